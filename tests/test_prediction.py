"""Predictions: every kind against its definition, every conversion there and back, on every process and against exact data."""

import pytest
import torch
from conftest import Gaussian

from prediction import PREDICTIONS, convert, target
from processes import PROCESSES
from utils import UserError

KINDS = list(PREDICTIONS)


def batch(process, n=64, low=0.02, high=0.98):
    t = torch.linspace(low, high, n, dtype=torch.float64)
    x0, x1 = torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c = process.coefs(t, 2)
    return t, c, x0, x1, c.alpha * x0 + c.sigma * x1


def test_targets_are_their_definitions(process):
    _, c, x0, x1, _ = batch(process)
    definitions = {
        "x0": x0,
        "x1": x1,
        "score": -x1 / c.sigma,
        "velocity": c.alpha_dot * x0 + c.sigma_dot * x1,
        "v": c.alpha * x1 - c.sigma * x0,
    }
    assert definitions.keys() == PREDICTIONS.keys()
    for kind, definition in definitions.items():
        torch.testing.assert_close(target(kind, c, x0, x1), definition, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_conversion_gives_the_other_target_and_back(process, kind, to):
    _, c, x0, x1, xt = batch(process)
    y = target(kind, c, x0, x1)
    there = convert(y, xt, c, kind, to)
    torch.testing.assert_close(there, target(to, c, x0, x1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(convert(there, xt, c, to, kind), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_score_of_exact_data_is_the_gradient_of_log_density(process, kind):
    t, c, _, _, xt = batch(process)
    oracle = Gaussian(process, kind)
    x = xt.clone().requires_grad_()
    _, mean, variance = oracle.moments(t)
    (gradient,) = torch.autograd.grad((-0.5 * (x - mean) ** 2 / variance).sum(), x)
    torch.testing.assert_close(convert(oracle(xt, t), xt, c, kind, "score"), gradient, rtol=1e-9, atol=1e-9)


def test_same_kind_is_untouched_even_where_it_is_singular(process):
    c = process.coefs(torch.tensor([0.0, 1.0]), 2)
    y = torch.randn(2, 3)
    assert all(convert(y, y, c, kind, kind) is y for kind in KINDS)


def test_negative_determinant_has_the_right_sign(process):
    """x0 has D = -sigma < 0: a guard such as D + 1e-8 would be wrong there, most of all near t = 0."""
    t = torch.tensor([1e-6], dtype=torch.float64)
    c, x0, x1 = process.coefs(t, 2), torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64)
    x1_again = convert(x0, c.alpha * x0 + c.sigma * x1, c, "x0", "x1")
    torch.testing.assert_close(x1_again, x1, rtol=1e-6, atol=0)


def test_unknown_kind_lists_the_known():
    c = PROCESSES["rf"]().coefs(torch.rand(2), 2)
    with pytest.raises(UserError, match="'velocty' is not known here: expected one of x0, x1, score, velocity, v"):
        target("velocty", c, torch.zeros(2, 1), torch.zeros(2, 1))
