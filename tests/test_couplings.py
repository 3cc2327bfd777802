"""Tests of the couplings: the least cost against every order, classes that keep their noise, batches of training."""

import itertools

import pytest
import torch
from conftest import make

from couplings import COUPLINGS


def points(n, seed=0):
    return torch.randn(2, n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cost(x0, x1):
    return ((x0 - x1) ** 2).sum().item()


@pytest.mark.parametrize("seed", range(5))
def test_ot_is_the_least_of_all_orders(seed):
    x0, x1 = points(6, seed)
    order = COUPLINGS["ot"](x0, x1, None)
    assert sorted(order.tolist()) == list(range(6))
    least = min(cost(x0, x1[list(o)]) for o in itertools.permutations(range(6)))
    assert cost(x0, x1[order]) == pytest.approx(least, rel=1e-12) and least < cost(x0, x1)


def test_ot_within_class_is_the_least_of_orders_within_classes():
    x0, x1 = points(7)
    label = torch.tensor([1, 0, 1, 0, 2, 1, 0])
    order = COUPLINGS["ot_within_class"](x0, x1, label)
    assert torch.equal(label[order], label) and sorted(order.tolist()) == list(range(7))
    allowed = [list(o) for o in itertools.permutations(range(7)) if torch.equal(label[list(o)], label)]
    assert cost(x0, x1[order]) == pytest.approx(min(cost(x0, x1[o]) for o in allowed), rel=1e-12)


def test_naive_ot_ties_noise_to_labels_and_within_class_does_not():
    """Two classes, at x = -2 and 2. With `ot` each gets the noise on its side of 0, of mean -0.8 or 0.8.

    With `ot_within_class`, the noise of each class has mean 0.
    """
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(512) % 2
    x0 = 4.0 * label[:, None] - 2 + 0.1 * torch.randn(512, 1, generator=generator)
    x1 = torch.randn(512, 1, generator=generator)
    naive, within = (x1[COUPLINGS[name](x0, x1, label)][label == 1].mean().item() for name in ("ot", "ot_within_class"))
    assert naive > 0.7 and abs(within) < 4 / 256**0.5  # 4 standard errors of the mean of 256


@pytest.mark.parametrize("coupling", ["ot", "ot_within_class"])
def test_a_batch_is_coupled_as_a_whole(tmp_path, digits, coupling):
    """A batch has the same data and noise in a better order, and each of several ranks has its rows of this batch."""
    usual = make(tmp_path, digits).prepare_batch(3)
    trainer = make(tmp_path, digits, run_name="ot", coupling=coupling, sde_sampler=None, label_dropout=0.5)
    batch = trainer.prepare_batch(3)
    assert torch.equal(batch.x0, usual.x0) and torch.equal(batch.t, usual.t)
    assert torch.equal(batch.x1.flatten(1).sort(0).values, usual.x1.flatten(1).sort(0).values)
    assert cost(batch.x0, batch.x1) < cost(usual.x0, usual.x1)
    parts = []
    for rank in range(4):
        trainer.own_rows = range(4 * rank, 4 * rank + 4)
        parts.append(trainer.prepare_batch(3))
    for name in ("x0", "x1", "t", "label", "importance"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name
    if coupling == "ot_within_class":  # by the labels before some are hidden
        labels = trainer.batches(3)[1]
        order = [(usual.x1 == x).flatten(1).all(1).nonzero().item() for x in batch.x1]
        assert torch.equal(labels[order], labels)
