"""Data sets, and the batch of step s as a function of (seed, s).

A data set is an array of uint8 images (N, C, H, W) or float32 vectors (N, D), with labels (N,) int64 or None. A `DataSpec` says
what the numbers mean: `encode` takes them to the network's scale (images to [-1, 1], vectors to mean 0 and standard deviation
1), `decode` takes samples back. Arrays stay in memory, or on disk where they come from a folder of images, and are read a
whole batch at a time.

To add a data set, write a function that returns `make_dataset(data, labels)` and give it a row in DATASETS. It is called on
rank 0 first, with download=True; its arguments are those of `load_dataset` that it names. One that names `split` has a test split,
which only evaluate.py looks at.
"""

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

from utils import Progress, UserError, choose, first_line, import_torchvision, make_seed, parameters_of, to_uint8, write_atomically

CACHE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "cache")  # decoded image folders


@functools.lru_cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values as float32 on the device, copied there once: each copy would wait for a GPU."""
    return torch.tensor(values, device=device)


@dataclass
class DataSpec:
    """Shape of one item, number of classes (0: no labels), and the scale: `mean` and `std`, of one number or of D numbers."""

    shape: tuple[int, ...]
    num_classes: int
    mean: list[float]
    std: list[float]

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    def encode(self, data: Tensor) -> Tensor:
        """Data (B, ...) as they are stored -> float32 on the network's scale."""
        mean, std = constant(tuple(self.mean), data.device), constant(tuple(self.std), data.device)
        return (data.float() - mean) / std

    def decode(self, x: Tensor) -> Tensor:
        """Samples (B, ...) on the network's scale -> uint8 images or float32 vectors in the data's own units."""
        if self.is_image:
            return to_uint8(x, self.mean[0], self.std[0])
        return x.float() * constant(tuple(self.std), x.device) + constant(tuple(self.mean), x.device)


@dataclass
class Dataset:
    data: np.ndarray  # (N, C, H, W) uint8 or (N, D) float32
    labels: np.ndarray | None  # (N,) int64
    spec: DataSpec
    note: str = ""  # what one must know to compare figures, as of files that lost something
    name: str = ""  # decides, beside the seed, on the order in which it is read


SPLITS = ("train", "test")


def make_dataset(data: np.ndarray, labels: np.ndarray | None, source: str = "make_dataset") -> Dataset:
    """A data set of images (N, C, H, W) uint8, C 1, 3 or 4, or vectors (N, D), with labels (N,) of whole numbers from 0, or None.

    Raises UserError, which names `source`, for anything else.
    """
    for what, given in (("data", data), ("labels", labels)):
        if not isinstance(given, np.ndarray) and given is not None:
            raise UserError(f"{source}: {what} are of type {type(given).__name__}: expected an array of numpy")
    is_images = data.ndim == 4 and data.dtype == np.uint8 and data.shape[1] in (1, 3, 4)
    is_vectors = data.ndim == 2 and data.dtype.kind in "iuf"
    if not (is_images or is_vectors) or 0 in data.shape:
        raise UserError(f"{source}: data are {data.dtype} of shape {data.shape}: expected vectors (N, D), or images (N, C, H, W) uint8 "
                        "with C 1, 3 or 4")
    num_classes = 0
    if labels is not None:
        if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
            raise UserError(f"{source}: labels are {labels.dtype} of shape {labels.shape}: expected whole numbers of shape ({len(data)},)")
        if labels.min() < 0 or labels.max() >= max(len(data), 10_000):
            raise UserError(f"{source}: labels run from {labels.min()} to {labels.max()}: expected the numbers of the classes, from 0; "
                            "number them anew")
        labels, num_classes = labels.astype(np.int64), int(labels.max()) + 1
    if is_images:
        return Dataset(data, labels, DataSpec(tuple(data.shape[1:]), num_classes, [127.5], [127.5]))
    with np.errstate(over="ignore"):
        data = data.astype(np.float32)
    if not np.isfinite(data).all():
        raise UserError(f"{source}: data hold values that are not finite in float32: expected finite numbers; remove or scale these rows")
    std = data.std(0, dtype=np.float64)
    spec = DataSpec(tuple(data.shape[1:]), num_classes, data.mean(0, dtype=np.float64).tolist(), np.where(std > 0, std, 1.0).tolist())
    return Dataset(data, labels, spec)


# ---- Data sets that are downloaded


CIFAR10 = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")  # and its MD5


def fetch(name: str, data_dir: str, files: list[tuple[str, str]], source: str, get):
    """`get()`, which fetches or reads `files`, of (path in `data_dir`, MD5); a failure is told as what to put where, from `source`."""
    try:
        return get()
    except (OSError, RuntimeError, EOFError, KeyError, tarfile.TarError) as error:  # no network, no room, a bad archive
        check = import_torchvision().datasets.utils.check_integrity
        files = [(os.path.join(data_dir, file), md5) for file, md5 in files]
        corrupt = [path for path, md5 in files if os.path.exists(path) and not check(path, md5)]
        wrong = f"{corrupt[0]} is corrupt (its MD5 is not the published one)" if corrupt else f"{name} is not in {data_dir}"
        raise UserError(f"{wrong} and cannot be downloaded ({first_line(error)}): put {' and '.join(p for p, _ in files)} there, "
                        f"from {source}, or run the preset 'digits', which needs no download") from error


def cifar10(data_dir: str, download: bool, split: str) -> Dataset:
    """50,000 photographs of 10 classes, 32 x 32, and 10,000 for testing. From the archive of plain bytes, since a pickle could run code."""
    url, md5 = CIFAR10
    file = os.path.basename(url)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]

    def get():
        if download:
            import_torchvision().datasets.utils.download_url(url, data_dir, md5=md5)  # unless it is there
        with tarfile.open(os.path.join(data_dir, file)) as archive:
            parts = [archive.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names]
        return np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 1 + 3 * 32 * 32)  # a label and an image a row

    rows = fetch("CIFAR10", data_dir, [(file, md5)], url, get)
    return make_dataset(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0])


def from_torchvision(name: str, folder: str, data_dir: str, download: bool, split: str) -> Dataset:
    """A split of torchvision's class `name`, of grey images whose archives lie in `data_dir`/`folder`."""
    cls = getattr(import_torchvision().datasets, name)
    files = [(os.path.join(folder, file), md5) for file, md5 in cls.resources]
    data = fetch(name, data_dir, files, cls.mirrors[-1], lambda: cls(data_dir, train=split == "train", download=download))
    return make_dataset(np.asarray(data.data)[:, None], np.asarray(data.targets))


def mnist(data_dir: str, download: bool, split: str) -> Dataset:
    """60,000 handwritten digits, 28 x 28, and 10,000 for testing."""
    return from_torchvision("MNIST", "MNIST/raw", data_dir, download, split)


def fashion_mnist(data_dir: str, download: bool, split: str) -> Dataset:
    """60,000 pictures of 10 kinds of clothes, 28 x 28, and 10,000 for testing."""
    return from_torchvision("FashionMNIST", "FashionMNIST/raw", data_dir, download, split)


# ---- Data sets that need no download


def digits(split: str) -> Dataset:
    """1,500 of the 1,797 handwritten digits, 8 x 8, that scikit-learn ships (values 0 to 16, here 0 to 255); the others for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    rows = np.sort(train_test_split(np.arange(len(data.images)), test_size=297, stratify=data.target, random_state=0)[SPLITS.index(split)])
    return make_dataset(np.rint(data.images[rows] * (255 / 16)).astype(np.uint8)[:, None], data.target[rows])


def moons(split: str) -> Dataset:
    """20,000 points on two half circles, of radius 1, with noise 0.05, and as many for testing; the label says which."""
    from sklearn.datasets import make_moons

    return make_dataset(*make_moons(20_000, noise=0.05, random_state=SPLITS.index(split)))


def eight_gaussians(split: str) -> Dataset:
    """20,000 points of eight Gaussians, standard deviation 0.1, on a circle of radius 2, and as many for testing; the label says which."""
    rng = np.random.default_rng(SPLITS.index(split))
    labels = rng.integers(8, size=20_000)
    centres = 2 * np.stack([np.cos(labels * np.pi / 4), np.sin(labels * np.pi / 4)], axis=1)
    return make_dataset(centres + 0.1 * rng.standard_normal((20_000, 2)), labels)


def checkerboard(split: str) -> Dataset:
    """20,000 points, uniform on the eight black squares of a 4 x 4 board on [-2, 2]^2, and as many for testing; the label says which."""
    rng = np.random.default_rng(SPLITS.index(split))
    labels = rng.integers(8, size=20_000)
    column, row = labels % 4, 2 * (labels // 4) + labels % 2  # row + column is even
    corner = np.stack([column, row], axis=1)
    return make_dataset(corner - 2 + rng.random((20_000, 2)), labels)


# ---- Your own data


def decode_image(path: str, size: int) -> np.ndarray:
    """The image as (3, size, size) uint8, on white where it is transparent, resized to cover the square, and cropped in the middle."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image ({first_line(error)}): mend or remove it") from error


def split_folder(data_dir: str, split: str) -> str:
    """The folder of class folders of a split: DATA_DIR/train and DATA_DIR/test (or val), or, if there are no such, DATA_DIR and none."""
    train, *tests = [os.path.join(data_dir, name) for name in ("train", "test", "val")]
    tests = [folder for folder in tests if os.path.isdir(folder)]
    if os.path.isdir(train) and tests:
        return train if split == "train" else tests[0]
    if split == "test":
        raise UserError(f"{data_dir} has no test split: expected class folders in {train} and in {os.path.join(data_dir, 'test')}")
    return data_dir


def image_folder(data_dir: str, image_size: int, split: str) -> Dataset:
    """A folder of class folders of images of any size, decoded once into data/cache and read from there until the folder changes.

    With DATA_DIR/train and DATA_DIR/test (or val) of class folders each, these are the splits.
    """
    train, data_dir = split_folder(data_dir, "train"), split_folder(data_dir, split)
    datasets = import_torchvision().datasets
    try:
        folder, classes = datasets.ImageFolder(data_dir), datasets.folder.find_classes(train)[0]
    except OSError as error:
        raise UserError(f"{data_dir} is no folder of class folders of images: expected DATA_DIR/CLASS/IMAGE.jpg (or .png, ...) in each, "
                        f"but {first_line(error)}; set --data_dir") from error
    if folder.classes != classes:
        raise UserError(f"{data_dir} has the classes {', '.join(folder.classes)}, and {train} has {', '.join(classes)}: expected the same")
    paths, labels = [path for path, _ in folder.samples], [label for _, label in folder.samples]
    lossy = sum(path.lower().endswith((".jpg", ".jpeg")) for path in paths)
    try:
        listing = "\n".join(f"{path} {(stat := os.stat(path)).st_size} {stat.st_mtime_ns}" for path in paths)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): mend or remove it") from error
    prefix = os.path.join(CACHE, f"{hashlib.sha256(os.path.abspath(data_dir).encode()).hexdigest()[:12]}-{image_size}-")
    cache = f"{prefix}{hashlib.sha256(listing.encode()).hexdigest()[:12]}.npy"

    def write(file):
        shape = (len(paths), 3, image_size, image_size)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with ThreadPoolExecutor() as pool, Progress("decoding", len(paths), "image") as progress:
            for start in range(0, len(paths), 1024):
                for image in pool.map(functools.partial(decode_image, size=image_size), paths[start : start + 1024]):
                    file.write(image.tobytes())
                    progress.update()

    if not os.path.exists(cache):
        os.makedirs(CACHE, exist_ok=True)
        for old in glob.glob(f"{prefix}*"):  # of the folder as it was, or of a decoding that was killed; another may be at work
            if old.endswith(".npy") or time.time() - os.path.getmtime(old) > 3600:
                os.remove(old)
        write_atomically(cache, write)
    dataset = make_dataset(np.load(cache, mmap_mode="r"), np.array(labels), data_dir)
    dataset.note = f"{lossy} of {len(paths)} are JPEG files, which are lossy" if lossy else ""
    return dataset


def from_array_file(path: str) -> Dataset:
    """Vectors (N, D) or uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W) of a .npy or .npz file (`arr_0`, labels `arr_1`)."""
    try:
        file = np.load(path, allow_pickle=False)
        arrays = {name: file[name] for name in file.files} if hasattr(file, "files") else {"arr_0": file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or "it holds something else, or is damaged"
        raise UserError(f"cannot read {path} ({why}): expected a .npz or .npy file of numbers, as numpy.savez writes it") from error
    data, labels = arrays.get("arr_0"), arrays.get("arr_1")
    if not isinstance(data, np.ndarray):
        raise UserError(f"{path} has no array arr_0, only {', '.join(arrays) or 'nothing'}: write it as numpy.savez(path, data, labels)")
    if data.ndim == 3 and data.dtype == np.uint8:
        data = data[:, None]
    elif data.ndim == 4 and data.dtype == np.uint8 and data.shape[3] in (1, 3, 4):
        data = np.ascontiguousarray(data.transpose(0, 3, 1, 2))
    return make_dataset(data, labels, path)


DATASETS = {
    "cifar10": cifar10,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "digits": digits,
    "image_folder": image_folder,
    "moons": moons,
    "eight_gaussians": eight_gaussians,
    "checkerboard": checkerboard,
}


def is_array_file(name: str) -> bool:
    return name.endswith((".npz", ".npy"))


def check_labels(name: str) -> None:
    """Raises UserError if this data set has no labels, from its name or its file's table of contents, before data are read."""
    has_labels = not name.endswith(".npy")
    if name.endswith(".npz") and zipfile.is_zipfile(name):  # if it is none, loading it tells why
        names = zipfile.ZipFile(name).namelist()
        has_labels = "arr_1.npy" in names or "arr_0.npy" not in names
    if not has_labels:
        raise UserError(f"class_conditional is set, but {name} has no labels: use --class_conditional False, or add labels as arr_1 of "
                        "a .npz file")


def load_dataset(name: str, data_dir: str = "data", image_size: int = 32, download: bool = False, split: str = "train") -> Dataset:
    """A split, train or test, of the data set of this name, or of this .npz or .npy file, beside which NAME_test.npz is its test split.

    `image_size` is in pixels, for image_folder. Raises UserError for an unknown name, and for data that are missing or bad.
    """
    if is_array_file(name):
        if split == "test":
            name = "_test".join(os.path.splitext(name))
            if not os.path.exists(name):
                raise UserError(f"there is no test split {name}: expected a file of the same kind as that for training")
        dataset = from_array_file(name)
    else:
        if split == "test" and name in DATASETS and "split" not in parameters_of(DATASETS[name]):
            raise UserError(f"{name} has no test split: let its function in data_utils.py take `split`, train or test")
        dataset = choose(DATASETS, name, data_dir=data_dir, image_size=image_size, download=download, split=split)
    dataset.name = dataset.name or f"{name} {split}"
    return dataset


def spread_labels(labels: np.ndarray, n: int) -> Tensor:
    """Labels (n,), any first part of which has the frequencies of `labels`: steps of the golden ratio through their sorted list."""
    place = np.arange(n) * ((5**0.5 - 1) / 2) % 1
    return torch.from_numpy(np.sort(labels)[(place * len(labels)).astype(int)])


class Batches:
    """The rows of a data set that step s takes: epoch after epoch, each in a random order that is a function of (seed, name, epoch).

    Called with a step it gives the items `rows` (a slice) of the global batch: uint8 or float32 (B, ...), and labels (B,) or None.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(make_seed(self.seed, "epoch", epoch, self.dataset.name)).permutation(len(self.dataset.data))

    def indices(self, step: int) -> np.ndarray:
        """Indices (B,) of the global batch of this step; a batch may reach into the next epoch, or span several."""
        first, last, parts = step * self.batch_size, (step + 1) * self.batch_size, []
        while first < last:
            epoch, place = divmod(first, len(self.dataset.data))
            parts.append(self.order(epoch)[place : place + last - first])
            first += len(parts[-1])
        return np.concatenate(parts)

    def __call__(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        indices = self.indices(step)[rows]
        labels = self.dataset.labels
        return torch.from_numpy(self.dataset.data[indices]), None if labels is None else torch.from_numpy(labels[indices])
