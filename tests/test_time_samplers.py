"""Tests of the time samplers: range, density against the drawn times and known distributions, weights, and strata."""

import math

import pytest
import scipy.stats
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from processes import PROCESSES
from time_samplers import TIME_SAMPLERS, LogitNormal, Stratified
from utils import call_with_settings

N = 20_000  # times: the Kolmogorov-Smirnov distance below is then known to 0.014
# Not the defaults, so that a setting that is ignored makes a test fail
SETTINGS = dict(logit_normal_loc=0.5, logit_normal_scale=0.8, edm_P_mean=-0.5, edm_P_std=0.9, time_beta_a=1.5,
                time_beta_b=0.8, mode_scale=-0.6, process=PROCESSES["cosine"]())


def make(name, T_min=0.1, T_max=0.9, **changes):
    return call_with_settings(TIME_SAMPLERS[name], {**SETTINGS, **changes}, T_min=T_min, T_max=T_max)


def draws(sampler, seed=0, n=N):
    return sampler(n, "cpu", torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(TIME_SAMPLERS))
def test_inside_the_range_and_reproducible(name):
    sampler = make(name, 0.2, 0.7)
    t = draws(sampler)
    assert t.shape == (N,) and t.dtype == torch.float32 and torch.equal(t, draws(sampler))
    assert t.min() >= 0.2 and t.max() <= 0.7 and t.std() > 0.05
    assert not torch.equal(t, draws(sampler, 1))


def distance(t, cdf):
    """Kolmogorov-Smirnov distance of the sample from the distribution."""
    t = t.double().sort().values
    ranks = torch.arange(1, len(t) + 1) / len(t)
    return max((cdf(t) - ranks).abs().max().item(), (cdf(t) - ranks + 1 / len(t)).abs().max().item())


@pytest.mark.parametrize("changes", [
    {}, {"mode_scale": 1.29, "process": PROCESSES["edm"](), "time_beta_a": 3.0, "time_beta_b": 3.0},
])
@pytest.mark.parametrize("name", list(TIME_SAMPLERS))
def test_draws_have_the_density(name, changes):
    """The density integrates to 1, and the drawn times follow it.

    For a right density, the Kolmogorov-Smirnov distance is below 1.95 / sqrt(N) with probability 0.999.
    """
    sampler = make(name, **changes)
    # fine near the ends, where some are steep
    grid = 0.1 + 0.8 * torch.sin(torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64)) ** 2
    density = sampler.density(grid)
    mass = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(density, grid)])
    assert mass[-1].item() == pytest.approx(1, abs=2e-3)

    def cdf(t):
        i = torch.searchsorted(grid, t).clamp(1, len(grid) - 1)
        share = (t - grid[i - 1]) / (grid[i] - grid[i - 1])
        return mass[i - 1] + share * (mass[i] - mass[i - 1])

    assert distance(draws(sampler), cdf) < 1.95 / math.sqrt(N) + 2e-3


def test_known_distributions():
    """Times on [0, 1] against the distributions of scipy."""
    def cdf(distribution, *parameters):
        return lambda t: torch.as_tensor(distribution.cdf(t.numpy(), *parameters))

    bound = 1.95 / math.sqrt(N)
    logit = torch.logit(draws(make("logit_normal", 0, 1)).double())
    assert distance(logit, cdf(scipy.stats.norm, 0.5, 0.8)) < bound
    assert distance(draws(make("beta", 0, 1)), cdf(scipy.stats.beta, 1.5, 0.8)) < bound
    process = PROCESSES["rf"]()
    t = draws(make("edm_log_normal", 1e-4, 0.9999, process=process)).double()
    assert distance((t / (1 - t)).log(), cdf(scipy.stats.norm, -0.5, 0.9)) < bound
    # with cosmap, rf has the log-SNR of the cosine process at uniform times (Esser et al. 2024, section 3.1)
    t = draws(make("cosmap", 0, 1)).double()
    assert distance(2 / math.pi * torch.atan(t / (1 - t)), cdf(scipy.stats.uniform)) < bound


def test_density_of_the_papers():
    """Mode sampling is uniform for scale 0 and most dense in the middle for 1.29; cosmap has the density of eq. 22.

    (Esser et al. 2024.)
    """
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(make("mode", 0, 1, mode_scale=0.0).density(u), torch.ones_like(u))
    mode = make("mode", 0, 1, mode_scale=1.29).density(u)
    assert mode.argmax() == 49 and mode[49].item() == pytest.approx(1 / (1 + 1.29 * (1 - math.pi / 2)), rel=1e-9)
    torch.testing.assert_close(make("cosmap", 0, 1).density(u), 2 / (math.pi - 2 * math.pi * u + 2 * math.pi * u**2))


@pytest.mark.parametrize("name", list(TIME_SAMPLERS))
def test_importance_weights_give_the_uniform_loss(name):
    """The weighted mean of a loss is its uniform mean, within 4 standard errors.

    The loss is 0 near the ends, since the weights of logit_normal have infinite variance there.
    """
    sampler = make(name, 0.05, 0.95)

    def loss(t):
        return torch.where((t > 0.1) & (t < 0.9), 1 + torch.sin(9 * t), 0.0)

    t = draws(sampler, n=200_000)
    terms = sampler.importance(t) * loss(t)
    uniform = loss(torch.linspace(0.05, 0.95, 100_001, dtype=torch.float64)).mean().item()
    assert abs(terms.mean().item() - uniform) < 4 * terms.std().item() / math.sqrt(200_000)
    if name not in ("uniform", "stratified"):
        assert abs(loss(t).mean().item() - uniform) > 0.01  # the mean without weights is another


def test_importance_is_finite_at_the_ends():
    for name in TIME_SAMPLERS:
        sampler = make(name, 1e-4, 0.9999)
        for t in (torch.tensor([1e-4, 0.9999]), torch.tensor([1e-4, 0.9999], dtype=torch.float64)):
            density = sampler.density(t)
            assert density.dtype == t.dtype and density.isfinite().all() and (density >= 0).all(), name


def test_stratified_has_one_time_in_each_interval_in_random_order():
    t = draws(Stratified(), n=256)
    cells = (t * 256).long()
    assert torch.equal(cells.sort().values, torch.arange(256))
    assert not torch.equal(cells, torch.arange(256))


def test_logit_normal_settings_matter():
    assert draws(LogitNormal(logit_normal_loc=2.0)).mean() > 0.8
    assert draws(LogitNormal(logit_normal_scale=0.1)).std() < 0.05


class CountOperations(TorchDispatchMode):
    """Counts operations, each of which is at least one kernel on a GPU, and lists those that make the CPU wait for it.

    These are reading a value and copying to another device.
    """

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, []

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        self.count += 1
        result = operation(*arguments, **(settings or {}))
        devices = {x.device for x in (result, *arguments) if isinstance(x, torch.Tensor)}
        reads = operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        if reads or len(devices) > 1:
            self.waits.append(operation)
        return result


@pytest.mark.parametrize("name", list(TIME_SAMPLERS))
def test_on_a_gpu_nothing_is_copied_or_waited_for(name):
    """Tested with fake tensors, which need no GPU. The operations are few, since each costs the launch of a kernel.

    (By bisection, mode would take 694 operations.)
    """
    sampler = make(name, 1e-4, 0.9999)
    with FakeTensorMode(), CountOperations() as operations:
        t = sampler(128, torch.device("cuda", 0))
        weight = sampler.importance(t)
    assert t.device.type == weight.device.type == "cuda" and not operations.waits, operations.waits
    assert operations.count < 100


@pytest.mark.parametrize("scale", [-1.0, -0.3, 1.29, 1.75])
def test_the_density_of_mode_is_that_of_its_map(scale):
    """1 / |map'(v)| at u = map(v), for v on a grid that is fine at the ends.

    There the map has slope 0 for scale -1; for scale 1.75, its slope is small in the middle.
    """
    mode = make("mode", 0, 1, mode_scale=scale)
    v = torch.sin(torch.linspace(0.01, math.pi / 2 - 0.01, 5000, dtype=torch.float64)) ** 2
    slope = 1 + scale * (1 - math.pi / 2 * torch.sin(math.pi * v))
    torch.testing.assert_close(mode.unit_density(mode.map(v)), 1 / slope, rtol=1e-5, atol=0)
