"""Tests of the optimizer: learning rates, weight decay on matrices only, and steps with clipped gradients."""

import math

import pytest
import torch
from torch import nn

from optimizers import SCHEDULES, learning_rate, make_optimizer, take_step
from utils import UserError

RATE = dict(base_lr=0.1, min_lr=0.01, warmup_steps=10, num_training_steps=110)


def test_warmup_rises_linearly_to_the_base_rate():
    for schedule in SCHEDULES:
        rates = [learning_rate(s, lr_schedule=schedule, **RATE) for s in range(10)]
        assert rates == pytest.approx([0.01 * (s + 1) for s in range(10)])


def test_after_warmup():
    assert {learning_rate(s, lr_schedule="constant", **RATE) for s in range(10, 200)} == {0.1}
    cosine = [learning_rate(s, lr_schedule="cosine", **RATE) for s in range(10, 111)]
    assert cosine[0] == pytest.approx(0.1) and cosine[-1] == pytest.approx(0.01) and cosine[50] == pytest.approx(0.055)
    assert all(a > b for a, b in zip(cosine, cosine[1:]))
    assert learning_rate(500, lr_schedule="cosine", **RATE) == pytest.approx(0.01)


def test_no_warmup_and_warmup_as_long_as_training():
    assert learning_rate(0, lr_schedule="cosine", **{**RATE, "warmup_steps": 0}) == pytest.approx(0.1)
    assert learning_rate(109, lr_schedule="cosine", **{**RATE, "warmup_steps": 110}) == pytest.approx(0.1)
    assert math.isfinite(learning_rate(110, lr_schedule="cosine", **{**RATE, "warmup_steps": 110}))


def test_unknown_schedule():
    with pytest.raises(UserError, match="constant, cosine"):
        learning_rate(50, lr_schedule="linear", **RATE)


def test_only_matrices_decay():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    optimizer = make_optimizer(net, weight_decay=0.5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, value in net.state_dict().items():
        factor = 0.95 if before[name].ndim >= 2 else 1.0
        torch.testing.assert_close(value, factor * before[name])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(before)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_scales_the_gradient_and_returns_the_norm_before(fused):
    """After one step, Adam's first moment is 0.1 times the scaled gradient. An infinite norm changes nothing."""
    for max_norm, after in ((1.0, 1.0), (10.0, 5.0), (0, 5.0)):
        net = nn.Linear(3, 1, bias=False)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
        net.weight.grad = torch.tensor([[3.0, 4.0, 0.0]])
        assert take_step(optimizer, max_norm).item() == pytest.approx(5.0)
        moment = optimizer.state[net.weight]["exp_avg"]
        torch.testing.assert_close(moment, 0.1 * after / 5 * torch.tensor([[3.0, 4.0, 0.0]]), rtol=1e-5, atol=0)
        before, moment = net.weight.clone(), moment.clone()
        net.weight.grad = torch.tensor([[3.0, math.inf, 0.0]])
        assert not take_step(optimizer, max_norm).isfinite()
        assert torch.equal(net.weight, before) and torch.equal(optimizer.state[net.weight]["exp_avg"], moment)
