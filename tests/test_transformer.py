"""Tests of the transformer: shapes, the start at zero, places, conditions, its published size, and wrong settings."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_unet import assert_inputs_matter, randomized
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmark import flops_of
from config import PRESETS, Config
from transformer import Block, Transformer
from utils import UserError, call_with_settings

SMALL = dict(patch_size=2, depth=2, heads=2, hidden_dim=24)
PRESETS_OF_IT = [name for name, settings in PRESETS.items() if settings.get("network") == "transformer"]


@pytest.mark.parametrize("shape, patch_size", [((1, 8, 8), 1), ((3, 16, 8), 4), ((8, 6, 9), 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_has_the_shape_of_the_input_and_starts_at_zero(shape, patch_size, memory_format):
    net = Transformer(shape, **{**SMALL, "patch_size": patch_size}).to(memory_format=memory_format)
    x = torch.randn(2, *shape).to(memory_format=memory_format)
    assert torch.equal(net(x, torch.rand(2)), torch.zeros_like(x))
    out = randomized(net)(x, torch.rand(2))
    assert out.shape == x.shape and out.std() > 0.01


def test_each_block_starts_as_the_identity_and_passes_gradients():
    torch.manual_seed(0)
    block, x, emb = Block(24, 2, 0.0), torch.randn(2, 5, 24), torch.randn(2, 24)
    out = block(x, emb)
    assert torch.equal(out, x)
    out.square().sum().backward()
    gates = block.modulation.weight.grad.unflatten(0, (6, 24))[[2, 5]]
    assert gates.abs().amax((1, 2)).min() > 0  # zero gates are left in the first step


def test_blocks_are_attention_and_swiglu_by_the_plain_formulas():
    """LayerNorm, softmax(q k^T / sqrt(d)) v and SiLU(a) b, head by head."""
    torch.manual_seed(0)
    block = randomized(Block(24, 2, 0.0))
    x, emb = torch.randn(3, 5, 24), torch.randn(3, 24)
    shift1, scale1, gate1, shift2, scale2, gate2 = (emb @ block.modulation.weight.T + block.modulation.bias).split(
        24, dim=1)

    def norm(y):
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    expected = []
    for row in range(3):
        h = norm(x[row]) * (1 + scale1[row]) + shift1[row]
        heads = []
        for head in range(2):
            q, k, v = (h @ block.qkv.weight[24 * part + 12 * head :][:12].T for part in range(3))
            q, k = norm(q) * block.norm.weight, norm(k) * block.norm.weight
            heads.append(torch.softmax(q @ k.T / 12**0.5, dim=-1) @ v)
        y = x[row] + gate1[row] * (torch.cat(heads, dim=-1) @ block.attention_out.weight.T)
        a, b = ((norm(y) * (1 + scale2[row]) + shift2[row]) @ block.mlp_in.weight.T).chunk(2, dim=-1)
        expected.append(y + gate2[row] * ((a * torch.sigmoid(a) * b) @ block.mlp_out.weight.T))
    torch.testing.assert_close(block(x, emb), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_patches_are_told_apart_by_their_place():
    """Without positions the network would not see a permutation of patches. Each place has its own sines."""
    net = randomized(Transformer((1, 8, 12), **SMALL))
    x, t = torch.randn(1, 1, 8, 12), torch.tensor([0.5])
    for dim in (2, 3):
        rolled = net(x.roll(2, dim), t).roll(-2, dim)
        assert (rolled - net(x, t)).abs().max() > 1e-2
    assert net.positions.shape == (4 * 6, 24) and torch.pdist(net.positions).min() > 0.5
    net.positions.zero_()
    torch.testing.assert_close(net(x.roll(2, 3), t).roll(-2, 3), net(x, t), rtol=1e-4, atol=1e-4)


def test_positions_are_sines_and_cosines_of_row_and_column():
    """Peebles & Xie 2023 and He et al. 2022: half of the channels for each, at frequencies 10,000^(-i / 6)."""
    net = Transformer((1, 8, 12), **SMALL)
    for row, column in ((0, 0), (1, 0), (0, 5), (3, 4)):
        angles = torch.cat([place * 10_000 ** (-torch.arange(6) / 6) for place in (row, column)])
        angles = angles.unflatten(0, (2, 6))
        expected = torch.cat([angles.cos(), angles.sin()], dim=1).flatten()
        torch.testing.assert_close(net.positions[row * 6 + column], expected)


def test_a_patch_is_one_token():
    """Without attention, the output of a patch depends on the pixels of this patch alone."""
    net = randomized(Transformer((2, 4, 6), **{**SMALL, "depth": 0}))
    x, t = torch.randn(1, 2, 4, 6), torch.tensor([0.5])
    changed = x.clone()
    changed[:, 1, 3, 2] += 1  # in the patch of rows 2 and 3, columns 2 and 3
    differs = (net(changed, t) != net(x, t))[0]
    assert differs[:, 2:, 2:4].all() and differs.sum() == 2 * 4


def test_time_label_and_pixels_matter_and_rows_do_not_interact():
    net = randomized(Transformer((1, 8, 8), num_classes=3, **SMALL))
    assert_inputs_matter(net, atol=1e-4)
    x, t = torch.randn(4, 1, 8, 8), torch.rand(4)
    assert torch.equal(net(x, t, None), net(x, t, torch.full((4,), 3)))


def test_a_second_time_matters():
    """As the network of a flow map gets it: t - s has features of its own."""
    net = randomized(Transformer((1, 8, 8), second_time=True, **SMALL))
    x, t, s = torch.randn(4, 1, 8, 8), torch.rand(4), torch.rand(4)
    for changed in (net(x, t, None, None, s + 0.1), net(x, t + 0.1, None, None, s + 0.1)):
        assert (changed - net(x, t, None, None, s)).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("cond_shape", [(4,), (2, 8, 8), (2, 4, 4)])
def test_a_condition_matters_and_none_is_zeros(cond_shape):
    net = randomized(Transformer((1, 8, 8), cond_shape=cond_shape, **SMALL))
    x, t, cond = torch.randn(2, 1, 8, 8), torch.rand(2), torch.randn(2, *cond_shape)
    assert torch.equal(net(x, t), net(x, t, None, torch.zeros_like(cond)))
    assert (net(x, t, None, cond) - net(x, t)).abs().amax((1, 2, 3)).min() > 1e-3
    if cond_shape == (2, 4, 4):
        enlarged = F.interpolate(cond, (8, 8), mode="bilinear")
        torch.testing.assert_close(net(x, t, None, cond), net(x, t, None, enlarged))


def test_every_parameter_gets_a_gradient_and_dropout_is_used():
    net = randomized(Transformer((1, 8, 8), 3, cond_shape=(2,), second_time=True, dropout=0.5, **SMALL)).train()
    given = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3]), torch.ones(4, 2), torch.zeros(4)
    out = net(*given)
    out.pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    assert not torch.equal(net(*given), out)


def test_size_s_2_has_the_published_parameters_and_operations():
    """DiT-S/2 (Peebles & Xie 2023, table 1 and appendix A): 33M, and 6.06 G multiply-adds at 32 x 32 x 4.

    That one also outputs the variance of each of the 4 channels, by as many operations as added below.
    """
    net = Transformer((4, 32, 32), 1000, patch_size=2, depth=12, heads=6, hidden_dim=384)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == 33
    with torch.no_grad():
        flops = flops_of(lambda: net(torch.randn(1, 4, 32, 32), torch.rand(1), torch.tensor([1])))
    assert round((flops / 2 + 256 * 384 * 16) / 1e9, 2) == 6.06


def test_a_swiglu_has_the_parameters_of_an_mlp_of_four_times_the_width():
    for dim in (384, 768, 1024, 1152):  # S, B, L, XL
        with torch.device("meta"):
            block = Block(dim, 16, 0.0)
        mlp = sum(p.numel() for layer in (block.mlp_in, block.mlp_out) for p in layer.parameters())
        assert 0.998 < mlp / (8 * dim**2) <= 1


@pytest.mark.parametrize("shape, changes, words", [
    ((2,), {}, r"transformer takes images, not data of shape \(2,\): use --network mlp"),
    ((1, 8, 9), {}, "cuts 8 x 9 images into patches of 2 x 2: use a --patch_size that divides both sides"),
    ((1, 9, 8), {}, "cuts 9 x 8 images"),
    ((1, 8, 8), dict(heads=5), "hidden_dim 24 is not divisible by 4 x heads, 20: use a --hidden_dim such as 320, or"),
    ((1, 8, 8), dict(hidden_dim=22), "hidden_dim 22 is not divisible by 4 x heads, 8: .* fewer --heads"),
])
def test_sizes_that_do_not_fit(shape, changes, words):
    with pytest.raises(UserError, match=words) as error:
        Transformer(shape, **{**SMALL, **changes})
    assert "\n" not in str(error.value)


def gradients(net, given, bf16=False):
    torch.manual_seed(1)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = net(*given)
    return torch.cat([g.flatten() for g in torch.autograd.grad(out.float().sin().sum(), list(net.parameters()))])


def test_checkpointing_gives_equal_gradients_and_keeps_less():
    given = torch.randn(4, 1, 8, 8), torch.rand(4)
    kept, found = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = randomized(Transformer((1, 8, 8), dropout=0.5, checkpointing=checkpointing, **SMALL)).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            net(*given)
        kept.append(sum(sizes))
        found.append(gradients(net, given))
    assert torch.equal(*found)
    assert kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_computes_nearly_the_same(memory_format):
    net = randomized(Transformer((3, 8, 8), **SMALL)).to(memory_format=memory_format)
    given = torch.randn(4, 3, 8, 8).to(memory_format=memory_format), torch.rand(4)
    full, half = gradients(net, given), gradients(net, given, bf16=True)
    assert (half - full).norm() / full.norm() < 0.03  # each operation in bfloat16, of 8 bits, is up to 0.4% off


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_mode_is_the_derivative(checkpointing):
    """By jvp along xt, t and s, as training of flow maps takes it, and by central differences."""
    net = randomized(Transformer((1, 4, 4), second_time=True, checkpointing=checkpointing, **SMALL))
    torch.manual_seed(2)
    x, t, s, direction = torch.randn(3, 1, 4, 4), torch.rand(3), torch.rand(3), torch.randn(3, 1, 4, 4)

    def along(e):
        return net(x + e * direction, t + e, None, None, s - 0.5 * e)

    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(along, (torch.tensor(0.0),), (torch.tensor(1.0),))
        differences = (along(2e-3) - along(-2e-3)) / 4e-3
    error = (derivative - differences).norm() / derivative.norm()
    assert derivative.norm() > 0.1 and error < 5e-3, error  # rounding over 4e-3, and the third derivative


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_into_one_graph_once(checkpointing):
    """No graph break (fullgraph), the same numbers, and no recompilation for other data and other labels."""
    torch._dynamo.reset()
    net = randomized(Transformer((1, 8, 8), 3, checkpointing=checkpointing, **{**SMALL, "depth": 1}))
    compiled = torch.compile(net, fullgraph=True, backend="eager")  # traces the network, but compiles nothing: faster
    x, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])  # 3: no label
    torch.testing.assert_close(compiled(x, t, label), net(x, t, label))
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(x + 1, 1 - t, label.flip(0)), net(x + 1, 1 - t, label.flip(0)))


def test_presets_and_defaults_make_a_network():
    assert PRESETS_OF_IT == ["digits_transformer", "cifar10_transformer"]
    for settings in (*map(PRESETS.get, PRESETS_OF_IT), dict(network="transformer")):
        with torch.device("meta"):
            call_with_settings(Transformer, vars(Config(**settings)), data_shape=(3, 32, 32))


def test_the_sizes_of_the_readme():
    """Parameters and multiply-adds of all four, counted without computing anything."""
    rows = re.findall(r"^\| (\w+) \| `--hidden_dim (\d+) --depth (\d+) --heads (\d+)` \| ([\d.]+) M .*\| ([\d.]+) G ",
                      (ROOT / "README.md").read_text(), re.M)
    assert [row[0] for row in rows] == ["S", "B", "L", "XL"]
    for _, dim, depth, heads, parameters, multiply_adds in rows:
        with torch.device("meta"):
            net = Transformer((4, 32, 32), num_classes=1000, hidden_dim=int(dim), depth=int(depth), heads=int(heads))
            given = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
            flops = flops_of(partial(net, *given))
        assert f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f}" == parameters
        assert f"{flops / 2e9:.2f}" == multiply_adds
