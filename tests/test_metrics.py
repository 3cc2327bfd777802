"""Distances against closed forms of Gaussians, against torch-fidelity as a whole, and what each must see."""

import functools
import math

import numpy as np
import pytest
import torch

import data_utils
from data_utils import make_dataset
from metrics import (
    EXTRACTORS,
    Evaluator,
    classifier_two_sample,
    compare_features,
    energy_distance,
    metric_name,
    nearest,
    sliced_wasserstein,
)
from utils import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("own_cache")


def normal(n, d, key, mean=0.0, std=1.0):
    return mean + std * torch.randn(n, d, generator=torch.Generator().manual_seed(key), dtype=torch.float64)


# ---- Features


def reference(features, **statistics):
    """Features of a reference, with their mean and covariance, or with others."""
    return {"features": features, "mu": features.mean(0), "sigma": torch.cov(features.T), **statistics}


def test_frechet_distance_of_gaussians():
    """Of diagonal covariances in a common rotated basis: |mu - nu|^2 + sum (s - r)^2."""
    rotation = torch.linalg.qr(normal(5, 5, 0)).Q
    s, r = torch.tensor([1.0, 2, 3, 0.5, 0]).double(), torch.tensor([2.0, 2, 1, 0.1, 0.3]).double()
    mu, nu = normal(1, 5, 1)[0], normal(1, 5, 2)[0]
    white = normal(40, 5, 3)
    white = torch.linalg.qr(white - white.mean(0)).Q * 39**0.5  # of mean 0 and covariance 1, exactly
    x = mu + white * s @ rotation.T
    one, other = (compare_features(x, reference(x, mu=mean, sigma=rotation @ torch.diag(std**2) @ rotation.T))["fd40"]
                  for mean, std in ((mu, s), (nu, r)))
    exact = ((mu - nu).square().sum() + (s - r).square().sum()).item()
    assert other == pytest.approx(exact, rel=1e-6) and one == pytest.approx(0, abs=1e-6)


def test_the_name_fid_is_kept_for_what_it_is():
    assert metric_name("", "fd50000", "") == "fid"
    assert metric_name("", "fd50000", "_test") == "fid50k_test"
    assert metric_name("", "fd10000", "") == "fid10k"
    assert metric_name("", "fd297", "") == "fid297"
    assert metric_name("classifier_", "fd50000", "") == "classifier_fd50k"


def test_names_say_extractor_and_split():
    assert [metric_name(prefix, "kid", "") for prefix in ("", "classifier_")] == ["kid", "classifier_kid"]
    assert metric_name("classifier_", "precision", "_test") == "classifier_precision_test"
    assert metric_name("", "c2st", "") == "c2st" and metric_name("", "c2st", "_test") == "c2st_test"


@pytest.mark.parametrize("m", [0.0, 0.5])
def test_kernel_distance_of_gaussians(m, monkeypatch):
    """Squared MMD of N(0, 1) and N(m, 1) by the kernel (x y + 1)^3, without bias: 3 m^2 + 3 m^4 + (3 m + m^3)^2."""
    import torch_fidelity.metric_kid as fidelity

    exact = 3 * m**2 + 3 * m**4 + (3 * m + m**3) ** 2  # the squared differences of the moments, weighted by 3, 3 and 1
    x, y = ([normal(200, 2, start + k, mean=mean) * torch.tensor([2**0.5, 0]) for k in range(100)]
            for start, mean in ((0, 0), (1000, m)))  # the second coordinate is 0; the kernel divides by their number
    one_subset = functools.partial(fidelity.kid_features_to_metric, kid_subsets=1)  # of all, as each of the hundred
    monkeypatch.setattr(fidelity, "kid_features_to_metric", one_subset)
    found = [compare_features(*pair)["kid"] for pair in zip(x, map(reference, y))]
    error = 4 * np.std(found) / 10
    assert np.mean(found) == pytest.approx(exact, abs=error) and error < 0.6 * exact + 0.2


def test_precision_and_recall_tell_two_failures_apart():
    data = torch.cat([normal(200, 2, 0), normal(200, 2, 1, mean=20)])
    def precision_recall(x):
        found = compare_features(x, reference(data))
        return found["precision"], found["recall"]

    precision, recall = precision_recall(normal(400, 2, 2))  # one mode is missing
    assert precision > 0.85 and recall == pytest.approx(0.5, abs=0.05)
    precision, recall = precision_recall(torch.cat([data + 1e-3, normal(400, 2, 3, mean=-20)]))  # one too many
    assert precision == pytest.approx(0.5, abs=0.05) and recall > 0.9


# ---- Points


def test_energy_distance_of_gaussians():
    """E|N(m, 2)| = 2 exp(-m^2/4) / sqrt(pi) + m erf(m / 2), and no bias at m = 0."""
    def absolute(m):
        return 2 * math.exp(-(m**2) / 4) / math.sqrt(math.pi) + m * math.erf(m / 2)

    for m in (0.0, 1.0):
        found = [energy_distance(normal(300, 1, k), normal(400, 1, 100 + k, mean=m)) for k in range(40)]
        assert np.mean(found) == pytest.approx(2 * absolute(m) - 2 * absolute(0), abs=4 * np.std(found) / 40**0.5)


def test_sliced_wasserstein_of_a_shift():
    """A shift by m moves each projection by m . theta, whose mean square over the sphere is |m|^2 / D."""
    x, m = normal(300, 3, 0), torch.tensor([1.0, -2.0, 2.0]).double()
    assert sliced_wasserstein(x, x + m, projections=20_000) == pytest.approx(math.sqrt(9 / 3), rel=0.01)
    assert sliced_wasserstein(x, x) == 0


def test_classifier_two_sample():
    x = normal(1000, 2, 0)
    assert classifier_two_sample(x, normal(1000, 2, 1)) == pytest.approx(0.5, abs=0.04)
    assert classifier_two_sample(x, normal(1000, 2, 1, std=3)) > 0.7
    assert classifier_two_sample(x, normal(1000, 2, 1, mean=10)) > 0.999


def test_points_are_compared_in_units_of_the_data():
    data, samples = normal(3000, 2, 0).numpy(), normal(500, 2, 1, mean=0.3).float()
    scale = torch.tensor([100.0, 0.01])
    plain = make_dataset(data, None)
    scaled = make_dataset(data * scale.numpy(), None)
    one = Evaluator(plain, plain, CPU)(samples)
    other = Evaluator(scaled, scaled, CPU)(samples * scale)
    assert set(one) == {"energy_distance", "sliced_wasserstein", "wasserstein", "c2st"}
    for name in ("energy_distance", "sliced_wasserstein"):
        assert one[name] == pytest.approx(other[name], rel=1e-3)
    constant = make_dataset(np.concatenate([data, np.ones((3000, 1))], 1), None)
    found = Evaluator(constant, constant, CPU)(torch.cat([samples, torch.ones(500, 1)], 1))
    assert np.isfinite(list(found.values())).all()


# ---- Images


def test_the_evaluator_of_images(digits):
    test = data_utils.load_dataset("digits", split="test")
    evaluator = Evaluator(digits, digits, CPU)
    images, labels = torch.from_numpy(test.data), torch.from_numpy(test.labels)
    real = evaluator(images, labels)
    names = ("fd297", "kid", "precision", "recall")
    assert list(real) == [*(f"classifier_{name}" for name in names), "recognised"]
    assert real["recognised"] > 0.95 and evaluator(images[:100])["classifier_fd100"] > real["classifier_fd297"]
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    bad = evaluator(noise, labels)
    assert bad["classifier_fd297"] > 20 * real["classifier_fd297"]
    assert bad["classifier_precision"] < 0.2 and bad["recognised"] < 0.3
    wrong = evaluator(images, (labels + 1) % 10)
    assert wrong["recognised"] < 0.05 and wrong["classifier_fd297"] == real["classifier_fd297"]
    assert "recognised" not in evaluator(images)
    of_test = Evaluator(digits, test, CPU, suffix="_test")(images, labels)
    assert of_test["classifier_fd297_test"] == pytest.approx(0, abs=1e-4) and of_test["classifier_precision_test"] == 1


def test_with_another_extractor_the_classifier_still_recognises(digits, monkeypatch):
    class Pixels:
        prefix, sha256 = "", 64 * "0"

        def __init__(self, train, device):
            pass

        def __call__(self, images):
            return images.float().flatten(1)[:, 20:30]

    test = data_utils.load_dataset("digits", split="test")
    monkeypatch.setitem(EXTRACTORS, "pixels", Pixels)
    evaluator = Evaluator(digits, digits, CPU, "pixels")
    found = evaluator(torch.from_numpy(test.data), torch.from_numpy(test.labels))
    assert list(found) == ["fid297", "kid", "precision", "recall", "recognised"]
    assert found["recognised"] > 0.95


def test_statistics_are_kept_and_used_again(digits, monkeypatch):
    first = Evaluator(digits, digits, CPU)
    monkeypatch.setattr("metrics.statistics_of", None)
    again = Evaluator(digits, digits, CPU)
    one, other = first.reference, again.reference
    assert set(one) == {"mu", "sigma", "features"} and all(torch.equal(one[name], other[name]) for name in one)
    fewer = make_dataset(digits.data[:500], digits.labels[:500])
    with pytest.raises(TypeError):  # other content: the features would be taken anew
        Evaluator(digits, fewer, CPU)


def test_samples_that_are_not_finite(digits):
    data = make_dataset(normal(50, 2, 0).numpy(), None)
    with pytest.raises(UserError, match="2 of 20 samples are not finite"):
        Evaluator(data, data, CPU)(torch.tensor([[0.0, 0.0]] * 18 + [[0.0, math.inf], [math.nan, 0.0]]))


def test_too_few_to_compare():
    """One line, where scikit-learn would raise an error of its own."""
    few, enough = (make_dataset(normal(n, 2, 0).numpy(), None) for n in (9, 10))
    for reference, n in ((few, 10), (enough, 9)):
        with pytest.raises(UserError, match="expected 10 or more of both"):
            Evaluator(reference, reference, CPU)(torch.randn(n, 2))
    assert "c2st" in Evaluator(enough, enough, CPU)(torch.randn(10, 2))


@pytest.mark.parametrize("chunk", [10**9, 5000, 1])
def test_nearest_is_the_nearest(monkeypatch, chunk):
    """Whether the data are read at once, in parts, of which the last is shorter, or one by one."""
    monkeypatch.setattr("metrics.CHUNK", chunk)
    rng = np.random.default_rng(0)
    data, images = (rng.integers(0, 256, (n, 1, 4, 4), np.uint8) for n in (12_345 if chunk > 1 else 50, 40))
    images[3] = data[len(data) // 2]
    distances, items = nearest(images, data, 3, CPU)
    exact = np.linalg.norm(images.reshape(40, 1, 16).astype(float) - data.reshape(1, -1, 16), axis=2)
    assert np.array_equal(items, np.argsort(exact, axis=1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(exact, axis=1)[:, :3], atol=0.2)
    assert items[3, 0] == len(data) // 2 and distances[3, 0] < 0.2
