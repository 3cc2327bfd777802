"""Tests of the optimizers: learning rates, which parameters decay or get Muon, and steps with clipped gradients."""

import math

import pytest
import torch
from conftest import make, metrics_of, run_ranks, tiny
from torch import nn

import saving
from mlp import MLP, PlainMLP
from optimizers import OPTIMIZERS, SCHEDULES, adamw, learning_rate, muon, take_step
from unet import UNet
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


def test_inverse_square_root():
    """base_lr / sqrt(max(t / t_ref, 1)) after warm-up, whatever the length of the run."""
    for start, first in ((40, 40), (5, 10)):  # at the earliest after warm-up
        rates = {**RATE, "min_lr": 0.0, "lr_schedule": "inverse_sqrt", "lr_decay_start": start}
        for steps in (110, 500):
            for step in (10, 39, 40, 41, 100, 400):
                right = 0.1 / math.sqrt(max(step / first, 1))
                assert learning_rate(step, **{**rates, "num_training_steps": steps}) == pytest.approx(right)
        assert learning_rate(9, **rates) == pytest.approx(0.1)
    assert learning_rate(10**9, **{**rates, "min_lr": 0.01}) == pytest.approx(0.01, rel=1e-2)


def test_warmup_stable_decay():
    rates = [learning_rate(s, lr_schedule="wsd", lr_decay_share=0.4, **RATE) for s in range(10, 111)]
    assert rates[:61] == pytest.approx([0.1] * 61)
    assert rates[60:] == pytest.approx([0.1 - 0.09 * k / 40 for k in range(41)])
    assert learning_rate(500, lr_schedule="wsd", lr_decay_share=0.4, **RATE) == pytest.approx(0.01)


def test_unknown_schedule():
    with pytest.raises(UserError, match="constant, cosine"):
        learning_rate(50, lr_schedule="linear", **RATE)


def test_only_matrices_decay():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    optimizer = adamw(net, weight_decay=0.5)
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


# ---- Muon


def hidden(net):
    """The names of the parameters that Muon updates, and those that AdamW does; all are in one of both."""
    first, second = muon(net, 0.0).optimizers
    names = {p: name for name, p in net.named_parameters()}
    found = [{names[p] for group in optimizer.param_groups for p in group["params"]} for optimizer in (first, second)]
    assert found[0] | found[1] == set(names.values()) and not found[0] & found[1]
    return found[0]


def test_muon_takes_the_matrices_of_blocks():
    """Not those of embeddings, of the layers before and after the blocks, and no convolutions."""
    net = MLP((2,), num_classes=3, hidden_dim=8, num_layers=2)
    assert hidden(net) == {f"layers.{i}.{k}.weight" for i in range(2) for k in (1, 4)}
    net = UNet((1, 8, 8), num_classes=3, model_channels=8, channel_mults=(1, 2), attention_resolutions=(8,))
    assert hidden(net) == {name for name, _ in net.named_parameters() if name.endswith("scale_shift.weight")}
    own = nn.ModuleDict({"first": nn.Linear(2, 4), "blocks": nn.ModuleList([nn.Embedding(3, 4), nn.Linear(4, 4)])})
    assert hidden(own) == {"blocks.1.weight"}
    with pytest.raises(UserError, match="in an nn.ModuleList, .* --optimizer adamw"):
        muon(PlainMLP((2,)), 0.0)


def two_layers(weight_decay=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ModuleList([nn.Linear(16, 16)]))
    optimizer = OPTIMIZERS["muon"](net, weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return net, optimizer


def test_an_update_by_muon_is_orthogonal_and_as_large_as_one_by_adamw():
    """0.2 lr in the root mean square: Newton and Schulz leave singular values of 0.7 to 1.2, in bfloat16."""
    net, optimizer = two_layers()
    before = [p.detach().clone() for p in net.parameters()]
    take_step(optimizer, 0)
    first, _, update, bias = (p.detach() - old for p, old in zip(net.parameters(), before))
    values = torch.linalg.svdvals(update / (0.1 * 0.2 * 16**0.5))
    assert 0.6 < values.min() and values.max() < 1.3
    for x in (first, bias):  # the first step of Adam has the size lr
        torch.testing.assert_close(x.abs(), torch.full_like(x, 0.1), rtol=1e-3, atol=0)


def test_muon_decays_matrices_and_no_biases():
    net, optimizer = two_layers(weight_decay=0.5)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad.zero_()
    take_step(optimizer, 0)
    for p, old in zip(net.parameters(), before):
        torch.testing.assert_close(p.detach(), (0.95 if p.ndim == 2 else 1.0) * old)


@pytest.mark.parametrize("spoilt", range(4))
def test_muon_clips_the_norm_of_all_gradients_and_skips_a_step_that_is_not_finite(spoilt):
    net, optimizer = two_layers()
    total = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    gradients = [p.grad.clone() for p in net.parameters()]
    torch.testing.assert_close(take_step(optimizer, 2.0), total)
    for p, gradient in zip(net.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient * 2 / total)
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    before = saving.digest([net.state_dict(), optimizer.state_dict()])
    for p, gradient in zip(net.parameters(), gradients):
        p.grad = gradient
    list(net.parameters())[spoilt].grad.flatten()[0] = math.nan
    assert not take_step(optimizer, 2.0).isfinite()
    assert saving.digest([net.state_dict(), optimizer.state_dict()]) == before


MUON = dict(optimizer="muon", weight_decay=0.1, lr_schedule="wsd", sde_sampler=None, sampler="euler", num_samples=1)


@pytest.mark.parametrize("stop", [1, 3])
def test_resuming_with_muon_is_bit_equal(tmp_path, digits, without_curves, stop):
    """Across the end of warm-up, and on a schedule that follows the whole run."""
    make(tmp_path, digits, run_name="straight", num_training_steps=6, **MUON).train()
    broken = make(tmp_path, digits, run_name="broken", num_training_steps=6, **MUON)
    broken.loop(stop)
    broken.save()
    make(tmp_path, digits, run_name="broken", num_training_steps=6, **MUON).train()
    a, b = (saving.load(f"{tmp_path}/{name}/last.pt") for name in ("straight", "broken"))
    assert len(a["optimizer"]) == 2 and all(len(state["state"]) for state in a["optimizer"])
    assert all(saving.digest(a[name]) == saving.digest(b[name]) for name in a.keys() - {"config"})
    with pytest.raises(UserError, match=r"optimizer \(muon there, adamw now\)"):
        make(tmp_path, digits, run_name="broken", **{**MUON, "optimizer": "adamw", "num_training_steps": 6})


def test_two_ranks_with_muon_are_one(tmp_path):
    """Losses to 1e-3: Muon computes in bfloat16, where the rounding of a sum may become 0.4% of an update."""
    for ranks in (1, 2):
        result = run_ranks(ranks, tiny(tmp_path, run_name=f"{ranks}", num_training_steps=12, **MUON))
        assert result.returncode == 0, result.stderr
    losses = [[line["loss"] for line in metrics_of(tmp_path / f"{ranks}")] for ranks in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0][0] != losses[0][-1]
