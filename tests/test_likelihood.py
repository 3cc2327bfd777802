"""Tests of the likelihood: divergences, bits per dimension against the formula, batches, labels, ranks, and samples.

test_check.py compares the log-likelihood with its exact value, and tests the bias of Hutchinson's estimate.
"""

import math

import pytest
import torch
from conftest import gaussian

from check import GaussianMixture, mixture
from distributed import share
from likelihood import PROBES, bits_per_dim, divergence, flow, log_likelihood, log_likelihoods
from processes import PROCESSES
from sampling import Field
from utils import UserError

SETTINGS = dict(model_type="velocity", T_min=1e-4, T_max=0.9999, device="cpu", seed=0)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2)])
def test_divergence_is_the_trace_of_the_jacobian(shape):
    torch.manual_seed(0)
    mix = torch.nn.Linear(math.prod(shape), math.prod(shape), dtype=torch.float64)

    def velocity(x):
        return torch.tanh(mix(x.flatten(1))).reshape(x.shape) * x

    x = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(velocity, x).reshape(4, math.prod(shape), 4, math.prod(shape))
    per_row = torch.stack([jacobian[i, :, i] for i in range(4)])
    torch.testing.assert_close(divergence(velocity(x), x, None), torch.einsum("bdd->b", per_row))
    e = torch.randn(4, *shape, dtype=torch.float64)
    estimate = torch.einsum("bd,bde,be->b", e.flatten(1), per_row, e.flatten(1))
    torch.testing.assert_close(divergence(velocity(x), x, e), estimate)


def test_probes():
    noise = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    signs = PROBES["rademacher"](lambda: noise)
    assert set(signs.tolist()) == {-1.0, 1.0} and abs(signs.mean()) < 4 / 316 and PROBES["exact"](lambda: noise) is None
    assert torch.equal(PROBES["gaussian"](lambda: noise), noise)


def test_default_prior_is_where_sampling_starts(process):
    """The density of samples that start from N(0, sigma(T_max)^2) is nearly that of the data, but not equal to it.

    Their log-densities are 1e-6 to 0.02 nats apart, since little is left of the data at T_max.
    """
    data = mixture(process)
    x0 = data.sample(20, torch.Generator().manual_seed(0), 1e-4)[0]
    log_p = log_likelihood(Field(data, process, "velocity"), x0, 1e-4, 0.9999)
    exact = data.log_prob(x0, torch.full((20,), 1e-4, dtype=torch.float64))
    assert 1e-6 < (log_p - exact).abs().max() < 0.02


def test_forward_and_back(process):
    """`log_likelihood` of a sample, from data to noise, is that of its noise, changed as along the way from there.

    With one probe for both ways; test_check.py tests the exact divergence, there and back.
    """
    field, tolerances = Field(mixture(process), process, "velocity"), dict(rtol=1e-6, atol=1e-6)
    x1 = process.at(0.999).sigma * torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probe = torch.ones(20, 2, dtype=torch.float64)
    x0, change = flow(field, x1, 0.999, 1e-3, probe, **tolerances)
    log_p = torch.distributions.Normal(0.0, process.at(0.999).sigma).log_prob(x1).sum(1) + change
    again = log_likelihood(field, x0, 1e-3, 0.999, probe, **tolerances)
    torch.testing.assert_close(again, log_p, rtol=0, atol=3e-4)  # the solver's errors are up to 2e-4


def test_bits_per_dim_of_a_gaussian():
    """Pixels from N(0, 0.5^2) on [-1, 1] have 1/2 log2(2 pi e std^2) - log2(bin_width) bits on average.

    Each image has the bits that follow from its density.
    """
    process, std = PROCESSES["rf"](), 0.5
    images = torch.randn(600, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * std
    pixels = (images * 127.5 + 127.5).round()  # integers, not clamped to 0 ... 255: so their density is the Gaussian's
    data = GaussianMixture(process, "velocity", torch.zeros(1, 1, 2, 2), std**2)
    settings = dict(probe="exact", bin_width=1 / 127.5, rtol=1e-6, atol=1e-6, batch_size=600, **SETTINGS)
    log_p = torch.cat(list(log_likelihoods(data, process, (pixels - 127.5) / 127.5, rows=range(600), **settings)))
    bits = bits_per_dim(log_p, 4)
    formula = 0.5 * math.log2(2 * math.pi * math.e * std**2) + math.log2(127.5)
    assert abs(bits.mean() - formula) < 4 * bits.std() / 600**0.5
    exact = -torch.distributions.Normal(0, std).log_prob(images).sum((1, 2, 3)) / 4 / math.log(2) + math.log2(127.5)
    assert (bits - exact).abs().mean() < 0.01  # dequantization moves a pixel by up to 1/255
    # a pixel of 256 equal grey levels has 8 bits
    assert bits_per_dim(torch.tensor(-3 * math.log(2.0)), 3, 2 / 256).item() == pytest.approx(8)


def test_dequantization_is_uniform_and_of_the_width():
    seen = []
    process = PROCESSES["rf"]()

    def net(x, t, label, cond=None):
        seen.append(x.detach())
        return x

    data = torch.zeros(2000, 3)
    list(log_likelihoods(net, process, data, rows=range(2000), batch_size=2000, bin_width=0.2, **SETTINGS))
    first = seen[0].flatten()
    assert first.min() >= -0.1 and first.max() <= 0.1
    assert abs(first.std() - 0.2 / 12**0.5) < 0.002 and abs(first.mean()) < 0.003
    seen.clear()
    list(log_likelihoods(net, process, data, rows=range(4), **SETTINGS))
    assert (seen[0] == 0).all()


@pytest.mark.parametrize("probe", list(PROBES))
def test_rows_do_not_depend_on_the_batch(probe):
    process = PROCESSES["cosine"]()
    data = mixture(process)
    x0 = data.sample(20, torch.Generator().manual_seed(0))[0].float()

    def log_p(rows, batch_size, seed=0):
        settings = {**SETTINGS, "seed": seed, "probe": probe, "bin_width": 0.05}
        return torch.cat(list(log_likelihoods(data, process, x0, rows=rows, batch_size=batch_size, **settings)))

    whole = log_p(range(20), 20)
    torch.testing.assert_close(log_p(range(20), 8), whole, rtol=0, atol=3e-3)  # the solver chooses steps by the batch
    torch.testing.assert_close(log_p(range(11, 20), 20), whole[11:], rtol=0, atol=3e-3)
    assert (log_p(range(20), 20, seed=1) - whole).abs().max() > 0.01


def test_labels_go_with_their_rows():
    process = PROCESSES["rf"]()
    data = mixture(process)
    x0, label = data.sample(30, torch.Generator().manual_seed(0))
    rows = range(10, 30)
    settings = dict(labels=label, batch_size=6, probe="exact", **SETTINGS)
    log_p = torch.cat(list(log_likelihoods(data, process, x0, rows=rows, **settings)))
    exact = data.log_prob(x0, torch.full((30,), 1e-4), label)[10:]
    torch.testing.assert_close(log_p, exact, rtol=0, atol=0.02)


def test_two_ranks_give_what_one_gives(monkeypatch):
    """The shares of two ranks, one after the other, are the values of one rank, though their batches differ.

    test_evaluate.py runs evaluate.py, which gathers these shares, on one rank and on two.
    """
    process = PROCESSES["rf"]()
    data = mixture(process)
    x0 = data.sample(33, torch.Generator().manual_seed(0))[0].float()

    def log_p(rank, world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        return torch.cat(list(log_likelihoods(data, process, x0, rows=share(33), batch_size=12, **SETTINGS)))

    one = log_p(0, 1)
    assert one.shape == (33,)
    torch.testing.assert_close(torch.cat([log_p(0, 2), log_p(1, 2)]), one, rtol=0, atol=3e-3)


def test_unknown_probe():
    process = PROCESSES["rf"]()
    with pytest.raises(UserError, match="exact, rademacher, gaussian"):
        list(log_likelihoods(gaussian(process), process, torch.zeros(2, 1), rows=range(2), probe="trace", **SETTINGS))
