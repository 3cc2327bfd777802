"""Draws samples from a checkpoint. `python sample.py --ckpt ckpts/digits/last.pt --num 1000 --out samples.npz`, and
`python launch.py --nproc-per-node=2 sample.py --ckpt ...` (or `torchrun --nproc-per-node=2 -- sample.py --ckpt ...`) on two GPUs.

Writes `arr_0`, uint8 images (N, H, W, C) or float32 vectors (N, D), and `arr_1`, labels (N,) int64 if the network takes labels, as the
evaluation files of Dhariwal & Nichol 2021 have them; and beside it a PNG of the first samples. Sample i is a function of the seed
and i, to rounding: neither the batch size nor the number of processes changes it.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

from config import CHOICES, Config, out_of_range
from main import fail, parse, set_up, start

# What a network for autoguidance must share with the one it guides.
SAME_IN_GUIDE = ("process", "beta_min", "beta_max", "sigma_min", "sigma_max", "rho", "sigma_data", "model_type")


@dataclass
class Drawing:
    """How samples are drawn: what this script and evaluate.py ask. None is the run's own setting."""

    ckpt: str  # Checkpoint to draw from, such as ckpts/digits/last.pt.
    weights: Literal["ema", "raw"] = "ema"  # Averaged weights, or those of the last step.
    sampler: str | None = None  # Sampler; None: the run's own.
    sampling_steps: int | None = None  # Steps from noise to data; None: the run's own.
    grid: str | None = None  # Times of the steps; None: the run's own.
    grid_shift: float | None = None  # shifted: above 1 for shorter steps near the noise; None: the run's own.
    denoise: bool | None = None  # Take the predicted x0 at the end, without the noise left at T_min; None: the run's own.
    guidance_scale: float | None = None  # Guidance, 1 is none; None: the run's own.
    guidance_t_min: float | None = None  # Least time at which guidance acts; None: the run's own.
    guidance_t_max: float | None = None  # Greatest time at which guidance acts; None: the run's own.
    guide: str | None = None  # Autoguidance: checkpoint of a worse network for the same data. None: the network itself, without labels.
    sde_diffusion: str | None = None  # Noise that an SDE sampler adds; None: the run's own.
    sde_scale: float | None = None  # Factor of sde_diffusion; None: the run's own.
    corrector_snr: float | None = None  # predictor_corrector: size of Langevin's step; None: the run's own.
    churn: float | None = None  # edm_churn: EDM's S_churn; None: the run's own.
    churn_min: float | None = None  # edm_churn: least sigma / alpha at which noise is added; None: the run's own.
    churn_max: float | None = None  # edm_churn: greatest sigma / alpha at which noise is added; None: the run's own.
    churn_noise: float | None = None  # edm_churn: standard deviation of that noise; None: the run's own.
    rtol: float | None = None  # dopri5: relative tolerance; None: the run's own.
    atol: float | None = None  # dopri5: absolute tolerance; None: the run's own.
    bf16: bool | None = None  # Run the network in bfloat16; None: the run's own.
    compile: bool | None = None  # Compile the network for 500 steps or more, over all batches; None: the run's own.
    seed: int = 0  # Seed of the samples.
    batch_size: int = 500  # Samples that one process draws at once.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one.


@dataclass
class Options(Drawing):
    num: int = 1000  # Number of samples.
    out: str = "samples.npz"  # File to write; the picture goes beside it as .png.
    labels: str = "all"  # Labels to draw, in turn: all, or a list such as 3,5,7.


DRAWING_CHOICES = {name: CHOICES[name] for name in ("sampler", "grid", "sde_diffusion")}


def read_labels(text: str, num: int, num_classes: int):
    """(num,) int64: the labels of `text` in turn. Raises UserError for labels that the network does not know."""
    import torch

    from utils import UserError

    try:
        chosen = list(range(num_classes)) if text == "all" else [int(word) for word in text.split(",")]
    except ValueError:
        chosen = [-1]
    if not all(0 <= label < num_classes for label in chosen):
        raise UserError(f"labels {text!r}: expected all, or a list such as 0,{num_classes - 1} of numbers from 0 to {num_classes - 1}")
    return torch.tensor(chosen)[torch.arange(num) % len(chosen)]


def load_run(path: str):
    """Checkpoint, settings and data of a run. Raises UserError if they are not of this code."""
    import saving
    from data_utils import DataSpec
    from utils import UserError

    state = saving.load(path)
    try:
        return state, Config(**state["config"]), DataSpec(**{**state["data"], "shape": tuple(state["data"]["shape"])})
    except TypeError as error:
        raise UserError(f"{path} was made with other settings than this code has ({error}): use that code") from error


def load_net(path: str, state: dict, config: Config, spec, device, weights: str = "ema"):
    """The process and the network of the checkpoint `state`, read from `path`. Raises UserError if the settings do not fit."""
    import saving
    from build import build, check_settings
    from utils import UserError

    try:
        process, net = build(config, spec, device)
        check_settings(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    saving.restore(net, state["ema"]["net"] if weights == "ema" else state["net"], path)
    return process, net.eval()


def load_guide(path: str, config: Config, spec, device):
    """The averaged network at `path`, for autoguidance. Raises UserError if it is of other data, process or prediction."""
    from utils import UserError

    state, theirs, data = load_run(path)
    different = [name for name in SAME_IN_GUIDE if getattr(theirs, name) != getattr(config, name)]
    if theirs.class_conditional and not config.class_conditional and theirs.label_dropout == 0:
        raise UserError(f"guide {path} was never trained without labels, and there are none: use one with label_dropout above 0")
    if data != spec or different:
        raise UserError(f"guide {path} differs in {', '.join(different) or 'its data'}: expected a run with the same data and the same "
                        f"{', '.join(SAME_IN_GUIDE)}")
    return load_net(path, state, theirs, data, device)[1]


class Loaded(NamedTuple):
    """A checkpoint, ready to draw from: `state` is what it holds, `config` the run's settings with those of the command line."""

    state: dict
    config: Config
    spec: object  # DataSpec
    process: object
    net: object
    guide: object | None


def load(options: Drawing, device) -> Loaded:
    """The checkpoint options.ckpt and what is drawn from it. Raises UserError if it is not of this code, or the options contradict it."""
    from build import check_bf16
    from utils import UserError

    check_bf16(options, device)
    state, config, spec = load_run(options.ckpt)
    own = {f.name for f in dataclasses.fields(Config)} - {"batch_size", "device"}
    chosen = {name: value for name, value in vars(options).items() if name in own and value is not None}
    config = dataclasses.replace(config, sampling_batch_size=options.batch_size, **chosen)
    for problem in out_of_range(vars(config)):
        raise UserError(problem)
    guide = options.guide and load_guide(options.guide, config, spec, device)
    if config.guidance_scale != 1 and not guide and not (config.class_conditional and config.label_dropout > 0):
        raise UserError("guidance_scale needs a network trained with labels and label_dropout above 0, or a --guide: "
                        "use --guidance_scale 1")
    if guide and config.guidance_scale == 1:
        raise UserError("guide does nothing at guidance_scale 1: use --guidance_scale 2, or leave --guide out")
    return Loaded(state, config, spec, *load_net(options.ckpt, state, config, spec, device, options.weights), guide)


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments, description="Draws samples from a checkpoint.", choices=DRAWING_CHOICES)
    folder, png = os.path.dirname(options.out) or ".", os.path.splitext(options.out)[0] + ".png"
    if not options.out.endswith(".npz") or not os.access(folder, os.W_OK) or os.path.isdir(options.out) or os.path.isdir(png):
        fail(f"out is {options.out!r}: expected a FILE.npz in a folder that is there and can be written")
    with set_up(options.device) as device:
        import numpy as np

        from logging_utils import picture_of
        from trainer import TRAINERS
        from utils import UserError, find, on_rank0, print0, write_atomically

        state, config, spec, process, net, guide = load(options, device)
        if options.labels != "all" and not config.class_conditional:
            raise UserError(f"labels {options.labels!r}: the network of {options.ckpt} takes none; leave --labels out")
        labels = read_labels(options.labels, options.num, spec.num_classes) if config.class_conditional else None

        draw = find(TRAINERS, config.trainer).draw
        samples, _ = draw(config, spec, process, net, device, rows=range(options.num), labels=labels, sampler=config.sampler, guide=guide)

        def write():
            arrays = {"arr_0": (samples.permute(0, 2, 3, 1) if spec.is_image else samples).numpy()}
            if labels is not None:
                arrays["arr_1"] = labels.numpy()
            write_atomically(options.out, lambda file: np.savez(file, **arrays))
            picture = picture_of(samples)
            write_atomically(png, lambda file: picture.save(file, format="PNG"))

        on_rank0(write)
        steps = f"{config.sampling_steps} steps of " if config.sampler != "dopri5" else ""  # which chooses its own
        print0(f"{options.num} samples of {options.weights} weights at step {state['step']}, by {steps}{config.sampler}: "
               f"{options.out} and {png}")


if __name__ == "__main__":
    start(main)
