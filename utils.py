"""Small helpers that every file may use: broadcasting, image ranges, seeds, rank 0, choosing by name, and errors told in one line.

Randomness. `make_seed` mixes any numbers and words into one seed, and `RowNoise` draws row i of a batch as a function of
(seed, i) only: a process that holds rows 64 to 127 draws just these, and gets what a single process would get for them.
"""

import contextlib
import ctypes
import datetime
import errno
import functools
import inspect
import itertools
import math
import os
import re
import sys
import time
import timeit
import zlib

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

NOISE_BLOCK = 16  # Rows that share one generator in `RowNoise`: few launches, little drawn in vain.


class UserError(ValueError):
    """A mistake of the user's, told in one line: what is wrong, what was expected, what to do. The scripts show no traceback for it."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- Ranks


def rank() -> int:
    """This process among all, from 0; torchrun sets it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes; torchrun sets it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def print0(*args) -> None:
    """Prints on rank 0 only, at once."""
    if rank() == 0:
        print(*args, flush=True)


def complain(text: str) -> None:
    """A line on stderr about something that went wrong and does not end the run."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def share(n: int) -> range:
    """The rows of n that this process takes: one run of rows each, alike in length to one row."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


CALLS, HEARTS = itertools.count(), itertools.count()  # of on_rank0, and of Heartbeat, alike on all processes
PATIENCE = datetime.timedelta(hours=12)  # of the others with what rank 0 does alone


def store():
    """The processes' common store of keys, which is part of their group."""
    return dist.distributed_c10d._get_default_store()


class Heartbeat:
    """Lets processes wait for each other as long as all of them get on, however long that takes.

    Each calls `beat` now and then in its work, and `wait` at its end; all make as many of these objects, in the same order.
    """

    DONE = 10**9  # more than there are beats

    def __init__(self, minutes: float):
        self.minutes, self.told, self.name = minutes, -math.inf, f"heartbeat {next(HEARTS)}"

    def count(self, of: int, more: int = 0) -> int:
        """The beats of process `of`, after `more` are added."""
        return store().add(f"{self.name} of {of}", more)

    def beat(self) -> None:
        if world_size() > 1 and time.monotonic() - self.told > 1:
            self.count(rank(), 1)
            self.told = time.monotonic()

    def wait(self) -> None:
        """Until all have done their work: rank 0 looks at the others, and they at it. Raises RuntimeError if one stands still."""
        if rank() == 0:
            for other in range(1, world_size()):
                self.wait_for(other)
        if world_size() > 1:
            self.count(rank(), self.DONE)
        if rank() > 0:
            self.wait_for(0)

    def wait_for(self, other: int) -> None:
        last, since = -1, time.monotonic()
        while (beats := self.count(other)) < self.DONE:
            if beats != last:
                last, since = beats, time.monotonic()
            if time.monotonic() - since > 60 * self.minutes:
                raise RuntimeError(f"Timed out waiting for process {other}")
            self.beat()
            time.sleep(0.02)


def gather_rows(mine: torch.Tensor) -> torch.Tensor:
    """The rows of all processes in order, on every process; the number of rows may differ. All processes must call it. On the CPU."""
    mine = mine.cpu().contiguous()
    if world_size() == 1:
        return mine
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(mine)]))
    padded = mine.new_zeros(max(counts).item(), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def on_rank0(work):
    """`work()` on rank 0 while the others wait; its result, something small, on all.

    Raises UserError on all if rank 0 met one, or could not read or write a file; on the others also for any other error there.
    """
    answer, bug = [None, None], None
    if rank() == 0:
        try:
            answer = [work(), None]
        except (UserError, OSError) as error:
            answer = [None, str(error)]
        except Exception as error:
            answer, bug = [None, f"process 0 failed ({type(error).__name__}: {first_line(error)})"], error
    if world_size() > 1:
        done = f"work of rank 0, {next(CALLS)}"
        if rank() == 0:
            store().set(done, "")
        else:
            store().wait([done], PATIENCE)  # the time-out of the group is for the exchange that follows
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if bug is not None:
        raise bug
    result, error = answer
    if error is not None:
        raise UserError(error)
    return result


def rank0_first(work):
    """`work(True)` on rank 0, and then `work(False)` on the others: what it fetches or makes is there for them. Gives each its own."""
    mine = []
    on_rank0(lambda: mine.append(work(True)))
    return mine[0] if mine else work(False)


def all_or_none(work):
    """`work()` of each process. Raises UserError on all if one met one. All processes must call it."""
    result = failure = None
    try:
        result = work()
    except UserError as error:
        failure = str(error)
    if gather_rows(torch.tensor([failure is not None])).any():
        raise UserError(failure or "another process could not do what this one did")
    return result


def progress_bar(**settings) -> tqdm:
    """A bar on stderr where that is a terminal, as wide as it is; 80 columns where it tells no width, as in some containers."""
    try:
        shape = {"dynamic_ncols": True} if os.get_terminal_size(2).columns else {"ncols": 80, "nrows": 24}
    except OSError:  # no terminal
        shape = {}
    return tqdm(**{"disable": None, **shape, **settings})


class Progress:
    """How far long work has come, on rank 0: a bar on a terminal, a line every 30 seconds in a log file. Used in a `with`."""

    def __init__(self, what: str, total: int | None = None, unit: str = "step"):
        self.bar = progress_bar(desc=what, total=total, unit=f" {unit}s", leave=False, disable=None if rank() == 0 else True)
        self.what, self.total, self.unit, self.n, self.told = what, total, unit, 0, time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def update(self, n: int = 1, what: str | None = None) -> None:
        """n more are done; `what` is a new text before the numbers."""
        self.n += n
        self.bar.update(n)
        if what is not None:
            self.what = what
            self.bar.set_description(what, refresh=False)
        if self.bar.disable and time.monotonic() - self.told > 30:
            print0(f"{self.what}: {self.n}{f' of {self.total}' if self.total else ''} {self.unit}s")
            self.told = time.monotonic()


# ---- Choices


@functools.lru_cache
def parameters_of(function) -> frozenset[str]:
    """The names of a function's parameters, looked up once."""
    return frozenset(inspect.signature(function).parameters)


def call(function, **settings):
    """Calls a class or function with those of `settings` that its signature names."""
    wanted = parameters_of(function)
    return function(**{k: v for k, v in settings.items() if k in wanted})


def find(table: dict, name: str):
    """`table[name]`. Raises UserError, with the known names, for a name that is not in the table."""
    if name not in table:
        raise UserError(f"{name!r} is not known here: expected one of {', '.join(table)}")
    return table[name]


def choose(table: dict, name: str, **settings):
    """Calls `find(table, name)` with those of `settings` that its signature names. Raises UserError as that does."""
    return call(find(table, name), **settings)


# ---- Shapes and ranges


def append_dims(v: torch.Tensor, ndim: int) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1) with `ndim` dimensions, so that it multiplies a batch (B, ...). A scalar stays one."""
    return v.reshape(v.shape + (1,) * (ndim - v.ndim))


def invert(function, y: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The x in [low, high] with function(x) = y, of y's shape and type, for a falling function, by bisection: 50 halvings, no waiting."""
    low, high = torch.full_like(y, low), torch.full_like(y, high)
    for _ in range(50):
        middle = (low + high) / 2
        above = function(middle) > y
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def mean_flat(x: torch.Tensor) -> torch.Tensor:
    """(B, ...) -> (B,): the mean over all but the batch."""
    return x.flatten(1).mean(1)


def to_uint8(x: torch.Tensor, mean: float = 127.5, std: float = 127.5) -> torch.Tensor:
    """Pixels x * std + mean, rounded and clamped to 0 ... 255, as uint8. The defaults take [-1, 1] to [0, 255]."""
    return (x.float() * std + mean).round().clamp(0, 255).to(torch.uint8)


# ---- Randomness


def make_seeds(n: int, *keys: int | str) -> list[int]:
    """n 64-bit seeds from numbers in [0, 2^32) and words; other keys give others. Of a larger n, the first are the same.

    On a CPU, torch takes their low halves.
    """
    words = [zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in keys]
    # the length first: SeedSequence takes (1,) and (1, 0) for the same
    return np.random.SeedSequence([len(words), *words]).generate_state(n, np.uint64).tolist()


def make_seed(*keys: int | str) -> int:
    """One seed of `make_seeds`."""
    return make_seeds(1, *keys)[0]


def seed_torch(seed: int, device: torch.device) -> None:
    """Seeds the device's own generator alone: torch.manual_seed looks for all kinds of devices, for 0.1 to 0.2 ms."""
    (torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]).manual_seed(seed)


class RowNoise:
    """Standard normal noise for `rows` of a batch: each call gives the next (len(rows), *shape), float32.

    Row i of the n-th call is a function of `keys`, n and i alone, on one kind of device.
    """

    def __init__(self, rows: range, shape: tuple[int, ...], device, *keys: int | str):
        first, last = rows.start // NOISE_BLOCK, (rows.stop - 1) // NOISE_BLOCK
        self.shape, self.device = (NOISE_BLOCK, *shape), device
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in make_seeds(last + 1, *keys)[first:]]
        self.mine = slice(rows.start - first * NOISE_BLOCK, rows.stop - first * NOISE_BLOCK)

    def __call__(self) -> torch.Tensor:
        blocks = [torch.randn(self.shape, device=self.device, generator=generator) for generator in self.generators]
        return torch.cat(blocks)[self.mine]


# ---- Devices


@functools.lru_cache
def native_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself: a GPU of capability 8.0 or more, or a CPU that multiplies small matrices in it at
    a fifth of float32's speed or more. A CPU without such instructions emulates it, ten to some hundred times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)

    def seconds(dtype):
        x = torch.ones(128, 128, dtype=dtype)
        return min(timeit.repeat(lambda: x @ x, number=1, repeat=6))

    return seconds(torch.bfloat16) < 5 * seconds(torch.float32)


OUT_OF_MEMORY = re.compile("MemoryError|can't allocate memory|CUDA error: out of memory|CU(DNN|BLAS)_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a CPU or a GPU has too little memory."""
    return bool(OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"))


def in_batches(work, rows: range, size: int):
    """Yields `work(part, size)` for parts of `rows`, of `size` rows each, and fewer in the last.

    Where memory does not suffice, the size is halved, with one line. Raises UserError if there is no memory for one row.
    """
    while rows:
        part, failure = rows[:size], None
        try:
            result = work(part, size)
        except Exception as error:
            if not out_of_memory(error):
                raise
            failure = first_line(error)
        if failure is None:
            yield result
            rows = rows[size:]
        elif len(part) == 1:
            raise UserError(f"out of memory for a single item ({failure}): use a smaller network, or another GPU")
        else:  # out of the except clause, which keeps what the error holds
            torch.cuda.empty_cache()
            size = len(part) // 2
            complain(f"out of memory for {len(part)} items at once ({failure}): trying {size}; --sampling_batch_size {size} (of sample.py "
                     "and evaluate.py: --batch_size) asks for no more")


# ---- Files and libraries


def keep_freed_memory() -> None:
    """Tells the C library to keep freed memory for the next step, if it is glibc.

    Else it gives large blocks back, and pages that are new each time cost a CPU a tenth of a step of training, or much more.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never trim the heap
        mallopt(-4, 0)  # M_MMAP_MAX: no block outside it


def import_torchvision():
    """torchvision, also where it was built for CUDA and torch was not.

    PyPI has torchvision for CUDA only. Beside a CPU build of torch its import fails, since its compiled operators do not
    load and `torchvision::nms` is not there to be decorated. Nothing here uses these operators: they are declared, and
    the import is tried again. The data sets, transforms and image grids work as they are.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


def write_atomically(path: str, content) -> None:
    """Writes text, or calls `content(file)`, on a temporary file beside `path` and renames it: `path` is whole or as it was.

    Raises UserError if the disk is full or cannot be written.
    """
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the new name, too, is to survive a loss of power; not all file systems can
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        room = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise UserError(f"cannot write {path} ({error.strerror or error}): {room}choose another folder") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
