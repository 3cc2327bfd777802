"""Arrays that are read when they are needed, so that data may be larger than memory; and a field that is simulated.

A field is an item (C, H, W) of float32 numbers with any number of channels, such as the state of a simulation. `Items`
makes an array of what is read one item at a time, and `Frames` of the rows of several arrays, such as trajectories
(T, C, H, W) in files of their own.
"""

import math
import mmap
import os
from glob import glob
from itertools import count, pairwise

import numpy as np
import torch
from torch.fft import fftfreq, irfft2, rfft2, rfftfreq

from logging_utils import Progress
from utils import UserError, first_line

CHANNELS = (1, 3, 4)  # that an image can have


def channels_first(images):
    """uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W) -> (N, C, H, W). Other arrays stay as they are."""
    if images.dtype != np.uint8:
        return images
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4:
        first, last = images.shape[1::2]
        if last in CHANNELS and (first not in CHANNELS or last < first):
            return np.ascontiguousarray(np.moveaxis(images, 3, 1))
    return images


class Items:
    """Some `rows` (all by default) of a map-style data set as one array: `items[rows]` reads these, one at a time.

    An item is a PIL image, an array (C, H, W), (H, W) or (D,), or a tuple that begins with one. What is read is float32
    (N, ...), or uint8 if the items are, with the channels first. Raises UserError for items of different type or shape.
    """

    def __init__(self, source, rows=None):
        self.source = source
        self.rows = np.arange(len(source)) if rows is None else rows
        first = self[[0]]
        self.dtype = first.dtype
        self.ndim = first.ndim
        self.shape = len(self), *first.shape[1:]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        found = channels_first(self.read(self.rows[rows]))
        found = found[:, None] if found.ndim == 3 else found
        return found if found.dtype == np.uint8 else found.astype(np.float32, copy=False)

    def read(self, rows):
        items = (self.source[int(i)] for i in rows)
        found = [np.asarray(item[0] if isinstance(item, tuple) else item) for item in items]
        kinds = {(x.dtype, x.shape) for x in found}
        if len(kinds) > 1 or found[0].dtype.kind not in "buif":
            raise UserError(f"items are {' and '.join(sorted(f'{dtype} {shape}' for dtype, shape in kinds))}: expected "
                            "images or arrays of numbers, of one type and shape; convert or resize them in __getitem__")
        return np.stack(found)


class Frames(Items):
    """The rows of arrays (T, ...) that lie one after the other, and some `channels` of each row. `names` are the files.

    Raises UserError for channels that are not there.
    """

    def __init__(self, arrays, names=(), rows=None, channels=()):
        there = arrays[0].shape[1] if arrays[0].ndim == 4 and arrays[0].dtype != np.uint8 else 0
        if not set(channels) <= set(range(there)):
            has = f"has 0 to {there - 1}" if there else "holds no fields"
            raise UserError(f"channels {tuple(channels)} are not all there: {names[0]} {has}")
        self.arrays = arrays
        self.names = names
        self.channels = list(channels)
        self.starts = np.cumsum([0, *map(len, arrays)])
        super().__init__(range(self.starts[-1]), rows)

    def array_of(self, rows):
        """The number of the array in which a row lies."""
        return np.searchsorted(self.starts, rows, "right") - 1

    def read(self, rows):
        which = self.array_of(rows)
        none = self.arrays[0][:0][:, self.channels or ...]
        found = np.empty((len(rows), *none.shape[1:]), none.dtype)
        for k in np.unique(which):
            array = self.arrays[k]
            own = which == k
            found[own] = array[rows[own] - self.starts[k]][:, self.channels or ...]
            if isinstance(array, np.memmap):  # what is mapped counts as memory of this process
                array._mmap.madvise(mmap.MADV_DONTNEED)
        return found

    def lagged(self, lag):
        """The frames from `lag` on of each array, and those so many earlier. Raises UserError if one is short."""
        for name, array in zip(self.names or count(), self.arrays):
            if len(array) <= lag:
                raise UserError(f"lag {lag} is beyond trajectory {name} of {len(array)} frames: use a smaller --lag")
        rows = np.concatenate([np.arange(a + lag, b) for a, b in pairwise(self.starts)])
        return tuple(Frames(self.arrays, self.names, r, self.channels) for r in (rows, rows - lag))


def open_frames(paths, channels=()):
    """The rows of .npy files as `Frames`. They stay on disk, except vectors.

    Raises UserError unless all rows have one shape.
    """
    arrays = []
    for path in paths:
        try:
            array = np.load(path, mmap_mode="r")
        except Exception as error:  # a damaged file fails in many ways
            raise UserError(f"cannot read {path} ({first_line(error)}): expected a .npy file of numbers") from error
        arrays.append(np.array(array) if array.ndim == 2 else array)
        here, first = (f"{a.dtype} {('N', *a.shape[1:])}" for a in (array, arrays[0]))
        if here != first or array.dtype.kind not in "iuf" or array.ndim < 2 or not array.size:
            raise UserError(f"{path} holds {here}, and {paths[0]} {first}: expected numbers, and rows of one shape and "
                            "type in all files")
    return Frames(arrays, paths, channels=channels)


def shards(folder, split):
    """The .npy files of a split: of FOLDER/train or FOLDER/test, or, without these, the last tenth is for testing."""
    if os.path.isdir(f"{folder}/train"):
        paths = sorted(glob(f"{folder}/{split}/*.npy"))
    else:
        paths = sorted(glob(f"{folder}/*.npy"))
        trained = len(paths) * 9 // 10 or len(paths)
        paths = paths[trained:] if split == "test" else paths[:trained]
    if not paths:
        raise UserError(f"{folder} has no .npy files for the {split} split: expected one for each trajectory, in "
                        f"{folder}, or in {folder}/train and {folder}/test")
    return paths


def statistics(data, source):
    """Mean and standard deviation (1 if it is 0) of each channel of data (N, C, ...), as lists, from one reading.

    Of a map-style data set 1,000 items are read. Raises UserError, which names `source`, or the file of `Frames`, if a
    value is not finite in float32.
    """
    n = min(len(data), 1000) if type(data) is Items else len(data)
    rows = np.linspace(0, len(data) - 1, n).astype(int)
    size = math.prod(data.shape[2:])
    sums = 0.0
    with Progress("mean and standard deviation", rows, "item") as progress:
        for chosen in np.array_split(rows, -(-n * size * data.shape[1] // 2**24)):
            part = np.asarray(data[chosen], np.float64).reshape(len(chosen), -1, size)
            bad = chosen[~(np.abs(part) <= np.finfo(np.float32).max).all((1, 2))]
            if len(bad):
                file = data.names[data.array_of(data.rows[bad[0]])] if getattr(data, "names", ()) else source
                raise UserError(f"{file}: item {bad[0]} has values that are not finite in float32: expected finite "
                                "numbers; remove or repair it")
            sums += np.stack([part.sum((0, 2)), (part**2).sum((0, 2))])
            progress.update(len(part))
    mean, square = sums / (n * size)
    return mean.tolist(), [math.sqrt(v) or 1.0 for v in (square - mean**2).clip(0)]


# ---- A simulated field


def vorticity(trajectories, frames, seed, size=32, solved_at=64, interval=0.5, dt=0.01, viscosity=2e-3, drag=0.1,
              stirring=1.0, rest=20.0, initial=0.0):
    """Vorticity (trajectories, frames, 1, size, size) of a fluid on the torus [0, 2 pi]^2, stirred at random.

    dw + v . grad w dt = viscosity laplace w dt - drag w dt + dW (Chen et al. 2024, section 4, there with 256^2 points
    and viscosity 1e-3), where dW stirs waves of some 5 to 8 periods a side, without correlation in time. It is solved
    by Fourier series at solved_at^2 points without aliasing, in steps dt: by Heun's method for the transport, and
    exactly for the rest. Frames are `interval` apart, of the waves that size^2 points can show. The first comes this
    long after `rest`, a multiple of `interval`, from the vorticity `initial` (solved_at, solved_at).
    """
    generator = torch.Generator().manual_seed(seed)
    n = solved_at
    kx, ky = torch.meshgrid(rfftfreq(n, 1 / n), fftfreq(n, 1 / n), indexing="xy")
    square = kx**2 + ky**2
    highest = torch.maximum(kx, ky.abs())
    kept = (highest < n / 3) & (square > 0)
    shown = highest < size / 2
    inverse = 1 / square.clamp(min=1)
    operators = 1j * torch.stack([ky * inverse, -kx * inverse, kx, ky])  # w -> velocity (u, v) and slopes of w
    decay = torch.exp(-dt * (viscosity * square + drag))

    def transport(w):  # -v . grad w
        u, v, slope_x, slope_y = irfft2(operators * w[:, None]).unbind(1)
        return -rfft2(u * slope_x + v * slope_y) * kept

    x = torch.arange(n) * 2 * math.pi / n
    y = x[:, None]
    phases = torch.stack(torch.broadcast_tensors(6 * x, 7 * y, 5 * (x + y), 8 * (x + y)))
    waves = rfft2(torch.cat([phases.sin(), phases.cos()]))
    w = rfft2(torch.zeros(trajectories, n, n) + initial)
    every = round(interval / dt)
    found = []
    for step in Progress("solving Navier-Stokes", range(round(rest / dt) + every * frames)):
        slope = transport(w)
        ahead = decay * (w + dt * slope)
        kick = stirring * dt**0.5 * torch.randn(trajectories, len(waves), generator=generator)
        w = decay * (w + dt / 2 * slope) + dt / 2 * transport(ahead) + torch.einsum("bk,kij->bij", kick + 0j, waves)
        if (step + 1) % every == 0:
            found.append(irfft2(w * shown)[:, :: n // size, :: n // size])
    return torch.stack(found[-frames:], 1)[:, :, None].numpy()
