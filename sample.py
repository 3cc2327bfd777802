"""Draws samples from a checkpoint. `python sample.py --ckpt ckpts/digits/last.pt --num 1000 --out samples.npz`, and
`python launch.py --nproc-per-node=2 sample.py --ckpt ...` (or `torchrun --nproc-per-node=2 -- sample.py --ckpt ...`) on two GPUs.

Writes `arr_0`, uint8 images (N, H, W, C) or float32 vectors (N, D), and `arr_1`, labels (N,) int64 if the network takes labels, as the
evaluation files of Dhariwal & Nichol 2021 have them; and beside it a PNG of the first samples. Sample i is a function of the seed
and i, to rounding: neither the batch size nor the number of processes changes it.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal

from config import CHOICES, Config, out_of_range
from main import fail, parse, set_up, start


@dataclass
class Options:
    ckpt: str  # Checkpoint to draw from, such as ckpts/digits/last.pt.
    num: int = 1000  # Number of samples.
    out: str = "samples.npz"  # File to write; the picture goes beside it as .png.
    weights: Literal["ema", "raw"] = "ema"  # Averaged weights, or those of the last step.
    sampler: str | None = None  # Sampler; None: the run's own.
    sampling_steps: int | None = None  # Steps from noise to data; None: the run's own.
    guidance_scale: float | None = None  # Classifier-free guidance, 1 is none; None: the run's own.
    sde_diffusion: str | None = None  # Noise that an SDE sampler adds; None: the run's own.
    labels: str = "all"  # Labels to draw, in turn: all, or a list such as 3,5,7.
    seed: int = 0  # Seed of the samples.
    batch_size: int = 500  # Samples that one process draws at once.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one.


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


def main(arguments: list[str]) -> None:
    choices = {name: CHOICES[name] for name in ("sampler", "sde_diffusion")}
    options = parse(Options, arguments, description="Draws samples from a checkpoint.", choices=choices)
    for problem in out_of_range(vars(options)):
        fail(problem)
    folder, png = os.path.dirname(options.out) or ".", os.path.splitext(options.out)[0] + ".png"
    if not options.out.endswith(".npz") or not os.access(folder, os.W_OK) or os.path.isdir(options.out) or os.path.isdir(png):
        fail(f"out is {options.out!r}: expected a FILE.npz in a folder that is there and can be written")
    with set_up(options.device) as device:
        import numpy as np

        import saving
        from data_utils import DataSpec
        from logging_utils import image_grid, scatter_plot
        from sampling import check_times
        from trainer import build, draw_all
        from utils import UserError, on_rank0, print0, write_atomically

        state = saving.load(options.ckpt)
        chosen = {name: getattr(options, name) for name in ("sampler", "sampling_steps", "guidance_scale", "sde_diffusion", "seed")}
        try:
            config = Config(**state["config"])
        except TypeError as error:
            raise UserError(f"{options.ckpt} was made with other settings than this code has ({error}): use that code") from error
        config = dataclasses.replace(config, sampling_batch_size=options.batch_size, **{k: v for k, v in chosen.items() if v is not None})
        spec = DataSpec(**state["data"])
        if options.labels != "all" and not config.class_conditional:
            raise UserError(f"labels {options.labels!r}: the network of {options.ckpt} takes none; leave --labels out")
        if config.guidance_scale != 1 and not (config.class_conditional and config.label_dropout > 0):
            raise UserError("guidance_scale needs a network trained with labels and label_dropout above 0; use --guidance_scale 1")
        labels = read_labels(options.labels, options.num, spec.num_classes) if config.class_conditional else None

        try:
            process, net = build(config, spec, device)
            check_times(process, config.model_type, config.target_type, config.sde_diffusion, config.T_min, config.T_max)
        except UserError as error:
            raise UserError(f"{options.ckpt}: {error}") from error
        saving.restore(net, state["ema"]["net"] if options.weights == "ema" else state["net"], options.ckpt)
        samples = draw_all(config, spec, process, net.eval(), device, rows=range(options.num), labels=labels, sampler=config.sampler)

        def write():
            arrays = {"arr_0": (samples.permute(0, 2, 3, 1) if spec.is_image else samples).numpy()}
            if labels is not None:
                arrays["arr_1"] = labels.numpy()
            write_atomically(options.out, lambda file: np.savez(file, **arrays))
            first = samples[:100] if spec.is_image else samples
            picture = image_grid(first, columns=10) if spec.is_image else scatter_plot(first)
            write_atomically(png, lambda file: picture.save(file, format="PNG"))

        on_rank0(write)
        print0(f"{options.num} samples of {options.weights} weights at step {state['step']}, by {config.sampling_steps} steps of "
               f"{config.sampler}: {options.out} and {png}")


if __name__ == "__main__":
    start(main)
