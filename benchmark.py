"""How fast it is here, and how fast this machine could be. `python benchmark.py [--preset cifar10] [--setting value ...]`, or on two GPUs
`python launch.py --nproc-per-node=2 benchmark.py ...`. Prints a table and writes it as JSON.

The ceilings are the network alone (forward, backward, optimizer and EMA on one batch that stays on the device), a large matrix product,
and a 3 x 3 convolution of the network's width. Nothing is downloaded: CIFAR-10, MNIST and Fashion-MNIST are random pixels of their
shape. How it is measured is in measuring.py, and what is measured beside it in peers.py.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from config import CHOICES, PRESETS, Config, problems
from main import HERE, fail, parse, set_up, start


@dataclass
class Options(Config):
    preset: str = "cifar10"  # Settings to start from; any other setting can be given beside it.
    out: str = "benchmark.json"  # File to write.
    rounds: int = 5  # How often everything is measured, in turns.
    seconds: float = 1.0  # Least time of one measurement.
    training: bool = True  # Measure training: the trainer, the network alone, ceilings, shares of the step, memory.
    sampling: bool = True  # Measure every sampler against bare calls of the network.
    starting: bool = True  # Measure `sh run.sh digits` up to its first step, and `python main.py --help`.
    peers: bool = True  # Measure torchcfm's and denoising-diffusion-pytorch's networks and training steps, where they are installed.
    modes: bool = False  # Measure torch.compile's modes, with graph breaks and recompilations; on a GPU always.
    scaling: bool = False  # Measure cost against batch size, image size, width and processes.
    memory_steps: int = 0  # Also train for so many steps and tell what memory grows by.
    batch_size: int | None = None  # Images in one step; None: the preset's, on a CPU 32 at most if they have 1,000 numbers or more.
    wandb: str = "offline"  # online, offline or disabled.


class Table:
    """What is measured, printed as it comes, on rank 0."""

    def __init__(self):
        self.rows = []

    def add(self, part: str, what: str, **values: float) -> None:
        """A row of `part`; the names of the values are their units."""
        from utils import print0

        if not self.rows or self.rows[-1]["part"] != part:
            print0(f"\n{part}")
        self.rows.append({"part": part, "what": what, **values})
        shown = (f"{value:>9.4g} {unit.replace('_per_', '/').replace('_', ' '):<18}" for unit, value in values.items())
        print0(f"  {what:<62}{''.join(shown)}".rstrip())


def first_step(folder: str, device: str) -> float:
    """Seconds from `sh run.sh digits` to the line of its first step. Raises UserError if there is none."""
    from utils import UserError

    environment = {**os.environ, "PYTHON": sys.executable, "WANDB_MODE": "offline", "MPLCONFIGDIR": os.path.join(folder, "fonts"),
                   "TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "inductor")}
    run_folder = tempfile.mkdtemp(dir=folder)
    begin = time.perf_counter()
    with subprocess.Popen(["sh", "run.sh", "digits", "--log_every", "1", "--ckpt_dir", run_folder, "--device", device], cwd=HERE,
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        for line in run.stdout:
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - begin
                run.terminate()
                run.communicate()
                return seconds
    raise UserError("sh run.sh digits takes no step: try it by hand")


def measure_start(table: Table, options: Options) -> None:
    """Seconds from a command to what it is for."""
    part = "from the command"
    with tempfile.TemporaryDirectory() as folder:
        what = "sh run.sh digits, to the first step"
        table.add(part, f"{what}, caches of torch.compile and fonts empty", s=first_step(folder, options.device))
        table.add(part, f"{what}, again", s=statistics.median(first_step(folder, options.device) for _ in range(options.rounds)))
    seconds = []
    for _ in range(options.rounds):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "main.py", "--help"], cwd=HERE, stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - begin)
    table.add(part, "python main.py --help", s=statistics.median(seconds))


def read_options(arguments: list[str]) -> Options:
    """The options of the command line. Ends the program in one line if they are unknown or wrong."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    preset = next((after for word, after in zip(words, words[1:]) if word == "--preset"), "cifar10")
    if preset not in PRESETS:
        fail(f"{preset!r} is no preset: expected one of {', '.join(PRESETS)}")
    options = parse(Options, arguments, Options(preset=preset, **PRESETS[preset]), "Measures how fast it is.", CHOICES)
    folder = os.path.dirname(options.out) or "."
    if not os.access(folder, os.W_OK) or os.path.isdir(options.out):
        fail(f"out is {options.out!r}: expected a file in a folder that is there and can be written")
    return options


def machine(device) -> dict:
    """What was measured on."""
    import platform

    import torch

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else name, "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


def main(arguments: list[str]) -> None:
    options = read_options(arguments)
    with set_up(options.device, options.tf32, options.timeout, options.cudnn_benchmark) as device, contextlib.ExitStack() as stack:
        import measuring
        from build import check_bf16, check_settings, uses_bf16
        from peers import measure_peers
        from utils import UserError, on_rank0, print0, rank, world_size, write_atomically

        check_bf16(options, device)
        options.bf16 = uses_bf16(options, device)
        if len(measuring.kinds(options, device)) == 1:
            print0("this device has no bfloat16 of its own: it is not measured")
        dataset = measuring.load(options)
        small = device.type == "cpu" and math.prod(dataset.spec.shape) >= 1000  # such networks take seconds for a batch
        if options.batch_size is None:
            options.batch_size = 32 if small else Config.batch_size
        options.num_samples = min(options.num_samples, 16) if small else options.num_samples
        for problem in problems(options, world_size()):
            raise UserError(problem)
        check_settings(options)
        here, table = machine(device), Table()
        print0(", ".join(f"{name} {value}" for name, value in here.items()))
        folder = on_rank0(tempfile.mkdtemp)
        if rank() == 0:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        trainer = measuring.make_trainer(options, dataset, device, folder)
        if options.training:
            measuring.measure_training(table, options, trainer)
        if options.modes or device.type == "cuda":
            measuring.measure_modes(table, options, trainer)
        if options.memory_steps:
            measuring.measure_memory(table, options, trainer)
        if options.sampling:
            measuring.measure_sampling(table, options, trainer)
        if world_size() == 1:
            if options.peers and trainer.spec.shape == (3, 32, 32):
                measure_peers(table, options, trainer)
            if options.scaling:
                measuring.measure_scaling(table, options, trainer)
            if options.starting:
                measure_start(table, options)
        if trainer.logger:
            trainer.logger.finish()
        content = {"machine": here, "settings": dataclasses.asdict(options), "rows": table.rows}
        on_rank0(lambda: write_atomically(options.out, json.dumps(content, indent=1)))
        print0(f"\n{options.out}")


if __name__ == "__main__":
    start(main)
