"""Data sets, and which of their items each training step takes.

A data set is an array of uint8 images (N, C, H, W) or float32 vectors (N, D), with labels (N,) int64 or None. Its
`DataSpec` gives the scale: `encode` takes images to [-1, 1], and vectors to mean 0 and standard deviation 1; `decode`
takes samples back. Arrays stay in memory, except those of an image folder, which stay on disk.

To add a data set, write a function that returns `make_dataset(data, labels)`, and give it a row in DATASETS. Of
`data_dir`, `image_size`, `download` and `split` it gets those that it has as parameters (`utils.call_with_settings`).
Rank 0 calls it first, with download=True. With the parameter `split` it has a test split, which only evaluate.py reads.
"""

import contextlib
import functools
import glob
import hashlib
import os
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logging_utils import Progress
from utils import (
    UserError,
    call_with_settings,
    first_line,
    import_torchvision,
    look_up,
    make_seed,
    parameters_of,
    write_atomically,
)

CACHE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "cache")  # decoded image folders
SPLITS = ("train", "test")
constant = functools.lru_cache(torch.tensor)  # copied to a device once, since each copy makes a GPU wait


@dataclass
class DataSpec:
    """Shape of one item, number of classes (0: no labels), and `mean` and `std`: one number, or one for each of D."""

    shape: tuple[int, ...]
    num_classes: int
    mean: list[float]
    std: list[float]

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    def scale(self, device: torch.device) -> Tensor:
        """Mean and standard deviation, (2, 1) or (2, D) float32."""
        return constant((tuple(self.mean), tuple(self.std)), device=device)

    def encode(self, data: Tensor) -> Tensor:
        """Data (B, ...) as they are stored -> float32 on the network's scale."""
        mean, std = self.scale(data.device)
        return (data.float() - mean) / std

    def decode(self, x: Tensor) -> Tensor:
        """Samples (B, ...) on the network's scale -> uint8 images, rounded and clamped, or float32 vectors."""
        mean, std = self.scale(x.device)
        data = x.float() * std + mean
        return data.round().clamp(0, 255).to(torch.uint8) if self.is_image else data


@dataclass
class Dataset:
    data: np.ndarray  # (N, C, H, W) uint8 or (N, D) float32
    labels: np.ndarray | None  # (N,) int64
    spec: DataSpec
    note: str = ""  # what a reader of its figures must know, for instance that its files are lossy
    name: str = ""  # the random order depends on it, and on the seed


def make_dataset(data, labels, source: str = "make_dataset") -> Dataset:
    """A data set of images (N, C, H, W) uint8, C 1, 3 or 4, or vectors (N, D), with labels (N,) from 0, or None.

    Both may be anything that numpy.asarray takes. Raises UserError, which names `source`, if they are something else.
    """
    data, num_classes = np.asarray(data), 0
    is_images = data.ndim == 4 and data.dtype == np.uint8 and data.shape[1] in (1, 3, 4)
    is_vectors = data.ndim == 2 and data.dtype.kind in "iuf"
    if not (is_images or is_vectors) or 0 in data.shape:
        raise UserError(f"{source}: data are {data.dtype} of shape {data.shape}: expected vectors (N, D), or images "
                        "(N, C, H, W) uint8 with C 1, 3 or 4")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
            raise UserError(f"{source}: labels are {labels.dtype} of shape {labels.shape}: expected whole numbers of "
                            f"shape ({len(data)},)")
        if labels.min() < 0 or labels.max() >= max(len(data), 10_000):
            raise UserError(f"{source}: labels run from {labels.min()} to {labels.max()}: expected the classes' "
                            "numbers 0, 1, 2, ...")
        labels, num_classes = labels.astype(np.int64), int(labels.max()) + 1
    mean = std = np.array([127.5])
    if is_vectors:
        with np.errstate(over="ignore"):
            data = data.astype(np.float32)
        if not np.isfinite(data).all():
            raise UserError(f"{source}: data hold values that are not finite in float32: expected finite numbers; "
                            "remove or scale these rows")
        mean, std = data.mean(0, dtype=np.float64), data.std(0, dtype=np.float64)
        std[std == 0] = 1
    return Dataset(data, labels, DataSpec(data.shape[1:], num_classes, mean.tolist(), std.tolist()))


# ---- Data sets that are downloaded


CIFAR10 = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")  # and its MD5


@contextlib.contextmanager
def downloads(name: str, data_dir: str, files: list[str], source: str):
    """Turns an error within, where `files` are downloaded or read, into one line: which to put there, from `source`."""
    try:
        yield
    except (OSError, RuntimeError, EOFError, KeyError, tarfile.TarError) as error:  # no network, no room, a bad archive
        raise UserError(f"{name} is not in {data_dir}, or is corrupt there, and cannot be downloaded "
                        f"({first_line(error)}): put {' and '.join(files)} there, from {source}, or run the preset "
                        "'digits', which needs no download") from error


def cifar10(data_dir: str, download: bool, split: str) -> Dataset:
    """50,000 photographs of 10 classes, 32 x 32, and 10,000 for testing.

    Read from the archive of plain bytes: the pickles of the other one could run code.
    """
    url, md5 = CIFAR10
    path = os.path.join(data_dir, os.path.basename(url))
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    with downloads("CIFAR10", data_dir, [path], url):
        if download:
            import_torchvision().datasets.utils.download_url(url, data_dir, md5=md5)  # unless it is there
        with tarfile.open(path) as archive:
            parts = [archive.extractfile(f"cifar-10-batches-bin/{name}.bin").read() for name in names]
    rows = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 1 + 3 * 32 * 32)  # a label and an image in each row
    return make_dataset(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0])


def from_torchvision(name: str, data_dir: str, download: bool, split: str) -> Dataset:
    """torchvision's data set `name`, of grey images; its archives are in `data_dir`/`name`/raw."""
    cls = getattr(import_torchvision().datasets, name)
    files = [os.path.join(data_dir, name, "raw", file) for file, md5 in cls.resources]
    with downloads(name, data_dir, files, cls.mirrors[0]):
        data = cls(data_dir, train=split == "train", download=download)
    return make_dataset(data.data.numpy()[:, None], data.targets)


# ---- Data sets that need no download


def digits(split: str) -> Dataset:
    """1,500 of scikit-learn's 1,797 handwritten digits, 8 x 8, values 0 to 16 scaled to 0 to 255; 297 for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    splits = train_test_split(np.arange(len(data.target)), test_size=297, stratify=data.target, random_state=0)
    rows = np.sort(splits[SPLITS.index(split)])
    return make_dataset(np.rint(data.images[rows] * (255 / 16)).astype(np.uint8)[:, None], data.target[rows])


def moons(split: str) -> Dataset:
    """20,000 points on two half circles of radius 1, with noise 0.05; as many for testing. The label is the circle."""
    from sklearn.datasets import make_moons

    return make_dataset(*make_moons(20_000, noise=0.05, random_state=SPLITS.index(split)))


def eight_gaussians(split: str) -> Dataset:
    """20,000 points of eight Gaussians, standard deviation 0.1, on a circle of radius 2; as many for testing.

    The label is the number of the Gaussian.
    """
    rng = np.random.default_rng(SPLITS.index(split))
    labels = rng.integers(8, size=20_000)
    angles = labels * np.pi / 4
    centres = 2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return make_dataset(centres + 0.1 * rng.standard_normal((20_000, 2)), labels)


def checkerboard(split: str) -> Dataset:
    """20,000 points, uniform on the eight black squares of a 4 x 4 board on [-2, 2]^2; as many for testing.

    The label is the number of the square.
    """
    rng = np.random.default_rng(SPLITS.index(split))
    labels = rng.integers(8, size=20_000)
    corners = np.stack([labels % 4, 2 * (labels // 4) + labels % 2], axis=1)  # column + row is even
    return make_dataset(corners - 2 + rng.random((20_000, 2)), labels)


# ---- Your own data


def decode_image(path: str, size: int) -> np.ndarray:
    """The image as (3, size, size) uint8, resized to cover the square and cropped to its middle.

    It is turned as its EXIF data say, and white where it is transparent.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            return np.asarray(image).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image ({first_line(error)}): repair or remove it") from error


def split_folders(data_dir: str) -> dict[str, str]:
    """The folder of each split: DATA_DIR/train and DATA_DIR/test (or val); or DATA_DIR, with no test split."""
    train, *tests = [os.path.join(data_dir, name) for name in ("train", "test", "val")]
    tests = [folder for folder in tests if os.path.isdir(folder)]
    return {"train": train, "test": tests[0]} if tests and os.path.isdir(train) else {"train": data_dir}


def image_folder(data_dir: str, image_size: int, split: str) -> Dataset:
    """Images of any size in a folder of class folders, or in two of these: DATA_DIR/train and DATA_DIR/test (or val).

    They are decoded once into data/cache, and read from there until the folder changes.
    """
    folders = split_folders(data_dir)
    if split not in folders:
        raise UserError(f"{data_dir} has no test split: expected class folders in {data_dir}/train and in "
                        f"{data_dir}/test")
    folder, datasets = folders[split], import_torchvision().datasets
    try:
        images, classes = datasets.ImageFolder(folder), datasets.folder.find_classes(folders["train"])[0]
        paths, labels = zip(*images.samples)
        listing = "\n".join(f"{path} {(stat := os.stat(path)).st_size} {stat.st_mtime_ns}" for path in paths)
    except OSError as error:
        raise UserError(f"{folder} is no folder of class folders of images ({first_line(error)}): expected "
                        "DATA_DIR/CLASS/IMAGE.jpg (or .png, ...); set --data_dir, or repair the folder") from error
    if images.classes != classes:
        raise UserError(f"{folder} has the classes {', '.join(images.classes)}, and {folders['train']} has "
                        f"{', '.join(classes)}: expected the same")
    prefix = os.path.join(CACHE, f"{hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:12]}-{image_size}-")
    cache = f"{prefix}{hashlib.sha256(listing.encode()).hexdigest()[:12]}.npy"

    def write(file):
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (len(paths), 3, image_size, image_size)})
        with ThreadPoolExecutor() as pool, Progress("decoding", len(paths), "image") as progress:
            for start in range(0, len(paths), 1024):  # only so many decoded images wait in memory
                for image in pool.map(decode_image, paths[start : start + 1024], [image_size] * 1024):
                    file.write(image.tobytes())
                    progress.update()

    if not os.path.exists(cache):
        os.makedirs(CACHE, exist_ok=True)
        for old in glob.glob(f"{prefix}*"):  # of the folder as it was, or left by a kill; a new one may be in use
            if old.endswith(".npy") or time.time() - os.path.getmtime(old) > 3600:
                os.remove(old)
        write_atomically(cache, write)
    dataset = make_dataset(np.load(cache, mmap_mode="r"), labels, folder)
    if lossy := sum(path.lower().endswith((".jpg", ".jpeg")) for path in paths):
        dataset.note = f"{lossy} of {len(paths)} are JPEG files, which are lossy"
    return dataset


def from_array_file(path: str) -> Dataset:
    """A .npz file of `arr_0` and, for labels, `arr_1`; or a .npy file without labels.

    The data are vectors (N, D), or uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W).
    """
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            arrays = {"arr_0": arrays}
        data, labels = np.asarray(arrays["arr_0"]), arrays.get("arr_1")
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or "it holds something else, or is damaged"
        raise UserError(f"cannot read {path} ({why}): expected a .npz file of numbers, arr_0 and for labels arr_1, as "
                        "numpy.savez(path, data, labels) writes it, or a .npy file") from error
    if data.dtype == np.uint8:
        data = data[..., None] if data.ndim == 3 else data
        if data.ndim == 4 and data.shape[3] in (1, 3, 4):
            data = np.ascontiguousarray(np.moveaxis(data, 3, 1))
    return make_dataset(data, labels, path)


DATASETS = {
    "cifar10": cifar10,
    "mnist": functools.partial(from_torchvision, "MNIST"),  # 60,000 handwritten digits, 28 x 28; 10,000 for testing
    "fashion_mnist": functools.partial(from_torchvision, "FashionMNIST"),  # as many pictures of 10 kinds of clothes
    "digits": digits,
    "image_folder": image_folder,
    "moons": moons,
    "eight_gaussians": eight_gaussians,
    "checkerboard": checkerboard,
}


def load_dataset(name: str, data_dir: str = "data", image_size: int = 32, download: bool = False,
                 split: str = "train") -> Dataset:
    """The split, train or test, of the data set of this name, or of a .npz or .npy file.

    The test split of FILE.npz is FILE_test.npz. `image_size` is in pixels, for image_folder. Raises UserError for an
    unknown name, and for data that are missing or bad.
    """
    if name.endswith((".npz", ".npy")):
        if split == "test":
            name = "_test".join(os.path.splitext(name))
            if not os.path.exists(name):
                raise UserError(f"there is no test split {name}: expected a file of the same kind as that for training")
        dataset = from_array_file(name)
    else:
        function = look_up(DATASETS | {"a FILE.npz or FILE.npy": None}, name)
        if split == "test" and "split" not in parameters_of(function):
            raise UserError(f"{name} has no test split: let its function in data_utils.py take `split`, train or test")
        settings = dict(data_dir=data_dir, image_size=image_size, download=download, split=split)
        dataset = call_with_settings(function, settings)
    dataset.name = dataset.name or f"{name} {split}"
    return dataset


# ---- Items and labels that are shown, drawn or trained on


def examples(dataset: Dataset, n: int) -> np.ndarray:
    """Indices (n,) of items to show: of class 0, 1, 2, ..., 0, 1, 2, ..., as in sample grids; without labels the first.

    They start again where there are too few. -1 stands for an item of a class that has none.
    """
    labels = np.zeros(len(dataset.data)) if dataset.labels is None else dataset.labels
    by_class = [np.flatnonzero(labels == k) for k in range(max(1, min(n, dataset.spec.num_classes)))]
    return np.stack([np.resize(rows if len(rows) else -1, n) for rows in by_class], axis=1).flatten()[:n]


def spread_labels(labels: np.ndarray, n: int) -> Tensor:
    """Labels (n,) with the frequencies of `labels`; for any m, the first m of them have these as well.

    They are read from the sorted labels in steps of the golden ratio.
    """
    place = np.arange(n) * ((5**0.5 - 1) / 2) % 1
    return torch.from_numpy(np.sort(labels)[(place * len(labels)).astype(int)])


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int, name: str) -> np.ndarray:
    """The order (n,) in which an epoch takes the items of the data set of this name."""
    return np.random.default_rng(make_seed(seed, "epoch", epoch, name)).permutation(n)


@dataclass
class Batches:
    """The items that each step takes, epoch after epoch, each epoch in an order of its own.

    Called with a step it gives the items `rows` (a slice) of the global batch: uint8 or float32 (B, ...), and labels
    (B,) or None. They depend on nothing but seed, step and the data set's name.
    """

    dataset: Dataset
    batch_size: int
    seed: int

    def indices(self, step: int) -> np.ndarray:
        """Indices (B,) of the global batch of this step, which may reach into the next epoch, or span several."""
        n, first = len(self.dataset.data), step * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), n)
        return np.concatenate([epoch_order(n, self.seed, epoch, self.dataset.name)[places[epochs == epoch]]
                               for epoch in np.unique(epochs)])

    def __call__(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        indices, labels = self.indices(step)[rows], self.dataset.labels
        data = torch.from_numpy(self.dataset.data[indices])
        return data, None if labels is None else torch.from_numpy(labels[indices])
