"""The U-Net: shapes, that every input matters, the null label, the size of the CIFAR-10 network, sizes that do not fit."""

import pytest
import torch

from config import Config
from unet import UNet, time_features
from utils import choose

SMALL = dict(model_channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,))


def randomized(net):
    """Weights away from zero, so that no branch is silent."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 8), (3, 12, 12)])
def test_output_has_the_shape_of_the_input(shape):
    net = UNet(shape, **{**SMALL, "attention_resolutions": (shape[1] // 2,)})
    x = torch.randn(2, *shape)
    assert net(x, torch.rand(2)).shape == x.shape
    assert torch.equal(net(x, torch.rand(2)), torch.zeros_like(x))  # the last layer starts at zero


def test_time_label_and_pixels_matter_and_rows_do_not_interact():
    net = randomized(UNet((1, 8, 8), num_classes=3, **SMALL))
    x, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 0])
    out = net(x, t, label)
    changed = {"x": net(x + 1, t, label), "t": net(x, t + 0.1, label), "label": net(x, t, (label + 1) % 3)}
    for name, other in changed.items():
        assert (other - out).abs().amax((1, 2, 3)).min() > 1e-3, name
    torch.testing.assert_close(net(x[1:3], t[1:3], label[1:3]), out[1:3], rtol=1e-4, atol=1e-5)


def test_none_is_the_null_label():
    net = randomized(UNet((1, 8, 8), num_classes=3, **SMALL))
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert torch.equal(net(x, t, None), net(x, t, torch.tensor([3, 3])))
    assert not torch.allclose(net(x, t, None), net(x, t, torch.tensor([0, 0])))


def test_every_parameter_gets_a_gradient():
    net = randomized(UNet((1, 8, 8), num_classes=3, **SMALL)).train()
    net(torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_dropout_and_attention_settings_are_used():
    net = randomized(UNet((1, 8, 8), dropout=0.5, **SMALL)).train()
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert not torch.equal(net(x, t), net(x, t))

    def size(**changes):
        return sum(p.numel() for p in UNet((1, 8, 8), **{**SMALL, **changes}).parameters())

    assert size(attention_resolutions=()) < size() < size(attention_resolutions=(4, 8))


def test_the_default_is_the_network_of_ddpm():
    """Ho et al. 2020, appendix B: 35.7 million parameters; scale-and-shift conditioning adds some."""
    with torch.device("meta"):
        net = choose({"unet": UNet}, "unet", **vars(Config()), data_shape=(3, 32, 32))
    assert 35e6 < sum(p.numel() for p in net.parameters()) < 40e6


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="halves 9 x 8 images 1 times"):
        UNet((1, 9, 8), **SMALL)
    with pytest.raises(ValueError, match="attention_resolutions 4 5: .* at heights 8 4:"):
        UNet((1, 8, 8), **{**SMALL, "attention_resolutions": (4, 5)})
    with pytest.raises(ValueError, match="--network mlp"):
        UNet((2,), **SMALL)


def test_time_features_tell_near_times_apart():
    t = torch.linspace(0, 1, 1001)
    features = time_features(t, 32)
    assert features.shape == (1001, 32)
    assert (features[1:] - features[:-1]).norm(dim=1).min() > 0.1
