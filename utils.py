"""Small helpers that every file may use: one-line errors, names and settings, shapes, seeds, memory, and whole files.

Randomness: `make_seed` mixes any numbers and words into one seed. `row_noise` draws row i of a batch as a function of
(seed, i) alone: a rank that holds rows 64 to 127 draws only these, and gets what a single rank would get for them.
"""

import contextlib
import ctypes
import functools
import inspect
import os
import re
import sys
import zlib

import numpy as np
import torch

NOISE_BLOCK = 16  # rows that share one generator in `row_noise`: few launches, and few rows drawn for nothing
OUT_OF_MEMORY = "MemoryError|can't allocate memory|CUDA error: out of memory|CU(DNN|BLAS)_STATUS_ALLOC_FAILED"


class UserError(ValueError):
    """A mistake of the user's, in one line: what is wrong, what was expected, what to do. Scripts print it alone."""


def first_line(error):
    """The first line of an error's text, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def warn(text):
    """Prints a line on stderr about an error that does not end the run."""
    print(f"warning: {text}", file=sys.stderr)


# ---- Settings and names


@functools.lru_cache
def parameters_of(function):
    """The names of a function's parameters, and `**` if it takes any others."""
    return frozenset("**" if parameter.kind is parameter.VAR_KEYWORD else name
                     for name, parameter in inspect.signature(function).parameters.items())


def call_with_settings(function, settings, **arguments):
    """`function(**arguments)`, with those `settings` too that are parameters of the function (all, if it has `**`).

    This is how settings reach the code that reads them: a class or function gets a setting of config.py by having a
    parameter of its name. An argument replaces the setting of its name. Raises TypeError for an argument that is no
    parameter.
    """
    wanted = parameters_of(function)
    if misspelt := arguments.keys() - wanted:
        raise TypeError(f"{function.__name__} has no parameter {', '.join(sorted(misspelt))}")
    names = settings if "**" in wanted else wanted & settings.keys()
    return function(**{name: settings[name] for name in names} | arguments)


def look_up(table, name):
    """`table[name]`. Raises UserError, which lists the known names, for any other."""
    if name not in table:
        raise UserError(f"{name!r} is not known here: expected one of {', '.join(table)}")
    return table[name]


# ---- Shapes and functions


def append_dims(v, ndim):
    """(B,) -> (B, 1, ..., 1) with `ndim` dimensions, to multiply a batch (B, ...). A scalar stays a scalar."""
    return v.reshape(v.shape + (1,) * (ndim - v.ndim))


def enlarged(images, size, mode="bilinear"):
    """Images (B, C, h, w) at the size (H, W), by interpolation; those that have it, and vectors, as they are."""
    return images if images.shape[2:] == size else torch.nn.functional.interpolate(images, size, mode=mode)


def invert(function, y, low, high):
    """The x in [low, high] with function(x) = y, for a decreasing function. Of y's shape and type.

    By 50 bisections, without waiting for a GPU.
    """
    low = torch.full_like(y, low)
    high = torch.full_like(y, high)
    for _ in range(50):
        middle = (low + high) / 2
        above = function(middle) > y
        low = torch.where(above, middle, low)
        high = torch.where(above, high, middle)
    return (low + high) / 2


def zero(module):
    """Sets all parameters of the module to zero, so that its branch adds nothing at the start; returns the module."""
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)
    return module


# ---- Randomness


def make_seeds(n, *keys):
    """n 64-bit seeds from `keys`, numbers in [0, 2^32) and words. With a larger n, the first n seeds are the same.

    torch's generator on a CPU takes only their lower 32 bits.
    """
    words = [zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in keys]
    # the length first: SeedSequence does not distinguish (1,) from (1, 0)
    return np.random.SeedSequence([len(words), *words]).generate_state(n, np.uint64).tolist()


def make_seed(*keys):
    """The first seed of `make_seeds`."""
    return make_seeds(1, *keys)[0]


def seed_torch(seed, device):
    """Seeds the generator of this device alone; torch.manual_seed takes 0.1 to 0.2 ms to look for other devices."""
    (torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]).manual_seed(seed)


def row_noise(rows, shape, device, *keys):
    """A function whose calls return standard normal noise for `rows` of a batch, (len(rows), *shape), float32.

    On one kind of device, row i of the n-th call depends on `keys`, n and i alone. Samplers call it with their state,
    as they would call torch.randn_like.
    """
    first, before = divmod(rows.start, NOISE_BLOCK)  # block, and rows in it that come before the first of `rows`
    seeds = make_seeds(-(-rows.stop // NOISE_BLOCK), *keys)[first:]
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def noise(like=None):
        blocks = [torch.randn(NOISE_BLOCK, *shape, device=g.device, generator=g) for g in generators]
        return torch.cat(blocks)[before : before + len(rows)]

    return noise


# ---- Devices and memory


def in_batches(work, rows, size):
    """Yields `work(part)` for parts of `rows`, each of `size` rows, or fewer in the last.

    If memory is too small, the size is halved, with a warning. Raises UserError if it is too small for one row.
    """
    while rows:
        part = rows[:size]
        try:
            yield work(part)
            rows = rows[size:]
            continue
        except Exception as error:  # of `work`: what fails between two parts, fails outside of this function
            if not re.search(OUT_OF_MEMORY, f"{type(error).__name__}: {error}"):
                raise
            failure = first_line(error)
        if len(part) == 1:
            raise UserError(f"out of memory for a single item ({failure}): use a smaller network, or another GPU")
        torch.cuda.empty_cache()  # here, outside `except`, the error no longer holds the tensors
        size = len(part) // 2
        warn(f"out of memory for {len(part)} items at once ({failure}): trying {size}; in drawing, "
             f"--sampling_batch_size {size} starts with so few")


def keep_freed_memory():
    """Makes glibc, if that is the C library, keep freed memory for the next step.

    By default it returns large blocks to the system. Getting new ones costs a training step on a CPU a tenth of its
    time, or much more.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never trim the heap
        mallopt(-4, 0)  # M_MMAP_MAX: no block outside it


# ---- Libraries and files


def import_torchvision():
    """torchvision, even if it was built for CUDA and torch was not.

    PyPI has torchvision for CUDA only. With a CPU build of torch its compiled operators do not load, and its import
    fails, since it registers a function for `torchvision::nms`, which does not exist. Nothing here uses these
    operators, so they are declared, and the import is tried again. Data sets, transforms and image grids work.
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


def write_atomically(path, content):
    """Writes a text, or calls `content(file)`, on a temporary file, and renames it to `path`. Makes its folder.

    So `path` is whole, or as it was. Raises UserError if it cannot be written, for instance on a full disk.
    """
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): make room, or choose another "
                        "folder") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
