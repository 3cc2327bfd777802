"""Samplers: order of convergence and distribution against exact Gaussian data, the grid, guidance, and rows that do not interact."""

import math

import pytest
import torch
from conftest import Gaussian

from prediction import PREDICTIONS
from processes import PROCESSES
from sampling import DIFFUSIONS, SAMPLERS, Field, check_times, draw, euler, euler_maruyama, heun, uniform_grid
from utils import UserError

SETTINGS = dict(model_type="velocity", sampling_steps=4, T_min=1e-3, T_max=0.999)


def test_grid_has_n_plus_1_times_and_exact_ends():
    for n in (1, 7, 50):
        ts = uniform_grid(n, 1e-4, 0.9999)
        assert len(ts) == n + 1 and ts[0] == 0.9999 and ts[-1] == 1e-4
        assert all(a > b for a, b in zip(ts, ts[1:]))
        assert max(abs((a - b) - 0.9998 / n) for a, b in zip(ts, ts[1:])) < 1e-12


@pytest.mark.parametrize("kind", list(PREDICTIONS))
@pytest.mark.parametrize("sampler, order", [(euler, 1), (heun, 2)])
def test_order_of_convergence(process, kind, sampler, order):
    """The error against the exact flow falls as n^-order; between t = 0.9 and 0.2, where all kinds are well conditioned."""
    oracle = Gaussian(process, kind)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = oracle.flow(x, 0.9, 0.2)
    steps = [64, 128, 256]
    errors = [(sampler(Field(oracle, process, kind), x, uniform_grid(n, 0.2, 0.9)) - exact).abs().max().item() for n in steps]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(slope - order) < 0.2 for slope in slopes), slopes


@pytest.mark.parametrize("diffusion", list(DIFFUSIONS))
def test_sde_reaches_the_mean_and_variance(process, diffusion):
    """40,000 samples: one standard error is 0.0025 of the mean and 0.0018 of the standard deviation; 4 of each, and 0.01 for 200 steps."""
    oracle = Gaussian(process, "score")
    torch.manual_seed(0)
    t_high = 0.98
    _, mean, variance = oracle.moments(torch.tensor([t_high]))
    x = mean + variance.sqrt() * torch.randn(40_000, 1)
    out = euler_maruyama(Field(oracle, process, "score", sde_diffusion=diffusion), x, uniform_grid(200, 0.001, t_high))
    assert abs(out.mean() - 0.7) < 0.01 + 0.01, out.mean()
    assert abs(out.std() - 0.5) < 0.0072 + 0.01, out.std()


def test_sde_adds_noise_in_every_step_but_the_last():
    oracle, calls = Gaussian(PROCESSES["rf"](), "velocity"), []
    x = torch.zeros(5, 1)

    def noise():
        calls.append(1)
        return torch.ones(5, 1)

    euler_maruyama(Field(oracle, oracle.process, "velocity"), x, uniform_grid(6, 0.01, 0.9), noise)
    assert len(calls) == 5
    one = euler_maruyama(Field(oracle, oracle.process, "velocity"), x, [0.5, 0.2], noise)
    assert torch.equal(one, euler(Field(oracle, oracle.process, "velocity"), x, [0.5, 0.2])) and len(calls) == 5


@pytest.mark.parametrize("sampler, calls", [("euler", 6), ("heun", 11), ("euler_maruyama", 6)])
def test_network_calls(sampler, calls):
    times = []

    def net(x, t, label):
        times.append(t[0].item())
        return torch.zeros_like(x)

    SAMPLERS[sampler](Field(net, PROCESSES["rf"](), "velocity"), torch.zeros(2, 1), uniform_grid(6, 0.01, 0.9))
    assert len(times) == calls and min(times) > 0.01 + 1e-3  # never at the last time


@pytest.mark.parametrize("kind", list(PREDICTIONS))
def test_guidance_mixes_velocities(kind):
    """Guidance on any prediction is guidance on the velocity; scale 1 leaves the conditional field, 0 the unconditional."""
    process = PROCESSES["cosine"]()
    conditional, unconditional = Gaussian(process, kind, mean=1.0, std=0.3), Gaussian(process, kind, mean=0.0, std=1.0)

    def net(x, t, label):
        return (unconditional if label is None else conditional)(x, t)

    x, label = torch.randn(8, 2, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    c, u = (Field(net, process, kind, which).velocity(x, 0.4) for which in (label, None))
    for scale in (0.0, 1.0, 2.5):
        torch.testing.assert_close(Field(net, process, kind, label, scale).velocity(x, 0.4), u + scale * (c - u))


def test_guidance_is_mixed_in_float32():
    """Outputs in bfloat16, as under autocast: their difference would lose what little the label changes."""
    def net(x, t, label):
        return torch.full_like(x, 256.0 if label is None else 258.0, dtype=torch.bfloat16)

    field = Field(net, PROCESSES["rf"](), "velocity", torch.zeros(2, dtype=torch.int64), 1.25)
    assert field.predict(torch.zeros(2, 1), torch.rand(2)).tolist() == [[258.5], [258.5]]


def test_one_call_without_guidance():
    calls = []

    def net(x, t, label):
        calls.append(label)
        return x

    Field(net, PROCESSES["rf"](), "velocity", torch.zeros(2, dtype=torch.int64), 1.0).velocity(torch.zeros(2, 1), 0.5)
    assert len(calls) == 1


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_rows_do_not_depend_on_the_batch(sampler):
    process = PROCESSES["rf"]()
    net = Gaussian(process, "velocity")

    def samples(rows, batch_size):
        batches = draw(net, process, rows=rows, shape=(3,), device="cpu", seed=1, sampler=sampler, batch_size=batch_size, **SETTINGS)
        return torch.cat(list(batches))

    whole = samples(range(50), 50)
    assert whole.shape == (50, 3)
    torch.testing.assert_close(samples(range(50), 7), whole)
    torch.testing.assert_close(samples(range(33, 50), 100), whole[33:])
    assert len(whole.unique(dim=0)) == 50
    other = torch.cat(list(draw(net, process, rows=range(50), shape=(3,), device="cpu", seed=2, sampler=sampler, **SETTINGS)))
    assert (other != whole).any(1).all()
    assert list(draw(net, process, rows=range(0), shape=(3,), device="cpu", seed=1, sampler=sampler, **SETTINGS)) == []


def test_labels_go_with_their_rows():
    seen = []

    def net(x, t, label):
        seen.append(label.tolist())
        return x

    settings = {**SETTINGS, "sampling_steps": 1, "labels": torch.arange(10), "batch_size": 3}
    list(draw(net, PROCESSES["rf"](), rows=range(2, 6), shape=(1,), device="cpu", seed=0, sampler="euler", **settings))
    assert seen == [[2, 3, 4], [5]]


def test_unknown_sampler():
    with pytest.raises(UserError, match="euler, heun, euler_maruyama"):
        list(draw(None, PROCESSES["rf"](), rows=range(2), shape=(1,), device="cpu", seed=0, sampler="dopri", **SETTINGS))


def test_check_times(process):
    for kind in PREDICTIONS:
        for to in PREDICTIONS:
            for diffusion in DIFFUSIONS:
                check_times(process, kind, to, diffusion, 1e-4, 0.9999)
    with pytest.raises(UserError, match="T_min 0.*--T_min 1e-4"):
        check_times(process, "velocity", "score", "sigma", 0.0, 0.9999)
    rf = PROCESSES["rf"]()
    with pytest.raises(UserError, match="T_max 1.*velocity.*predicts x1.*--T_max 0.9999"):
        check_times(rf, "x1", "x1", "sigma", 1e-4, 1.0)
    with pytest.raises(UserError, match="T_max 1.*sde_diffusion delta.*--T_max 0.9999"):
        check_times(rf, "velocity", "velocity", "delta", 0.0, 1.0)
    check_times(rf, "velocity", "velocity", "sigma", 0.0, 1.0)
