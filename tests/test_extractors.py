"""metrics.py: the classifier, what it learns and that it is kept; Inception-v3 whole, with weights made here."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import data_utils
import metrics
from data_utils import load_dataset, make_dataset
from metrics import Evaluator, Inception, content, features_of, make_classifier
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
    net = make_classifier(digits, CPU)
    features = features_of(net, test.data, CPU)
    logits = net.head(features)
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


def test_without_labels_it_learns_clusters_and_its_distances_see_noise_blur_and_missing_classes(digits, own_cache):
    """The Frechet distance of real test images rises with noise and with blur, and where classes are missing."""
    plain, test = make_dataset(digits.data, None), load_dataset("digits", split="test")
    evaluator, rng = Evaluator(plain, plain, CPU), np.random.default_rng(0)
    noise, images = rng.standard_normal(test.data.shape), test.data.astype(float)

    def distance(changed):
        images = torch.from_numpy(changed.round().clip(0, 255).astype(np.uint8))
        return evaluator(images)[f"classifier_fd{len(images)}"]

    real, *noisy = (distance(images + std * noise) for std in (0, 8, 16, 32, 64, 128))
    blurred = [distance(gaussian_filter(images, (0, 0, std, std))) for std in (0.4, 0.5, 0.7, 1.0, 1.5)]
    for distances in (noisy, blurred):
        assert sorted(distances) == distances and real < distances[0] and distances[2] > 2 * real
    assert distance(images[test.labels < 3]) > 20 * real
    assert evaluator.classifier.head.out_features == 10 and "recognised" not in evaluator(torch.from_numpy(test.data))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 50), (4, 7, 5)])
def test_images_of_any_shape_without_labels(cache, shape):
    images = np.random.default_rng(0).integers(0, 256, (40, *shape), np.uint8)
    plain = make_dataset(images, None)
    assert np.isfinite(list(Evaluator(plain, plain, CPU)(torch.from_numpy(images[:20])).values())).all()


@pytest.mark.parametrize("world", [2, 7])
def test_each_process_takes_its_share(digits, monkeypatch, world):
    """The shares, put together, are the whole; a process without images gives rows of the right width."""
    def extractor(images):
        return images.float().flatten(1)[:, :5]

    images, parts = digits.data[:5], []
    whole = features_of(extractor, images, CPU)
    monkeypatch.setattr(metrics, "gather_rows", lambda x: x)
    monkeypatch.setattr(metrics, "all_or_none", lambda work: work())
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(features_of(extractor, images, CPU))
    assert torch.equal(torch.cat(parts), whole) and {part.shape[1] for part in parts} == {5}


@pytest.mark.parametrize("part", [1000, 100, 50])
def test_statistics_of_parts_are_those_of_the_whole(digits, monkeypatch, part):
    """The images are read in parts, of which the last is shorter; the subset that is kept is a random one."""
    def extractor(images):
        return images.float().flatten(1)[:, 10:15]

    monkeypatch.setattr(metrics, "SUBSET", part)
    images = digits.data[:433]
    features = torch.from_numpy(images.reshape(433, -1)[:, 10:15].copy()).double()
    found = metrics.statistics_of(extractor, images, CPU)
    torch.testing.assert_close(found["mu"], features.mean(0))
    torch.testing.assert_close(found["sigma"], torch.cov(features.T))
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
    """A folder of torch.hub with weights of Inception-v3's shape, made here, where the download would be."""
    import_torchvision()
    from torch_fidelity import FeatureExtractorInceptionV3
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
        torch.manual_seed(0)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("hub") / "checkpoints" / os.path.basename(URL_INCEPTION_V3)
    path.parent.mkdir(exist_ok=True)
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(weights.parent.parent))
        return Inception(None, CPU)


@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_figures_are_those_of_torch_fidelity(tmp_path, weights, inception, cache, monkeypatch):
    """FID, kernel distance, precision and recall of two folders of images, by both libraries."""
    from torch_fidelity import calculate_metrics

    rng = np.random.default_rng(0)
    real = (rng.integers(0, 256, (12, 3, 1, 1)) * np.linspace(0, 1, 32)).repeat(32, axis=2).astype(np.uint8)
    fake = rng.integers(0, 256, (10, 3, 32, 32)).astype(np.uint8)
    for name, images in (("real", real), ("fake", fake)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / name / f"{i:03d}.png")
    expected = calculate_metrics(
        input1=str(tmp_path / "fake"), input2=str(tmp_path / "real"), cuda=False, fid=True, kid=True,
        prc=True, kid_subset_size=10, verbose=False, cache=False, feature_extractor_weights_path=str(weights),
        feature_extractor="inception-v3-compat", batch_size=8)
    data = make_dataset(real, None)
    monkeypatch.setitem(metrics.EXTRACTORS, "inception", lambda train, device: inception)
    ours = Evaluator(data, data, CPU, "inception")(torch.from_numpy(fake))
    assert ours["fid10"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert ours["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert (ours["precision"], ours["recall"]) == pytest.approx((expected["precision"], expected["recall"]))


def test_grey_images_get_three_channels(inception):
    grey = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(inception(grey), inception(grey.repeat(1, 3, 1, 1)))
    assert inception(grey).shape == (2, 2048)


def test_without_weights_a_line_says_what_to_put_where(tmp_path, monkeypatch, weights):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda request: (_ for _ in ()).throw(OSError("no answer")))
    path = tmp_path / "checkpoints" / weights.name
    line = rf"no answer.*download http.*pth and put it at {path}, or .*classifier"
    with pytest.raises(UserError, match=line):
        Inception(None, CPU)
    path.parent.mkdir(exist_ok=True)

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by code"),)

    for bad in ("no weights", Code()):
        torch.save(bad, path)
        with pytest.raises(UserError, match="cannot get Inception's weights"):
            Inception(None, CPU)
    assert not (tmp_path / "made by code").exists()
