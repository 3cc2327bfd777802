"""Fields on disk, read when they are needed, and a simulated one: two-dimensional turbulence.

A field is an item (C, H, W) of float32 numbers with any number of channels, such as the state of a simulation. `Frames`
are rows of several arrays, such as trajectories (T, C, H, W) in files of their own. They behave as one array that is
read row by row, so that data may be larger than memory.
"""

import math
import mmap
import os
from glob import glob

import numpy as np
import torch

from logging_utils import Progress
from utils import UserError, first_line


class Frames:
    """`rows` (all by default) of arrays (T, ...) that lie one after the other, and some `channels` of each row.

    `frames[rows]`, by a slice or an array of numbers, reads these rows: float32, or uint8 if the arrays are. Raises
    UserError for channels that are not there.
    """

    def __init__(self, arrays, names=(), rows=None, channels=()):
        there = arrays[0].shape[1] if arrays[0].ndim == 4 and arrays[0].dtype != np.uint8 else 0
        if channels and not 0 <= min(channels) <= max(channels) < there:
            has = f"has 0 to {there - 1}" if there else "holds no fields"
            raise UserError(f"channels {tuple(channels)} are not all there: {names[0]} {has}")
        self.arrays, self.names, self.channels = arrays, names, list(channels)
        self.starts = np.cumsum([0, *map(len, arrays)])
        self.rows = np.arange(self.starts[-1]) if rows is None else rows
        self.dtype = np.dtype(np.uint8 if arrays[0].dtype == np.uint8 else np.float32)
        self.shape = (len(self.rows), *((len(self.channels),) if channels else arrays[0].shape[1:2]),
                      *arrays[0].shape[2:])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        rows = self.rows[rows]
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        which = np.searchsorted(self.starts, rows, "right") - 1
        for k in np.unique(which):
            array, own = self.arrays[k], which == k
            items = array[rows[own] - self.starts[k]]
            found[own] = items[:, self.channels] if self.channels else items
            if isinstance(array, np.memmap):  # what is mapped counts as memory of this process
                array._mmap.madvise(mmap.MADV_DONTNEED)
        return found

    def lagged(self, lag) -> tuple["Frames", "Frames"]:
        """The frames from `lag` on of each array, and those so many earlier. Raises UserError if one is short."""
        for name, array in zip(self.names or map(str, range(len(self.arrays))), self.arrays):
            if len(array) <= lag:
                raise UserError(f"lag {lag} is beyond trajectory {name} of {len(array)} frames: use a smaller --lag")
        rows = np.concatenate([np.arange(a + lag, b) for a, b in zip(self.starts, self.starts[1:])])
        return tuple(Frames(self.arrays, self.names, r, self.channels) for r in (rows, rows - lag))


def open_frames(paths, channels=()) -> Frames:
    """The rows of .npy files, which stay on disk. Raises UserError unless all have rows of the same shape."""
    arrays = []
    for path in paths:
        try:
            arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except Exception as error:  # a damaged file fails in many ways
            raise UserError(f"cannot read {path} ({first_line(error)}): expected a .npy file of numbers") from error
        here, first = (f"{a.dtype} {('N', *a.shape[1:])}" for a in (arrays[-1], arrays[0]))
        if here != first or arrays[-1].dtype.kind not in "iuf" or arrays[-1].ndim < 2 or not arrays[-1].size:
            raise UserError(f"{path} holds {here}, and {paths[0]} {first}: expected numbers, and rows of one shape and "
                            "type in all files")
    return Frames(arrays, paths, channels=channels)


def shards(folder, split) -> list[str]:
    """The .npy files of a split: of FOLDER/train or FOLDER/test, or, without these, the last tenth is for testing."""
    if os.path.isdir(f"{folder}/train"):
        paths = sorted(glob(f"{folder}/{split}/*.npy"))
    else:
        paths = sorted(glob(f"{folder}/*.npy"))
        tested = -(-len(paths) // 10) if len(paths) > 1 else 0
        paths = paths[len(paths) - tested :] if split == "test" else paths[: len(paths) - tested]
    if not paths:
        raise UserError(f"{folder} has no .npy files for the {split} split: expected one for each trajectory, in "
                        f"{folder}, or in {folder}/train and {folder}/test")
    return paths


def statistics(frames: Frames):
    """Mean and standard deviation of each channel, as lists, from one reading.

    Raises UserError, which names the file, if a value is not finite.
    """
    sums, chunk = 0.0, max(1, 2**24 // math.prod(frames.shape[1:]))
    axes = (0, *range(2, len(frames.shape)))
    with Progress("mean and standard deviation", len(frames), "item") as progress:
        for start in range(0, len(frames), chunk):
            part = frames[start : start + chunk].astype(np.float64)
            sums = sums + np.stack([part.sum(axes), (part**2).sum(axes)])
            if not np.isfinite(sums).all():
                bad = start + np.flatnonzero(~np.isfinite(part.reshape(len(part), -1)).all(1))[0]
                file = np.searchsorted(frames.starts, frames.rows[bad], "right") - 1
                raise UserError(f"{frames.names[file] if frames.names else 'the data'} holds values that are not finite"
                                f", in item {bad}: expected finite numbers; remove or repair it")
            progress.update(len(part))
    mean, square = sums * frames.shape[1] / math.prod(frames.shape)
    return mean.tolist(), [math.sqrt(v) or 1.0 for v in (square - mean**2).clip(0)]


# ---- A simulated field


def vorticity(trajectories, frames, seed, size=32, solved_at=64, interval=0.5, dt=0.01, viscosity=2e-3, drag=0.1,
              stirring=1.0, rest=20.0, initial=None) -> np.ndarray:
    """Vorticity (trajectories, frames, 1, size, size) of a fluid on the torus [0, 2 pi]^2, stirred at random.

    dw + v . grad w dt = viscosity laplace w dt - drag w dt + dW (Chen et al. 2024, section 4, there with 256^2 points
    and viscosity 1e-3), where dW stirs waves of some 5 to 8 periods a side, without correlation in time. It is solved
    by Fourier series at solved_at^2 points without aliasing, in steps dt: by Heun's method for the transport, and
    exactly for the rest. Frames are `interval` apart, of the waves that size^2 points can show. The first comes this
    long after `rest` from rest, or from the vorticity `initial` (solved_at, solved_at).
    """
    generator, n = torch.Generator().manual_seed(seed), solved_at
    k = torch.fft.fftfreq(n, 1 / n)
    kx, ky = torch.meshgrid(k[: n // 2 + 1].abs(), k, indexing="xy")
    square = kx**2 + ky**2
    kept = (torch.maximum(kx, ky.abs()) < n / 3) & (square > 0)
    slopes = 1j * torch.stack([kx, ky])
    to_velocity = torch.stack([slopes[1], -slopes[0]]) / square.clamp(min=1)  # by the stream function
    decay = torch.exp(-dt * (viscosity * square + drag))

    def transport(w):  # -v . grad w
        velocity, slope = torch.fft.irfft2(to_velocity * w[:, None]), torch.fft.irfft2(slopes * w[:, None])
        return -torch.fft.rfft2((velocity * slope).sum(1)) * kept

    x = torch.arange(n) * 2 * math.pi / n
    x, y = x[None, :], x[:, None]
    phases = torch.stack([6 * x + 0 * y, 7 * y + 0 * x, 5 * (x + y), 8 * (x + y)])
    waves = torch.fft.rfft2(torch.cat([phases.sin(), phases.cos()]))
    w, found = torch.zeros(trajectories, *square.shape, dtype=torch.complex64), []
    if initial is not None:
        w = w + torch.fft.rfft2(initial)
    start, every, half = round(rest / dt), round(interval / dt), size // 2
    with Progress("solving Navier-Stokes", start + every * frames) as progress:
        for step in range(1, start + every * frames + 1):
            slope = transport(w)
            ahead = decay * (w + dt * slope)
            kick = stirring * dt**0.5 * torch.randn(trajectories, len(waves), generator=generator)
            w = decay * (w + dt / 2 * slope) + dt / 2 * transport(ahead) + torch.einsum("bk,kij->bij", kick + 0j, waves)
            if step > start and (step - start) % every == 0:
                coarse = torch.cat([w[:, :half, :half + 1], w[:, -half:, : half + 1]], dim=1) * (size / n) ** 2
                coarse[:, half], coarse[:, :, half] = 0, 0  # waves that size^2 points cannot tell from each other
                found.append(torch.fft.irfft2(coarse))
            progress.update()
    return torch.stack(found, 1)[:, :, None].numpy()
