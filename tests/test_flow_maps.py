"""Flow maps: objectives on exact maps, the semigroup, second times, two ranks, and every script on such a run."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import assert_ranks_parts_and_halves, gaussian, make, tiny

import evaluate
import sample
from build import NETWORKS, check_run
from check import M
from config import Config, problems
from data_utils import load_dataset
from flow_maps import OBJECTIVES, FlowMap, residual
from processes import make_process
from sampling import SAMPLERS, Field, draw
from trainer import DiffusionTrainer
from utils import UserError, append_dims, call_with_settings, row_noise

MAP = dict(objective="lagrangian", sampler="flow_map", sde_sampler=None)
VECTORS = dict(network="mlp", hidden_dim=16, num_layers=1, dataset="moons", class_conditional=False)


# ---- The mathematics


def exact(process, theta, x, t, s, tangents=None):
    """The average velocity of one Gaussian, exact for theta 0, in float64, and its derivative."""
    one = gaussian(process, dims=2)

    def average(x, t, s):
        diagonal = append_dims(s == t, 2)  # where the quotient is 0 / 0
        exact = torch.where(diagonal, one(x, t), one(x, t, s=torch.where(s == t, t / 2, s)))
        return exact + theta * append_dims(1 + t * s**2, 2) * x.sin()

    return torch.func.jvp(average, (x, t, s), tangents) if tangents else average(x, t, s)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_at_the_exact_map_the_loss_and_its_gradient_are_0(objective, process):
    """With the exact velocity in the place of the data's. Some pairs have s = t; near the ends of VE, values are large.
    """
    generator = torch.Generator().manual_seed(0)
    t, s = (0.02 + 0.96 * torch.rand(2, 64, dtype=torch.float64, generator=generator)).sort(0, descending=True)[0]
    s[:8] = t[:8]
    x = torch.stack([gaussian(process, dims=2).sample(1, generator, time)[0][0] for time in t.tolist()])
    velocity = gaussian(process, dims=2)(x, t)
    scale = velocity.abs().max()
    for value, zero in ((0.0, True), (0.1 * scale.item(), False)):
        theta = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        error = residual(objective, partial(exact, process, theta), x, t, s, velocity) / scale
        (gradient,) = torch.autograd.grad(error.square().mean(), theta)
        assert (error.abs().max() < 1e-6) == (abs(gradient) < 1e-6) == zero
        assert zero or (error[:8].abs().max() > 1e-3 and error[8:].abs().max() > 1e-3)  # on the diagonal, and off it


def test_objectives_are_those_of_the_papers():
    """Against finite differences, for a map that is not exact, in float64."""
    rf = make_process("rf")
    theta = torch.tensor(0.3, dtype=torch.float64)
    u = partial(exact, rf, theta)
    x, velocity = torch.randn(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.5, 0.9, 5, dtype=torch.float64)
    s = t - 0.3
    h = 1e-5
    there = x + (s - t)[:, None] * u(x, t, s)
    own = u(x, t, t)

    def along(v):  # u at the times t + h and t - h of the path
        return (u(x + h * v, t + h, s) - u(x - h * v, t - h, s)) / (2 * h)

    lagrangian = (u(x, t, s + h) * (s + h - t)[:, None] - u(x, t, s - h) * (s - h - t)[:, None]) / (2 * h)
    half = x - 0.15 * u(x, t, t - 0.15)
    expected = {
        "lagrangian": (lagrangian, u(there, s, s)),
        "eulerian": (u(x, t, s), own - 0.3 * along(own)),
        "mean_flow": (u(x, t, s), velocity - 0.3 * along(velocity)),
        "progressive": (x - 0.3 * u(x, t, s), half - 0.15 * u(half, t - 0.15, s)),
    }
    assert expected.keys() == OBJECTIVES.keys()
    for name, (prediction, target) in expected.items():
        found = residual(name, u, x, t, s, velocity) * (-0.3 if name == "progressive" else 1)
        torch.testing.assert_close(found, prediction - target, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("objective", ["eulerian", "mean_flow", "progressive"])
def test_a_target_has_no_gradient(objective):
    """The gradient of r^2 / 2, for r = u - target, is r du/dtheta."""
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    u = partial(exact, make_process("rf"), theta)
    x, velocity = torch.randn(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.5, 0.9, 5, dtype=torch.float64)
    r = residual(objective, u, x, t, t - 0.3, velocity)
    found, expected = (torch.autograd.grad(loss.sum(), theta)[0] for loss in (
        r.square() / 2, r.detach() * u(x, t, t - 0.3)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("base", ["noise", "condition"])
def test_jumps_are_exact_in_any_number_of_steps(base):
    """By `draw`, from its own noise; with a base around m, which the network gets in xt."""
    process = make_process("cosine", base=base, base_std=0.5)
    data = gaussian(process, dims=2)

    def net(xt, t, label, cond, s=None):  # of the whole xt
        c, m = process.coefs(t.double(), 2), 0.0 if cond is None else cond[:, :-1]
        if s is None:
            return data(xt - c.shift * m, t) + c.shift_dot * m
        there = data.flow(xt.double() - c.shift * m, t, s) + process.coefs(s.double(), 2).shift * m
        return (there - xt) / (s - t)[:, None]

    cond = torch.cat([M, torch.ones(1, 1)], dim=1).float() if base == "condition" else None
    settings = dict(rows=range(20), shape=(2,), device="cpu", seed=0, model_type="velocity", T_min=1e-3, T_max=0.99,
                    cond=cond, base=base)

    def samples(sampler, steps):
        return next(draw(net, process, sampler=sampler, sampling_steps=steps, **settings))

    one, calls = samples("flow_map", 1)
    assert calls == 1 and samples("flow_map", 7)[1] == 7
    torch.testing.assert_close(samples("flow_map", 7)[0], one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(samples("rk4", 200)[0], one, rtol=1e-4, atol=1e-4)


def test_guidance_of_a_flow_map_is_that_of_its_average_velocities():
    """(1 - s) u(without label) + s u(label), in one jump."""
    def net(xt, t, label, cond, s):
        return (1.0 if label is None else 3.0) * xt * (s - t)[:, None]

    field = Field(net, make_process("rf"), "velocity", label=torch.tensor([0]), guidance_scale=2.0)
    out = SAMPLERS["flow_map"](field, torch.ones(1, 2), [0.9, 0.4])
    torch.testing.assert_close(out, torch.full((1, 2), 1 - 0.5 * (1 + 2 * (3 - 1)) * -0.5))
    assert field.calls == 2


# ---- Networks


@pytest.mark.parametrize("network, shape, settings", [
    ("mlp", (3,), {}), ("transformer", (2, 4, 8), dict(num_classes=3, depth=2)),
    ("unet", (2, 8, 8), dict(num_classes=3)),
    ("unet", (1, 8, 8), dict(cond_shape=(2, 4, 4), attention_resolutions=(8,))),
])
def test_the_derivative_is_that_of_finite_differences(network, shape, settings):
    """In all three directions, in float64; and without s the network is called at s = t."""
    torch.manual_seed(0)
    small = dict(model_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), hidden_dim=16)
    net = call_with_settings(NETWORKS[network], small | settings, data_shape=shape, second_time=True).double()
    for parameter in net.parameters():  # those of the last layers are 0
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    net = FlowMap(net)
    x, dx = torch.randn(2, 2, *shape, dtype=torch.float64)
    t, s, dt, ds = torch.rand(4, 2, dtype=torch.float64)
    given = torch.tensor([0, 3]) if "num_classes" in settings else None, None
    if "cond_shape" in settings:
        given = None, torch.randn(2, *settings["cond_shape"], dtype=torch.float64)
    value, slope = net(x, t, *given, s, tangents=(dx, dt, ds))
    h = 1e-6
    there, back = (net(x + k * dx, t + k * dt, *given, s + k * ds) for k in (h, -h))
    torch.testing.assert_close(slope, (there - back) / (2 * h), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value, net(x, t, *given, s))
    torch.testing.assert_close(net(x, t, *given), net(x, t, *given, t))
    assert not torch.allclose(value, net(x, t, *given))
    gradients = torch.autograd.grad(slope.square().sum(), list(net.parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


# ---- The trainer


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("base", ["noise", "condition"])
def test_the_loss_is_0_at_the_map_of_one_point(tmp_path, objective, base):
    """If all data are one point p, the data's velocity is the ODE's, (xt - p) / t, and so is every average of it."""
    changes = dict(corruption="downsample", base=base) if base == "condition" else {}
    digits = load_dataset("digits", downsample_factor=4, **changes)
    trainer = make(tmp_path, digits, **MAP | changes | {"objective": objective, "T_min": 0.05})
    point = trainer.prepare_batch(0).x0[:1]

    class Exact(torch.nn.Module):
        def forward(self, xt, t, label, cond, s):
            return (xt - point) / t[:, None, None, None] + factor * s[:, None, None, None]

    trainer.net = trainer.forward = FlowMap(Exact())
    for factor in (0.0, 0.1):
        for step in range(2):
            batch = trainer.prepare_batch(step)
            losses = trainer.loss(batch._replace(x0=point.expand_as(batch.x0)))
            assert losses.shape == (16,) and (losses < 1e-6).all() == (factor == 0)


def test_second_times(tmp_path, digits):
    """A share of the rows has s < t; all else is as without an objective, and the share warms up."""
    settings = MAP | dict(batch_size=64, off_diagonal=0.25, off_diagonal_warmup=4)
    trainer = make(tmp_path, digits, **settings)
    plain = make(tmp_path, digits, batch_size=64, run_name="plain").prepare_batch(4)
    batch = trainer.prepare_batch(4)
    off = batch.s < batch.t
    assert torch.equal(batch.s[~off], batch.t[~off])
    either = (batch.t == plain.t) | (batch.s == plain.t)
    assert either.all() and not torch.equal(batch.t[off], plain.t[off]) and not torch.equal(batch.s[off], plain.t[off])
    for name in ("x0", "x1", "label", "importance"):
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name
    large = make(tmp_path, digits, **settings | dict(batch_size=10_000, run_name="large"))
    shares = [(b.s < b.t).double().mean().item() for b in map(large.prepare_batch, range(6))]
    assert shares == pytest.approx([1 / 16, 2 / 16, 3 / 16, 1 / 4, 1 / 4, 1 / 4], abs=0.018)  # 4 standard deviations
    always = make(tmp_path, digits, **MAP | dict(off_diagonal=0.99999, run_name="always"))
    assert all((batch.s < batch.t).all() for batch in map(always.prepare_batch, range(3)))
    for parts in (2, 4):
        found = []
        for rank in range(parts):
            trainer.own_rows = range(64 // parts * rank, 64 // parts * (rank + 1))
            found.append(trainer.prepare_batch(4))
        for name in ("t", "s"):
            assert torch.equal(torch.cat([getattr(part, name) for part in found]), getattr(batch, name))


def test_importance_weights_of_pairs_are_those_of_both_times(tmp_path, digits):
    trainer = make(tmp_path, digits, **MAP | dict(time_sampler="mode", importance_weights=True))
    batch = trainer.prepare_batch(0)
    off = batch.s < batch.t
    t, s = (trainer.time_sampler.importance(time) for time in (batch.t, batch.s))
    torch.testing.assert_close(batch.importance, torch.where(off, t * s, t))


def test_a_loss_of_diagonal_pairs_is_that_of_flow_matching(tmp_path, digits):
    trainer = make(tmp_path, digits, **MAP | dict(off_diagonal=0.0, loss_weighting="min_snr"))
    torch.manual_seed(0)
    for parameter in trainer.net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    batch = trainer.prepare_batch(1)
    found = trainer.loss(batch)
    trainer.config.objective = None
    torch.testing.assert_close(found, trainer.loss(batch))


@pytest.mark.parametrize("settings", [
    *(VECTORS | dict(objective=objective) for objective in OBJECTIVES),
    dict(coupling="ot", objective="mean_flow", base_lr=1e-3),  # Adam at a larger rate enlarges rounding
], ids=[*OBJECTIVES, "unet"])
def test_two_ranks_accumulation_and_resuming(tmp_path, settings, without_curves):
    """Losses as those of one rank, so that a derivative drops no exchange; in two halves, bit for bit as a whole."""
    config = tiny(tmp_path, **MAP | dict(num_training_steps=6, base_lr=1e-2, run_name="map") | settings)
    assert_ranks_parts_and_halves(tmp_path, config)


# ---- Scripts, and wrong settings


def test_every_script_takes_a_flow_map(tmp_path, digits, own_cache, without_curves, capsys, monkeypatch):
    """Samples, the last frame of a trajectory, and the loss on the card are those of the trained map."""
    trainer = make(tmp_path, digits, **MAP | dict(base_lr=1e-2, num_training_steps=20, log_every=20))
    trainer.train()
    words = ["--ckpt", f"{trainer.folder}/last.pt", "--num", "20", "--weights", "raw"]
    frames, save = [], sample.save_trajectory
    monkeypatch.setattr(sample, "save_trajectory", lambda *given: frames.append(given[2]) or save(*given))
    sample.main([*words, "--out", str(tmp_path / "x"), "--sampling_steps", "1", "--trajectory", "True"])
    images, labels = np.load(tmp_path / "x.npz").values()
    t, s, label = torch.full((20,), 0.9999), torch.full((20,), 1e-4), torch.from_numpy(labels)
    start = 0.9999 * row_noise(range(20), (1, 8, 8), "cpu", 0, "sample")()
    with torch.no_grad():
        expected = start + (1e-4 - 0.9999) * trainer.net(start, t, label, None, s)
        losses = torch.cat([trainer.loss(trainer.prepare_batch(step)) for step in range(40)])
    decoded = trainer.spec.decode(expected).movedim(1, -1).numpy()
    assert np.abs(images.astype(int) - decoded).max() <= 1
    assert frames[0].shape == (2, 20, 1, 8, 8) and np.array_equal(frames[0][-1].movedim(1, -1), images)
    evaluate.main([*words, "--out", str(tmp_path / "card"), "--seeds", "1", "--curve", "1", "2", "--likelihood_num",
                   "4", "--loss_num", "640"])
    assert "1 steps  nfe 1 " in capsys.readouterr().out.partition("flow_map ")[2]
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    assert card["loss"]["train"] == pytest.approx(losses.mean().item(), rel=0.15) and card["loss"]["train"] < 0.8


def test_a_guide_is_a_map_too(tmp_path, digits, without_curves, capsys):
    for name, changes in (("map", MAP), ("guide", MAP), ("plain", {})):
        make(tmp_path, digits, **changes | dict(run_name=name, num_training_steps=2)).train()
    words = ["--ckpt", str(tmp_path / "map" / "last.pt"), "--num", "4", "--out", str(tmp_path / "x"),
             "--guidance_scale", "2", "--guide"]
    sample.main([*words, str(tmp_path / "guide" / "last.pt")])
    with pytest.raises(SystemExit):
        sample.main([*words, str(tmp_path / "plain" / "last.pt")])
    assert "differs in objective" in capsys.readouterr().err


def test_a_map_between_two_data_sets_leads_one_way(tmp_path, without_curves, capsys):
    settings = VECTORS | MAP | dict(dataset="eight_gaussians_far", source="moons_far")
    config = tiny(tmp_path, run_name="map", **settings)
    DiffusionTrainer(config, load_dataset(**vars(config) | {"name": config.dataset}), torch.device("cpu")).train()
    words = ["--ckpt", str(tmp_path / "map" / "last.pt"), "--num", "20", "--out", str(tmp_path / "x")]
    sample.main(words)
    with pytest.raises(SystemExit):
        sample.main([*words, "--reverse", "True"])
    assert "reverse leads to the source by the ODE: it needs a run with a source, and --sampler heun" in (
        capsys.readouterr().err)
    sample.main([*words, "--reverse", "True", "--sampler", "heun"])


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="x0"), "objective is for --model_type velocity"),
    (dict(gamma="brownian", source="moons"), "objective is for"),
    (dict(trainer="regression", objective="progressive"), "objective is for"),
    (dict(network="transformer", checkpointing=True), "checkpointing gives no derivative in time, which"),
    (dict(off_diagonal=1.0), "off_diagonal is 1.0: expected a number in [0, 1)"),
])
def test_settings_that_contradict_an_objective(changes, words):
    (problem,) = problems(Config(**dict(objective="mean_flow") | changes))
    assert words in problem


def test_a_map_needs_an_objective_and_a_network_of_two_times(tmp_path, digits, monkeypatch):
    with pytest.raises(UserError, match="sampler flow_map needs a network that was trained as one, and predicts no "
                       "x0 to clip: use --sampler heun"):
        check_run(Config(sampler="flow_map"), torch.device("cpu"))
    with pytest.raises(UserError, match="predicts no x0 to clip: .* draw with --clip_x0 none"):
        check_run(Config(**MAP | dict(clip_x0="static")), torch.device("cpu"))

    class OneTime(torch.nn.Module):
        def __init__(self, data_shape, num_classes):
            super().__init__()

    monkeypatch.setitem(NETWORKS, "one_time", OneTime)
    with pytest.raises(UserError, match="network of two times, and one_time takes no second_time"):
        make(tmp_path, digits, **MAP | dict(network="one_time"))
