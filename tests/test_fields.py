"""Fields: rows of many files as one array, their statistics, data sets of them, data read by workers, turbulence."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data_utils
from build import check_condition
from config import Config
from data_utils import Batches, load_dataset, make_dataset
from fields import Frames, Items, open_frames, shards, statistics, vorticity
from utils import UserError

RNG = np.random.default_rng(0)
LENGTHS = (5, 1, 7)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Statistics go to a folder of the test."""
    monkeypatch.setattr(data_utils, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fields(n, *shape):
    """Numbers (n, *shape), (3, 4, 2) by default, of another mean and deviation in each channel."""
    shape = shape or (3, 4, 2)
    scale = np.arange(1, shape[0] + 1).reshape(-1, *(1,) * (len(shape) - 1))
    return (RNG.normal(size=(n, *shape)) * scale + 10 * scale).astype(np.float32)


def save(folder, *arrays):
    """The paths of these arrays as files a.npy, b.npy, ... of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{letter}.npy") for letter, _ in zip("abcdefghijklmnopqrstuvwxyz", arrays)]
    for path, array in zip(paths, arrays):
        np.save(path, array)
    return paths


def fails(words, function, *arguments, **settings):
    """The call raises UserError of one line that holds these words."""
    with pytest.raises(UserError, match=words) as raised:
        function(*arguments, **settings)
    assert "\n" not in str(raised.value)


# ---- Rows of several arrays


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("channels", [(), (1,), (2, 0)])
def test_frames_are_the_concatenation_of_their_arrays(tmp_path, on_disk, channels):
    arrays = [fields(n) for n in LENGTHS]
    frames = open_frames(save(tmp_path / "x", *arrays), channels) if on_disk else Frames(arrays, channels=channels)
    whole = np.concatenate(arrays)[:, list(channels) or slice(None)]
    assert frames.shape == whole.shape and len(frames) == len(whole) and frames.dtype == np.float32
    assert all(type(a) is (np.memmap if on_disk else np.ndarray) for a in frames.arrays)
    for rows in (slice(None), slice(3, 9), slice(None, None, -2), slice(4, 4), np.array([12, 0, 5, 5, 4, 6]),
                 np.array([-1]), np.arange(13) % 2 == 0, [7, 2]):
        found = frames[rows]
        assert np.array_equal(found, whole[rows]) and found.dtype == np.float32, rows


def test_frames_keep_bytes_and_take_other_numbers_as_float32():
    assert Frames([np.arange(4, dtype=np.uint8)[:, None]])[:].dtype == np.uint8
    for dtype in (np.float64, np.float16, np.int64):
        found = Frames([np.arange(4, dtype=dtype)[:, None]])[:]
        assert found.dtype == np.float32 and found[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("lag", [1, 3])
def test_lagged_pairs_stay_within_a_trajectory(tmp_path, lag):
    """Each number tells its trajectory and its time."""
    lengths = (5, 4, 7)
    arrays = [np.full((n, 2, 1, 1), 100 * k) + np.arange(n)[:, None, None, None] for k, n in enumerate(lengths)]
    for frames in (Frames(arrays, channels=(1,)), open_frames(save(tmp_path / "x", *arrays), (1,))):
        later, earlier = frames.lagged(lag)
        assert later.shape == earlier.shape == (sum(lengths) - lag * len(lengths), 1, 1, 1)
        expected = [100 * k + t for k, n in enumerate(lengths) for t in range(lag, n)]
        assert later[:].ravel().tolist() == expected
        assert np.array_equal(later[:] - lag, earlier[:])
        assert later[np.array([4, 0])].ravel().tolist() == [expected[4], expected[0]]


def test_a_lag_beyond_a_trajectory_is_refused(tmp_path):
    paths = save(tmp_path / "x", fields(5), fields(3))
    assert len(open_frames(paths).lagged(2)[0]) == 4
    fails(f"lag 3 is beyond trajectory {paths[1]} of 3 frames: use a smaller --lag", open_frames(paths).lagged, 3)
    fails("lag 5 is beyond trajectory 0 of 5 frames", Frames([fields(5), fields(9)]).lagged, 5)
    fails("lag 3 is beyond trajectory .*b.npy of 3 frames", load_dataset,
          save(tmp_path, fields(5), fields(3))[1], lag=3)


def test_shards_that_do_not_fit_are_refused(tmp_path):
    first, folder = fields(5), tmp_path / "train"
    other = str(folder / "b.npy")
    for second, words in [
        (fields(5, 3, 4, 3), r"b.npy holds float32 \('N', 3, 4, 3\), and .*a.npy float32 \('N', 3, 4, 2\): expected .*"
                             "rows of one shape"),
        (fields(5, 2, 4, 2), "expected .*rows of one shape"),
        (fields(5).astype(np.float64), r"b.npy holds float64 .*, and .*a.npy float32 .*: expected"),
        (fields(0), "b.npy holds .*: expected numbers"),
        (np.array([{}]), "cannot read .*b.npy .*: expected a .npy file of numbers"),
    ]:
        fails(words, open_frames, save(folder, first, second))
        fails(words, load_dataset, str(tmp_path))
    for only in (np.zeros(4), np.zeros((4, 2), complex), np.array([["a", "b"]])):
        fails("a.npy holds .*: expected numbers", open_frames, save(tmp_path, only))
    open(other, "wb").write(b"text")
    fails("cannot read .*b.npy .*: expected a .npy file of numbers", open_frames, [other])
    fails("cannot read .*nowhere.npy", open_frames, [str(tmp_path / "nowhere.npy")])


@pytest.mark.parametrize("channels", [(3,), (0, 5), (-1,)])
def test_unknown_channels_are_refused(tmp_path, channels):
    (path,) = save(tmp_path / "x", fields(5))
    words = rf"channels \({', '.join(map(str, channels))},?\) are not all there: .*a.npy has 0 to 2"
    fails(words, open_frames, [path], channels)
    fails(words, load_dataset, path, channels=channels)
    fails(r"channels \(0,\): expected with a FILE or FOLDER of fields, not with digits", load_dataset, "digits",
          channels=(0,))


@pytest.mark.parametrize("number, tested", [(2, 1), (10, 1), (11, 2), (21, 3)])
def test_the_last_tenth_of_the_shards_is_for_testing(tmp_path, number, tested):
    paths = save(tmp_path / "x", *[fields(2)] * number)
    (tmp_path / "x" / "notes.txt").touch()
    assert shards(str(tmp_path / "x"), "train") == paths[:-tested]
    assert shards(str(tmp_path / "x"), "test") == paths[-tested:]


def test_shards_of_folders_for_training_and_testing(tmp_path):
    folder = str(tmp_path)
    fails(f"{folder} has no .npy files for the train split: expected one for each trajectory", shards, folder, "train")
    outside = save(tmp_path, fields(2))
    assert shards(folder, "train") == outside
    fails("no .npy files for the test split", shards, folder, "test")
    train = save(tmp_path / "train", *[fields(2)] * 3)
    fails("no .npy files for the test split", shards, folder, "test")
    test = save(tmp_path / "test", fields(2), fields(2))
    assert shards(folder, "train") == train and shards(folder, "test") == test


# ---- Statistics


@pytest.mark.parametrize("channels", [(), (2, 0)])
def test_statistics_are_those_of_numpy(tmp_path, channels):
    """By channel, also in parts; a constant channel has the standard deviation 1."""
    arrays = [RNG.random((n, 3, 256, 256), np.float32) for n in (40, 50)]
    for a in arrays:
        a[:, 1] = 4.0
    whole = np.concatenate(arrays).astype(np.float64)
    mean, std = whole.mean((0, 2, 3)), whole.std((0, 2, 3))
    frames = Frames(arrays, channels=channels)
    assert frames[:].size > 2**24 or channels  # more than one part
    chosen = list(channels) or [0, 1, 2]
    found = statistics(frames, "")
    np.testing.assert_allclose(found[0], mean[chosen], rtol=1e-9)
    np.testing.assert_allclose(found[1], np.where(std == 0, 1, std)[chosen], rtol=1e-6)


def test_statistics_are_kept_until_a_file_changes(tmp_path, cache, monkeypatch):
    arrays, calls = [fields(5), fields(4)], []
    paths = save(tmp_path / "x" / "train", *arrays)
    monkeypatch.setattr(data_utils, "statistics", lambda *given: calls.append(1) or statistics(*given))

    def load(**settings):
        spec = load_dataset(str(tmp_path / "x"), **settings).spec
        return spec.mean, spec.std

    first = load()
    assert load() == first and len(calls) == 1 and len(os.listdir(cache)) == 1
    assert load(channels=(2,)) == tuple(pytest.approx([value[2]]) for value in first) and len(calls) == 2
    np.save(paths[1], arrays[1] + 3)
    os.utime(paths[1], (1, 1))  # at another time
    np.testing.assert_allclose(load()[0], np.concatenate([arrays[0], arrays[1] + 3]).mean((0, 2, 3)), rtol=1e-5)
    assert len(calls) == 3 and len(os.listdir(cache)) == 3
    np.save(paths[1], fields(6))
    os.utime(paths[1], (1, 1))  # of another size
    assert load() != first and len(calls) == 4
    save(tmp_path / "x" / "train", *arrays, fields(2))
    assert load() != first and len(calls) == 5
    assert make_dataset(Frames(arrays), None).spec.mean == pytest.approx(first[0]) and len(os.listdir(cache)) == 5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_names_its_file(tmp_path, cache, value):
    arrays = [fields(n) for n in LENGTHS]
    arrays[2][3, 1, 2, 0] = value
    paths = save(tmp_path / "x" / "train", *arrays)
    words = f"{paths[2]}: item 9 has values that are not finite in float32: expected finite numbers"
    fails(words, load_dataset, str(tmp_path / "x"))
    fails("make_dataset: data: item 9 has values that are not finite in float32", make_dataset, Frames(arrays), None)
    assert not list(cache.glob("*"))
    load_dataset(str(tmp_path / "x"), channels=(0, 2))  # without the channel it is whole
    fails("c.npy: data: item 3 has values that are not finite", make_dataset, arrays[2], None, "c.npy")


# ---- Data sets of fields


def assert_scaled(data):
    """`encode` gives mean 0 and standard deviation 1 in each channel; `decode` is its inverse."""
    stored = torch.from_numpy(data.data[:])
    x = data.spec.encode(stored)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(x.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(x.shape[1]), atol=1e-4, rtol=0)
    back = data.spec.decode(x)
    assert back.dtype == torch.float32 and data.spec.is_field and not data.spec.is_image
    torch.testing.assert_close(back, stored, rtol=1e-5, atol=1e-5)


def test_a_file_of_fields_with_conditions_and_a_test_split(tmp_path):
    arrays = {"x": fields(20), "x_cond": fields(20, 2, 2, 2), "x_test": fields(6), "x_test_cond": fields(6, 2, 2, 2)}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    for split, name in (("train", "x"), ("test", "x_test")):
        data = load_dataset(str(tmp_path / "x.npy"), split=split)
        assert isinstance(data.data, Frames) and data.data.shape == arrays[name].shape and data.labels is None
        assert np.array_equal(data.data[:], arrays[name]) and np.array_equal(data.cond[:], arrays[f"{name}_cond"])
        assert data.spec.shape == (3, 4, 2) and data.spec.cond_shape == (2, 2, 2) and data.spec.num_classes == 0
        assert_scaled(data)
        cond = data.spec.condition(torch.from_numpy(data.cond[:]))
        assert cond.shape == (len(data.data), 3, 2, 2) and (cond[:, 2] == 1).all()
        torch.testing.assert_close(cond[:, :2].mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(cond[:, :2].std((0, 2, 3), correction=0), torch.ones(2), atol=1e-4, rtol=0)
    os.remove(tmp_path / "x_test.npy")
    fails("there is no test split .*x_test.npy", load_dataset, str(tmp_path / "x.npy"), split="test")


def test_a_batch_has_the_items_and_the_conditions_of_its_indices(tmp_path):
    np.save(tmp_path / "x.npy", x := fields(20))
    np.save(tmp_path / "x_cond.npy", cond := fields(20, 3, 2, 1))
    batches = Batches(load_dataset(str(tmp_path / "x.npy")), 8, seed=0)
    for step in (0, 2):
        data, label, given = batches(step, slice(1, 5))
        rows = batches.indices(step)[1:5]
        assert np.array_equal(data, x[rows]) and np.array_equal(given, cond[rows]) and label is None


@pytest.mark.parametrize("name", ["arr_2", "cond"])
def test_an_npz_file_of_fields_with_conditions(tmp_path, name):
    """They have as many channels as the data: they are of the same quantities, and are scaled as these."""
    path, x, cond, labels = str(tmp_path / "x.npz"), fields(20), fields(20, 3, 2, 2) + 5, np.arange(20) % 4
    np.savez(path, x, labels, **{name: cond})
    data = load_dataset(path)
    assert np.array_equal(data.data, x) and np.array_equal(data.cond, cond) and np.array_equal(data.labels, labels)
    assert data.spec.cond_mean == data.spec.mean and data.spec.cond_std == data.spec.std
    assert_scaled(data)
    expected = data.spec.encode(torch.from_numpy(cond))
    assert torch.equal(data.spec.condition(torch.from_numpy(cond))[:, :3], expected)
    assert np.array_equal(load_dataset(path, channels=(2, 0)).data, x[:, [2, 0]])
    np.savez(path, x, **{name: fields(20, 5)})
    assert load_dataset(path).spec.cond_shape == (5,) and load_dataset(path).labels is None


def test_conditions_of_another_length_are_refused(tmp_path):
    words = "there are 3 conditions for 4 items: expected one for each"
    fails(f"^make_dataset: {words}", make_dataset, fields(4), None, cond=fields(3))
    fails(words, make_dataset, Frames([fields(4)]), None, cond=Frames([fields(1), fields(2)]))
    fails("conditions are complex64 of shape", make_dataset, fields(4), None, cond=np.zeros((4, 2), np.complex64))
    fails("conditions: item 0 has values that are not finite", make_dataset, fields(4), None,
          cond=np.full((4, 2), np.nan))
    np.save(tmp_path / "x.npy", fields(4))
    np.save(tmp_path / "x_cond.npy", fields(3))
    fails(f"x.npy: {words}", load_dataset, str(tmp_path / "x.npy"))


def test_a_folder_of_trajectories_with_a_lag_and_channels(tmp_path):
    arrays = [fields(n) for n in (6, 3, 5, 4)]
    save(tmp_path / "x", *arrays)
    for split, own in (("train", arrays[:3]), ("test", arrays[3:])):
        data = load_dataset(str(tmp_path / "x"), split=split, lag=2, channels=(2, 0))
        assert np.array_equal(data.data[:], np.concatenate([a[2:, [2, 0]] for a in own]))
        assert np.array_equal(data.cond[:], np.concatenate([a[:-2, [2, 0]] for a in own]))
        spec, whole = data.spec, np.concatenate(own)[:, [2, 0]]
        assert spec.shape == spec.cond_shape == (2, 4, 2)
        assert spec.cond_mean == spec.mean == pytest.approx(whole.mean((0, 2, 3)), rel=1e-4)
        assert spec.cond_std == spec.std == pytest.approx(whole.std((0, 2, 3)), rel=1e-4)
        both = data.spec.condition(torch.from_numpy(data.cond[:]))
        assert torch.equal(both[:, :2], spec.encode(torch.from_numpy(data.cond[:]))) and (both[:, 2] == 1).all()
    whole = load_dataset(str(tmp_path / "x"))
    assert whole.cond is None and whole.spec.cond_shape == ()
    assert_scaled(whole)


def test_a_folder_of_conditions_goes_with_a_folder_of_items(tmp_path):
    items, conds = [fields(n) for n in (6, 3, 4)], [fields(n, 1, 2, 2) for n in (6, 3, 4)]
    save(tmp_path / "x", *items), save(tmp_path / "x_cond", *conds)
    for split, own in (("train", slice(2)), ("test", slice(2, 3))):
        data = load_dataset(str(tmp_path / "x"), split=split)
        assert np.array_equal(data.data[:], np.concatenate(items[own]))
        assert np.array_equal(data.cond[:], np.concatenate(conds[own]))
    fails("expected one condition", load_dataset, str(tmp_path / "x"), lag=1)


def test_two_conditions_are_refused(tmp_path):
    (path,) = save(tmp_path, fields(5))
    fails("expected one condition, .*--lag or --corruption, and not two", load_dataset, path, lag=1, corruption="grey")


def test_an_items_lag_keeps_its_label(tmp_path):
    np.savez(tmp_path / "x.npz", x := fields(6), labels := np.arange(6) % 4)
    data = load_dataset(str(tmp_path / "x.npz"), lag=2)
    assert np.array_equal(data.data[:], x[2:]) and np.array_equal(data.cond[:], x[:-2])
    assert np.array_equal(data.labels, labels[2:])


READ_IN_BATCHES = """
import sys
import numpy as np
from data_utils import Batches, Dataset, DataSpec
from fields import open_frames

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

frames = open_frames(sys.argv[1:])
batches = Batches(Dataset(frames, None, DataSpec(frames.shape[1:], 0, [0.0], [1.0])), 64, seed=0)
batches(0)
before, most, total = resident(), 0.0, 0.0
for step in range(1, 51):
    total += batches(step)[0].sum().item()
    most = max(most, resident() - before)
print(most, total)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux says how much memory is resident")
def test_data_on_disk_do_not_fill_the_memory(tmp_path):
    """200 MiB in two files are read whole, in batches of 4 MiB."""
    for name in "ab":
        array = np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.float32, (1600, 1, 128, 128))
        array[:] = 1
        del array
    paths = [str(tmp_path / f"{name}.npy") for name in "ab"]
    result = subprocess.run([sys.executable, "-c", READ_IN_BATCHES, *paths], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    most, total = map(float, result.stdout.split())
    assert total == 50 * 64 * 128 * 128 and most < 40
    for path in paths:
        os.remove(path)


# ---- Data sets that are read item by item


class Pictures:
    """PIL images, which differ, and their numbers."""

    def __init__(self, n, mode="RGB"):
        self.n, self.mode = n, mode

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 4, 3), np.uint8)
        return Image.fromarray(pixels).convert(self.mode), i


class Arrays(torch.utils.data.Dataset):
    """Tensors (2, 4, 4), without a label."""

    def __len__(self):
        return 23

    def __getitem__(self, i):
        return torch.from_numpy(np.random.default_rng(i).normal(size=(2, 4, 4)) * 3 + 1)


def pixels(item):
    image = np.asarray(item)
    return image.transpose(2, 0, 1) if image.ndim == 3 else image[None]


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_items_are_read_as_images(mode, channels):
    source = Pictures(23, mode)
    data = make_dataset(Items(source), np.arange(23) % 5)
    assert data.data.shape == (23, channels, 6, 4) and len(data.data) == 23 and data.data.dtype == np.uint8
    assert data.spec.shape == (channels, 6, 4) and data.spec.is_image and data.spec.num_classes == 5
    for rows in (slice(2, 5), np.array([7, 0, 7])):
        expected = [pixels(source[i][0]) for i in np.arange(23)[rows]]
        assert np.array_equal(data.data[rows], expected)
    assert data.spec.mean == [127.5] and data.labels.dtype == np.int64


def test_items_are_read_as_arrays_with_conditions():
    data = make_dataset(Items(Arrays()), None, cond=Items(Pictures(23, "L")))
    whole = np.stack([Arrays()[i] for i in range(23)])
    assert data.data.shape == (23, 2, 4, 4) and data.data.dtype == np.float32 and data.labels is None
    np.testing.assert_allclose(data.data[:], whole, rtol=1e-6)
    np.testing.assert_allclose(data.spec.mean, whole.mean((0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(data.spec.std, whole.std((0, 2, 3)), rtol=1e-4)
    assert data.cond.shape == (23, 1, 6, 4) and data.spec.cond_shape == (1, 6, 4)
    assert_scaled(data)


@pytest.mark.parametrize("kind", ["images", "arrays"])
def test_workers_change_nothing(kind):
    """Each step has the items of its indices, also where training resumes at step 5, or goes back."""
    data = {"images": lambda: make_dataset(Items(Pictures(23)), np.arange(23) % 5),
            "arrays": lambda: make_dataset(Items(Arrays()), None, cond=Items(Pictures(23)))}[kind]()
    plain, workers = Batches(data, 8, seed=3), Batches(data, 8, seed=3, num_workers=2)
    direct = [data.data[plain.indices(step)[2:7]] for step in range(9)]
    for steps in (range(9), range(5, 8), range(2)):
        resumed = Batches(data, 8, seed=3, num_workers=2) if steps.start == 5 else workers
        for step in steps:
            a, b = plain(step, slice(2, 7)), resumed(step, slice(2, 7))
            assert np.array_equal(b[0], direct[step])
            assert all(x is None and y is None or torch.equal(x, y) for x, y in zip(a, b)), step
            if kind == "images":
                assert np.array_equal(b[1], plain.indices(step)[2:7] % 5)
            else:
                assert b[1] is None and b[2].shape == (5, 3, 6, 4)
    assert torch.equal(workers(3)[0], plain(3)[0])  # other rows
    loader = workers.loader
    workers(4)
    assert workers.loader is loader  # the workers go on, and are not started for each step


def test_workers_repeat_one_batch():
    data = make_dataset(Items(Pictures(23)), np.arange(23) % 5)
    first = Batches(data, 8, seed=3)(0)
    batches = Batches(data, 8, seed=3, overfit_one_batch=True, num_workers=1)
    for step in range(3):
        assert all(torch.equal(x, y) for x, y in zip(batches(step)[:2], first[:2]))


def test_items_have_no_lag(monkeypatch):
    monkeypatch.setitem(data_utils.DATASETS, "items", lambda: make_dataset(Items(Arrays()), None))
    fails("lag 1 needs trajectories, and items is read item by item", load_dataset, "items", lag=1)


# ---- Turbulence


N = 32
X = torch.arange(N) * 2 * torch.pi / N
Y, X = torch.meshgrid(X, X, indexing="ij")  # rows are y


def smooth(seed, waves=4):
    """A random vorticity (N, N) of waves of up to `waves` periods a side."""
    rng, w = np.random.default_rng(seed), torch.zeros(N, N)
    for kx in range(-waves, waves + 1):
        for ky in range(waves + 1):
            if (kx, ky) != (0, 0):
                w += rng.normal() * torch.cos(kx * X + ky * Y + 2 * np.pi * rng.random()) / (kx**2 + ky**2)
    return w


def velocity(w):
    """(u, v) = (dpsi/dy, -dpsi/dx) where laplace psi = -w, for w (..., N, N) in numpy."""
    k = np.fft.fftfreq(N, 1 / N)
    ky, kx = np.meshgrid(k, k, indexing="ij")
    psi = np.fft.fft2(w) / np.maximum(kx**2 + ky**2, 1)
    psi[..., 0, 0] = 0
    return np.fft.ifft2(1j * ky * psi).real, np.fft.ifft2(-1j * kx * psi).real


@pytest.mark.parametrize("viscosity, drag", [(0.05, 0.0), (0.0, 0.3), (0.02, 0.1)])
def test_taylor_green_vortices_decay(viscosity, drag):
    w = 2 * X.cos() * Y.cos()
    found = vorticity(2, 4, 0, size=N, solved_at=N, viscosity=viscosity, drag=drag, stirring=0.0, rest=0.0, initial=w)
    assert found.shape == (2, 4, 1, N, N) and found.dtype == np.float32
    for i in range(4):
        expected = w * np.exp(-(2 * viscosity + drag) * 0.5 * (i + 1))
        np.testing.assert_allclose(found[:, i, 0], expected.expand(2, N, N), atol=1e-4)


def test_energy_and_enstrophy_are_conserved_without_friction():
    w = smooth(0)
    found = vorticity(1, 4, 0, size=N, solved_at=N, viscosity=0.0, drag=0.0, stirring=0.0, rest=0.0, initial=w)
    frames = np.concatenate([w[None].numpy(), found[0, :, 0]]).astype(np.float64)
    assert np.abs(frames[-1] - frames[0]).max() > 0.3 * frames.std()  # it moves
    enstrophy, energy = (frames**2).mean((1, 2)), sum(a**2 for a in velocity(frames)).mean((1, 2))
    np.testing.assert_allclose(enstrophy, enstrophy[0], rtol=1e-3)
    np.testing.assert_allclose(energy, energy[0], rtol=1e-3)


def test_vorticity_is_carried_along():
    """Over a small step, dw/dt = -(u dw/dx + v dw/dy); slopes by differences of fourth order."""
    w = smooth(1, waves=2)
    dt = 0.01
    (found,) = vorticity(1, 1, 0, size=N, solved_at=N, interval=dt, dt=dt, viscosity=0.0, drag=0.0, stirring=0.0,
                         rest=0.0, initial=w)[0, :, 0]
    w, h = w.numpy().astype(np.float64), 2 * np.pi / N

    def slope(axis):
        return sum(c * (np.roll(w, -n, axis) - np.roll(w, n, axis)) for n, c in ((1, 2 / 3), (2, -1 / 12))) / h

    u, v = velocity(w)
    expected = -(u * slope(1) + v * slope(0))
    np.testing.assert_allclose((found - w) / dt, expected, atol=0.03 * np.abs(expected).max())


def test_one_seed_makes_one_simulation():
    arguments = dict(size=16, solved_at=N, rest=0.1, interval=0.1)
    one, same, other = (vorticity(2, 3, seed, **arguments) for seed in (1, 1, 2))
    assert one.shape == (2, 3, 1, 16, 16) and np.array_equal(one, same) and np.isfinite(one).all()
    assert np.abs(one - other).mean() > 0.1 * one.std() and np.abs(one[0] - one[1]).mean() > 0.1 * one.std()


def test_coarse_frames_have_the_waves_that_they_can_show():
    """Those of up to 7 periods a side, for 16 points; others are left out, and not taken for longer ones."""
    few, many = (X.cos() + 2 * (3 * X - 7 * Y).sin(), (9 * X).cos() + (8 * Y).cos() + (2 * X + 10 * Y).sin())
    still = dict(viscosity=0.0, drag=0.0, stirring=0.0, rest=0.0, interval=1e-6, dt=1e-6)
    found = vorticity(1, 1, 0, size=16, solved_at=N, initial=few + many, **still)[0, 0, 0]
    np.testing.assert_allclose(found, few[::2, ::2], atol=1e-3)


def test_the_named_data_set_is_made_once(cache, monkeypatch):
    calls = []

    def made(trajectories, frames, seed):
        calls.append((trajectories, frames, seed))
        return np.random.default_rng(seed).normal(size=(3, 4, 1, 8, 8)).astype(np.float32)

    monkeypatch.setattr(data_utils, "vorticity", made)
    for split, expected in (("train", (150, 40, 0)), ("test", (15, 40, 1))):
        for _ in range(2):
            data = load_dataset("navier_stokes", split=split, lag=1)
        assert calls.pop() == expected and not calls
        whole = made(0, 0, expected[2])
        calls.clear()
        assert np.array_equal(data.data[:], whole[:, 1:].reshape(-1, 1, 8, 8))
        assert np.array_equal(data.cond[:], whole[:, :-1].reshape(-1, 1, 8, 8))


# ---- What went wrong once


def test_trajectories_of_vectors_and_images_keep_their_ends(tmp_path):
    for k in range(2):
        np.save(tmp_path / f"{k}.npy", np.arange(5.0)[:, None] + 10 * k + np.zeros((5, 2)))
    for folder in ("v.2/train", "v.2/test"):
        os.makedirs(tmp_path / "data" / folder)
        shutil.copy(tmp_path / "0.npy", tmp_path / "data" / folder)
    shutil.copy(tmp_path / "1.npy", tmp_path / "data/v.2/train")
    data = load_dataset(f"{tmp_path}/data/v.2/", lag=1)
    rows = np.arange(len(data.data))
    assert len(rows) == 8 and (data.data[rows] - data.cond[rows] == 1).all()


def test_attributes_are_not_scaled_as_fields_of_as_many_channels():
    fields, attributes = 100 * np.random.default_rng(0).normal(size=(50, 1, 4, 4)), np.linspace(0, 1e-3, 50)[:, None]
    data = make_dataset(fields, None, cond=attributes)
    assert data.cases(np.arange(50)).cond[:, 0].std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("labels, cond, words", [
    (np.zeros(9, int), None, "labels are int64 of shape"), (np.zeros(11, int), None, "labels are int64 of shape"),
    (np.arange(10) - 1, None, "labels run from -1"), (None, np.zeros((9, 2)), "9 conditions for 10 items"),
])
def test_items_with_labels_or_conditions_of_other_length(labels, cond, words):
    with pytest.raises(UserError, match=words):
        make_dataset(Items(np.zeros((10, 1, 4, 4), np.float32)), labels, cond=None if cond is None else Items(cond))


def test_items_of_two_shapes_are_reported_in_one_line_also_by_a_worker():
    source = [np.zeros((1, 4, 4), np.float32)] * 9 + [np.zeros((1, 4, 5), np.float32)]
    words = r"items are float32 \(1, 4, 4\) and float32 \(1, 4, 5\): expected .* of one type and shape; .*__getitem__"
    with pytest.raises(UserError, match=words):
        make_dataset(Items(source), None)
    data = make_dataset(Items(source[:9]), None)
    data.data.source = source[1:]
    with pytest.raises(UserError, match=f"^{words}[^\n]*$"):
        for step in range(5):
            Batches(data, 5, 0, num_workers=1)(step)


@pytest.mark.parametrize("item, words", [({"image": 0}, r"object \(\)"), ("image", "<U5"), (np.zeros(3), "float64")])
def test_items_that_are_no_images_of_one_kind_are_refused(item, words):
    """Dictionaries, as of Hugging Face's data sets; words; vectors beside images."""
    source = [item] * 9 + ([np.zeros((1, 4, 4), np.float32)] if words == "float64" else [])
    fails(f"items are .*{words}.*: expected images or arrays of numbers", lambda: make_dataset(Items(source), None))


def test_a_condition_of_other_channels_is_no_base(tmp_path):
    """It keeps all its channels where --channels takes some of the data's, and more channels have a scale of their own.
    """
    np.save(tmp_path / "x.npy", x := fields(20))
    np.save(tmp_path / "x_cond.npy", x[:, :, ::2])
    for channels, right in (((), True), ((1, 2), False), ((0,), False)):
        data = load_dataset(str(tmp_path / "x.npy"), channels=channels)
        assert data.spec.cond_shape == (3, 2, 2) and data.spec.cond_has_channels == right
    more = np.concatenate([x[:, ::-1], x[:, :1]], 1)
    for cond, right in ((x[:, :2], False), (more, False), (x[:, :, 0, 0], False), (x, True)):
        assert make_dataset(x, None, cond=cond).spec.cond_has_channels == right
    spec = load_dataset(str(tmp_path / "x.npy"), channels=(1, 2)).spec
    fails("base condition needs a condition with the 2 channels of the data", check_condition,
          Config(base="condition"), spec)


def test_a_folder_does_not_hide_a_data_set_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "digits", fields(4))
    assert load_dataset("digits").spec.shape == (1, 8, 8)
    assert load_dataset("./digits").spec.shape == (3, 4, 2)


def test_fields_without_a_channel_get_one():
    assert make_dataset(Items(np.zeros((10, 4, 5), np.float32)), None).spec.shape == (1, 4, 5)
