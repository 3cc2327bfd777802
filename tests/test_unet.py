"""Tests of the U-Net: shapes, inputs that all matter, the null label, its size, wrong settings, and fast layers."""

import pytest
import torch

import unet
from config import Config
from unet import UNet, time_features
from utils import call_with_settings

SMALL = dict(model_channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,))


def randomized(net):
    """The network with weights away from zero, so that every branch changes the output."""
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


def assert_inputs_matter(net, atol):
    """Time, label and pixels of one channel of 8 x 8 matter, with three classes, and rows do not interact."""
    x, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 0])
    out = net(x, t, label)
    changed = {"x": net(x + 1, t, label), "t": net(x, t + 0.1, label), "label": net(x, t, (label + 1) % 3)}
    for name, changed_out in changed.items():
        assert (changed_out - out).abs().amax((1, 2, 3)).min() > 1e-3, name
    torch.testing.assert_close(net(x[1:3], t[1:3], label[1:3]), out[1:3], rtol=1e-4, atol=atol)


def test_time_label_and_pixels_matter_and_rows_do_not_interact():
    assert_inputs_matter(randomized(UNet((1, 8, 8), num_classes=3, **SMALL)), atol=1e-5)


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
    """Ho et al. 2020, appendix B, has 35.7 million parameters. The scale and shift of each block add some."""
    with torch.device("meta"):
        net = call_with_settings(UNet, vars(Config()), data_shape=(3, 32, 32))
    assert 35e6 < sum(p.numel() for p in net.parameters()) < 40e6


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="halves 9 x 8 images 1 times"):
        UNet((1, 9, 8), **SMALL)
    with pytest.raises(ValueError, match="attention_resolutions 4 5: .* at heights 8 4:"):
        UNet((1, 8, 8), **{**SMALL, "attention_resolutions": (4, 5)})
    with pytest.raises(ValueError, match="--network mlp"):
        UNet((2,), **SMALL)


def test_time_features_of_near_times_differ():
    t = torch.linspace(0, 1, 1001)
    features = time_features(t, 32)
    assert features.shape == (1001, 32)
    assert (features[1:] - features[:-1]).norm(dim=1).min() > 0.1


def plain_attention(self, x):
    """`Attention.forward` by the plain formula, with a copy for each change of shape."""
    B, C, H, W = x.shape
    qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
    q, k, v = qkv.transpose(-1, -2).unbind(1)
    h = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v
    return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bf16", [False, True])
def test_fast_layers_compute_what_plain_layers_compute(memory_format, bf16, monkeypatch):
    """Outputs and gradients are those with torch's own GroupNorm and Dropout, and with plain attention."""
    settings = {**SMALL, "model_channels": 64}  # two heads
    net = randomized(UNet((3, 8, 8), **settings)).to(memory_format=memory_format)
    torch.manual_seed(1)
    x, t, probe = torch.randn(4, 3, 8, 8).to(memory_format=memory_format), torch.rand(4), torch.randn(4, 3, 8, 8)
    results = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(unet.Attention, "forward", plain_attention)
            monkeypatch.delattr(unet.GroupNorm, "forward")
            monkeypatch.delattr(unet.Dropout, "forward")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = net(x, t)
        gradients = torch.autograd.grad((out.float() * probe).sum(), list(net.parameters()))
        results.append([out.detach().float(), torch.cat([g.flatten() for g in gradients])])
    for fast, plain in zip(*results):
        error = (fast - plain).norm() / plain.norm()
        assert error < (0.03 if bf16 else 1e-5), error  # each operation in bfloat16, of 8 bits, is up to 0.4% off


def test_norms_are_in_float32():
    assert unet.GroupNorm(8)(torch.randn(2, 8, 4, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_each_element_with_its_probability(p):
    dropout, x = unet.Dropout(p), torch.ones(7, 3, 50, 101)  # 106,050 elements, which is not a multiple of 4
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(0)
    out = dropout(x)
    kept = (out != 0).double()
    assert out.stride() == x.stride()
    scaled = torch.full_like(out[out != 0], 1 / (1 - p))
    torch.testing.assert_close(out[out != 0], scaled, rtol=1e-4, atol=0)  # p is rounded to a multiple of 2^-16
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 4 * deviation
    flat = kept.permute(0, 2, 3, 1).flatten()  # in the order of memory: one random number for each four elements
    for lag in (1, 2, 3, 4, 5, 101, len(flat) // 4, len(flat) // 2):
        covariance = ((flat[lag:] - (1 - p)) * (flat[:-lag] - (1 - p))).mean()
        assert abs(covariance) < 4 * p * (1 - p) / len(flat[lag:]) ** 0.5, lag
    for row in range(4):
        assert abs(flat[row::4].mean() - (1 - p)) < 8 * deviation
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out.detach())
    assert not torch.equal(dropout(x), out)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), out)
    assert torch.equal(dropout.eval()(x), x)


def test_compiles_into_one_graph_once():
    """No graph break (fullgraph), the same numbers, and no recompilation for other data and other labels."""
    net = randomized(UNet((1, 8, 8), num_classes=3, **SMALL))
    compiled = torch.compile(net, fullgraph=True, backend="eager")  # traces the network, but compiles nothing: faster
    x, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])  # 3: no label
    torch.testing.assert_close(compiled(x, t, label), net(x, t, label))
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(x + 1, 1 - t, label.flip(0)), net(x + 1, 1 - t, label.flip(0)))


def test_a_step_of_training_compiles_into_one_graph():
    """Forward and backward, with dropout, labels and bfloat16, through AOTAutograd, which traces each operation.

    The network has one resolution, so that this takes seconds: changes of resolution are in the test above.
    """
    torch._dynamo.reset()  # else the shape of the images becomes a variable, after the other shape above: slower
    net = UNet((1, 4, 4), num_classes=3, dropout=0.1, **{**SMALL, "channel_mults": (1,)})
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x, t, label = torch.randn(4, 1, 4, 4), torch.rand(4), torch.tensor([0, 1, 2, 3])
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            compiled(x, t, label).float().square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
