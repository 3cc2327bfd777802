"""Data sets, and which of their items each training step takes.

A data set is an array of uint8 images (N, C, H, W) or float32 vectors (N, D), with labels (N,) int64 or None. Its
`DataSpec` gives the scale: `encode` takes images to [-1, 1], and vectors to mean 0 and standard deviation 1; `decode`
takes samples back. Arrays stay in memory, except those of an image folder, which stay on disk.

To add a data set, write a function that returns `make_dataset(data, labels)`, and give it a row in DATASETS. Of
`data_dir`, `image_size`, `download` and `split` it gets those that it has as parameters (`utils.call_with_settings`).
Rank 0 calls it first, with download=True. If it takes `split`, there is a test split, which only evaluate.py reads.
"""

import functools
import hashlib
import os
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

CACHE = os.path.join(os.path.dirname(__file__), "data", "cache")  # decoded image folders
SPLITS = ("train", "test")
CHANNELS = (1, 3, 4)  # that an image can have
constant = functools.lru_cache(torch.tensor)  # copied to a device once, since each copy makes a GPU wait


@dataclass
class DataSpec:
    """Shape of one item, number of classes (0: no labels), and `mean` and `std`: one number, or one for each of D."""

    shape: tuple[int, ...]
    num_classes: int
    mean: list[float]
    std: list[float]

    @property
    def is_image(self):
        return len(self.shape) == 3

    def scale(self, device) -> Tensor:
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
    name: str = ""  # the random order depends on it, and on the seed


def make_dataset(data, labels, source="make_dataset") -> Dataset:
    """A data set of uint8 images or of vectors (N, D), with labels (N,) from 0, or None.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W), with C 1, 3 or 4. Data and labels may be anything that
    numpy.asarray takes. Raises UserError, which names `source`, if they are something else.
    """
    data, num_classes = np.asarray(data), 0
    mean = std = [127.5]
    images = data[..., None] if data.ndim == 3 else data
    if images.ndim == 4 and images.shape[1] not in CHANNELS:
        images = np.ascontiguousarray(np.moveaxis(images, 3, 1))
    if images.ndim == 4 and images.shape[1] in CHANNELS and data.dtype == np.uint8 and data.size:
        data = images
    elif data.ndim == 2 and data.dtype.kind in "iuf" and data.size:
        if not (np.abs(data) <= np.finfo(np.float32).max).all():
            raise UserError(f"{source}: data hold values that are not finite in float32: expected finite numbers; "
                            "remove or scale these rows")
        data = data.astype(np.float32)
        mean, std = data.mean(0, dtype=np.float64).tolist(), data.std(0, dtype=np.float64).tolist()
        std = [value or 1.0 for value in std]
    else:
        raise UserError(f"{source}: data are {data.dtype} of shape {data.shape}: expected vectors (N, D), or uint8 "
                        "images (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1, 3 or 4")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
            raise UserError(f"{source}: labels are {labels.dtype} of shape {labels.shape}: expected whole numbers of "
                            f"shape ({len(data)},)")
        if labels.min() < 0 or labels.max() >= max(len(data), 10_000):
            raise UserError(f"{source}: labels run from {labels.min()} to {labels.max()}: expected the classes' "
                            "numbers 0, 1, 2, ...")
        labels, num_classes = labels.astype(np.int64), int(labels.max()) + 1
    return Dataset(data, labels, DataSpec(data.shape[1:], num_classes, mean, std))


# ---- Data sets that are downloaded


def from_torchvision(name, data_dir, download, split) -> Dataset:
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
        raise UserError(f"{name} is not in {data_dir}, or is corrupt there, and cannot be downloaded "
                        f"({first_line(error)}): put {files} there, from {source}, or run the preset 'digits', which "
                        "needs no download") from error
    return make_dataset(data.data, data.targets)


# ---- Data sets that need no download


def digits(split) -> Dataset:
    """1,500 of scikit-learn's 1,797 handwritten digits, 8 x 8, values 0 to 16 scaled to 0 to 255; 297 for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    splits = train_test_split(np.arange(len(data.target)), test_size=297, stratify=data.target, random_state=0)
    rows = np.sort(splits[SPLITS.index(split)])
    return make_dataset(np.rint(data.images[rows] * (255 / 16)).astype(np.uint8)[:, None], data.target[rows])


def moons(split) -> Dataset:
    """20,000 points on two half circles of radius 1, with noise 0.05; as many for testing. The label is the circle."""
    from sklearn.datasets import make_moons

    return make_dataset(*make_moons(20_000, noise=0.05, random_state=SPLITS.index(split)))


def eight_gaussians(split) -> Dataset:
    """20,000 points of eight Gaussians, standard deviation 0.1, on a circle of radius 2; as many for testing.

    The label is the number of the Gaussian.
    """
    from sklearn.datasets import make_blobs

    angles = np.arange(8) * np.pi / 4
    centres = 2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return make_dataset(*make_blobs(20_000, centers=centres, cluster_std=0.1, random_state=SPLITS.index(split)))


def checkerboard(split) -> Dataset:
    """20,000 points, uniform on the eight black squares of a 4 x 4 board on [-2, 2]^2; as many for testing.

    The label is the number of the square.
    """
    rng = np.random.default_rng(SPLITS.index(split))
    labels = rng.integers(8, size=20_000)
    corners = np.stack([labels % 4, 2 * (labels // 4) + labels % 2], axis=1)  # column + row is even
    return make_dataset(corners - 2 + rng.random((20_000, 2)), labels)


# ---- Your own data


def decode_image(path, size) -> np.ndarray:
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


def image_folder(data_dir, image_size, split) -> Dataset:
    """Images of any size in a folder of class folders, or in two of these: DATA_DIR/train and DATA_DIR/test (or val).

    They are decoded once into data/cache, and read from there until the folder changes.
    """
    folders = {"train": data_dir}
    for test in ("val", "test"):  # test, if there are both
        if os.path.isdir(f"{data_dir}/train") and os.path.isdir(f"{data_dir}/{test}"):
            folders = {"train": f"{data_dir}/train", "test": f"{data_dir}/{test}"}
    if split not in folders:
        raise UserError(f"{data_dir} has no test split: expected class folders in {data_dir}/train and in "
                        f"{data_dir}/test")
    folder, datasets = folders[split], import_torchvision().datasets
    try:
        images, classes = datasets.ImageFolder(folder), datasets.folder.find_classes(folders["train"])[0]
        paths, labels = zip(*images.samples)
        listing = "\n".join(f"{path} {os.path.getsize(path)} {os.path.getmtime(path)}" for path in paths)
    except OSError as error:
        raise UserError(f"{folder} is no folder of class folders of images ({first_line(error)}): expected "
                        "DATA_DIR/CLASS/IMAGE.jpg (or .png, ...); set --data_dir, or repair the folder") from error
    if classes == ["train"]:
        raise UserError(f"{data_dir} holds one folder, train: expected class folders, or train and test with class "
                        f"folders in each; use --data_dir {data_dir}/train")
    if images.classes != classes:
        raise UserError(f"{folder} has the classes {', '.join(images.classes)}, and {folders['train']} has "
                        f"{', '.join(classes)}: expected the same")
    cache = f"{CACHE}/{hashlib.sha256(listing.encode()).hexdigest()[:16]}-{image_size}"

    def write(file):
        decode = functools.partial(decode_image, size=image_size)
        with ThreadPoolExecutor() as pool, Progress("decoding", len(paths), "image") as progress:
            for start in range(0, len(paths), 256):  # only so many decoded images wait in memory
                for image in pool.map(decode, paths[start : start + 256]):
                    file.write(image.tobytes())
                    progress.update()

    if not os.path.exists(cache):
        write_atomically(cache, write)
    data = np.memmap(cache, np.uint8, "r", shape=(len(paths), 3, image_size, image_size))
    return make_dataset(data, labels, folder)


def from_array_file(path) -> Dataset:
    """A .npz file of `arr_0` and, for labels, `arr_1`; or a .npy file without labels. See `make_dataset`."""
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            arrays = {"arr_0": arrays}
        data, labels = arrays["arr_0"], arrays.get("arr_1")
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"cannot read {path} ({first_line(error)}): expected a .npz file of numbers, arr_0 and for "
                        "labels arr_1, as numpy.savez(path, data, labels) writes it, or a .npy file") from error
    return make_dataset(data, labels, path)


DATASETS = {
    "cifar10": functools.partial(from_torchvision, "CIFAR10"),  # 50,000 photographs of 10 classes; 10,000 for testing
    "mnist": functools.partial(from_torchvision, "MNIST"),  # 60,000 handwritten digits; 10,000 for testing
    "fashion_mnist": functools.partial(from_torchvision, "FashionMNIST"),  # as many pictures of 10 kinds of clothes
    "digits": digits,
    "image_folder": image_folder,
    "moons": moons,
    "eight_gaussians": eight_gaussians,
    "checkerboard": checkerboard,
}


def load_dataset(name, data_dir="data", image_size=32, download=False, split="train") -> Dataset:
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
        dataset = call_with_settings(
            function, dict(data_dir=data_dir, image_size=image_size, download=download, split=split))
    dataset.name = f"{name} {split}"
    return dataset


# ---- Labels that are drawn, and items that are trained on


def spread_labels(labels: np.ndarray, n) -> Tensor:
    """Labels (n,) in the proportions of `labels`. For any m, the first m have these proportions too, to rounding.

    They are read from the sorted labels in steps of the golden ratio.
    """
    place = np.arange(n) * ((5**0.5 - 1) / 2) % 1
    return torch.from_numpy(np.sort(labels)[(place * len(labels)).astype(int)])


@functools.lru_cache(maxsize=4)
def epoch_order(n, seed, epoch, name) -> np.ndarray:
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
    only_first: bool = False  # every step takes the items of step 0

    def indices(self, step) -> np.ndarray:
        """Indices (B,) of the global batch of this step, which may reach into the next epoch, or span several."""
        n, first = len(self.dataset.data), 0 if self.only_first else step * self.batch_size
        last = first + self.batch_size
        return np.concatenate([
            epoch_order(n, self.seed, epoch, self.dataset.name)[max(first - epoch * n, 0) : last - epoch * n]
            for epoch in range(first // n, -(-last // n))])

    def __call__(self, step, rows=slice(None)) -> tuple[Tensor, Tensor | None]:
        indices, labels = self.indices(step)[rows], self.dataset.labels
        data = torch.from_numpy(self.dataset.data[indices])
        return data, None if labels is None else torch.from_numpy(labels[indices])
