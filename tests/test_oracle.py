"""The oracle against sums, integrals and derivatives that use none of its formulas."""

import pytest
import torch
from conftest import gaussian

from check import GaussianMixture, mixture
from prediction import PREDICTIONS, target
from processes import PROCESSES


def moments(data: GaussianMixture, t: float):
    """Mean (D,) and covariance (D, D) of xt at one time."""
    c, mean = data.process.at(t), data.weights @ data.means
    off = data.means - mean
    covariance = torch.einsum("k,kde->de", data.weights, data.covariances + off[:, :, None] * off[:, None])
    return c.alpha * mean, c.alpha**2 * covariance + c.sigma**2 * torch.ones_like(mean).diag()


def test_density_is_that_of_the_samples(process):
    """The density integrates to 1, and its moments are those of the samples: 4 standard errors."""
    data, t = mixture(process), 0.3
    mean, covariance = moments(data, t)
    axes = [m + s * torch.linspace(-7, 7, 401, dtype=torch.float64) for m, s in zip(mean, covariance.diag().sqrt())]
    points = torch.cartesian_prod(*axes)
    area = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    mass = data.log_prob(points, torch.full((len(points),), t)).exp() * area
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(mass @ points, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close((points - mean).T @ ((points - mean) * mass[:, None]), covariance, rtol=1e-5, atol=1e-6)
    x, label = data.sample(40_000, torch.Generator().manual_seed(0), t)
    d = x - mean
    assert (d.mean(0).abs() < 4 * (covariance.diag() / 40_000) ** 0.5).all()
    products = d[:, :, None] * d[:, None]
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / 200).all()
    assert (torch.bincount(label) / 40_000 - data.weights).abs().max() < 4 * 0.5 / 200


@pytest.mark.parametrize("kind", list(PREDICTIONS))
def test_predictions_are_expectations(process, kind):
    """E[p x0 + q x1 | xt], by weighting 400,000 draws of x0 with the density of xt given x0."""
    data, t, xt = mixture(process, kind), 0.6, torch.tensor([[0.5, -0.2]], dtype=torch.float64)
    c = process.at(t)
    xt = (c.alpha + 0.3 * c.sigma) * xt
    x0 = data.sample(400_000, torch.Generator().manual_seed(0))[0]
    x1 = (xt - c.alpha * x0) / c.sigma
    weight = (-0.5 * (x1**2).sum(1)).softmax(0)[:, None]
    y = target(kind, c, x0, x1)
    expected, error = (weight * y).sum(0), ((weight * (y - (weight * y).sum(0))) ** 2).sum(0).sqrt()
    assert ((data(xt, torch.tensor([t], dtype=torch.float64))[0] - expected).abs() < 4 * error).all()


def test_label_is_the_component():
    process, kind = PROCESSES["cosine"](), "x0"
    data, x = mixture(process, kind), torch.randn(6, 2, dtype=torch.float64)
    t = torch.full((6,), 0.5, dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 3, 3, 0])
    out, log_p = data(x, t, label), data.log_prob(x, t, label)
    for k in range(3):
        alone = GaussianMixture(process, kind, data.means[k : k + 1], data.covariances[k : k + 1])
        torch.testing.assert_close(out[label == k], alone(x, t)[label == k])
        torch.testing.assert_close(log_p[label == k], alone.log_prob(x, t)[label == k])
    torch.testing.assert_close(out[3:5], data(x, t)[3:5])
    torch.testing.assert_close(log_p[3:5], data.log_prob(x, t)[3:5])


def test_one_time_for_all_is_that_time_for_each(process):
    data, x = mixture(process), torch.randn(6, 2, dtype=torch.float64)
    for function in (data, data.log_prob):
        torch.testing.assert_close(function(x, 0.3), function(x, torch.full((6,), 0.3, dtype=torch.float64)))


def test_images_and_float32():
    """Data of any shape; the prediction has the type of xt."""
    process = PROCESSES["rf"]()
    images = GaussianMixture(process, "velocity", torch.randn(4, 1, 5, 5), 0.3)
    flat = GaussianMixture(process, "velocity", images.means, 0.3)
    x, label = images.sample(7, torch.Generator().manual_seed(0), 0.4)
    assert x.shape == (7, 1, 5, 5) and label.shape == (7,)
    t = torch.rand(7)
    assert images(x.float(), t).dtype == torch.float32
    torch.testing.assert_close(images(x, t).flatten(1), flat(x.flatten(1), t))


def test_a_flat_component():
    """A covariance of rank 1, whose smallest eigenvalue may come out below 0: its samples lie on a line."""
    data = GaussianMixture(PROCESSES["rf"](), "x0", torch.zeros(1, 3), torch.ones(1, 3, 3))
    x, _ = data.sample(100, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x, x[:, :1].expand(100, 3), rtol=1e-6, atol=1e-6)


def test_flow_solves_the_ode(process):
    """Its derivative in t is the velocity."""
    data = gaussian(process, dims=3)
    x = data.sample(5, torch.Generator().manual_seed(0), 0.5)[0]
    slope = (data.flow(x, 0.5, 0.5 + 1e-5) - data.flow(x, 0.5, 0.5 - 1e-5)) / 2e-5
    torch.testing.assert_close(slope, data(x, torch.full((5,), 0.5, dtype=torch.float64)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(data.flow(data.flow(x, 0.5, 0.2), 0.2, 0.5), x)


def test_one_variance_is_exact_in_float64():
    """0.1 in float32 would be 0.10000000149."""
    data = GaussianMixture(PROCESSES["ve_linear"](), "x0", torch.zeros(1, 2), 0.1)
    assert torch.equal(data.covariances[0], 0.1 * torch.eye(2, dtype=torch.float64))
