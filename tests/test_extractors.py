"""metrics.py: the classifier, what it learns and that it is kept; Inception-v3 whole, with weights made here."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import data_utils
import metrics
from data_utils import load_dataset, make_dataset
from metrics import Evaluator, content, features_of, make_classifier, make_inception, turned
from utils import UserError, import_torchvision

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for classifiers, which are trained for three steps."""
    monkeypatch.setattr(data_utils, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics, "CLASSIFIER_STEPS", 3)
    return tmp_path / "cache"


def test_the_classifier_is_good(digits, own_cache):
    test = load_dataset("digits", split="test")
    features, logits = features_of(make_classifier(digits, CPU), test.data, CPU)
    assert features.shape == (297, 64) and (logits.argmax(1).numpy() == test.labels).mean() > 0.97


def test_the_classifier_is_kept(digits, cache, monkeypatch):
    net = make_classifier(digits, CPU)
    (file,) = os.listdir(cache)
    calls = []
    monkeypatch.setattr(metrics, "train_classifier", lambda *arguments: calls.append(1))
    again = make_classifier(digits, CPU)
    assert not calls and again.sha256 == net.sha256
    assert make_classifier(make_dataset(digits.data[:1000], digits.labels[:1000]), CPU).sha256 != net.sha256 and calls
    (cache / file).write_bytes(b"half of it")
    with pytest.raises(UserError, match="cannot be read .*remove it"):
        make_classifier(digits, CPU)


def test_the_classifier_leaves_the_random_state_alone_and_is_the_same_each_time(digits, cache):
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    one = make_classifier(digits, CPU)
    assert torch.equal(torch.rand(1), first)
    for file in cache.iterdir():
        file.unlink()
    assert make_classifier(digits, CPU).sha256 == one.sha256


def test_without_labels_it_learns_which_way_is_up(digits, cache, monkeypatch):
    monkeypatch.setattr(metrics, "CLASSIFIER_STEPS", 150)
    plain = make_dataset(digits.data, None)
    net = make_classifier(plain, CPU)
    test = torch.from_numpy(load_dataset("digits", split="test").data)
    images, turns = turned(test, torch.Generator().manual_seed(1))
    assert (features_of(net, images.numpy(), CPU)[1].argmax(1) == turns).double().mean() > 0.9
    evaluator = Evaluator(plain, {"train": plain}, CPU)
    assert "recognised" not in evaluator(images) and evaluator.classifier is None


def test_turned():
    square = torch.arange(9).reshape(1, 1, 3, 3).repeat(40, 1, 1, 1)
    wide = torch.arange(6).reshape(1, 1, 2, 3).repeat(40, 1, 1, 1)
    images, turns = turned(square, torch.Generator().manual_seed(0))
    assert set(turns.tolist()) == {0, 1, 2, 3}
    assert all(torch.equal(image, torch.rot90(square[0], k, (1, 2))) for image, k in zip(images, turns.tolist()))
    images, turns = turned(wide, torch.Generator().manual_seed(0))
    assert set(turns.tolist()) == {0, 1}
    assert all(torch.equal(image, wide[0].flip(1, 2) if k else wide[0]) for image, k in zip(images, turns))


@pytest.mark.parametrize("world", [2, 7])
def test_each_process_takes_its_share(digits, monkeypatch, world):
    """The shares, put together, are the whole; a process without images gives rows of the right width."""
    def extractor(images):
        x = images.float().flatten(1)
        return x[:, :5], x[:, :2]

    images, parts = digits.data[:5], []
    whole = features_of(extractor, images, CPU)[0]
    monkeypatch.setattr(metrics, "gather_rows", lambda x: x)
    monkeypatch.setattr(metrics, "all_or_none", lambda work: work())
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(features_of(extractor, images, CPU)[0])
    assert torch.equal(torch.cat(parts), whole) and {part.shape[1] for part in parts} == {5}


@pytest.mark.parametrize("part", [1000, 100, 50])
def test_statistics_of_parts_are_those_of_the_whole(digits, monkeypatch, part):
    """The images are read in parts, of which the last is shorter; the subset that is kept is a random one."""
    def extractor(images):
        x = images.float().flatten(1)
        return x[:, 10:15], x[:, :2]

    monkeypatch.setattr(metrics, "SUBSET", part)
    images = digits.data[:433]
    features = torch.from_numpy(images.reshape(433, -1)[:, 10:15].copy()).double()
    found = metrics.statistics_of(extractor, images, CPU)
    torch.testing.assert_close(found["mean"], features.mean(0))
    torch.testing.assert_close(found["covariance"], torch.cov(features.T))
    assert [value.dtype for value in found.values()] == [torch.float64, torch.float64, torch.float32]
    chosen = np.random.default_rng(0).permutation(433) < part
    assert torch.equal(found["features"].double(), features[chosen]) and len(found["features"]) == min(part, 433)


def test_content():
    x = np.arange(10_000, dtype=np.uint8).reshape(-1, 1)
    assert content(x) == content(x.copy())
    assert len({content(x), content(x[:-1]), content(x[::-1]), content(x.reshape(1, -1))}) == 4


# ---- Inception-v3


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of Inception-v3's shape, made here; the file that a user would put there."""
    import_torchvision()
    from torch_fidelity import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
        torch.manual_seed(0)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(net.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def inception(weights):
    return make_inception(None, CPU, weights)


@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_figures_are_those_of_torch_fidelity(tmp_path, weights, inception, cache):
    """FID, kernel distance, Inception score, precision and recall of two folders of images, by both libraries."""
    from torch_fidelity import calculate_metrics

    rng = np.random.default_rng(0)
    real = (rng.integers(0, 256, (12, 3, 1, 1)) * np.linspace(0, 1, 32)).repeat(32, axis=2).astype(np.uint8)
    fake = rng.integers(0, 256, (10, 3, 32, 32)).astype(np.uint8)
    for name, images in (("real", real), ("fake", fake)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / name / f"{i:03d}.png")
    expected = calculate_metrics(
        input1=str(tmp_path / "fake"), input2=str(tmp_path / "real"), cuda=False, isc=True, fid=True, kid=True,
        prc=True, kid_subset_size=10, verbose=False, cache=False, feature_extractor_weights_path=weights,
        feature_extractor="inception-v3-compat", batch_size=8)
    data = make_dataset(real, None)
    ours = Evaluator(data, {"train": data}, CPU, inception)(torch.from_numpy(fake))
    assert ours["fid10"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert ours["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert ours["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    assert (ours["precision"], ours["recall"]) == pytest.approx((expected["precision"], expected["recall"]))


def test_grey_images_get_three_channels(inception):
    grey = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(inception(grey)[0], inception(grey.repeat(1, 3, 1, 1))[0])
    assert inception(grey)[0].shape == (2, 2048) and inception(grey)[1].shape == (2, 1008)


def test_without_weights_a_line_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(metrics, "no_answer", lambda url: f"no answer from {url}")
    line = (rf"no answer from http.*download http.*pth, and give it as --inception_weights FILE or put it at "
            rf"{tmp_path}.*pth; or .*classifier")
    with pytest.raises(UserError, match=line):
        make_inception(None, CPU)
    with pytest.raises(UserError, match="'none.pth' is no file: expected weights-inception.*pth, from https"):
        make_inception(None, CPU, "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot get Inception's weights"):
        make_inception(None, CPU, str(tmp_path / "bad.pth"))
