"""Tests of the MLP: shapes, inputs that all matter, the null label, dropout, and data that do not fit."""

import pytest
import torch

from mlp import MLP


def test_shape_inputs_and_null_label():
    torch.manual_seed(0)
    net = MLP((2,), num_classes=3, hidden_dim=32, num_layers=2)
    x, t, label = torch.randn(5, 2), torch.rand(5), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(net(x, t, label), torch.zeros(5, 2))  # the last layer starts at zero
    torch.nn.init.normal_(net.out[-1].weight)
    out = net(x, t, label)
    assert out.shape == (5, 2)
    for changed in (net(x + 1, t, label), net(x, t + 0.1, label), net(x, t, (label + 1) % 3)):
        assert (changed - out).abs().amax(1).min() > 1e-3
    assert torch.equal(net(x, t, None), net(x, t, torch.full((5,), 3)))


def test_dropout_is_used():
    net = MLP((2,), hidden_dim=32, num_layers=2, dropout=0.5)
    torch.nn.init.normal_(net.out[-1].weight)
    x, t = torch.randn(5, 2), torch.rand(5)
    assert not torch.equal(net(x, t), net(x, t)) and torch.equal(net.eval()(x, t), net(x, t))


def test_images_do_not_fit():
    with pytest.raises(ValueError, match="--network unet"):
        MLP((1, 8, 8))
