"""How good is a checkpoint? `python evaluate.py --ckpt ckpts/digits/last.pt`, and `python launch.py --nproc-per-node=2 evaluate.py
--ckpt ...` on two GPUs. `python evaluate.py compare CARD.json CARD.json ...` lays results side by side, if they may be compared.

Draws several sets of samples, compares them and real data with a reference split, and writes a card: the numbers, and all that must
be the same before two numbers are compared. Further: bits per dimension of the test split, the loss by t, the training images nearest
to samples, and, with --curve 5 10 20 40, distance against network calls for all samplers. Everything goes to a folder in `evaluation/`
beside the checkpoint, and to wandb. Any number of processes gives the same samples, to rounding, each counted once.
"""

from dataclasses import dataclass
from typing import Literal

from cards import compare
from main import fail, parse, set_up, start
from sample import DRAWING_CHOICES, Drawing


@dataclass
class Options(Drawing):
    num: int | None = None  # Samples of each seed; None: 5,000 vectors; of images 50,000 on a GPU, 1,000 on a CPU.
    seeds: int = 3  # Sets of samples, with seeds from `seed` on.
    reference: Literal["train", "test", "both"] = "train"  # Split that the samples are compared with.
    extractor: str = "auto"  # Features of images; auto: inception for colour images of 32 pixels or more, if its weights can be had.
    inception_weights: str | None = None  # File of Inception's weights; None: downloaded once.
    data_dir: str | None = None  # Folder of the data; None: the run's own.
    likelihood_num: int | None = None  # Test items for bits per dimension, 0 for none; None: 10,000 on a GPU, 300 on a CPU.
    loss_num: int | None = None  # Draws for the loss by t, 0 for none; None: 10,000 on a GPU, 2,000 on a CPU.
    neighbours_num: int = 1000  # Samples whose nearest training images are looked for, 0 for none.
    curve: tuple[int, ...] = ()  # Network calls at which all samplers are compared, such as 5 10 20 40.
    out: str | None = None  # Folder of the results; None: one in evaluation/ beside the checkpoint.
    wandb: Literal["online", "offline", "disabled"] | None = None  # None: the run's own.


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["compare"]:
        return compare(arguments[1:])
    choices = {**DRAWING_CHOICES, "extractor": ("extractors.py", "EXTRACTORS", Literal["auto"])}
    options = parse(Options, arguments, description="Tells how good a checkpoint is.", choices=choices)
    if options.num == 1:
        fail("num is 1: expected 2 or more, to have a spread")
    if options.curve and min(options.curve) < 1:
        fail(f"curve is {options.curve}: expected numbers of network calls, such as --curve 5 10 20 40")
    with set_up(options.device, tf32=False, timeout=60.0) as device:  # distances and likelihoods want exact products
        from evaluation import Evaluation

        Evaluation(options, device).run()


if __name__ == "__main__":
    start(main)
