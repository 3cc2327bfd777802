"""Data sets: the named ones, downloads from a server on this machine, image folders, array files; training batches."""

import functools
import hashlib
import http.server
import io
import os
import pickle
import shutil
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import data_utils
from data_utils import DATASETS, Batches, DataSpec, load_dataset, make_dataset, spread_labels
from utils import UserError, import_torchvision

# ---- Sets that need no download


def test_digits_are_all_there():
    from sklearn.datasets import load_digits

    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    assert train.data.shape == (1500, 1, 8, 8) and test.data.shape == (297, 1, 8, 8) and train.data.dtype == np.uint8
    assert train.data.max() == 255 and train.spec.num_classes == test.spec.num_classes == 10
    assert np.abs(np.bincount(train.labels) / 1500 - np.bincount(test.labels) / 297).max() < 0.003

    def pairs(images, labels):
        return sorted((*image.ravel().tolist(), int(label)) for image, label in zip(images, labels))

    shipped = load_digits()
    together = np.concatenate([train.data, test.data]), np.concatenate([train.labels, test.labels])
    assert pairs(*together) == pairs(np.rint(shipped.images * (255 / 16)).astype(np.uint8), shipped.target)


@pytest.mark.parametrize("name", ["moons", "eight_gaussians", "checkerboard"])
def test_points(name):
    data = load_dataset(name)
    assert data.data.shape == (20_000, 2) and data.data.dtype == np.float32 and len(data.labels) == 20_000
    assert np.array_equal(load_dataset(name).data, data.data)
    test = load_dataset(name, split="test")
    assert test.data.shape == data.data.shape and not np.isin(test.data, data.data).all(1).any()
    in_test, in_train = (np.quantile(split.data, [0.1, 0.5, 0.9], axis=0) for split in (test, data))
    assert np.abs(in_test - in_train).max() < 0.1
    encoded = data.spec.encode(torch.from_numpy(data.data))
    torch.testing.assert_close(encoded.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(encoded.std(0), torch.ones(2), atol=1e-3, rtol=0)
    if name == "checkerboard":
        cell = np.floor(data.data + 2).astype(int)
        assert (cell.sum(1) % 2 == 0).all() and len({(*c, k) for c, k in zip(cell.tolist(), data.labels.tolist())}) == 8
    if name == "eight_gaussians":
        centre = np.stack([data.data[data.labels == k].mean(0) for k in range(8)])
        np.testing.assert_allclose(np.linalg.norm(centre, axis=1), 2, atol=0.02)


def test_encode_and_decode():
    pixels = torch.arange(256).to(torch.uint8).reshape(1, 1, 16, 16)
    spec = DataSpec((1, 16, 16), 0, [127.5], [127.5])
    x = spec.encode(pixels)
    assert x.min() == -1 and x.max() == 1 and torch.equal(spec.decode(x), pixels)
    assert spec.decode(torch.tensor([-3.0, 3.0, 0.003])).tolist() == [0, 255, 128]
    constant = make_dataset(np.array([[1.0, 5.0], [3.0, 5.0]]), None)
    x = constant.spec.encode(torch.from_numpy(constant.data))
    assert x.tolist() == [[-1, 0], [1, 0]] and constant.spec.num_classes == 0
    assert torch.equal(constant.spec.decode(x), torch.from_numpy(constant.data))


# ---- Downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """CIFAR-10 comes from a server on this machine: 60 made-up images in an archive as published, pickled by part.

    Gives the folder that it serves, and the labels and pixels (60, 3073).
    """
    rows = np.random.default_rng(0).integers(0, 256, (60, 3073), np.uint8)
    rows[:, 0] = np.arange(60) % 10
    parts = {f"data_batch_{i + 1}": rows[10 * i : 10 * i + 10] for i in range(5)} | {"test_batch": rows[50:]}
    files = {name: {"data": part[:, 1:], "labels": part[:, 0].tolist()} for name, part in parts.items()}
    files = {name: pickle.dumps(part) for name, part in (files | {"batches.meta": {"label_names": ["x"] * 10}}).items()}
    folder, sums = tmp_path / "served", {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    cls, archive = import_torchvision().datasets.CIFAR10, (folder / "cifar-10-python.tar.gz").read_bytes()
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": sums["batches.meta"]})
    for split in ("train_list", "test_list"):
        monkeypatch.setattr(cls, split, [[name, sums[name]] for name, _ in getattr(cls, split)])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(cls, "url", f"http://127.0.0.1:{httpd.server_port}/{cls.filename}")
        yield folder, rows
        httpd.shutdown()


def test_cifar10_is_downloaded_only_where_asked(server, tmp_path):
    here = str(tmp_path / "data")
    with pytest.raises(UserError, match="CIFAR10 is not in"):
        load_dataset("cifar10", here, download=False)
    folder, rows = server
    data = load_dataset("cifar10", here, download=True)
    assert data.data.shape == (50, 3, 32, 32) and data.data.dtype == np.uint8 and data.spec.num_classes == 10
    assert np.array_equal(data.labels, rows[:50, 0]) and data.labels.dtype == np.int64
    assert np.array_equal(data.data.reshape(50, -1), rows[:50, 1:]) and data.data.flags["C_CONTIGUOUS"]
    os.remove(folder / "cifar-10-python.tar.gz")
    assert np.array_equal(load_dataset("cifar10", here, download=False).data, data.data)
    assert np.array_equal(load_dataset("cifar10", here, split="test").data.reshape(10, -1), rows[50:, 1:])


def test_no_network_and_a_corrupt_archive(server, tmp_path):
    os.remove(server[0] / "cifar-10-python.tar.gz")
    here = tmp_path / "data"
    words = "CIFAR10 is not in .* cannot be downloaded .*put .*cifar-10-python.tar.gz there, from http.*'digits'"
    with pytest.raises(UserError, match=words):
        load_dataset("cifar10", str(here), download=True)
    here.mkdir(exist_ok=True)
    (here / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    for download in (True, False):
        with pytest.raises(UserError, match="or is corrupt there, .*put .*cifar-10-python.tar.gz there, from http"):
            load_dataset("cifar10", str(here), download=download)


def test_a_corrupt_archive_is_downloaded_again(server, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    assert np.array_equal(load_dataset("cifar10", str(tmp_path), download=True).labels, server[1][:50, 0])


class Bomb:
    def __reduce__(self):
        return open, (Bomb.path, "w")


def test_a_pickle_that_is_not_cifar10s_is_not_opened(server, tmp_path):
    """It could run code. It is replaced where downloading is allowed, and refused elsewhere."""
    before, Bomb.path = load_dataset("cifar10", str(tmp_path), download=True), str(tmp_path / "exploded")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="or is corrupt there"):
        load_dataset("cifar10", str(tmp_path))
    assert np.array_equal(load_dataset("cifar10", str(tmp_path), download=True).data, before.data)
    assert not os.path.exists(Bomb.path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_reads_its_archives(name, tmp_path):
    """IDX files as published (LeCun's format): 2 bytes zero, type, dimensions, sizes, data."""
    folder = tmp_path / ("MNIST" if name == "mnist" else "FashionMNIST") / "raw"
    with pytest.raises(UserError, match=f"MNIST is not in .*put {folder}/train-images.*-ubyte.gz there, from http"):
        load_dataset(name, str(tmp_path))
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    for split, rows in (("train", slice(30)), ("t10k", slice(30, None))):
        arrays = {"images-idx3": images[rows], "labels-idx1": np.arange(40, dtype=np.uint8)[rows] % 10}
        for kind, array in arrays.items():
            sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
    data, test = load_dataset(name, str(tmp_path)), load_dataset(name, str(tmp_path), split="test")
    assert np.array_equal(test.data[:, 0], images[30:])
    assert data.data.shape == (30, 1, 28, 28) and np.array_equal(data.data[:, 0], images[:30])
    assert np.array_equal(data.labels, np.arange(30) % 10) and data.spec.num_classes == 10


# ---- Folders of images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of images of many sizes and modes; the cache goes to the test's folder."""
    monkeypatch.setattr(data_utils, "CACHE", str(tmp_path / "cache"))
    root = tmp_path / "my images"
    images = [("RGB", (40, 20), (200, 0, 0)), ("L", (16, 16), 100), ("RGBA", (9, 30), (0, 200, 0, 255)),
              ("P", (16, 17), 3), ("CMYK", (20, 20), (0, 0, 0, 0))]
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        for i, (mode, size, fill) in enumerate(images):
            Image.new(mode, size, fill).save(root / name / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    return root


def test_image_folder(folder):
    data = load_dataset("image_folder", str(folder), image_size=16)
    assert data.data.shape == (10, 3, 16, 16) and data.spec.num_classes == 2
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    assert data.data[0, :, 8, 8].tolist() == [200, 0, 0] and data.data[1, :, 8, 8].tolist() == [100, 100, 100]


def test_splits_of_an_image_folder(folder, tmp_path):
    words = "has no test split: expected class folders in .*my images/train and in .*my images/test"
    with pytest.raises(UserError, match=words):
        load_dataset("image_folder", str(folder), 16, split="test")
    for place, name in (("both", "test"), ("other", "val")):
        shutil.copytree(folder, tmp_path / place / "train")
        shutil.copytree(folder, tmp_path / place / name)
        for i in (0, 1):
            (tmp_path / place / name / "dogs" / f"{i}.png").unlink()
        train, test = (load_dataset("image_folder", str(tmp_path / place), 16, split=split)
                       for split in ("train", "test"))
        assert train.labels.tolist() == [0] * 5 + [1] * 5 and test.labels.tolist() == [0] * 5 + [1] * 3
    shutil.copytree(folder / "cats", tmp_path / "classes" / "cats")
    shutil.copytree(folder / "cats", tmp_path / "classes" / "test")  # a class of this name, as there is no train
    assert load_dataset("image_folder", str(tmp_path / "classes"), 16).labels.tolist() == [0] * 5 + [1] * 5
    (tmp_path / "both" / "test" / "cats").rename(tmp_path / "both" / "test" / "birds")
    with pytest.raises(UserError, match="has the classes birds, dogs, and .*train has cats, dogs"):
        load_dataset("image_folder", str(tmp_path / "both"), 16, split="test")


def test_images_are_turned_as_their_exif_data_say(folder):
    """Orientation 6: the camera was held sideways, and the first row of the file is the right side of the image."""
    stored, exif = np.zeros((16, 16, 3), np.uint8), Image.Exif()
    stored[:4], exif[0x0112] = 255, 6
    Image.fromarray(stored).save(folder / "cats" / "0.png", exif=exif)
    image = load_dataset("image_folder", str(folder), image_size=16).data[0]
    assert image[:, :, 12:].min() == 255 and image[:, :, :12].max() == 0


def test_images_are_cropped_in_the_middle(folder):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(folder / "cats" / "0.png")
    assert load_dataset("image_folder", str(folder), image_size=8).data[0].min() == 255


def test_the_cache_follows_the_folder(folder, tmp_path):
    before = load_dataset("image_folder", str(folder), image_size=16).data.copy()
    Image.new("RGB", (16, 16), (0, 0, 255)).save(folder / "cats" / "new.png")
    after = load_dataset("image_folder", str(folder), image_size=16).data
    assert len(after) == len(before) + 1 and after[5, :, 0, 0].tolist() == [0, 0, 255]
    assert len(os.listdir(tmp_path / "cache")) == 2
    changed = folder / "cats" / "new.png"
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")  # of the same size
    os.utime(changed, (0, 0))
    load_dataset("image_folder", str(folder), image_size=16)
    load_dataset("image_folder", str(folder), image_size=8)
    assert len(os.listdir(tmp_path / "cache")) == 4  # another size has a file of its own


def test_a_folder_is_decoded_once_and_in_parts(folder, monkeypatch):
    for i in range(600):  # more than two parts
        Image.new("RGB", (4, 4), (i % 256, i // 256, 0)).save(folder / "dogs" / f"many{i:03d}.png")
    data = load_dataset("image_folder", str(folder), image_size=4)
    assert data.data[-600:, :2, 1, 1].tolist() == [[i % 256, i // 256] for i in range(600)]
    monkeypatch.setattr(data_utils, "decode_image", None)
    again = load_dataset("image_folder", str(folder), image_size=4)
    assert np.array_equal(again.data, data.data) and again.labels.tolist() == [0] * 5 + [1] * 605


def test_bad_image_folders(folder, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="no folder of class folders.*set --data_dir"):
            load_dataset("image_folder", str(path))
    only_train = tmp_path / "data"
    shutil.copytree(folder, only_train / "train")
    with pytest.raises(UserError, match="holds one folder, train: .* --data_dir .*/data/train"):
        load_dataset("image_folder", str(only_train))
    assert load_dataset("image_folder", str(only_train / "train")).spec.num_classes == 2
    (folder / "dogs" / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match="dogs/text.jpg is not a readable image"):
        load_dataset("image_folder", str(folder))
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole, "JPEG")
    (folder / "dogs" / "text.jpg").write_bytes(whole.getvalue()[:1500])
    with pytest.raises(UserError, match="dogs/text.jpg is not a readable image"):
        load_dataset("image_folder", str(folder))
    assert len(os.listdir(tmp_path / "cache")) == 1  # of the good folder
    (folder / "dogs" / "text.jpg").unlink()
    (folder / "dogs" / "text.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match="No such file .*dogs/text.jpg.*repair the folder"):
        load_dataset("image_folder", str(folder))


# ---- Array files


def test_a_second_file_is_the_test_split(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", np.zeros((9, 8, 8), np.uint8))
    with pytest.raises(UserError, match="there is no test split .*x_test.npz"):
        load_dataset(str(tmp_path / "x.npz"), split="test")
    np.savez(tmp_path / "x_test.npz", np.ones((4, 8, 8), np.uint8))
    train, test = (load_dataset(str(tmp_path / "x.npz"), split=split) for split in ("train", "test"))
    assert train.data.shape == (9, 1, 8, 8) and test.data.shape == (4, 1, 8, 8)
    monkeypatch.setitem(DATASETS, "zeros", lambda: make_dataset(np.zeros((9, 2)), None))
    assert len(load_dataset("zeros").data) == 9
    with pytest.raises(UserError, match="zeros has no test split: let its function"):
        load_dataset("zeros", split="test")


@pytest.mark.parametrize("counts", [[50, 50], [1, 99], [10, 20, 70]])
def test_spread_labels(counts):
    """Any first part has the frequencies of the whole, to a few labels."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    spread = spread_labels(labels, 1000).numpy()
    for n in (10, 100, 1000):
        found = np.bincount(spread[:n], minlength=len(counts))
        assert np.abs(found - np.array(counts) * n / 100).max() <= 2.5
    assert np.array_equal(spread_labels(labels, 100), spread[:100])


@pytest.mark.parametrize(
    "shape, stored",
    [((20, 8, 8), (1, 8, 8)), ((20, 8, 6, 3), (3, 8, 6)), ((20, 3, 8, 6), (3, 8, 6)), ((20, 8, 8, 1), (1, 8, 8)),
     ((20, 1, 4, 4), (1, 4, 4)), ((20, 4, 6, 3), (3, 4, 6)), ((20, 4, 4, 3), (3, 4, 4)), ((20, 3, 4, 4), (3, 4, 4)),
     ((20, 3, 6, 4), (3, 6, 4)), ((20, 4, 4, 4), (4, 4, 4))],
)
def test_image_arrays(tmp_path, shape, stored):
    images, path = np.random.default_rng(0).integers(0, 256, shape, np.uint8), str(tmp_path / "x.npz")
    np.savez(path, images, np.arange(20) % 4)
    data = load_dataset(path)
    assert data.spec.shape == stored and data.spec.num_classes == 4 and data.spec.is_image
    expected = images if shape[1:] == stored else images.reshape(20, *shape[1:3], -1).transpose(0, 3, 1, 2)
    assert np.array_equal(data.data, expected)


def test_vector_arrays_and_files_without_labels(tmp_path):
    path = str(tmp_path / "x.npy")
    np.save(path, np.random.default_rng(0).normal(3, 2, (100, 5)))
    data = load_dataset(path)
    assert data.data.shape == (100, 5) and data.labels is None and not data.spec.is_image
    assert data.spec.num_classes == 0
    np.savez(tmp_path / "x.npz", np.zeros((3, 2)))
    assert load_dataset(str(tmp_path / "x.npz")).labels is None


def test_bad_arrays(tmp_path):
    path = str(tmp_path / "x.npz")
    good = np.zeros((4, 2), np.float32)
    for arrays, words in [
        ((np.zeros((4, 8, 8), np.float32),), "float32 of shape .* expected vectors"),
        ((np.zeros(4),), "expected vectors"),
        ((np.zeros((0, 2)),), "expected vectors"),
        ((np.zeros((4, 2), complex),), "expected vectors"),
        ((np.array([["a", "b"]]),), "expected vectors"),
        ((np.array([[1, None]], object),), "cannot read"),
        ((np.full((4, 2), np.nan),), "not finite"),
        ((good, np.zeros(3, int)), "labels are .* expected whole numbers of shape"),
        ((good, np.zeros(4)), "labels are .* expected whole numbers of shape"),
        ((good, np.array([0, 1, -1, 2])), "labels run from -1 to 2"),
        ((good, np.array([0, 1, 2, 10**12])), "run from 0 to 1000000000000: expected the classes' numbers"),
        ((good, np.array([0, 1, 2, 2**63], np.uint64)), "run from 0 to 9223372036854775808: expected"),
        ((np.full((4, 2), 1e300),), "not finite in float32"),
        ((np.zeros((4, 2), "timedelta64[s]"),), "expected vectors"),
    ]:
        np.savez(path, *arrays)
        with pytest.raises(UserError, match=words):
            load_dataset(path)
    np.savez(path, images=good)
    with pytest.raises(UserError, match="cannot read .* expected a .npz file of numbers, arr_0 and for labels arr_1"):
        load_dataset(path)
    for content in (b"", b"PK\x03\x04 half a zip", b"text"):
        open(path, "wb").write(content)
        with pytest.raises(UserError, match="cannot read"):
            load_dataset(path)
    with pytest.raises(UserError, match="cannot read"):
        load_dataset(str(tmp_path / "nowhere.npz"))


def test_unknown_name():
    with pytest.raises(UserError, match=f"expected one of {', '.join(DATASETS)}"):
        load_dataset("cifar11")


# ---- Batches


def dataset(n):
    return make_dataset(np.arange(n, dtype=np.float32)[:, None], np.arange(n) % 3)


@pytest.mark.parametrize("n, batch_size", [(10, 4), (10, 10), (7, 20), (5, 1)])
def test_every_epoch_takes_each_item_once_in_a_new_order(n, batch_size):
    batches = Batches(dataset(n), batch_size, seed=0)
    order = np.concatenate([batches.indices(step) for step in range(3 * n)])[: 3 * n]
    epochs = order.reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs.tolist())
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_batch_is_a_function_of_seed_and_step():
    one, same, other = (Batches(dataset(50), 8, seed) for seed in (1, 1, 2))
    forward = [one.indices(step) for step in range(20)]
    assert all(np.array_equal(same.indices(step), forward[step]) for step in reversed(range(20)))
    assert not np.array_equal(other.indices(0), forward[0])
    x, label, _ = one(3, slice(2, 6))
    assert np.array_equal(x[:, 0].numpy(), forward[3][2:6]) and np.array_equal(label.numpy(), forward[3][2:6] % 3)


def test_two_data_sets_of_one_length_are_read_in_two_orders():
    """Or the two ends of an interpolant would be paired. The order depends on the name: that of data set and split."""
    one, other = dataset(50), dataset(50)
    assert np.array_equal(Batches(one, 8, 0).indices(0), Batches(other, 8, 0).indices(0))
    other.name = "source"
    assert not np.array_equal(Batches(one, 8, 0).indices(0), Batches(other, 8, 0).indices(0))
    names = [("moons", "train"), ("moons", "test"), ("checkerboard", "train")]
    assert [load_dataset(name, split=split).name for name, split in names] == [" ".join(pair) for pair in names]


IMAGES, LABELS = np.zeros((6, 3, 8, 8), np.uint8), np.arange(6) % 2


@pytest.mark.parametrize("data, labels, words", [
    (IMAGES, LABELS[:5], r"labels are int64 of shape \(5,\): expected whole numbers of shape \(6,\)"),
    (IMAGES, LABELS.astype(float), "labels are float64 of shape"),
    (IMAGES, np.eye(6, 5, dtype=int), r"labels are int64 of shape \(6, 5\): expected"),
    (IMAGES, LABELS - 1, "labels run from -1 to 0: expected the classes' numbers 0, 1, 2"),
    (IMAGES, ["cat", "dog"] * 3, r"labels are <U3 of shape \(6,\): expected whole numbers"),
    (None, LABELS, r"data are object of shape \(\): expected"),
    (IMAGES[:, 0].astype(int), LABELS,
     r"data are int64 of shape \(6, 8, 8\): expected vectors \(N, D\), fields \(N, C, H, W\)"),
    (np.zeros((6, 8, 8, 2), np.uint8), LABELS, r"data are uint8 of shape \(6, 8, 8, 2\): expected .*C 1, 3 or 4"),
    (np.zeros((6, 8, 8)), None, r"of shape \(6, 8, 8\): expected"),
    (np.zeros((0, 3, 8, 8), np.uint8), None, r"of shape \(0, 3, 8, 8\): expected"),
    (np.full((6, 2), np.inf), None, "not finite in float32"),
    (np.zeros((0, 2)), None, r"of shape \(0, 2\): expected"),
])
def test_make_dataset_says_what_it_was_given(data, labels, words):
    with pytest.raises(UserError, match=f"^make_dataset: .*{words}") as raised:
        make_dataset(data, labels)
    assert "\n" not in str(raised.value)


def test_make_dataset_takes_tensors_and_lists():
    data = make_dataset(torch.from_numpy(IMAGES), LABELS.tolist())
    assert type(data.data) is type(data.labels) is np.ndarray and data.labels.dtype == np.int64
    assert np.array_equal(data.data, IMAGES) and np.array_equal(data.labels, LABELS)
