"""The classifier: what it learns, and that it is kept; Inception-v3 by torch-fidelity, whole, with weights made here."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import data_utils
import extractors
from data_utils import load_dataset, make_dataset
from extractors import content, features_of, make_classifier, make_inception, turned
from metrics import Judge
from utils import UserError, import_torchvision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_classifier_is_good_and_kept(digits, cache, monkeypatch):
    test = load_dataset("digits", split="test")
    net = make_classifier(digits, CPU)
    features, logits = features_of(net, test.data, CPU)
    assert features.shape == (297, 64) and (logits.argmax(1).numpy() == test.labels).mean() > 0.97
    (file,) = os.listdir(cache)
    calls = []
    monkeypatch.setattr(extractors, "train_classifier", lambda *arguments: calls.append(1))
    again = make_classifier(digits, CPU)
    assert not calls and again.sha256 == net.sha256
    assert make_classifier(make_dataset(digits.data[:1000], digits.labels[:1000]), CPU).sha256 != net.sha256 and calls
    (cache / file).write_bytes(b"half of it")
    with pytest.raises(UserError, match="cannot be read .*remove it"):
        make_classifier(digits, CPU)


def test_the_classifier_leaves_the_random_state_alone_and_is_the_same_each_time(digits, cache, monkeypatch):
    monkeypatch.setattr(extractors, "CLASSIFIER_STEPS", 3)
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    one = make_classifier(digits, CPU)
    assert torch.equal(torch.rand(1), first)
    for file in cache.iterdir():
        file.unlink()
    assert make_classifier(digits, CPU).sha256 == one.sha256


def test_without_labels_it_learns_which_way_is_up(digits, monkeypatch):
    monkeypatch.setattr(extractors, "CLASSIFIER_STEPS", 200)
    plain = make_dataset(digits.data, None)
    net = make_classifier(plain, CPU)
    images, turns = turned(torch.from_numpy(load_dataset("digits", split="test").data), torch.Generator().manual_seed(1))
    assert (features_of(net, images, CPU)[1].argmax(1) == turns).double().mean() > 0.9
    judge = Judge(plain, {"train": plain}, CPU)
    assert "recognised" not in judge(images) and judge.classifier is None


def test_turned():
    square, wide = torch.arange(9).reshape(1, 1, 3, 3).repeat(40, 1, 1, 1), torch.arange(6).reshape(1, 1, 2, 3).repeat(40, 1, 1, 1)
    images, turns = turned(square, torch.Generator().manual_seed(0))
    assert set(turns.tolist()) == {0, 1, 2, 3}
    assert all(torch.equal(image, torch.rot90(square[0], k, (1, 2))) for image, k in zip(images, turns.tolist()))
    images, turns = turned(wide, torch.Generator().manual_seed(0))
    assert set(turns.tolist()) == {0, 1} and all(torch.equal(i, wide[0].flip(1, 2) if k else wide[0]) for i, k in zip(images, turns))


@pytest.mark.parametrize("world", [2, 7])
def test_each_process_takes_its_share(digits, monkeypatch, world):
    """The shares, put together, are the whole; a process without images gives rows of the right width."""
    def extractor(images):
        x = images.float().flatten(1)
        return x[:, :5], x[:, :2]

    images, parts = digits.data[:5], []
    whole = features_of(extractor, images, CPU)[0]
    monkeypatch.setattr(extractors, "gather_rows", lambda x: x)
    monkeypatch.setattr(extractors, "all_or_none", lambda work: work())
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(features_of(extractor, images, CPU)[0])
    assert torch.equal(torch.cat(parts), whole) and {part.shape[1] for part in parts} == {5}


@pytest.mark.parametrize("world", [1, 2, 7])
def test_statistics_of_shares_are_those_of_the_whole(digits, monkeypatch, world):
    """Sums of the shares, in place of the features of all; the subset is the same for any number of processes."""
    def extractor(images):
        x = images.float().flatten(1)
        return x[:, 10:15], x[:, :2]

    def in_turn(act):
        turn = iter(said)
        return lambda x: act(next(turn), x)

    images, said = digits.data[:433], [[], [], []]  # what the processes hand over, call by call
    features = torch.from_numpy(images.reshape(433, -1)[:, 10:15].copy()).double()
    monkeypatch.setattr(extractors, "all_or_none", lambda work: work())
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(extractors, "gather_rows", in_turn(lambda rows, x: rows.append(x) or x))
        extractors.statistics_of(extractor, images, CPU, 50)
    monkeypatch.setattr(extractors, "gather_rows", in_turn(lambda rows, x: torch.cat(rows)))
    found = extractors.statistics_of(extractor, images, CPU, 50)
    torch.testing.assert_close(found["mean"], features.mean(0))
    torch.testing.assert_close(found["covariance"], torch.cov(features.T))
    chosen = np.sort(np.random.default_rng(0).permutation(433)[:50])
    assert torch.equal(found["features"].double(), features[chosen])


def test_content():
    x = np.arange(10_000, dtype=np.uint8).reshape(-1, 1)
    assert content(x) == content(x.copy()) and len({content(x), content(x[:-1]), content(x[::-1]), content(x.reshape(1, -1))}) == 4


# ---- Inception-v3


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Weights of Inception-v3's shape, made here; the file that a user would put there."""
    import_torchvision()
    from torch_fidelity import FeatureExtractorInceptionV3

    with monkeypatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
        torch.manual_seed(0)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    return str(path)


@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_figures_are_those_of_torch_fidelity(tmp_path, weights):
    """FID, kernel distance, Inception score, precision and recall of two folders of images, by their command and by ours."""
    from torch_fidelity import calculate_metrics

    rng = np.random.default_rng(0)
    real = (rng.integers(0, 256, (24, 3, 1, 1)) * np.linspace(0, 1, 32)).repeat(32, axis=2).astype(np.uint8)
    fake = rng.integers(0, 256, (20, 3, 32, 32)).astype(np.uint8)
    for name, images in (("real", real), ("fake", fake)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / name / f"{i:03d}.png")
    theirs = calculate_metrics(input1=str(tmp_path / "fake"), input2=str(tmp_path / "real"), cuda=False, isc=True, fid=True, kid=True,
                               prc=True, kid_subset_size=20, verbose=False, cache=False, feature_extractor_weights_path=weights,
                               feature_extractor="inception-v3-compat", batch_size=8)
    data = make_dataset(real, None)
    ours = Judge(data, {"train": data}, CPU, make_inception(CPU, weights))(torch.from_numpy(fake))
    assert ours["fid20"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_grey_images_get_three_channels(weights):
    net = make_inception(CPU, weights)
    grey = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(net(grey)[0], net(grey.repeat(1, 3, 1, 1))[0])
    assert net(grey)[0].shape == (2, 2048) and net(grey)[1].shape == (2, 1008)


def test_without_weights_a_line_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(extractors, "no_answer", lambda url: f"no answer from {url}")
    line = rf"no answer from http.*get http.*pth, and give it as --inception_weights FILE or put it at {tmp_path}.*pth; or .*classifier"
    with pytest.raises(UserError, match=line):
        make_inception(CPU)
    with pytest.raises(UserError, match="'none.pth' is no file: expected weights-inception.*pth, from https"):
        make_inception(CPU, "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="Inception's weights cannot be had"):
        make_inception(CPU, str(tmp_path / "bad.pth"))
