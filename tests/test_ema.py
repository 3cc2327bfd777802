"""Tests of the moving average: its formula with the warm-up, its buffers, and that its network restores."""

import torch
from torch import nn

from ema import EMA


def test_formula_with_warmup():
    net = nn.Linear(2, 1)
    ema, expected = EMA(net, 0.9), net.weight.detach().clone()
    for n in range(30):
        with torch.no_grad():
            net.weight.add_(1.0)
        ema.update(n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    torch.testing.assert_close(ema.net.weight, expected)
    assert not ema.net.weight.requires_grad and net.weight.requires_grad


def test_buffers_are_copied_and_the_state_restores():
    net = nn.BatchNorm1d(3)
    ema = EMA(net, 0.9)
    net(torch.randn(8, 3) + 5)
    ema.update(0)
    assert torch.equal(ema.net.running_mean, net.running_mean) and ema.net.num_batches_tracked == 1
    restored_ema = EMA(nn.BatchNorm1d(3), 0.9)
    restored_ema.net.load_state_dict(ema.net.state_dict())
    for restored, saved in zip(restored_ema.net.state_dict().values(), ema.net.state_dict().values(), strict=True):
        assert torch.equal(restored, saved)
