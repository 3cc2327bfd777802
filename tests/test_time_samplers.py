"""Time samplers: range, distribution (Kolmogorov-Smirnov), strata, and that they follow their generator."""

import math

import pytest
import torch

from time_samplers import TIME_SAMPLERS, LogitNormal, Stratified

N = 20_000


@pytest.mark.parametrize("name", list(TIME_SAMPLERS))
def test_inside_the_range_and_reproducible(name):
    sampler = TIME_SAMPLERS[name](T_min=0.2, T_max=0.7)
    draws = [sampler(N, "cpu", torch.Generator().manual_seed(3)) for _ in range(2)]
    assert draws[0].shape == (N,) and draws[0].dtype == torch.float32
    assert torch.equal(*draws)
    assert draws[0].min() >= 0.2 and draws[0].max() <= 0.7 and draws[0].std() > 0.05


def distance(t, cdf):
    """Kolmogorov-Smirnov distance of the sample from the distribution."""
    t = t.double().sort().values
    ranks = torch.arange(1, len(t) + 1) / len(t)
    return max((cdf(t) - ranks).abs().max().item(), (cdf(t) - ranks + 1 / len(t)).abs().max().item())


@pytest.mark.parametrize("name", list(TIME_SAMPLERS))
def test_distribution(name):
    settings = {"logit_normal_loc": 0.5, "logit_normal_scale": 0.8} if name == "logit_normal" else {}
    t = TIME_SAMPLERS[name](T_min=0.1, T_max=0.9, **settings)(N, "cpu", torch.Generator().manual_seed(0))

    def cdf(t):
        u = (t - 0.1) / 0.8
        return 0.5 * (1 + torch.erf((torch.logit(u) - 0.5) / 0.8 / math.sqrt(2))) if settings else u

    assert distance(t, cdf) < 1.95 / math.sqrt(N)  # passes with probability 0.999 if the distribution is right


def test_stratified_has_one_time_in_each_interval_in_random_order():
    t = Stratified()(256, "cpu", torch.Generator().manual_seed(0))
    cells = (t * 256).long()
    assert torch.equal(cells.sort().values, torch.arange(256))
    assert not torch.equal(cells, torch.arange(256))


def test_logit_normal_settings_matter():
    late = LogitNormal(logit_normal_loc=2.0)(N, "cpu", torch.Generator().manual_seed(0))
    narrow = LogitNormal(logit_normal_scale=0.1)(N, "cpu", torch.Generator().manual_seed(0))
    assert late.mean() > 0.8 and narrow.std() < 0.05
