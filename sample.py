"""Draws samples from a checkpoint: `python sample.py --ckpt ckpts/digits/last.pt --num 1000 --out samples.npz`.

On two GPUs: `python launch.py --nproc-per-node=2 sample.py --ckpt ...`, or with `torchrun --nproc-per-node=2 --`.

Writes `arr_0`, uint8 images (N, H, W, C) or float32 vectors (N, D), and `arr_1`, labels (N,) int64 if the network takes
labels, as the evaluation files of Dhariwal & Nichol 2021 have them; and beside it a PNG of the first samples. With
`--trajectory path.gif` also an animation of the first samples on their way from noise to data. Sample i is a function
of the seed and i, to rounding: neither the batch size nor the number of ranks changes it.
"""

import math
import os
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import saving
from build import build, check_bf16, check_settings
from command_line import fail, optional_settings, parse, start
from config import Config, Positive, Within, out_of_range
from data_utils import DataSpec
from distributed import gather_rows, on_rank0, print0, set_up
from logging_utils import image_grid, picture_of, save_picture
from processes import PROCESSES, Process, make_process
from sampling import make_grid
from trainer import TRAINERS
from utils import UserError, look_up, parameters_of, write_atomically

FRAMES = 50  # most frames of a trajectory, before the samples themselves


@dataclass(kw_only=True)
class Drawing(optional_settings(Config, "sampling")):
    """What sample.py and evaluate.py share: a checkpoint, and new values for the run's own settings of sampling."""

    ckpt: str  # Checkpoint to draw from, such as ckpts/digits/last.pt.
    weights: Literal["ema", "raw"] = "ema"  # Averaged weights, or those of the last step.
    # Autoguidance: checkpoint of a worse network for the same data. None: the network itself, without labels.
    guide: str | None = None
    seed: Annotated[int, Within("[0, 4294967296)")] = 0  # Seed of the samples.
    batch_size: Positive[int] = 500  # Samples that one rank draws at once.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one.


@dataclass(kw_only=True)
class Options(Drawing):
    num: Positive[int] = 1000  # Number of samples.
    out: str = "samples.npz"  # File to write; the picture goes beside it as .png.
    labels: str = "all"  # Labels to draw, in turn: all, or a list such as 3,5,7.
    trajectory: str | None = None  # GIF of the first 100 images or 2,000 points on their way from noise, as path.gif.


# ---- A checkpoint


@dataclass
class Loaded:
    """A checkpoint, ready to draw from. `state` is what its file holds; options replace the run's settings in `config`.
    """

    options: Drawing
    device: torch.device
    state: dict[str, Any]
    config: Config
    spec: DataSpec
    process: Process
    net: Any
    guide: Any

    def draw(self, num: int, labels: Tensor | None, together: bool = False, **changes) -> tuple[Tensor, float]:
        """Samples 0 to num - 1 with these `changes` of the settings, drawn by the run's trainer: see build.draw_all."""
        config = replace(self.config, **changes)
        check_settings(config)
        return look_up(TRAINERS, config.trainer).draw(
            config, self.spec, self.process, self.net, self.device, rows=range(num), labels=labels,
            sampler=config.sampler, guide=self.guide, together=together)


def load_run(path: str) -> tuple[dict, Config, DataSpec]:
    """Checkpoint, settings and data of a run. Raises UserError if they are not of this code."""
    state = saving.load(path)
    try:
        spec = DataSpec(**state["data"] | {"shape": tuple(state["data"]["shape"])})
        return state, Config(**state["config"]), spec
    except TypeError as error:
        raise UserError(f"{path} was made by another version of this code ({error}): use that version") from error


def load_net(path: str, state: dict, config: Config, spec: DataSpec, device, weights: str = "ema"):
    """The process and the network of the checkpoint `state` of `path`. Raises UserError if the settings do not fit."""
    try:
        process, net = build(config, spec, device)
        check_settings(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    saving.restore(net, state["ema"]["net"] if weights == "ema" else state["net"], path)
    return process, net.eval()


def load_guide(path: str, config: Config, spec: DataSpec, device):
    """The averaged network at `path`, for autoguidance. Raises UserError if its data, process or prediction differ."""
    state, guide, data = load_run(path)
    shared = {"model_type"} | parameters_of(make_process) | parameters_of(look_up(PROCESSES, config.process))
    shared = [name for name in vars(config) if name in shared]
    different = [name for name in shared if getattr(guide, name) != getattr(config, name)]
    if guide.class_conditional and not config.class_conditional and guide.label_dropout == 0:
        raise UserError(f"guide {path} always had labels in training, and there are none here: use one with "
                        "label_dropout above 0")
    if data != spec or different:
        raise UserError(f"guide {path} differs in {', '.join(different) or 'its data'}: expected a run with the same "
                        f"data and the same {', '.join(shared)}")
    return load_net(path, state, guide, data, device)[1]


def load(options: Drawing, device) -> Loaded:
    """The checkpoint options.ckpt. Raises UserError if it is not of this code, or the options contradict it."""
    check_bf16(options, device)
    state, config, spec = load_run(options.ckpt)
    chosen = {name: value for name, value in vars(options).items() if hasattr(config, name) and value is not None}
    batch_size = chosen.pop("batch_size")  # that of a run is for training
    config = replace(config, sampling_batch_size=batch_size, **chosen)
    for problem in out_of_range(config):
        raise UserError(problem)
    guide = options.guide and load_guide(options.guide, config, spec, device)
    if config.guidance_scale != 1 and not guide and not (config.class_conditional and config.label_dropout > 0):
        raise UserError("guidance_scale needs a network trained with labels and label_dropout above 0, or a --guide: "
                        "use --guidance_scale 1")
    if guide and config.guidance_scale == 1:
        raise UserError("guide does nothing at guidance_scale 1: use --guidance_scale 2, or leave --guide out")
    process, net = load_net(options.ckpt, state, config, spec, device, options.weights)
    return Loaded(options, device, state, config, spec, process, net, guide)


def read_labels(text: str, num: int, num_classes: int) -> Tensor:
    """(num,) int64: the labels of `text` in turn. Raises UserError for labels that the network does not know."""
    try:
        chosen = list(range(num_classes)) if text == "all" else [int(word) for word in text.split(",")]
    except ValueError:
        chosen = [-1]
    if not all(0 <= label < num_classes for label in chosen):
        raise UserError(f"labels {text!r}: expected all, or a list such as 0,{num_classes - 1} of numbers from 0 to "
                        f"{num_classes - 1}")
    return torch.tensor(chosen)[torch.arange(num) % len(chosen)]


# ---- From noise to data


def trajectory(run: Loaded, num: int, labels: Tensor | None) -> Tensor:
    """The first samples on their way, decoded, (F, num, ...): at up to FRAMES times of the grid, and then the samples.

    The state at a time is what the network gets in the call at the nearest time; of several calls at one time, in the
    last. So it suits any sampler. Where sigma is above 1, the state is divided by it: noise of standard deviation 80
    would leave the picture. All ranks must call it.
    """
    states = {}

    def recorded(xt, t, label):
        time = t[0].item()
        states[time] = run.spec.decode(xt / run.process.at(time).sigma.clamp(min=1)).cpu()
        return run.net(xt, t, label)

    samples, _ = replace(run, net=recorded).draw(num, labels, compile=False, sampling_batch_size=num)
    states = states or {0.0: samples[:0]}  # of a rank that has no share
    times = make_grid(**vars(run.config) | {"n": run.config.sampling_steps, "process": run.process})[:-1]
    times = times[:: math.ceil(len(times) / FRAMES)]
    calls = [min(states, key=lambda call: abs(call - time)) for time in times]
    states = [gather_rows(states[call]) for call in calls]
    if min(map(len, states)) < num:
        raise UserError(f"too little memory to draw {num} samples of a trajectory at once: use a smaller --num")
    return torch.stack([*states, samples])


def save_trajectory(states: Tensor, spec: DataSpec, path: str) -> None:
    """Writes the result of `trajectory` as an animated GIF, which pauses at its end.

    Images come in a grid. Of points the first and the last coordinate are drawn, up to three standard deviations. All
    frames share a few colours, so that the file is small.
    """
    pictures = []
    for state in states:
        if not spec.is_image:
            points = (state - torch.tensor(spec.mean)) / (3 * max(spec.std))
            counts = np.histogram2d(-points[:, -1], points[:, 0], 150, [[-1, 1], [-1, 1]])[0]
            state = torch.from_numpy((255 - 64 * counts).clip(0).astype(np.uint8))[None, None]
        columns = min(10, len(state))
        scale = max(1, 300 // (columns * state.shape[-1]))
        pictures.append(image_grid(nn.functional.interpolate(state, scale_factor=scale), columns))
    palette = pictures[-1].quantize(32 if spec.shape[0] == 3 else 8)
    first, *others = [picture.quantize(palette=palette, dither=0) for picture in pictures]
    save_picture(first, path, save_all=True, append_images=others, duration=[80] * len(others) + [2000], loop=0)


# ---- The script


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments, description="Draws samples from a checkpoint.")
    png = os.path.splitext(options.out)[0] + ".png"
    gif = [] if options.trajectory is None else [(options.trajectory, ".gif")]
    for path, end in [(options.out, ".npz"), (png, ".png"), *gif]:
        folder = os.path.dirname(path) or "."
        if not path.endswith(end) or not os.access(folder, os.W_OK) or os.path.isdir(path):
            fail(f"cannot write {path!r}: expected a FILE{end} in a folder that is there and can be written")
    with set_up(options.device) as device:
        run = load(options, device)
        config, spec, labels = run.config, run.spec, None
        if config.class_conditional:
            labels = read_labels(options.labels, options.num, spec.num_classes)
        elif options.labels != "all":
            raise UserError(f"labels {options.labels!r}: the network of {options.ckpt} takes none; leave --labels out")
        samples, _ = run.draw(options.num, labels)
        arrays = [samples.permute(0, 2, 3, 1) if spec.is_image else samples] + ([] if labels is None else [labels])
        on_rank0(lambda: write_atomically(options.out, lambda file: np.savez(file, *arrays)))  # as arr_0 and arr_1
        on_rank0(lambda: save_picture(picture_of(samples), png))
        if options.trajectory:
            states = trajectory(run, min(options.num, 100 if spec.is_image else 2000), labels)
            on_rank0(lambda: save_trajectory(states, spec, options.trajectory))
        steps = f"{config.sampling_steps} steps of " if config.sampler != "dopri5" else ""  # which chooses its own
        print0(f"{options.num} samples of {options.weights} weights at step {run.state['step']}, by "
               f"{steps}{config.sampler}: {options.out} and {png}")


if __name__ == "__main__":
    start(main)
