"""From one data set to another: gamma, exact mixtures and bridges, batches, couplings, samples both ways, and the rest.

test_check.py compares conversions, samplers and likelihood between two mixtures with what is exact.
"""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import (
    assert_one_line_error,
    assert_ranks_parts_and_halves,
    flags,
    make,
    run,
    tiny,
)
from scipy.optimize import linear_sum_assignment

import evaluate
import sample
from build import check_settings
from check import likelihood_error, mixture, sde_error, worst
from command_line import read_config
from config import PRESETS, Config, problems
from couplings import COUPLINGS
from data_utils import cases, load_dataset
from metrics import compare_points, wasserstein
from prediction import convert_output
from processes import GAMMAS, make_process
from sampling import SAMPLERS, WITH_GAMMA, Field, dopri5, draw, make_grid
from trainer import DiffusionTrainer
from utils import UserError

CPU = torch.device("cpu")
GIVEN_SOURCE = "velocity", "x0", "v"  # the kinds that a network can learn if x1 is no noise
POINTS = dict(dataset="eight_gaussians", source="moons", network="mlp", hidden_dim=16, num_layers=1, batch_size=16,
              class_conditional=False, model_type="velocity", target_type="velocity")
NOISY = POINTS | dict(gamma="brownian", gamma_scale=0.5, run_name="noisy")


def trained(tmp_path, **changes):
    """A short run between the two data sets of POINTS, trained, on the CPU."""
    config = tiny(tmp_path, **POINTS | dict(sde_sampler=None, run_name="points") | changes)
    trainer = DiffusionTrainer(config, load_dataset(config.dataset, **{k: v for k, v in vars(config).items() if k in (
        "source", "coupling")}), CPU)
    trainer.train()
    return trainer


# ---- Against what is exact


@pytest.mark.parametrize("name", list(GAMMAS))
def test_gamma_is_zero_at_the_ends_and_its_derivative_is_right(name):
    process, t = make_process("rf", gamma=name, gamma_scale=0.7), torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    assert abs(process.gamma(torch.tensor([0.0, 1.0]))).max() < 1e-7
    h = 1e-6
    slope = (process.gamma(t + h) - process.gamma(t - h)) / (2 * h)
    torch.testing.assert_close(process.coefs(t).gamma_dot, slope, rtol=1e-5, atol=1e-8)
    exact = {"brownian": (2 * t * (1 - t)) ** 0.5, "bsquared": t * (1 - t), "sin_squared": (math.pi * t).sin() ** 2}
    torch.testing.assert_close(process.coefs(t).noise, 0.7 * exact[name])


def two_sided_error(process):
    """With a gamma: each prediction about x0 and x1 as every other, as velocity and as score, float64, relative.

    The exact score is the gradient of the log-density.
    """
    t, x, kinds = torch.linspace(0.02, 0.98, 64, dtype=torch.float64), torch.randn(64, 2).double(), GIVEN_SOURCE
    c, log_p = process.coefs(t, 2), mixture(process).log_prob(x.requires_grad_(), t)
    y = {kind: mixture(process, kind)(x, t) for kind in kinds}
    eta, exact = y["x0"][:, 2:], {kind: y[kind][:, :2] for kind in kinds}
    exact["score"] = torch.autograd.grad(log_p.sum(), x)[0]
    exact["velocity"] = exact["velocity"] + c.gamma_dot * eta
    return worst((convert_output(y[kind], x, c, kind, to), exact[to]) for kind in kinds for to in exact)


@pytest.mark.parametrize("gamma", list(GAMMAS))
@pytest.mark.parametrize("process", ["rf", "cosine", "linear_vp"])
def test_predictions_and_likelihood_between_mixtures(process, gamma):
    torch.manual_seed(0)
    process = make_process(process, gamma=gamma, gamma_scale=0.5)
    assert two_sided_error(process) < 1e-9 and likelihood_error(process) < 1e-3


@pytest.mark.parametrize("gamma", list(GAMMAS))
def test_sde_between_mixtures(gamma):
    """With every eps, in standard errors."""
    torch.manual_seed(0)
    assert sde_error(make_process("cosine", gamma=gamma, gamma_scale=0.8), "stochastic_heun") < 4


@pytest.mark.parametrize("sampler", ["heun", "stochastic_heun"])
def test_from_the_source_itself_to_the_data(sampler):
    """The whole way, by `draw`: from points of the source, the ODE and the SDE with three eps reach the data's law."""
    torch.manual_seed(0)
    n, process = 4000, make_process("rf", gamma="brownian", gamma_scale=0.5)
    data = mixture(process)
    start, exact = (data.sample(n, t=t)[0] for t in (1.0, 0.0))
    for eps in ("sigma", "constant", "sin2") if sampler == "stochastic_heun" else ("sigma",):
        x = torch.cat([x for x, _ in draw(
            data, process, rows=range(n), shape=(2,), device=CPU, seed=0, sampler=sampler, sampling_steps=60,
            T_min=1e-3, T_max=0.999, start=start, model_type="velocity", sde_diffusion=eps)]).double()
        for power in (1, 2):
            error = ((x**power).mean(0) - (exact**power).mean(0)) / (exact**power).std(0) * (n / 2) ** 0.5
            assert error.abs().max() < 4, (eps, power, error)
        weights = [data.components(y, 0.01)[3].softmax(1) for y in (x, exact)]
        error = (weights[0].mean(0) - weights[1].mean(0)) / weights[1].std(0) * (n / 2) ** 0.5
        assert error.abs().max() < 4, (eps, error)


def test_the_start_has_the_noise_of_its_time():
    """The network first gets start + gamma(T_max) z, with a z for each row, in whatever batches it is called."""
    process, start, seen = make_process("rf", gamma="bsquared", gamma_scale=2.0), torch.randn(40, 2), []

    def net(xt, t, label, cond):
        seen.append(xt)
        return torch.zeros(len(xt), 4)

    for size in (40, 7):
        list(draw(net, process, rows=range(40), shape=(2,), device=CPU, seed=0, sampler="euler", sampling_steps=1,
                  T_min=0.2, T_max=0.7, start=start, model_type="velocity", sampling_batch_size=size))
    z = (seen[0] - start) / (2 * 0.7 * 0.3)
    assert abs(z.std() - 1) < 0.25 and torch.equal(torch.cat(seen[1:]), seen[0])


def test_no_step_of_the_sde_adds_more_noise_than_gamma():
    field = Field(None, make_process("rf", gamma="brownian", gamma_scale=0.5), "velocity", sde_diffusion="constant")
    assert field.eps(0.52, 0.5) == 1.0  # within the limit
    assert field.eps(0.9999, 0.99) == pytest.approx(0.25 * 2 * 0.99 * 0.01 / (2 * 0.0099))
    assert field.eps(0.1, 1e-4) == pytest.approx(0.25 * 2 * 1e-4 / (2 * 0.0999), rel=1e-3)


class ExactBridge:
    """x0 ~ N(-a, I) and x1 ~ N(a, I), each coordinate of covariance c: the exact velocity, or x0, and E[z | xt]."""

    def __init__(self, process, a, c):
        self.process, self.a, self.c = process, a, c

    def variance(self, c):
        return c.alpha**2 + c.sigma**2 + 2 * c.alpha * c.sigma * self.c + c.gamma**2

    def __call__(self, xt, t, label, cond):
        c = self.process.coefs(t.double(), 2)
        r = (xt - (c.sigma - c.alpha) * self.a) / self.variance(c)
        x0, x1 = -self.a + (c.alpha + c.sigma * self.c) * r, self.a + (c.alpha * self.c + c.sigma) * r
        return torch.cat([c.alpha_dot * x0 + c.sigma_dot * x1, c.gamma * r], dim=1)


@pytest.mark.parametrize("dims", [5, 20])
@pytest.mark.parametrize("s", [1.0, 0.5])
def test_schroedinger_bridge_of_two_gaussians(dims, s):
    """With the entropic plan and gamma of a Brownian bridge of variance s^2, the SDE with eps = s^2 / 2 is the bridge.

    The plan exp(-|x0 - x1|^2 / (2 s^2)) f g between N(-a, I) and N(a, I) has the covariance c, c^2 + s^2 c = 1. So have
    the ends of the SDE's paths, and the states in between the variance (1 - t)^2 + t^2 + 2 t (1 - t) c + s^2 t (1 - t).
    """
    torch.manual_seed(0)
    n, a, c = 4000, 0.1, (-(s**2) + (s**4 + 4) ** 0.5) / 2
    process = make_process("rf", gamma="brownian", gamma_scale=s / 2**0.5)
    net = ExactBridge(process, a, c)
    field = Field(net, process, "velocity", sde_diffusion="constant", sde_scale=s**2 / 2)
    x1 = a + torch.randn(n, dims, dtype=torch.float64)
    ts = make_grid(200, 1e-4, 0.9999)
    middle = SAMPLERS["stochastic_heun"](field, x1, ts[:101])
    x0 = SAMPLERS["stochastic_heun"](field, middle, ts[100:])
    error = 4 / (n * dims) ** 0.5  # 4 standard errors of a mean of so many products with a variance of about 1
    assert abs(((x0 + a) * (x1 - a)).mean() - c) < 1.5 * error
    assert abs(x0.mean() + a) < error and abs((x0 + a).square().mean() - 1) < 1.5 * error
    variance = 0.5 + c / 2 + s**2 / 4
    assert abs(middle.var() - variance) < 1.5 * error and abs(net.variance(process.at(0.5)) - variance) < 1e-9
    other = Field(net, process, "velocity", sde_diffusion="constant", sde_scale=0.01)  # same law, but another bridge
    wrong = SAMPLERS["stochastic_heun"](other, x1, ts)
    assert abs(wrong.var() - 1) < 2 * error and abs(((wrong + a) * (x1 - a)).mean() - c) > 0.05


def test_sb_draws_from_the_entropic_plan():
    """Of points of N(0, 1) it has the covariance of the exact plan, and each x0 gets an x1 of its own row."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 1500, 1, generator=generator)
    for s in (1.0, 0.5):
        order = COUPLINGS["sb"](x0, x1, None, gamma_scale=s / 2**0.5, generator=generator)
        exact = (-(s**2) + (s**4 + 4) ** 0.5) / 2
        assert abs(np.corrcoef(x0.flatten(), x1[order].flatten())[0, 1] - exact) < 0.06
    x0, x1 = torch.randn(2, 200, 2, generator=generator)
    orders = [COUPLINGS["ot"](x0, x1, None), COUPLINGS["sb"](x0, x1, None, gamma_scale=0.01, generator=generator)]
    least, tight = ((x0 - x1[order]).square().sum(1).mean().item() for order in orders)
    assert tight == pytest.approx(least, rel=0.1) and least < 0.2 * (x0 - x1).square().sum(1).mean()


# ---- Batches


def test_a_batch_takes_the_source_in_an_order_of_its_own(tmp_path):
    trainer = trained(tmp_path, num_training_steps=2)
    data, source = trainer.dataset, trainer.dataset.source
    rows = trainer.source_batches.indices(3)
    assert not np.array_equal(rows, trainer.batches.indices(3))
    batch = trainer.prepare_batch(3)
    torch.testing.assert_close(batch.x1, data.spec.encode(torch.from_numpy(source.data[rows])))  # on the data's scale
    assert batch.z is None
    same = make(tmp_path, load_dataset("moons", source="moons"), run_name="same", **POINTS | {"dataset": "moons"},
                sde_sampler=None).prepare_batch(0)
    assert not (same.x0 == same.x1).all(1).any()


def test_given_pairs_item_with_item(tmp_path):
    """A data set with itself is the mirror interpolant: the velocity is gamma_dot z alone."""
    pairs = load_dataset("moons", source="moons", coupling="given")
    trainer = make(tmp_path, pairs, **NOISY | dict(dataset="moons", coupling="given"))
    batch = trainer.prepare_batch(5)
    assert torch.equal(batch.x0, batch.x1) and batch.z.std() > 0.5
    zero = batch._replace(z=torch.zeros_like(batch.z))
    trainer.forward = lambda xt, *rest: torch.cat([torch.zeros_like(xt), torch.zeros_like(xt)], dim=1)
    assert torch.equal(trainer.loss(zero), torch.zeros(16))
    torch.testing.assert_close(trainer.loss(batch), batch.z.square().mean(1))


def test_the_loss_is_the_sum_of_both(tmp_path):
    """For a network that knows x0 and x1, and predicts one kind, read as another: only the error of z is left."""
    data = load_dataset("eight_gaussians", source="moons")
    for kind, target_type in (("velocity", "velocity"), ("x0", "velocity"), ("v", "x0")):
        settings = NOISY | dict(model_type=kind, target_type=target_type)
        trainer = make(tmp_path, data, **settings | {"run_name": f"{kind}_{target_type}"})
        batch = trainer.prepare_batch(0)
        c = trainer.process.coefs(batch.t, 2)
        known = c.alpha * batch.x0 + c.sigma * batch.x1
        right = {"x0": batch.x0, "velocity": c.alpha_dot * batch.x0 + c.sigma_dot * batch.x1,
                 "v": c.alpha * batch.x1 - c.sigma * batch.x0}
        seen = []

        def forward(xt, t, label, cond, right=right[kind], z=batch.z, seen=seen):
            seen.append(xt)
            return torch.cat([right, z + 0.5], dim=1)

        trainer.forward = forward
        torch.testing.assert_close(trainer.loss(batch), torch.full((16,), 0.25), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[0], known + c.gamma * batch.z)


def test_images_are_flipped_together_and_z_is_not(tmp_path, digits):
    data = load_dataset("digits", source="digits", coupling="given")
    settings = dict(source="digits", coupling="given", gamma="bsquared", random_flip=True, run_name="images")
    flipped, plain = (make(tmp_path, data, **settings | {"random_flip": flip, "run_name": str(flip)}).prepare_batch(1)
                      for flip in (True, False))
    assert torch.equal(flipped.x0, flipped.x1) and not torch.equal(flipped.x0, plain.x0)
    assert torch.equal(flipped.z, plain.z)


@pytest.mark.parametrize("coupling", ["independent", "ot", "sb"])
def test_ranks_and_parts_take_their_rows(tmp_path, coupling):
    trainer = trained(tmp_path, num_training_steps=2, **NOISY | {"coupling": coupling, "run_name": coupling})
    batch, parts = trainer.prepare_batch(3), []
    for rank in range(4):
        trainer.own_rows = range(4 * rank, 4 * rank + 4)
        parts.append(trainer.prepare_batch(3))
    for name in ("x0", "x1", "z", "t"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name


@pytest.mark.parametrize("settings", [NOISY, NOISY | dict(coupling="sb"), POINTS | dict(run_name="noisy")],
                         ids=["gamma", "sb", "no gamma"])
def test_two_ranks_accumulation_and_resuming(tmp_path, settings, without_curves):
    """Losses as those of one rank; a run in two halves ends bit for bit as a whole one."""
    config = tiny(tmp_path, **settings | dict(sde_sampler=None, num_training_steps=6))
    assert_ranks_parts_and_halves(tmp_path, config)


# ---- Samples, both ways


def call(script, trainer, tmp_path, *words, name="x"):
    script.main(["--ckpt", f"{trainer.folder}/last.pt", "--out", str(tmp_path / name), *map(str, words)])


def test_samples_start_from_the_test_split_of_the_source(tmp_path):
    trainer = trained(tmp_path, num_training_steps=2)
    call(sample, trainer, tmp_path, "--num", 50, "--sampling_steps", 3, "--pairs", True)
    start = np.load(tmp_path / "x_source.npz")["arr_0"]
    points = load_dataset("moons", split="test").data
    assert all(np.abs(points - point).max(1).min() < 1e-5 for point in start) and len(np.unique(start, axis=0)) == 50
    call(sample, trainer, tmp_path, "--num", 50, "--sampling_steps", 3, "--source", "checkerboard", "--pairs", True,
         name="other")
    other = np.load(tmp_path / "other_source.npz")["arr_0"]
    board = load_dataset("checkerboard", split="test").data
    assert all(np.abs(board - point).max(1).min() < 1e-5 for point in other)


def test_each_sample_of_a_condition_has_a_point_of_its_own(tmp_path):
    """Of an independent source; a given one starts all samples of a condition from the partner of its item."""
    rng = np.random.default_rng(0)
    for name, n in (("x", 30), ("x_test", 12)):
        x0 = rng.normal(size=(n, 2))
        np.savez(tmp_path / f"{name}.npz", arr_0=x0, cond=rng.normal(size=(n, 3)))
        np.save(tmp_path / f"{name}1.npy".replace("_test1", "1_test"), x0 + 10)
    for coupling in ("independent", "given"):
        data = load_dataset(str(tmp_path / "x.npz"), split="test", source=str(tmp_path / "x1.npy"), coupling=coupling)
        given = cases(data, 24, 2, False)
        start = data.spec.decode(given.start)
        partners = given.truth.repeat_interleave(2, 0) + 10
        if coupling == "given":
            torch.testing.assert_close(start, partners)
        else:
            assert (start != partners).any() and not torch.equal(start[::2], start[1::2])
    trainer = trained(tmp_path, dataset=str(tmp_path / "x.npz"), source=str(tmp_path / "x1.npy"), num_training_steps=2)
    with pytest.raises(UserError, match="rollout needs a condition like the data.*; and noise as --source"):
        run = sample.Loaded(sample.Options(ckpt=f"{trainer.folder}/last.pt"), CPU)
        sample.rollout(run, trainer.cases(8), 2)
    with pytest.raises(SystemExit):
        call(sample, trainer, tmp_path, "--pairs", True)


def test_given_partners_keep_their_labels(tmp_path):
    """Label and partner of an item belong together, in grids and in samples."""
    labels = np.arange(40) % 4
    for name in ("y", "y_test"):
        np.savez(tmp_path / f"{name}.npz", np.random.default_rng(0).normal(size=(40, 2)), labels)
        np.save(tmp_path / f"{name}1.npy".replace("_test1", "1_test"), np.stack([labels, labels], 1).astype(float))
    trainer = trained(tmp_path, dataset=str(tmp_path / "y.npz"), source=str(tmp_path / "y1.npy"), coupling="given",
                      class_conditional=True, num_training_steps=2)
    given = trainer.cases(30)
    torch.testing.assert_close(trainer.spec.decode(given.start)[:, 0], given.labels.float())
    drawn = []
    trainer.samples = lambda weights, sampler, drawn_for: drawn.append(drawn_for) or (torch.zeros(10, 2), 1.0)
    trainer.step += 1
    trainer.sample()
    torch.testing.assert_close(trainer.spec.decode(drawn[0].start)[:, 0], drawn[0].labels.float())


def test_there_and_back():
    """By the exact ODE, from the source to data and back to the same points."""
    torch.manual_seed(0)
    process = make_process("rf", gamma="bsquared", gamma_scale=0.5)
    data = mixture(process)
    start = data.sample(64, t=1.0)[0]
    settings = dict(rows=range(64), shape=(2,), device=CPU, seed=0, sampler="dopri5", sampling_steps=5, T_min=0.0,
                    T_max=1.0, model_type="velocity", rtol=1e-9, atol=1e-9)
    (there, _), = draw(data, process, start=start, **settings)
    (back, _), = draw(data, process, start=there, reverse=True, **settings)
    assert (there - start).abs().mean() > 0.5
    torch.testing.assert_close(back, start, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(there, dopri5(Field(data, process, "velocity"), start, [1.0, 0.0], 1e-9, 1e-9))


@pytest.mark.parametrize("sampler", WITH_GAMMA)
@pytest.mark.parametrize("settings", [NOISY, NOISY | dict(dataset="digits", source="digits", network="unet")],
                         ids=["points", "images"])
def test_every_sampler_draws(tmp_path, sampler, settings):
    trainer = trained(tmp_path, num_training_steps=2, **settings)
    samples, calls = trainer.samples("ema", sampler, trainer.cases(20))
    assert samples.shape == (20, *trainer.spec.shape) and samples.double().isfinite().all() and calls > 0


@pytest.mark.parametrize("kind", GIVEN_SOURCE)
@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "dpmpp_2m"])
def test_without_gamma_the_ode_samplers_agree(kind, sampler):
    """On the exact field of pairs (x0, x1) at given places, each kind and sampler leads to the x0 of each x1."""
    process, x0, x1 = make_process("rf"), torch.tensor([[2.0, 1.0], [-1.0, 3.0]]), torch.tensor([[0.0, 0.5], [4.0, -2]])

    def net(xt, t, label, cond):
        c = process.coefs(t, 2)
        return {"velocity": x1 - x0, "x0": x0, "v": c.alpha * x1 - c.sigma * x0}[kind]

    (x, _), = draw(net, process, rows=range(2), shape=(2,), device=CPU, seed=0, sampler=sampler, sampling_steps=8,
                   T_min=1e-4, T_max=0.9999, start=x1, model_type=kind)
    torch.testing.assert_close(x, x0, rtol=0, atol=2e-3)


def test_reverse_leads_from_the_test_data_to_the_source(tmp_path):
    trainer = trained(tmp_path, num_training_steps=300, base_lr=1e-2, hidden_dim=64, batch_size=256, num_layers=2,
                      log_every=100)
    call(sample, trainer, tmp_path, "--num", 1000, "--sampling_steps", 20, "--reverse", True, "--trajectory", True)
    back = torch.from_numpy(np.load(tmp_path / "x.npz")["arr_0"]).double()
    moons, data = (torch.from_numpy(load_dataset(name, split="test").data).double()[:1000]
                   for name in ("moons", "eight_gaussians"))
    assert wasserstein(back, moons) < 0.4 < 1.0 < wasserstein(data, moons)
    assert (tmp_path / "x.gif").stat().st_size > 1000


def test_reflow(tmp_path):
    """Pairs of a model from noise: a run trains on them, and draws from the source's points or from new noise."""
    teacher = trained(tmp_path, source="noise", num_training_steps=2, run_name="teacher")
    call(sample, teacher, tmp_path, "--num", 40, "--sampling_steps", 4, "--pairs", True, name="pairs")
    x0, x1 = (np.load(tmp_path / f"pairs{suffix}.npz")["arr_0"] for suffix in ("", "_source"))
    (exact, _), = draw(teacher.ema.net, teacher.process, rows=range(40), shape=(2,), device=CPU, seed=0,
                       sampler=teacher.config.sampler, sampling_steps=4, T_min=1e-4, T_max=0.9999,
                       start=teacher.spec.encode(torch.from_numpy(x1)), model_type="velocity")
    np.testing.assert_allclose(teacher.spec.decode(exact), x0, atol=2e-3)  # draw from noise starts at 0.9999 x1
    student = trained(tmp_path, dataset=str(tmp_path / "pairs.npz"), source=str(tmp_path / "pairs_source.npz"),
                      coupling="given", num_training_steps=2, run_name="student")
    batch = student.prepare_batch(0)
    rows = student.batches.indices(0)
    torch.testing.assert_close(student.spec.decode(batch.x1), torch.from_numpy(x1[rows]), rtol=1e-4, atol=1e-4)
    call(sample, student, tmp_path, "--num", 20, "--source", "noise", name="new")
    assert np.load(tmp_path / "new.npz")["arr_0"].shape == (20, 2)


def test_pairs_of_images_are_not_rounded(tmp_path):
    teacher = trained(tmp_path, dataset="digits", source="noise", network="unet", num_training_steps=2)
    call(sample, teacher, tmp_path, "--num", 20, "--pairs", True, name="pairs")
    x0, x1 = (np.load(tmp_path / f"pairs{suffix}.npz")["arr_0"] for suffix in ("", "_source"))
    assert x0.dtype == np.uint8 and x1.dtype == np.float32 and x1.shape == (20, 1, 8, 8)
    assert abs((x1 - 127.5).std() / 127.5 - 1) < 0.1
    data = load_dataset(str(tmp_path / "pairs.npz"), source=str(tmp_path / "pairs_source.npz"), coupling="given")
    assert abs(data.start(np.arange(20)).std() - 1) < 0.1


# ---- Evaluation


def test_wasserstein_is_that_of_the_best_assignment():
    x, y = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0)).double()
    cost = (torch.cdist(x, y) ** 2).numpy()
    assert wasserstein(x, y) == pytest.approx(cost[linear_sum_assignment(cost)].mean() ** 0.5, rel=1e-9)
    data = load_dataset("eight_gaussians_far")
    found = compare_points(torch.from_numpy(data.data[:300]) + 5, data)["wasserstein"]  # in the data's own units
    assert found == pytest.approx(50**0.5, rel=0.15)
    assert wasserstein(x, x + 2) == pytest.approx(12**0.5) and wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-6)


def test_the_card_has_the_energy_of_the_paths(tmp_path, own_cache, capsys):
    """As the sum of |step|^2 / dt along the paths of Euler's method, in the units of the data; and no likelihood."""
    trainer = trained(tmp_path, num_training_steps=100, base_lr=1e-2)
    words = ["--num", 200, "--seeds", 1, "--loss_num", 100, "--sampler", "euler", "--sampling_steps", 10]
    call(evaluate, trainer, tmp_path, *words, name="card")
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    given, steps = trainer.cases(200), make_grid(10, 1e-4, 0.9999)
    run = sample.Loaded(sample.Options(ckpt=f"{trainer.folder}/last.pt", sampler="euler", sampling_steps=10), CPU)
    states = sample.trajectory(run, given).double()
    lengths = torch.tensor(steps[:-1]) - torch.tensor(steps[1:])
    energy = ((states[1:] - states[:-1]).square().sum(2) / lengths[:, None]).sum(0).mean().item()
    assert card["paths"]["path_energy"] == pytest.approx(energy, rel=1e-4)
    paths = card["paths"]
    assert paths["normalised"] == pytest.approx(paths["path_energy"] / paths["least"] - 1)
    start, data = trainer.spec.decode(given.start), load_dataset("eight_gaussians", split="test").data
    assert paths["least"] == pytest.approx(wasserstein(start, torch.from_numpy(data[:200])) ** 2, rel=0.1)
    assert "likelihood" not in card and "likelihood is left out: the density of a source" in capsys.readouterr().out
    assert card["metrics"]["wasserstein"]["real"] < card["metrics"]["wasserstein"]["mean"]


# ---- Wrong settings


@pytest.mark.parametrize("changes, words", [
    (dict(gamma="brownian", source="noise"), "gamma brownian is the noise between data and a source.*--gamma None"),
    (dict(coupling="sb"), "coupling sb goes with .* Brownian bridge.*--coupling ot"),
    (dict(coupling="sb", gamma="bsquared"), "coupling sb goes with .* Brownian bridge.*--coupling ot"),
    (dict(trainer="regression"), "trainer regression predicts data from conditions alone"),
])
def test_contradictions(changes, words):
    found = problems(Config(**PRESETS["moons"] | dict(source="moons") | changes))
    assert len(found) == 1 and re.search(words, found[0])


@pytest.mark.parametrize("changes, words", [
    (dict(process="ve"), "process ve with base noise does not lead from a source.* to the data: use --process rf"),
    (dict(base="condition"), "process rf with base condition does not lead from a source.*--base noise"),
    (dict(process="edm"), "process edm with base noise does not lead from a source"),
    (dict(process="foellmer"), "process foellmer with base noise does not lead from a source"),
    (dict(model_type="score"), "model_type score is for noise alone: with a source expected velocity, x0, v$"),
    (dict(target_type="drift"), "target_type drift is for noise alone"),
    (dict(model_type="x1", target_type="x0"), "model_type x1 is for noise alone"),
    (dict(precondition=True), "precondition True is for noise alone: with a source expected False"),
    (dict(sde_sampler="euler_maruyama"), "euler_maruyama needs the score, which coupling independent with source moons "
                                         ".*--sde_sampler None, or train with a --source and --gamma brownian"),
    (dict(gamma="brownian", sampler="ddim"), "sampler ddim knows nothing of the noise of gamma brownian: use.* heun"),
    (dict(gamma="brownian", sde_sampler="ancestral"), "sde_sampler ancestral knows nothing of .*--sde_sampler None"),
    (dict(gamma="brownian", T_min=0.0), "T_min 0.0: the velocity .* is not finite there; use --T_min 1e-4"),
    (dict(gamma="brownian", T_max=1.0), "T_max 1.0: the (velocity|score) .* is not finite there; use --T_max 0.9999"),
])
def test_settings_that_do_not_go_with_a_source(changes, words):
    config = Config(**PRESETS["moons"] | dict(source="moons", sde_sampler=None) | changes)
    with pytest.raises(UserError, match=words):
        check_settings(config)


def test_data_that_do_not_go_together(tmp_path):
    with pytest.raises(UserError, match=r"digits has 1500 items of shape \(1, 8, 8\), and moons has 20000 of \(2,\)"):
        load_dataset("moons", source="digits")
    with pytest.raises(UserError, match="source normal has 10000 items .* moons has 20000 .*--coupling given as many"):
        load_dataset("moons", source="normal", coupling="given")
    with pytest.raises(UserError, match="'nothing' is not known here"):
        load_dataset("moons", source="nothing")
    config = tiny(tmp_path, **POINTS | dict(source="noise", coupling="given", sde_sampler=None))
    assert_one_line_error(run("python", "main.py", *flags(config)), "coupling given needs a source", "--coupling ot")


@pytest.mark.parametrize("words, expected", [
    (["--reverse", "True", "--sampler", "euler_maruyama"], "it needs a run with a source, and --sampler heun"),
    (["--source", "noise"], "gamma brownian is the noise between data and a source"),
    (["--source", "digits"], "source digits has 297 items of shape (1, 8, 8)"),
    (["--cond", "x.npy"], "cond x.npy comes without points of the source"),
    (["--sampler", "dpmpp_2m"], "sampler dpmpp_2m knows nothing of the noise of gamma brownian"),
])
def test_wrong_options_of_sample(tmp_path, capsys, words, expected):
    trainer = trained(tmp_path, num_training_steps=2, **NOISY)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        call(sample, trainer, tmp_path, *words)
    assert expected in capsys.readouterr().err


def test_reverse_needs_a_source(tmp_path, capsys):
    trainer = trained(tmp_path, num_training_steps=2, source="noise")
    with pytest.raises(SystemExit):
        call(sample, trainer, tmp_path, "--reverse", True)
    assert "reverse leads to the source by the ODE: it needs a run with a source" in capsys.readouterr().err


def test_a_run_keeps_its_source(tmp_path, capsys):
    trained(tmp_path, num_training_steps=2)
    with pytest.raises(UserError, match="other settings: source"):
        trained(tmp_path, num_training_steps=4, source="checkerboard")


# ---- The data sets of the literature


@pytest.mark.parametrize("name, mean, std", [
    ("moons_wide", (0.0, 0.5), 1.43), ("eight_gaussians_wide", (0.0, 0.0), 13.5**0.5), ("normal", (0.0, 0.0), 1.0),
    ("moons_far", (0.0, 0.0), 7.0), ("eight_gaussians_far", (0.0, 0.0), (72 + 2.25) ** 0.5), ("s_curve", (0, 0), 1.65),
])
def test_scale_of_the_data_sets(name, mean, std):
    train, test = (load_dataset(name, split=split).data for split in ("train", "test"))
    assert train.shape == test.shape == (10_000, 2) and not np.array_equal(train, test)
    assert np.abs(train.mean(0) - mean).max() < 0.15
    assert (train - train.mean(0)).std() == pytest.approx(std, rel=0.02)


def test_the_preset_is_two_sided():
    config = read_config(["moons_to_eight_gaussians"])
    assert (config.source, config.dataset, config.gamma) == ("moons_far", "eight_gaussians_far", "brownian")
