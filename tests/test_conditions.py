"""Conditions: what each corruption leaves, what a training step draws and hides, and networks that read them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make

from conditions import CORRUPTIONS, downsample, grey, mask_box, mask_pixels
from data_utils import cases, load_dataset, make_dataset, uniform_rows
from mlp import MLP
from unet import UNet
from utils import UserError

SMALL = dict(model_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,))
MASKS = ["mask_box", "mask_pixels"]


def images(n=5, *shape):
    torch.manual_seed(0)
    return torch.rand(n, *(shape or (3, 8, 8))) + 0.1  # never 0


def uniform(n, *keys):
    return uniform_rows(range(n), "cpu", 0, *keys)


# ---- Corruptions


def test_downsample_takes_means_of_squares():
    x = torch.arange(32.0).view(1, 2, 4, 4)
    expected = [[[[2.5, 4.5], [10.5, 12.5]], [[18.5, 20.5], [26.5, 28.5]]]]
    assert downsample(x, 2).tolist() == expected
    assert downsample(x, 4).tolist() == [[[[7.5]], [[23.5]]]] and torch.equal(downsample(x, 1), x)


def test_grey_is_the_mean_of_the_channels():
    x = torch.tensor([[1.0, 3], [2, 4], [6, 11]]).view(1, 3, 1, 2)
    assert grey(x).tolist() == [[[[3.0, 6.0]]]]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 10)])
def test_what_a_mask_leaves_is_as_it_was(name, shape):
    x = images(50, *shape)
    found = CORRUPTIONS[name](x, uniform(50), 0.3)
    left, mask = found[:, :-1], found[:, -1:]
    assert found.shape == (50, shape[0] + 1, *shape[1:]) and ((mask == 0) | (mask == 1)).all()
    visible = (mask == 1).expand_as(x)
    assert torch.equal(left[visible], x[visible]) and (left[~visible] == 0).all()
    assert 0 < (mask == 0).float().mean() < 1
    assert len(mask.flatten(1).unique(dim=0)) > 10  # each item has a mask of its own


@pytest.mark.parametrize("share, shape, box", [
    (0.25, (8, 8), (4, 4)), (0.3, (8, 8), (4, 4)), (0.5, (16, 8), (11, 6)), (1.0, (6, 4), (6, 4)),
])
def test_the_box_lies_inside_and_has_its_area(share, shape, box):
    """Every place inside occurs, and about equally often."""
    n = 2000
    hidden = mask_box(images(n, 1, *shape), uniform(n), share)[:, -1] == 0
    places = tuple(side - length + 1 for side, length in zip(shape, box))
    count = torch.zeros(places)
    for item in hidden:
        (y, x), last = item.nonzero().amin(0).tolist(), item.nonzero().amax(0).tolist()
        assert item.sum() == box[0] * box[1] and last == [y + box[0] - 1, x + box[1] - 1]
        count[y, x] += 1
    expected = n / count.numel()
    assert (count - expected).abs().max() <= 5 * expected**0.5 * (len(count) > 1)
    assert abs(box[0] * box[1] / np.prod(shape) - share) < 0.07


def test_the_box_follows_the_numbers_that_it_is_given():
    u = torch.tensor([[0.001, 0.999], [0.5, 0.25]])
    hidden = mask_box(torch.ones(2, 1, 8, 8), lambda n: u, 0.25)[:, -1] == 0
    first = [item.nonzero().amin(0).tolist() for item in hidden]
    assert first == [[0, 4], [2, 1]]


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_mask_pixels_hides_its_share(share):
    """Each pixel on its own, in all channels at once."""
    hidden = mask_pixels(images(400), uniform(400), share)[:, -1] == 0
    assert abs(hidden.float().mean() - share) < 0.015
    assert (hidden.float().mean(0) - share).abs().max() < 0.15
    neighbours = (hidden[:, :, 1:] & hidden[:, :, :-1]).float().mean()
    assert abs(neighbours - share**2) < 0.02


@pytest.mark.parametrize("name, shape", [("downsample", (1, 2, 2)), ("grey", (1, 8, 8)), ("mask_box", (2, 8, 8)),
                                         ("mask_pixels", (2, 8, 8))])
def test_a_data_set_with_a_corruption_gives_its_conditions(name, shape):
    data = load_dataset("digits", corruption=name, downsample_factor=4, mask_share=0.3)
    rows = np.array([3, 7, 7])
    cond, again = (data.cases(rows).cond for _ in range(2))
    other = data.condition(data.spec.encode(data[rows][0]), None, uniform_rows(range(3), "cpu", "other"))
    assert data.spec.cond_shape == shape and cond.shape == (3, shape[0] + 1, *shape[1:]) and data.cond is None
    assert (cond[:, -1] == 1).all() and torch.equal(cond, again)
    assert torch.equal(cond, other) == torch.equal(cond[1], cond[2]) == (name not in MASKS)
    x0 = data.spec.encode(torch.from_numpy(data.data[rows]))
    expected = F.avg_pool2d(x0, 4) if name == "downsample" else x0 * cond[:, -2:-1] if name in MASKS else x0
    assert torch.equal(cond[:, :1], expected)


def test_settings_reach_a_corruption():
    share = [(load_dataset("digits", corruption="mask_pixels", mask_share=s).cases(np.arange(200)).cond[:, 1] == 0)
             .float().mean() for s in (0.2, 0.8)]
    assert abs(share[0] - 0.2) < 0.03 and abs(share[1] - 0.8) < 0.03
    assert load_dataset("digits", corruption="downsample", downsample_factor=2).spec.cond_shape == (1, 4, 4)


def test_corruptions_that_do_not_fit_are_refused():
    for arguments, words in [
        (dict(name="moons", corruption="grey"), "corruption grey is for images and fields, not for data of shape"),
        (dict(name="digits", corruption="downsample", downsample_factor=9), "fails on items of shape .*smaller --down"),
        (dict(name="digits", corruption="blur"), "'blur' is not known here: expected one of downsample, grey"),
        (dict(name="digits", corruption="grey", lag=1), "expected one condition"),
    ]:
        with pytest.raises(UserError, match=words) as raised:
            load_dataset(**arguments)
        assert "\n" not in str(raised.value)


def test_samples_of_one_condition_follow_each_other():
    data = load_dataset("digits", corruption="mask_box", mask_share=0.3)
    found, again = cases(data, 12, 3, False), cases(data, 12, 3, False)
    assert found.cond.shape == (12, 3, 8, 8) and found.truth.shape == (4, 1, 8, 8) and found.labels.shape == (12,)
    assert torch.equal(found.cond, again.cond) and torch.equal(found.cond[::3], found.cond[2::3])
    assert len(found.cond.flatten(1).unique(dim=0)) == 4
    x0, mask = data.spec.encode(found.truth), found.cond[::3, 1:2]
    assert torch.equal(found.cond[::3, :1], x0 * mask)


# ---- Training steps


@pytest.fixture
def pairs():
    """40 random images (3, 8, 8) with 4 labels, and every other pixel of them as conditions (3, 4, 4)."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 3, 8, 8), np.uint8)
    return make_dataset(x, np.arange(40) % 4, cond=x[:, :, ::2, ::2].copy())


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_the_condition_of_a_step_is_a_function_of_seed_and_step(tmp_path, name):
    data = load_dataset("digits", corruption=name, downsample_factor=4, mask_share=0.3)
    trainer = make(tmp_path, data, overfit_one_batch=True, seed=1)  # the same items in each step
    torch.manual_seed(123)
    first, again, later = (trainer.prepare_batch(step) for step in (5, 5, 6))
    other = make(tmp_path, data, run_name="other", overfit_one_batch=True, seed=2)
    other.batches = trainer.batches
    assert torch.equal(first.cond, again.cond) and torch.equal(first.x0, later.x0)
    assert torch.equal(first.cond, later.cond) == (name not in MASKS)
    assert torch.equal(first.cond, other.prepare_batch(5).cond) == (name not in MASKS)


@pytest.mark.parametrize("name", ["downsample", "mask_box", "mask_pixels", None])
def test_ranks_share_the_conditions_of_one(tmp_path, pairs, name):
    data = pairs if name is None else load_dataset("digits", corruption=name, downsample_factor=4, mask_share=0.3)
    settings = dict(batch_size=40, random_flip=True, cond_dropout=0.3)
    whole, parts = make(tmp_path, data, **settings).prepare_batch(3), []
    trainer = make(tmp_path, data, run_name="b", **settings)
    for rank in range(2):
        trainer.own_rows = range(20 * rank, 20 * rank + 20)
        parts.append(trainer.prepare_batch(3))
    for name in ("cond", "x0", "x1", "label"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    split = whole.split(3)
    assert torch.equal(torch.cat([part.cond for part in split]), whole.cond)


def test_noise_is_not_coupled_with_conditions(tmp_path, pairs):
    with pytest.raises(UserError, match="coupling ot ties the noise to the condition, .*--coupling independent"):
        make(tmp_path, pairs, coupling="ot")


def test_a_stored_condition_is_flipped_with_its_item(tmp_path, pairs):
    trainer = make(tmp_path, pairs, batch_size=64, random_flip=True)
    batch, (data, _, cond) = trainer.prepare_batch(0), trainer.batches(0)
    x0, given = trainer.spec.encode(data), trainer.spec.encode(cond)
    flipped = (batch.x0 == x0.flip(-1)).flatten(1).all(1)
    assert 16 < flipped.sum() < 48 and torch.equal(batch.x0[~flipped], x0[~flipped])
    assert torch.equal(batch.cond[flipped, :3], given.flip(-1)[flipped])
    assert torch.equal(batch.cond[~flipped, :3], given[~flipped]) and (batch.cond[:, 3] == 1).all()


def test_a_corruption_is_of_the_flipped_item(tmp_path):
    data = load_dataset("digits", corruption="downsample", downsample_factor=4)
    trainer = make(tmp_path, data, batch_size=64, random_flip=True)
    batch, x0 = trainer.prepare_batch(0), data.spec.encode(trainer.batches(0)[0])
    assert not torch.equal(batch.x0, x0) and torch.equal(batch.cond[:, :1], F.avg_pool2d(batch.x0, 4))


def test_attributes_and_fields_are_not_flipped(tmp_path):
    x, cond = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8), np.arange(80.0).reshape(40, 2)
    trainer = make(tmp_path, make_dataset(x, np.arange(40) % 4, cond=cond), random_flip=True)
    batch = trainer.prepare_batch(0)
    assert torch.equal(batch.cond, trainer.spec.condition(trainer.batches(0)[2])) and batch.cond.shape == (16, 3)
    field = make(tmp_path, make_dataset(x / 255.0, np.arange(40) % 4), run_name="f", random_flip=True)
    assert torch.equal(field.prepare_batch(0).x0, field.spec.encode(field.batches(0)[0]))


@pytest.mark.parametrize("name", ["downsample", "mask_box", None])
def test_cond_dropout_hides_whole_conditions_at_its_rate(tmp_path, pairs, name):
    data = pairs if name is None else load_dataset("digits", corruption=name, downsample_factor=4, mask_share=0.3)
    settings = dict(batch_size=2048, class_conditional=False)
    plain = make(tmp_path, data, **settings).prepare_batch(1)
    batch = make(tmp_path, data, run_name="b", cond_dropout=0.25, **settings).prepare_batch(1)
    hidden = (batch.cond == 0).flatten(1).all(1)
    assert abs(hidden.float().mean() - 0.25) < 0.04
    assert (batch.cond[~hidden][:, -1] == 1).all() and (plain.cond[:, -1] == 1).all()
    assert torch.equal(batch.cond[~hidden], plain.cond[~hidden]) and torch.equal(batch.x1, plain.x1)
    assert batch.label is None


def test_labels_and_conditions_are_hidden_together(tmp_path, pairs):
    batch = make(tmp_path, pairs, batch_size=1024, cond_dropout=0.3, label_dropout=0.3).prepare_batch(0)
    hidden = (batch.cond == 0).flatten(1).all(1)
    assert torch.equal(hidden, batch.label == 4) and 200 < hidden.sum() < 400
    batch = make(tmp_path, pairs, run_name="b", batch_size=1024, cond_dropout=0.1, label_dropout=0.3).prepare_batch(0)
    hidden = (batch.cond == 0).flatten(1).all(1)
    assert 60 < hidden.sum() < 150 and (batch.label[hidden] == 4).all() and 200 < (batch.label == 4).sum() < 400


def test_a_data_set_without_conditions_has_none(tmp_path, digits):
    assert make(tmp_path, digits).prepare_batch(0).cond is None
    with pytest.raises(UserError, match="cond_dropout is set, but digits has no condition: use --lag 1"):
        make(tmp_path, digits, run_name="b", cond_dropout=0.1)


def test_a_run_with_conditions_learns_from_them(tmp_path, pairs, without_curves):
    """Three steps, and pictures. The gradient reaches what reads the condition."""
    trainer = make(tmp_path, pairs, cond_dropout=0.2, random_flip=True, num_training_steps=3)
    before = trainer.net.input.weight.detach().clone()
    trainer.train()
    assert (trainer.net.input.weight - before)[:, 3:].abs().amax((0, 2, 3)).min() > 0


# ---- Networks


def perturbed(net):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


NETWORKS = {
    "unet, image": (lambda: UNet((2, 8, 8), 3, cond_shape=(4, 8, 8), **SMALL), (2, 8, 8), (4, 8, 8)),
    "unet, coarse image": (lambda: UNet((2, 8, 8), 3, cond_shape=(4, 2, 2), **SMALL), (2, 8, 8), (4, 2, 2)),
    "unet, attributes": (lambda: UNet((2, 8, 8), 3, cond_shape=(4,), **SMALL), (2, 8, 8), (4,)),
    "mlp": (lambda: MLP((2,), 3, hidden_dim=16, num_layers=1, cond_shape=(4,)), (2,), (4,)),
}


@pytest.mark.parametrize("make_net, shape, cond_shape", NETWORKS.values(), ids=NETWORKS)
def test_every_channel_of_the_condition_matters(make_net, shape, cond_shape):
    net, x, t, label = make_net(), images(5, *shape), torch.rand(5), torch.tensor([0, 1, 2, 0, 1])
    cond = images(5, *cond_shape)
    assert torch.equal(net(x, t, label, cond), torch.zeros_like(x))  # the last layer starts at zero
    perturbed(net)
    out = net(x, t, label, cond)
    assert out.shape == x.shape
    for channel in range(4):
        changed = cond.clone()
        changed[:, channel] += 1
        assert (net(x, t, label, changed) - out).abs().flatten(1).amax(1).min() > 1e-3, channel
    one = cond.clone()
    one[2] += 1  # of one item alone
    differs = (net(x, t, label, one) - out).abs().flatten(1).amax(1)
    assert differs[2] > 1e-3 and differs[[0, 1, 3, 4]].max() < 1e-5


@pytest.mark.parametrize("make_net, shape, cond_shape", NETWORKS.values(), ids=NETWORKS)
def test_no_condition_is_a_condition_of_zeros(make_net, shape, cond_shape):
    net, x, t, label = perturbed(make_net()), images(5, *shape), torch.rand(5), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(net(x, t, label), net(x, t, label, torch.zeros(5, *cond_shape)))
    assert not torch.allclose(net(x, t, label), net(x, t, label, images(5, *cond_shape)))


def test_a_coarse_condition_is_seen_where_it_lies():
    """At the start only the first layer mixes pixels: a changed corner changes the outputs near it most."""
    net = UNet((1, 8, 8), cond_shape=(1, 2, 2), **SMALL)
    torch.manual_seed(0)
    torch.nn.init.normal_(net.out.weight)
    x, t, cond = images(1, 1, 8, 8), torch.rand(1), torch.zeros(1, 1, 2, 2)
    out = net(x, t, None, cond)
    changed = cond.clone()
    changed[0, 0, 1, 0] = 1.0
    size = (net(x, t, None, changed) - out)[0, 0].abs()
    assert size[5:, :3].mean() > 2 * size[:3, 5:].mean()


def parameters(net):
    return {name: tuple(p.shape) for name, p in net.state_dict().items()}


def test_a_condition_changes_only_the_layer_that_reads_it():
    """So networks without one have the parameters that they had before there were conditions."""
    plain = parameters(UNet((2, 8, 8), 3, **SMALL))
    assert plain["input.weight"] == (8, 2, 3, 3) and not [name for name in plain if "attributes" in name]
    assert parameters(UNet((2, 8, 8), 3, cond_shape=(4, 2, 2), **SMALL)) == plain | {"input.weight": (8, 6, 3, 3)}
    attributes = parameters(UNet((2, 8, 8), 3, cond_shape=(4,), **SMALL))
    assert attributes == plain | {"conditioning.attributes.weight": (32, 4)}
    parts = {name.split(".")[0] for name in plain}
    assert parts == {"conditioning", "input", "down", "middle", "up", "norm_out", "out"}
    assert sorted(name for name in plain if name.startswith("conditioning")) == [
        "conditioning.label.weight", *(f"conditioning.mlp.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight"))]
    plain = parameters(MLP((2,), 3, hidden_dim=16, num_layers=1))
    layers = [f"layers.0.{i}.{kind}" for i in (0, 1, 4) for kind in ("bias", "weight")]
    ends = [f"{name}.{kind}" for name in ("data", "time", "out.0", "out.2") for kind in ("bias", "weight")]
    assert sorted(plain) == sorted([*layers, *ends, "label.weight"]) and plain["data.weight"] == (16, 2)
    assert parameters(MLP((2,), 3, hidden_dim=16, num_layers=1, cond_shape=(4,))) == plain | {"data.weight": (16, 6)}


def test_an_mlp_refuses_a_condition_that_is_no_vector():
    with pytest.raises(ValueError, match="--network unet"):
        MLP((2,), cond_shape=(1, 8, 8))
