"""Measures training on fields in a file beside training on the same fields in memory: a part of benchmark.py.

    python tests/benchmark_fields.py digits --gigabytes 4    # any setting of config.py and of benchmark.py can be given

The fields are random numbers, of the height and width of the preset's images, with four channels. The file is in the
system's cache, since it was just written. What an epoch of batches from the file adds to the memory of the process is
measured too, where the system says it (Linux).
"""

import dataclasses
import functools
import os
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark import PARTS, Options, main, make_trainer, time_alternately, train  # noqa: E402
from command_line import start  # noqa: E402
from config import PositiveFloat  # noqa: E402
from data_utils import Dataset, DataSpec  # noqa: E402
from distributed import print0, world_size  # noqa: E402
from fields import open_frames  # noqa: E402


def resident():
    """MiB of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure_fields(trainer):
    """What an epoch of batches from a file adds to memory, and training steps with a file over those with memory."""
    config, shape = trainer.config, (4, *trainer.spec.shape[1:])
    if len(shape) != 3 or world_size() > 1:
        return print0("  only beside images or fields, on one rank")
    with tempfile.TemporaryDirectory() as folder:
        path, n = f"{folder}/fields.npy", int(config.gigabytes * 1e9 / 4 / np.prod(shape))
        file, rng = np.lib.format.open_memmap(path, "w+", np.float32, (n, *shape)), np.random.default_rng(0)
        for rows in np.array_split(np.arange(n), -(-n // 1000)):
            file[rows[0] : rows[-1] + 1] = rng.standard_normal((len(rows), *shape), np.float32)
        file.flush()
        del file
        settings, spec = dataclasses.replace(
            config, class_conditional=False, guidance_scale=1.0, lag=0, corruption=None, cond_dropout=0.0, base="noise",
            wandb="disabled"), DataSpec(shape, 0, [0.0], [1.0], is_field=True)
        trainers = {name: make_trainer(settings, trainer.device, f"{folder}/{name}", Dataset(data, None, spec, name))
                    for name, data in (("file", open_frames([path])), ("memory", np.load(path)))}
        if os.path.exists("/proc/self/statm"):
            trainers["file"].batches(0)
            before = resident()
            for step in range(-(-n // config.batch_size)):
                trainers["file"].batches(step)
            yield "an epoch of batches from the file", {"MiB_of_file": n * np.prod(shape) * 4 / 2**20,
                                                        "MiB_more_memory": resident() - before}
        times = time_alternately({name: functools.partial(train, trainers[name]) for name in trainers}, config)
        yield "training from the file", {"items_per_s": config.batch_size / times["file"],
                                         "of_memory": times["memory"] / times["file"]}


PARTS["fields"] = measure_fields


@dataclass
class FieldOptions(Options):
    parts: tuple[Literal["fields"], ...] = ("fields",)  # What to measure.
    gigabytes: PositiveFloat = 1.0  # Size of the file, and of the same in memory.


if __name__ == "__main__":
    start(functools.partial(main, options_class=FieldOptions))
