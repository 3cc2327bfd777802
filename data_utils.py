"""Data sets, and which of their items each training step takes.

A data set is an array of uint8 images (N, C, H, W), float32 fields (N, C, H, W) or float32 vectors (N, D), with labels
(N,) int64 or None, and a condition of each item or None. Its `DataSpec` gives the scale: `encode` takes images to
[-1, 1], and fields and vectors to mean 0 and standard deviation 1, by channel; `decode` takes samples back. Arrays stay
in memory, except those of an image folder and of .npy files of images and fields, which stay on disk.

To add a data set, write a function that returns `make_dataset(data, labels)`, and give it a row in DATASETS. Of
`data_dir`, `image_size`, `download` and `split` it gets those that it has as parameters (`utils.call_with_settings`).
Rank 0 calls it first, with download=True. If it takes `split`, there is a test split, which evaluate.py reads, and
training for the conditions of its pictures.
"""

import functools
import hashlib
import itertools
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from conditions import CORRUPTIONS
from fields import CHANNELS, Frames, Items, channels_first, open_frames, shards, statistics, vorticity
from logging_utils import Progress
from utils import (
    UserError,
    append_dims,
    call_with_settings,
    first_line,
    import_torchvision,
    look_up,
    make_seed,
    parameters_of,
    row_noise,
    write_atomically,
)

CACHE = os.path.join(os.path.dirname(__file__), "data", "cache")  # decoded image folders, simulations, statistics
SPLITS = ("train", "test")
constant = functools.lru_cache(torch.tensor)  # copied to a device once, since each copy makes a GPU wait


def scale(x, mean, std):
    """Mean and standard deviation, of one or of all channels, shaped for x (B, C, ...)."""
    return append_dims(constant((tuple(mean), tuple(std)), device=x.device), x.ndim)


@dataclass
class DataSpec:
    """Shape of an item, number of classes (0: no labels), and `mean` and `std`: one number, or one for each channel.

    The same of the condition, whose shape is () if there is none.
    """

    shape: tuple[int, ...]
    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    is_field: bool = False  # float32 items (C, H, W), not uint8
    cond_shape: tuple[int, ...] = ()
    cond_mean: Sequence[float] = (0.0,)
    cond_std: Sequence[float] = (1.0,)

    @property
    def is_image(self):
        return len(self.shape) == 3 and not self.is_field

    @property
    def cond_has_channels(self):
        """Whether the condition begins with the data's channels, on their scale, so that it is comparable with them."""
        return (len(self.cond_shape) == len(self.shape) and self.cond_shape[0] >= self.shape[0]
                and self.cond_std[: len(self.std)] == self.std)

    def encode(self, data):
        """Data (B, ...) as they are stored -> float32 on the network's scale."""
        mean, std = scale(data, self.mean, self.std)
        return (data.float() - mean) / std

    def decode(self, x, rounded=True):
        """Samples (B, ...) on the network's scale -> uint8 images, `rounded` and clamped, or float32 items."""
        mean, std = scale(x, self.mean, self.std)
        data = x.float() * std + mean
        return data.round().clamp(0, 255).to(torch.uint8) if self.is_image and rounded else data

    def condition(self, cond):
        """Conditions (B, ...) as they are stored -> as the network gets them: scaled, with a last channel of ones.

        The trainer hides a condition by zeros in all channels.
        """
        mean, std = scale(cond, self.cond_mean, self.cond_std)
        return with_ones((cond.float() - mean) / std)


def with_ones(cond):
    """Conditions (B, C, ...) with one more channel, of ones: it says that they are not hidden."""
    return torch.cat([cond, torch.ones_like(cond[:, :1])], dim=1)


class Cases(NamedTuple):
    """What `num` samples are drawn for: labels (num,) and conditions (num, ...), or None.

    With conditions, `times` samples one after the other have the same, and `truth` (num / times, ...) are their items.
    `start` (num, ...) are the points of a source, encoded, from which they start; or, with `reverse`, data.
    """

    num: int
    labels: Tensor | None = None
    cond: Tensor | None = None
    truth: Tensor | None = None
    times: int = 1
    start: Tensor | None = None
    reverse: bool = False


@dataclass
class Dataset:
    data: np.ndarray | Items  # (N, C, H, W) uint8 or float32, or (N, D) float32
    labels: np.ndarray | None  # (N,) int64
    spec: DataSpec
    name: str = ""  # the random order depends on it, and on the seed
    cond: np.ndarray | Items | None = None  # (N, ...)
    corruption: Callable | None = None  # a function of (x0, uniform) that makes the conditions instead
    source: "Dataset | None" = None  # x1, if it is no noise

    def condition(self, x0, cond, uniform):
        """What the network gets as conditions of encoded items x0, whose stored conditions are `cond`; None if none.

        `uniform(*shape)` gives numbers (B, *shape) in (0, 1) to a corruption.
        """
        if self.corruption:
            return with_ones(self.corruption(x0, uniform))
        return None if cond is None else self.spec.condition(cond)

    def cases(self, rows, times=1):
        """The labels and conditions of the items `rows` (an array), each repeated, and the items.

        What is random in a condition is a function of the place in `rows`.
        """
        truth, labels, cond = self[rows]
        cond = self.condition(self.spec.encode(truth), cond, uniform_rows(range(len(rows)), "cpu", "corruption"))
        labels, cond = (x if x is None else x.repeat_interleave(times, 0) for x in (labels, cond))
        return Cases(len(rows) * times, labels, cond, truth, times, self.start(np.repeat(rows, times)))

    def start(self, rows):
        """Points of the source, on the network's scale, as many as there are `rows` (an array); None without a source.

        They are the partners of these items of a `given` pair, and else random.
        """
        if self.source:
            rows = rows if self.source.name == self.name else random_rows(self.source, len(rows))
            return self.spec.encode(self.source[rows][0])

    def __len__(self):
        return len(self.data)

    def __getitem__(self, rows):
        """The items, labels and conditions `rows` (an array), as they are stored."""
        return [x if x is None else torch.from_numpy(x[rows]) for x in (self.data, self.labels, self.cond)]


def uniform_rows(rows, device, *keys):
    """A function that returns numbers (B, *shape) in (0, 1) for `rows`, of which each is a function of `keys` and i."""
    return lambda *shape: torch.special.ndtr(row_noise(rows, shape, device, *keys)()).clamp(max=1 - 2**-24)


def kept(name, key, write):
    """The path in data/cache of what `write(file)` writes for this key. It is written unless it is there."""
    path = f"{CACHE}/{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not os.path.exists(path):
        write_atomically(path, write)
    return path


def stamps(paths):
    """The paths, sizes and times of files, as a text that changes with them. Raises OSError if one is not there."""
    return "\n".join(f"{os.path.abspath(path)} {os.path.getsize(path)} {os.path.getmtime(path)}" for path in paths)


def as_arrays(data, what, source):
    """What numpy.asarray takes -> images (N, C, H, W) uint8, or fields or vectors float32; and mean and std of either.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W), with C 1, 3 or 4. `Items` stay as they are. Raises UserError,
    which names `source`, for anything else, and for values that are not finite. What was computed of files is kept in
    data/cache until a file changes.
    """
    data = data if isinstance(data, Items) else channels_first(np.asarray(data))
    images = data.dtype == np.uint8 and data.ndim == 4
    if data.ndim not in (2, 4) or data.dtype.kind not in "iuf" or 0 in data.shape or (
            images and data.shape[1] not in CHANNELS):
        raise UserError(
            f"{source}: {what} are {data.dtype} of shape {data.shape}: expected vectors (N, D), fields (N, C, H, W) of "
            "floats, or uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1, 3 or 4")
    if images:
        return data, [127.5], [127.5]
    if not getattr(data, "names", ()):
        found = statistics(data, f"{source}: {what}")
        return data if isinstance(data, Items) else data.astype(np.float32), *found
    path = kept("statistics", f"{stamps(data.names)} {data.channels} {zlib.crc32(data.rows)}",
                lambda file: np.save(file, statistics(data, source)))
    return data, *np.load(path).tolist()


def as_labels(labels, n, source):
    """n labels as int64, or None, and the number of classes. Raises UserError if they are something else."""
    if labels is None:
        return None, 0
    labels = np.asarray(labels)
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{source}: labels are {labels.dtype} of shape {labels.shape}: expected whole numbers of shape ({n},)")
    if labels.min() < 0 or labels.max() >= max(n, 10_000):
        raise UserError(
            f"{source}: labels run from {labels.min()} to {labels.max()}: expected the classes' numbers 0, 1, 2, ...")
    return labels.astype(np.int64), int(labels.max()) + 1


def make_dataset(data, labels, source="make_dataset", cond=None):
    """A data set of images, fields or vectors, with labels (N,) from 0, or None, and conditions (N, ...), or None.

    Both are what `as_arrays` takes. Conditions with as many channels as the data are of the same quantities, and are
    scaled as the data are. Raises UserError, which names `source`, if they are something else.
    """
    data, mean, std = as_arrays(data, "data", source)
    labels, num_classes = as_labels(labels, len(data), source)
    spec = DataSpec(data.shape[1:], num_classes, mean, std, data.dtype != np.uint8 and data.ndim == 4)
    if cond is not None:
        cond, *own = as_arrays(cond, "conditions", source)
        if len(cond) != len(data):
            raise UserError(f"{source}: there are {len(cond)} conditions for {len(data)} items: expected one for each")
        same = (cond.dtype, cond.ndim, cond.shape[1]) == (data.dtype, data.ndim, data.shape[1])
        spec.cond_shape, (spec.cond_mean, spec.cond_std) = cond.shape[1:], (mean, std) if same else own
    return Dataset(data, labels, spec, cond=cond)


# ---- Data sets that are downloaded


def from_torchvision(name, data_dir, download, split):
    """torchvision's data set `name`. Its archives are in `data_dir` (CIFAR10), or in `data_dir`/`name`/raw."""
    cls = getattr(import_torchvision().datasets, name)
    try:  # a pickle could run code: torchvision opens none before it has compared its MD5
        data = cls(data_dir, train=split == "train", download=download)
    except Exception as error:  # no network, no room, a damaged archive
        if name == "CIFAR10":
            files, source = f"{data_dir}/{cls.filename}", cls.url
        else:
            files = " and ".join(f"{data_dir}/{name}/raw/{file}" for file, _ in cls.resources)
            source = cls.mirrors[0]
        raise UserError(
            f"{name} is not in {data_dir}, or is corrupt there, and cannot be downloaded ({first_line(error)}): put "
            f"{files} there, from {source}, or run the preset 'digits', which needs no download") from error
    return make_dataset(data.data, data.targets)


# ---- Data sets that need no download


def digits(split):
    """1,500 of scikit-learn's 1,797 handwritten digits, 8 x 8, values 0 to 16 scaled to 0 to 255; 297 for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    splits = train_test_split(range(1797), test_size=297, stratify=data.target, random_state=0)
    rows = np.sort(splits[SPLITS.index(split)])
    return make_dataset(np.rint(data.images[rows] * (255 / 16)).astype(np.uint8), data.target[rows])


def moons(split, num=20_000, noise=0.05, scale=1, origin=(0, 0)):
    """Points on two half circles of radius 1, with noise, then shifted and scaled; as many for testing.

    The label is the circle.
    """
    from sklearn.datasets import make_moons

    x, labels = make_moons(num, noise=noise, random_state=SPLITS.index(split))
    return make_dataset(scale * (x - origin), labels)


def eight_gaussians(split, num=20_000, radius=2, std=0.1):
    """Points of eight Gaussians of this standard deviation, on a circle; as many for testing.

    The label is the number of the Gaussian.
    """
    from sklearn.datasets import make_blobs, make_circles

    centres = radius * make_circles((8, 0), shuffle=False)[0]  # 8 points on the outer circle, none on an inner one
    return make_dataset(*make_blobs(num, centers=centres, cluster_std=std, random_state=SPLITS.index(split)))


def s_curve(split):
    """10,000 points on a curve like the letter S, with noise 0.05, times 1.5; as many for testing."""
    from sklearn.datasets import make_s_curve

    return make_dataset(1.5 * make_s_curve(10_000, noise=0.05, random_state=SPLITS.index(split))[0][:, [0, 2]], None)


def normal(split):
    """10,000 points of N(0, I) in the plane, whatever the scale of the data that they are the source of."""
    return make_dataset(np.random.default_rng(SPLITS.index(split)).normal(size=(10_000, 2)), None)


def checkerboard(split):
    """20,000 points, uniform on the eight black squares of a 4 x 4 board on [-2, 2]^2; as many for testing.

    The label is the number of the square.
    """
    rng = np.random.default_rng(SPLITS.index(split))
    labels = rng.integers(8, size=20_000)
    corners = np.column_stack([labels % 4, 2 * (labels // 4) + labels % 2])  # column + row is even
    return make_dataset(corners - 2 + rng.random((20_000, 2)), labels)


def navier_stokes(split):
    """Vorticity of stirred turbulence, 32 x 32: 150 trajectories of 40 frames for training, 15 for testing.

    See `fields.vorticity`. They are made in a minute, and kept in data/cache.
    """
    number = SPLITS.index(split)
    path = kept("navier_stokes", split, lambda file: np.save(file, vorticity((150, 15)[number], 40, number)))
    return make_dataset(Frames(list(np.load(path))), None)


# ---- Your own data


def decode_image(path, size):
    """The image as (3, size, size) uint8, turned as its EXIF data say, resized to cover the square, and cropped to its
    middle.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"{path} is not a readable image ({first_line(error)}): repair or remove it") from error


def image_folder(data_dir, image_size, split):
    """Images of any size in a folder of class folders, or in two of these: DATA_DIR/train and DATA_DIR/test (or val).

    They are decoded once into data/cache, and read from there until the folder changes.
    """
    folders = {"train": data_dir}
    for test in ("val", "test"):  # test, if there are both
        if os.path.isdir(f"{data_dir}/train") and os.path.isdir(f"{data_dir}/{test}"):
            folders = {"train": f"{data_dir}/train", "test": f"{data_dir}/{test}"}
    if split not in folders:
        raise UserError(
            f"{data_dir} has no test split: expected class folders in {data_dir}/train and in {data_dir}/test")
    folder = folders[split]
    datasets = import_torchvision().datasets
    try:
        images, classes = datasets.ImageFolder(folder), datasets.folder.find_classes(folders["train"])[0]
        paths, labels = zip(*images.samples)
        listing = stamps(paths)
    except OSError as error:
        raise UserError(f"{folder} is no folder of class folders of images ({first_line(error)}): expected "
                        "DATA_DIR/CLASS/IMAGE.jpg (or .png, ...); set --data_dir, or repair the folder") from error
    if classes == ["train"]:
        raise UserError(f"{data_dir} holds one folder, train: expected class folders, or train and test with class "
                        f"folders in each; use --data_dir {data_dir}/train")
    if images.classes != classes:
        raise UserError(f"{folder} has the classes {', '.join(images.classes)}, and {folders['train']} has "
                        f"{', '.join(classes)}: expected the same")

    def write(file):
        with ThreadPoolExecutor() as pool, Progress("decoding", paths, "image") as progress:
            for start in range(0, len(paths), 256):  # only so many decoded images wait in memory
                for image in pool.map(decode_image, paths[start : start + 256], itertools.repeat(image_size)):
                    file.write(image.tobytes())
                    progress.update()

    cache = kept("images", f"{image_size} {listing}", write)
    data = np.memmap(cache, np.uint8, "r", shape=(len(paths), 3, image_size, image_size))
    return make_dataset(data, labels, folder)


def from_files(path, split, channels):
    """A .npz file of `arr_0`, for labels `arr_1`, and for conditions `arr_2` or `cond`; or .npy files, without labels.

    These are a file of items, or a folder of files: trajectories (T, C, H, W) each. Conditions are in FILE_cond.npy, or
    in a folder of this name. The test split is FILE_test.npz, FILE_test.npy, or see `fields.shards`.
    """
    root, suffix = (path.rstrip("/"), "") if os.path.isdir(path) else os.path.splitext(path)
    if split == "test" and suffix:
        root += "_test"
        if not os.path.exists(root + suffix):
            raise UserError(
                f"there is no test split {root + suffix}: expected a file of the same kind as that for training")
    path, other = root + suffix, f"{root}_cond{suffix}"
    if suffix == ".npz":
        try:
            arrays = np.load(path)
            data, labels, cond = arrays["arr_0"], arrays.get("arr_1"), arrays.get("arr_2", arrays.get("cond"))
        except Exception as error:  # a damaged file fails in many ways
            raise UserError(f"cannot read {path} ({first_line(error)}): expected a .npz file of numbers, arr_0 and for "
                            "labels arr_1, as numpy.savez(path, data, labels) writes it, or a .npy file") from error
        return make_dataset(Frames([data], [path], channels=channels)[:] if channels else data, labels, path, cond)

    def frames(path, channels=()):
        return open_frames([path] if suffix else shards(path, split), channels)

    return make_dataset(frames(path, channels), None, path, frames(other) if os.path.exists(other) else None)


DATASETS = {
    "cifar10": functools.partial(from_torchvision, "CIFAR10"),  # 50,000 photographs of 10 classes; 10,000 for testing
    "mnist": functools.partial(from_torchvision, "MNIST"),  # 60,000 handwritten digits; 10,000 for testing
    "fashion_mnist": functools.partial(from_torchvision, "FashionMNIST"),  # as many pictures of 10 kinds of clothes
    "digits": digits,
    "image_folder": image_folder,
    "moons": moons,
    "eight_gaussians": eight_gaussians,
    "checkerboard": checkerboard,
    # In the scale of the literature, 10,000 points: Tong et al. 2023 (wide); Shi et al. 2023, "DSBM" (far)
    "moons_wide": functools.partial(moons, num=10_000, scale=2, origin=[0.5, 0]),
    "eight_gaussians_wide": functools.partial(eight_gaussians, num=10_000, radius=5, std=1.0),
    "s_curve": s_curve,
    "normal": normal,
    # of mean 0, and both coordinates together of standard deviation 7
    "moons_far": functools.partial(moons, num=10_000, noise=0.1, scale=9.83, origin=[0.5, 0.25]),
    "eight_gaussians_far": functools.partial(eight_gaussians, num=10_000, radius=12, std=1.5),
    "navier_stokes": navier_stokes,
}


def load_dataset(name, data_dir="data", image_size=32, download=False, split="train", channels=(), lag=0,
                 corruption=None, source="noise", coupling="independent", **settings):
    """The split, train or test, of the data set of this name, of a .npz or .npy file, or of a folder of .npy files.

    `image_size` is in pixels, for image_folder, and `channels` are those of files to take. The condition of an item is
    the frame `lag` earlier in its trajectory, if this is not 0, or what the `corruption` of this name leaves of it;
    `settings` may hold its arguments. `source` is noise, or names a data set of the same shape, whose batches have an
    order of their own, or with the coupling `given` that of the data. Raises UserError for an unknown name, and for
    data that are missing or bad.
    """
    if name.endswith((".npz", ".npy")) or name not in DATASETS and os.path.isdir(name):
        dataset = from_files(name, split, channels)
    else:
        function = look_up(DATASETS | {"a FILE.npz or FILE.npy, or a FOLDER of .npy files": None}, name)
        if split == "test" and "split" not in parameters_of(function):
            raise UserError(f"{name} has no test split: let its function in data_utils.py take `split`, train or test")
        dataset = call_with_settings(
            function, dict(data_dir=data_dir, image_size=image_size, download=download, split=split))
        if channels:
            raise UserError(f"channels {channels}: expected with a FILE or FOLDER of fields, not with {name}")
    spec = dataset.spec
    dataset.name = f"{name} {split}"
    if (dataset.cond is not None) + (lag > 0) + bool(corruption) > 1:
        raise UserError(f"{name}: expected one condition, that of the data, --lag or --corruption, and not two")
    if lag:
        if type(dataset.data) is Items:
            raise UserError(f"lag {lag} needs trajectories, and {name} is read item by item: give it pairs")
        frames = dataset.data if isinstance(dataset.data, Frames) else Frames([dataset.data], [name])
        dataset.data, dataset.cond = frames.lagged(lag)
        dataset.labels = None if dataset.labels is None else dataset.labels[dataset.data.rows]
        spec.cond_shape, spec.cond_mean, spec.cond_std = spec.shape, spec.mean, spec.std
    if corruption:
        function = look_up(CORRUPTIONS, corruption)
        C = spec.shape[0]
        dataset.corruption = lambda x0, uniform: call_with_settings(function, settings | {"uniform": uniform}, x0=x0)
        if len(spec.shape) != 3:
            raise UserError(f"corruption {corruption} is for images and fields, not for data of shape {spec.shape}")
        try:
            shape = dataset.cases([0]).cond[0, :-1].shape  # without the channel of ones
        except RuntimeError as error:
            raise UserError(f"corruption {corruption} fails on items of shape {spec.shape} ({first_line(error)}): use "
                            "another, or a smaller --downsample_factor") from error
        spec.cond_shape = tuple(shape)  # of the data's channels, and perhaps a mask
        spec.cond_mean = ((spec.mean * C)[:C] + [0.0])[: shape[0]]
        spec.cond_std = ((spec.std * C)[:C] + [1.0])[: shape[0]]
    if source != "noise":
        dataset.source = there = load_dataset(source, data_dir, image_size, download, split, channels)
        if there.spec.shape != spec.shape or coupling == "given" and len(there) != len(dataset):
            raise UserError(f"source {source} has {len(there)} items of shape {there.spec.shape}, and {name} has "
                            f"{len(dataset)} of {spec.shape}: expected one shape, and with --coupling given as many")
        there.name = dataset.name if coupling == "given" else f"source {there.name}"
    return dataset


# ---- What samples are drawn for, and the items that are trained on


def cases(dataset, num, samples_per_cond, class_conditional):
    """What `num` samples are drawn for: labels in the proportions of the data set; or, if this has conditions, those of
    items that are spread over it, `samples_per_cond` for each.
    """
    if dataset.spec.cond_shape:
        rows = np.linspace(0, len(dataset) - 1, max(1, num // samples_per_cond)).astype(int)
        return dataset.cases(rows, samples_per_cond)
    if not dataset.source:
        return Cases(num, spread_labels(dataset.labels, num) if class_conditional else None)
    rows = random_rows(dataset, num)  # whose labels a given partner may depend on
    labels = torch.from_numpy(dataset.labels[rows]) if class_conditional else None
    return Cases(num, labels, start=dataset.start(rows))


def random_rows(dataset, n):
    """The numbers of n items in random order, always the same; beyond the number of items, again from the start."""
    return np.resize(np.random.default_rng(0).permutation(len(dataset)), n)


def spread_labels(labels, n):
    """Labels (n,) in the proportions of `labels`. For any m, the first m have these proportions too, to rounding.

    They are read from the sorted labels in steps of the golden ratio.
    """
    place = np.arange(n) * ((5**0.5 - 1) / 2) % 1
    return torch.from_numpy(np.sort(labels)[(place * len(labels)).astype(int)])


@functools.lru_cache(maxsize=4)
def epoch_order(n, seed, epoch, name):
    """The order (n,) in which an epoch takes the items of the data set of this name."""
    return np.random.default_rng(make_seed(seed, "epoch", epoch, name)).permutation(n)


@dataclass
class Batches:
    """The items that each step takes, epoch after epoch, each epoch in an order of its own.

    Called with a step it gives the items `rows` (a slice) of the global batch: uint8 or float32 (B, ...), and labels
    (B,) and conditions (B, ...) or None. They depend on nothing but seed, step and the data set's name. `Items` are
    read by `num_workers` processes, which prefetch those of the next steps.
    """

    dataset: Dataset
    batch_size: int
    seed: int
    overfit_one_batch: bool = False  # every step takes the items of step 0
    num_workers: int = 0
    following: tuple = ()  # the step and rows that the workers give next

    def indices(self, step):
        """Indices (B,) of the global batch of this step, which may reach into the next epoch, or span several."""
        n = len(self.dataset)
        first = 0 if self.overfit_one_batch else step * self.batch_size
        epochs, places = np.divmod(first + np.arange(self.batch_size), n)
        return np.concatenate([epoch_order(n, self.seed, epoch, self.dataset.name)[places[epochs == epoch]]
                               for epoch in np.unique(epochs)])

    def __call__(self, step, rows=slice(None)):
        if type(self.dataset.data) is not Items:
            return self.dataset[self.indices(step)[rows]]
        if self.following != (step, rows):
            order = (self.indices(later)[rows] for later in itertools.count(step))
            self.loader = iter(
                torch.utils.data.DataLoader(self.dataset, None, sampler=order, num_workers=self.num_workers))
        self.following = step + 1, rows
        try:
            return next(self.loader)
        except UserError as error:  # of a worker, with its traceback
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("utils.UserError: ")) from None
