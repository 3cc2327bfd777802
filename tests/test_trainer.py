"""The trainer: the loss against the formula, randomness by (seed, step), exact resuming, grids, and learning."""

import dataclasses
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, flags, make, metrics_of, run, tiny

import saving
from build import check_settings
from config import PRESETS, Config
from data_utils import load_dataset, make_dataset
from optimizers import learning_rate
from prediction import LOSS_WEIGHTINGS, PREDICTIONS, convert, loss_weight, target
from processes import PROCESSES
from time_samplers import TIME_SAMPLERS
from trainer import DiffusionTrainer
from utils import UserError, call_with_settings, seed_torch

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("without_curves")


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.net.parameters()])


def randomize(net):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("process", list(PROCESSES))
@pytest.mark.parametrize("model_type", list(PREDICTIONS))
def test_loss_is_the_mean_squared_error_of_every_target(tmp_path, digits, model_type, process):
    for target_type in PREDICTIONS:
        settings = dict(model_type=model_type, target_type=target_type, process=process, T_min=0.05, T_max=0.95)
        trainer = make(tmp_path, digits, run_name=target_type, **settings)
        randomize(trainer.net)
        batch = trainer.prepare_batch(0)
        losses = trainer.loss(batch)
        assert losses.shape == (16,) and losses.dtype == torch.float32 and losses.requires_grad
        c = trainer.process.coefs(batch.t, 4)
        xt = c.alpha * batch.x0 + c.sigma * batch.x1
        prediction = convert(trainer.net(xt, batch.t, batch.label), xt, c, model_type, target_type)
        error = prediction - target(target_type, c, batch.x0, batch.x1)
        torch.testing.assert_close(losses, error.square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weighting", list(LOSS_WEIGHTINGS))
def test_loss_weighting(tmp_path, digits, weighting):
    settings = dict(process="cosine", target_type="v", T_min=0.05, T_max=0.95, min_snr_gamma=2.0, sigmoid_bias=-1.0)
    plain = make(tmp_path, digits, **settings)
    trainer = make(tmp_path, digits, run_name="w", loss_weighting=weighting, **settings)
    randomize(plain.net), randomize(trainer.net)
    batch = trainer.prepare_batch(0)
    weight = loss_weight(trainer.process.coefs(batch.t), weighting, "v", min_snr_gamma=2.0, sigmoid_bias=-1.0)
    torch.testing.assert_close(trainer.loss(batch), weight * plain.loss(batch))
    assert (weighting == "none") == torch.allclose(weight, torch.ones(16))


def test_importance_weights_estimate_the_loss_of_uniform_times(tmp_path, digits):
    """Within 4 standard errors; the density of `mode` is bounded from below. The logged loss is the weighted mean."""
    settings = dict(batch_size=2048, time_sampler="mode", mode_scale=-0.9, target_type="x0", num_training_steps=1,
                    warmup_steps=0)
    uniform = make(tmp_path, digits, **{**settings, "time_sampler": "uniform"})
    plain = make(tmp_path, digits, run_name="p", **settings)
    trainer = make(tmp_path, digits, run_name="w", importance_weights=True, **settings)
    losses = []
    with torch.no_grad():
        for t in (uniform, plain, trainer):
            losses.append(torch.cat([batch.importance * t.loss(batch) for batch in map(t.prepare_batch, range(4))]))
    error = sum(x.var() / len(x) for x in losses[::2]) ** 0.5
    assert abs(losses[2].mean() - losses[0].mean()) < 4 * error < abs(losses[1].mean() - losses[0].mean())
    assert (plain.prepare_batch(0).importance == 1).all()
    trainer.train()
    (line,) = map(json.loads, open(tmp_path / "w" / "metrics.jsonl"))
    assert line["loss"] == pytest.approx(losses[2][:2048].mean().item(), rel=1e-4)


def test_the_gradient_is_that_of_the_weighted_mean(tmp_path, digits):
    trainer = make(tmp_path, digits, time_sampler="mode", importance_weights=True, grad_clip_norm=0.0,
                   num_training_steps=1, warmup_steps=0, accumulation_steps=2)
    batch = trainer.prepare_batch(0)
    (batch.importance * trainer.loss(batch)).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.net.parameters()]).norm().item()
    trainer.optimizer.zero_grad()
    trainer.train()
    (line,) = map(json.loads, open(tmp_path / "digits" / "metrics.jsonl"))
    assert line["grad_norm"] == pytest.approx(expected, rel=1e-4)


def test_losses_by_quarter_of_t_are_logged(tmp_path, digits):
    """The mean of the losses in each quarter, whatever their weight in the mean of all."""
    trainer = make(tmp_path, digits, time_sampler="mode", importance_weights=True, num_training_steps=1,
                   warmup_steps=0, batch_size=64)
    batch = trainer.prepare_batch(0)
    losses = trainer.loss(batch).detach()
    trainer.train()
    (line,) = map(json.loads, open(tmp_path / "digits" / "metrics.jsonl"))
    for i in range(4):
        inside = (4 * batch.t).long() == i
        assert line[f"loss_t_{i / 4:.2f}_{(i + 1) / 4:.2f}"] == pytest.approx(losses[inside].mean().item(), rel=1e-4)


def test_edm_as_in_the_paper(tmp_path, digits):
    """The preset cifar10_edm: D = c_skip x + c_out F(c_in x, log(sigma) / 4), Karras et al. 2022, eqs. 7 and 8.

    The weight is (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
    """
    edm = {k: v for k, v in PRESETS["cifar10_edm"].items() if k not in ("run_name", "sampling_steps")}
    trainer = make(tmp_path, digits, **edm)
    randomize(trainer.net)
    batch = trainer.prepare_batch(0)
    sigma = trainer.process.sigma(batch.t)[:, None, None, None]
    x = batch.x0 + sigma * batch.x1
    F = trainer.net.net(x / (sigma**2 + 0.25).sqrt(), sigma.flatten().log() / 4, batch.label)
    D = 0.25 / (sigma**2 + 0.25) * x + sigma * 0.5 / (sigma**2 + 0.25).sqrt() * F
    loss = ((sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (D - batch.x0) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(trainer.loss(batch), loss, rtol=1e-3, atol=1e-4)
    trainer.train()
    names = {f"{w}_{s}_0000004.png" for w in ("raw", "ema") for s in ("heun", "edm_churn")}
    assert set(os.listdir(tmp_path / "digits" / "samples")) == names


def test_without_an_sde_sampler_there_is_no_second_row(tmp_path, digits):
    make(tmp_path, digits, sde_sampler=None, coupling="ot_within_class").train()
    assert set(os.listdir(tmp_path / "digits" / "samples")) == {f"{w}_heun_0000004.png" for w in ("raw", "ema")}


def test_a_batch_is_a_function_of_seed_and_step(tmp_path, digits):
    trainer = make(tmp_path, digits, random_flip=True)
    torch.manual_seed(123)
    first, again, next_step = trainer.prepare_batch(5), trainer.prepare_batch(5), trainer.prepare_batch(6)
    other = make(tmp_path, digits, run_name="other", random_flip=True, seed=1).prepare_batch(5)
    for name in ("x0", "x1", "t", "label"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
        assert not torch.equal(getattr(first, name), getattr(next_step, name)), name
        assert not torch.equal(getattr(first, name), getattr(other, name)), name
    assert first.x0.min() >= -1 and first.x0.max() <= 1


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_one(tmp_path, digits, world):
    """Rank r has its rows of the batch of one rank, for everything random, also for a stratified time sampler."""
    whole = make(tmp_path, digits, random_flip=True, time_sampler="stratified").prepare_batch(3)
    trainer, parts = make(tmp_path, digits, run_name="b", random_flip=True, time_sampler="stratified"), []
    for rank in range(world):
        trainer.own_rows = range(16 * rank // world, 16 * (rank + 1) // world)
        parts.append(trainer.prepare_batch(3))
    for name in ("x0", "x1", "t", "label"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert torch.equal((whole.t * 16).long().sort().values, torch.arange(16))


def test_flips_and_label_dropout_have_their_rates(tmp_path, digits):
    trainer = make(tmp_path, digits, batch_size=4096, random_flip=True, label_dropout=0.25)
    batch, (data, label, _) = trainer.prepare_batch(0), trainer.batches(0)
    plain = trainer.spec.encode(data)
    flipped, same = (batch.x0 == plain.flip(-1)).flatten(1).all(1), (batch.x0 == plain).flatten(1).all(1)
    assert (flipped | same).all() and abs((flipped & ~same).float().mean() - 0.5) < 0.05
    hidden = batch.label == 10
    assert abs(hidden.float().mean() - 0.25) < 0.03 and torch.equal(batch.label[~hidden], label[~hidden])
    unconditional = make(tmp_path, digits, run_name="u", class_conditional=False).prepare_batch(0)
    assert unconditional.label is None


def test_each_step_has_dropout_of_its_own(tmp_path, digits, monkeypatch):
    trainer, seeds = make(tmp_path, digits, dropout=0.3), []
    monkeypatch.setattr("trainer.seed_torch", lambda seed, device: seeds.append(seed) or seed_torch(seed, device))
    trainer.train()
    assert len(set(seeds)) == len(seeds) == 4


def test_accumulation_changes_nothing(tmp_path, digits):
    """Neither the weights nor the norm of the gradient, which Adam and clipping would hide."""
    runs = [make(tmp_path, digits, run_name=f"a{parts}", accumulation_steps=parts, base_lr=1e-3) for parts in (1, 2, 4)]
    for trainer in runs:
        trainer.train()
    norms = [[line["grad_norm"] for line in metrics_of(tmp_path / f"a{parts}")] for parts in (1, 2, 4)]
    for trainer, norm in zip(runs[1:], norms[1:]):
        torch.testing.assert_close(weights(trainer), weights(runs[0]), rtol=1e-3, atol=1e-5)
        assert norm == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize("stop", [3, 4])
def test_resuming_is_bit_equal(tmp_path, digits, stop):
    """Weights, EMA and optimizer are those of a run without a stop; with dropout, and inside a window of the log."""
    settings = dict(dropout=0.3, lr_schedule="constant", log_every=5, random_flip=True, accumulation_steps=2,
                    num_training_steps=10)
    straight = make(tmp_path, digits, run_name="straight", **settings)
    straight.train()
    make(tmp_path, digits, run_name="broken", **{**settings, "num_training_steps": stop, "log_every": 100}).train()
    torch.manual_seed(99)
    resumed = make(tmp_path, digits, run_name="broken", **settings)
    assert resumed.step == stop
    resumed.train()
    a, b = (saving.load(os.path.join(tmp_path, name, "last.pt")) for name in ("straight", "broken"))
    for part in ("net", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert all(torch.equal(x[k], y[k]) for k in x)
    assert a["step"] == b["step"] == 10


def test_resuming_with_other_data_is_refused(tmp_path, digits):
    make(tmp_path, digits).train()
    other = make_dataset(digits.data[:, :, :, :4], digits.labels)
    with pytest.raises(UserError, match=r"other data \(shape \(1, 8, 8\), here \(1, 8, 4\)\): .*--run_name"):
        make(tmp_path, other, num_training_steps=5)
    with pytest.raises(UserError, match=r"other data \(items 1500, here 1499\): .*--run_name"):
        make(tmp_path, make_dataset(digits.data[:-1], digits.labels[:-1]), num_training_steps=5)
    with pytest.raises(UserError, match=r"other data \(num_classes 10, here 8\)"):
        make(tmp_path, make_dataset(digits.data, digits.labels % 8), num_training_steps=5)


def test_a_run_beyond_a_smaller_number_of_steps_draws_its_pictures(tmp_path, digits, capsys):
    trainer = make(tmp_path, digits, num_training_steps=20)
    trainer.loop(8)
    trainer.save()
    make(tmp_path, digits, num_training_steps=5).train()
    path = capsys.readouterr().out.partition("samples ")[2].split()[0]
    assert path.endswith("_0000008.png") and os.path.exists(path)


def test_the_window_of_metrics_is_resumed(tmp_path, digits):
    """The mean over the log's window is the same when the run is stopped inside it."""
    settings = dict(lr_schedule="constant", log_every=4, num_training_steps=4, save_every=1)
    straight = make(tmp_path, digits, run_name="straight", **settings)
    straight.train()
    broken = make(tmp_path, digits, run_name="broken", **settings)
    save = broken.save

    def save_and_break():
        save()
        if broken.step == 2:
            raise KeyboardInterrupt

    broken.save = save_and_break
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    make(tmp_path, digits, run_name="broken", **settings).train()
    (a,), (b,) = (metrics_of(tmp_path / name) for name in ("straight", "broken"))
    assert a == b and a["step"] == 4


def test_raw_and_ema_weights_come_back_apart(tmp_path, digits):
    trainer = make(tmp_path, digits)
    trainer.train()
    again = make(tmp_path, digits)
    ema = torch.cat([p.flatten() for p in again.ema.net.parameters()])
    assert torch.equal(weights(again), weights(trainer)) and not torch.equal(ema, weights(again)) and again.step == 4
    assert again.step == 4


def test_the_rate_is_set_before_its_step(tmp_path, digits):
    trainer, used = make(tmp_path, digits, base_lr=1e-3), []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (used.append(trainer.optimizer.param_groups[0]["lr"]), step())
    trainer.train()
    assert used == [call_with_settings(learning_rate, vars(trainer.config), step=s) for s in range(4)]
    assert used[:2] == [5e-4, 1e-3]


def test_all_grids_are_drawn_and_their_noise_is_the_same(tmp_path, digits, monkeypatch):
    monkeypatch.undo()  # of without_curves
    trainer = make(tmp_path, digits, sample_every=2)
    trainer.train()
    names = {f"{w}_{s}_{n:07d}.png" for w in ("raw", "ema") for s in ("heun", "euler_maruyama") for n in (2, 4)}
    assert set(os.listdir(tmp_path / "digits" / "samples")) == names
    assert {"real.png", "curves.png", "metrics.jsonl", "config.json", "last.pt"} <= set(os.listdir(tmp_path / "digits"))
    assert trainer.net.training
    starts = []
    for net in (trainer.net, trainer.ema.net):
        net.register_forward_pre_hook(lambda net, given: starts.append(given) if given[1][0] > 0.99 else None)
    trainer.sample()
    assert not starts  # they are there
    for trainer.step in (5, 6):
        trainer.sample()
    assert len(starts) == 8
    for x, _, label, _ in starts:
        assert torch.equal(x, starts[0][0]) and torch.equal(label, starts[0][2])


def test_the_end_names_the_picture_of_the_sampler(tmp_path, digits, capsys):
    make(tmp_path, digits, sampler="euler").train()
    assert os.path.join("samples", "ema_euler_0000004.png") in capsys.readouterr().out


def test_one_sampler_in_both_places_is_drawn_once(tmp_path, digits):
    trainer = make(tmp_path, digits, sampler="ancestral", sde_sampler="ancestral")
    drawn = []
    trainer.show = lambda name, path, points, drawn_for=None: drawn.append(points)
    trainer.train()
    assert len(drawn) == 3  # real, raw and EMA


def trainer_picture(trainer, n):
    shown = []
    trainer.logger.picture = lambda step, name, image, path: shown.append(image)
    DiffusionTrainer.show(trainer, "name", "path", torch.zeros(n, 1, 8, 8, dtype=torch.uint8))
    return shown[0]


def test_real_data_are_those_of_the_first_batch(tmp_path, digits):
    trainer, shown = make(tmp_path, digits, num_samples=30), []
    trainer.show = lambda name, path, points: shown.append(points)
    trainer.show_data()
    first = trainer.batches.indices(0)
    assert np.array_equal(shown[0], digits.data[[*first, *first[:14]]])
    assert trainer_picture(trainer, 40).width == trainer_picture(trainer, 10).width  # ten columns, a class each
    trainer.config = dataclasses.replace(trainer.config, class_conditional=False)
    square = trainer_picture(trainer, 36)
    assert square.width == square.height


def test_labels_need_data_with_labels(tmp_path):
    with pytest.raises(UserError, match="has no labels"):
        make(tmp_path, make_dataset(np.zeros((8, 1, 8, 8), np.uint8), None))


def test_overfit_one_batch_learns_it(tmp_path, digits):
    settings = dict(overfit_one_batch=True, num_training_steps=150, warmup_steps=5, base_lr=5e-3, log_every=50,
                    model_channels=16)
    trainer = make(tmp_path, digits, **settings)
    first = trainer.loss(trainer.prepare_batch(0)).mean().item()
    trainer.train()
    last = np.mean([trainer.loss(trainer.prepare_batch(s)).mean().item() for s in range(150, 155)])
    assert torch.equal(trainer.prepare_batch(0).x0, trainer.prepare_batch(9).x0)
    assert last < 0.5 * first, (first, last)


# ---- Settings that do not go together


@pytest.mark.parametrize("process", list(PROCESSES))
def test_check_settings_accepts_everything_on_the_usual_times(process):
    for model_type, target_type, weighting in itertools.product(PREDICTIONS, PREDICTIONS, LOSS_WEIGHTINGS):
        check_settings(Config(process=process, model_type=model_type, target_type=target_type,
                              loss_weighting=weighting, precondition=True))
    for time_sampler in TIME_SAMPLERS:
        check_settings(Config(process=process, time_sampler=time_sampler, importance_weights=True))
    if process in ("ve", "ve_linear", "edm"):
        check_settings(Config(process=process, T_min=0.0, T_max=1.0, target_type="score", loss_weighting="edm",
                              grid="log_snr"))


ENDS = dict(T_min=0.0, T_max=1.0)


@pytest.mark.parametrize("changes, words", [
    (dict(T_min=0.0, target_type="score"), "T_min 0.*--T_min 1e-4"),
    (dict(T_max=1.0, model_type="x1", target_type="x0"), "T_max 1.*x0 from a network that predicts x1.*--T_max 0.9999"),
    (dict(**ENDS, loss_weighting="edm"), "T_min 0.*the loss weighting edm.*--T_min 1e-4"),
    (dict(**ENDS, precondition=True),
     "T_min 0.*which precondition gives the network, is not finite there; use --T_min 1e-4"),
    (dict(**ENDS, time_sampler="edm_log_normal", importance_weights=True),
     "T_min 0.*importance weight of edm_log_normal"),
    (dict(**ENDS, grid="log_snr"), "grid log_snr.*--grid uniform"),
    (dict(time_sampler="edm_log_normal", edm_P_mean=50.0), "edm_P_mean 50.0 .*fewer than one time in 1,000"),
    (dict(coupling="ot", sde_sampler="ancestral"), "ancestral needs the score.*coupling ot.*--sde_sampler None"),
    (dict(coupling="ot", sde_sampler=None, sampler="ancestral"), "ancestral needs the score.*--sampler heun"),
])
def test_check_settings_finds_what_is_not_finite_or_not_there(changes, words):
    with pytest.raises(UserError, match=words):
        check_settings(Config(**changes))


def test_check_settings_accepts_the_ends_where_they_are_finite():
    check_settings(Config(**ENDS))
    check_settings(Config(coupling="ot", sde_sampler=None, sampler="dpmpp_2m"))


def test_points_and_settings_that_do_not_fit(tmp_path, digits):
    points = make_dataset(np.random.default_rng(0).normal(5, 3, (100, 2)), None)
    config = tiny(tmp_path, network="mlp", hidden_dim=16, num_layers=1, class_conditional=False, random_flip=True)
    trainer = DiffusionTrainer(config, points, CPU)
    trainer.train()
    assert os.path.exists(tmp_path / "digits" / "samples" / "ema_heun_0000004.png")
    with pytest.raises(UserError, match="--network unet"):
        DiffusionTrainer(dataclasses.replace(config, run_name="x"), digits, CPU)
    with pytest.raises(UserError, match="hidden_dim"):
        DiffusionTrainer(dataclasses.replace(config, hidden_dim=32), points, CPU).open_run()


@pytest.mark.parametrize("changes", [
    dict(bf16=True), dict(channels_last=False), dict(num_layers=1, network="mlp", dataset="moons"),
])
def test_weights_and_moments_stay_float32(tmp_path, digits, changes):
    data = load_dataset("moons") if "dataset" in changes else digits
    trainer = make(tmp_path, data, **changes)
    trainer.train()
    state = trainer.state()
    moments = [v for s in state["optimizer"]["state"].values() for v in s.values()]
    tensors = [*state["net"].values(), *state["ema"].values(), *moments]
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_gives_the_same_losses(tmp_path, digits, monkeypatch):
    modes, torch_compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, mode: modes.append(mode) or torch_compile(net, mode=mode))
    changes = dict(network="mlp", hidden_dim=8, num_layers=1, dataset="moons", class_conditional=False, num_samples=4)
    for name, more in (("eager", {}), ("compiled", dict(compile=True, compile_mode="reduce-overhead"))):
        config = tiny(tmp_path, run_name=name, **{**changes, **more})
        DiffusionTrainer(config, load_dataset("moons"), torch.device("cpu")).train()
    losses = [[line["loss"] for line in metrics_of(tmp_path / name)] for name in ("eager", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and modes == ["reduce-overhead"]


def test_no_compiler_in_one_line(tmp_path):
    words = flags(tiny(tmp_path, network="mlp", dataset="moons", class_conditional=False, compile=True))
    result = run("python", ROOT / "main.py", *words, CXX="/nowhere/g++",
                 TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert_one_line_error(result, "torch.compile failed", "--compile False")
