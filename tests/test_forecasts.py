"""Forecasts: metrics of ensembles and spectra against closed forms, the regression, and their part of a card."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from PIL import Image

import data_utils
from data_utils import Cases, DataSpec, cases, load_dataset, make_dataset
from evaluate import Evaluation, Options, evaluate, losses
from fields import Items
from logging_utils import picture_of
from metrics import Evaluator, compare_ensembles, spectral_distance, spectrum
from sample import Loaded, conditions_of
from sample import Options as Sample
from sample import main as sample
from trainer import TRAINERS, Regression
from utils import UserError

CPU = torch.device("cpu")
VECTORS = DataSpec((2,), 0, [1.0, -3.0], [2.0, 0.5])
pytestmark = pytest.mark.usefixtures("own_cache")


# ---- Ensembles


def stored(x):
    """Vectors of the network's scale, as they are stored."""
    return VECTORS.decode(x)


@pytest.mark.parametrize("K", [2, 5])
def test_a_perfect_ensemble_of_normal_numbers(K):
    """Of N(0, 1): CRPS 1 / sqrt(pi), RMSE sqrt(1 + 1 / K), spread over error 1, and 2 / (K + 1) outside."""
    generator, n = torch.Generator().manual_seed(K), 40_000
    x, y = torch.randn(n * K, 2, generator=generator), torch.randn(n, 2, generator=generator)
    found = compare_ensembles(stored(x), stored(y), VECTORS)
    assert set(found) == {"rmse", "crps", "spread_over_error", "outside"}
    assert found["crps"] == pytest.approx(math.pi**-0.5, rel=0.01)
    assert found["rmse"] == pytest.approx((1 + 1 / K) ** 0.5, rel=0.01)
    assert found["spread_over_error"] == pytest.approx(1, rel=0.01)
    assert found["outside"] == pytest.approx(2 / (K + 1), rel=0.02)


def test_an_ensemble_that_is_too_wide():
    """N(0, s^2) for N(0, 1): CRPS = sqrt(2 (1 + s^2) / pi) - s / sqrt(pi) (Gneiting & Raftery 2007, eq. 5)."""
    generator, n, K, s = torch.Generator().manual_seed(0), 40_000, 4, 2.0
    x, y = s * torch.randn(n * K, 2, generator=generator), torch.randn(n, 2, generator=generator)
    found = compare_ensembles(stored(x), stored(y), VECTORS)
    assert found["crps"] == pytest.approx((2 * (1 + s**2) / math.pi) ** 0.5 - s * math.pi**-0.5, rel=0.01)
    assert found["spread_over_error"] == pytest.approx(s * (1 + 1 / K) ** 0.5 / (1 + s**2 / K) ** 0.5, rel=0.01)
    assert found["outside"] < 0.25


def test_the_crps_is_the_mean_over_all_pairs():
    x, y = torch.randn(3 * 4, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    each = x.view(3, 4, 2)
    pairs = (each[:, :, None] - each[:, None]).abs().sum((1, 2)) / (4 * 3)  # those of two different samples
    exact = (each - y[:, None]).abs().mean() - pairs.mean() / 2
    assert compare_ensembles(stored(x), stored(y), VECTORS)["crps"] == pytest.approx(exact.item(), rel=1e-5)


def test_single_forecasts_have_an_error_and_no_spread():
    y = torch.randn(50, 2)
    found = compare_ensembles(stored(y + torch.tensor([0.3, -0.1])), stored(y), VECTORS)
    assert found == pytest.approx({"rmse": 0.05**0.5, "crps": 0.2}, rel=1e-4)


def test_forecasts_that_are_the_truth():
    y = torch.randn(50, 2)
    found = compare_ensembles(stored(y).repeat_interleave(3, 0), stored(y), VECTORS)
    assert found["rmse"] == found["crps"] == found["outside"] == 0


def test_the_peak_signal_to_noise_ratio_of_images():
    spec = DataSpec((1, 4, 4), 0, [127.5], [127.5])
    images = torch.randint(10, 245, (6, 1, 4, 4), dtype=torch.uint8)
    found = compare_ensembles(images + 5, images, spec)
    assert found["psnr"] == pytest.approx(20 * math.log10(255 / 5), rel=1e-5)


# ---- Spectra


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_the_spectrum_of_a_wave_is_at_its_wavenumber(size):
    """A wave a cos(3 x + 4 y + phase) has the power a^2 / 4 in each of two modes, at wavenumber 5."""
    y, x = torch.meshgrid(*(torch.arange(n) * 2 * math.pi / n for n in size), indexing="ij")
    fields = torch.stack([2 * (3 * x + 4 * y + phase).cos() for phase in (0.0, 1.0)])[:, None]
    found = spectrum(torch.cat([fields, torch.randn_like(fields)], 1))  # of the first channel alone
    k = torch.fft.fftfreq(size[0], 1 / size[0])[:, None] ** 2 + torch.fft.fftfreq(size[1], 1 / size[1]) ** 2
    ring = ((4.5**2 <= k) & (k <= 5.5**2)).sum().item()
    assert len(found) == 8 and found[4].item() == pytest.approx(2 * 1.0 / ring, rel=1e-5)
    assert torch.cat([found[:4], found[5:]]).max() < 1e-10


def test_white_noise_has_a_flat_spectrum():
    found = spectrum(3 * torch.randn(2000, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(found, torch.full((8,), 9 / 256).double(), rtol=0.03, atol=0)


def test_the_spectral_distance_is_in_decibels():
    fields = torch.randn(5, 1, 16, 16)
    assert spectral_distance(fields, fields) == 0
    assert spectral_distance(3 * fields, fields) == pytest.approx(20 * math.log10(3), rel=1e-4)


# ---- Regression


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """x0 = (c, -2 c) + noise of standard deviation 0.1, beside c; 500 pairs for training, 200 for testing."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for suffix, n in (("", 500), ("_test", 200)):
        c = rng.standard_normal((n, 1))
        np.save(folder / f"x{suffix}.npy", np.concatenate([c, -2 * c], 1) + 0.1 * rng.standard_normal((n, 2)))
        np.save(folder / f"x{suffix}_cond.npy", c)
    return str(folder / "x.npy")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory, cache_folder):
    """Runs on these pairs: the regression and the diffusion, from noise and around nothing else."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_utils, "CACHE", cache_folder)
        for trainer in TRAINERS:
            config = tiny(folder, run_name=trainer, trainer=trainer, dataset=data, network="mlp", hidden_dim=32,
                          num_layers=2, class_conditional=False, num_training_steps=400, warmup_steps=20, base_lr=3e-3,
                          batch_size=64, sampling_steps=20, log_every=100)
            TRAINERS[trainer](config, load_dataset(data), CPU).train()
    return folder


def test_the_regression_learns_the_mean(trained, data):
    run = Loaded(Options(ckpt=str(trained / "regression" / "last.pt")), CPU)
    test = load_dataset(data, split="test")
    rows = np.arange(200)
    given = test.cases(rows, 2)
    forecasts, calls = run.draw(given)
    c = torch.from_numpy(test.cond[rows])
    error = forecasts[::2] - torch.cat([c, -2 * c], 1)
    assert error.square().mean().sqrt() < 0.15 and calls >= 1
    assert torch.equal(forecasts[::2], forecasts[1::2])  # it depends on the condition alone
    assert torch.equal(run.draw(given, seed=7, sampler="euler_maruyama")[0], forecasts)


def test_the_loss_of_the_regression_is_its_squared_error(trained, data):
    config = Loaded(Options(ckpt=str(trained / "regression" / "last.pt")), CPU).config
    trainer = Regression(config, load_dataset(data), CPU)
    batch = trainer.prepare_batch(0)
    with torch.no_grad():
        mean = trainer.net(torch.zeros_like(batch.x0), torch.ones(64), None, batch.cond)
        torch.testing.assert_close(trainer.loss(batch), (mean - batch.x0).square().mean(1))
        other = batch._replace(x1=torch.randn_like(batch.x1), t=torch.rand(64))
        assert torch.equal(trainer.loss(other), trainer.loss(batch))  # neither noise nor times matter


def test_a_regression_has_no_likelihood(trained, tmp_path):
    """Its network is no velocity."""
    for name in TRAINERS:
        options = Options(ckpt=str(trained / name / "last.pt"), out=str(tmp_path), num=40, seeds=1, loss_num=0,
                          likelihood_num=4)
        assert ("likelihood" in evaluate(Evaluation(options, CPU))) == (name == "diffusion")


def test_samples_beat_the_regression_where_the_truth_is_uncertain(trained, tmp_path):
    """The CRPS of the right law is 1 / sqrt(2) of the mean's absolute error, for normal noise."""
    options = Options(ckpt=str(trained / "diffusion" / "last.pt"), out=str(tmp_path), num=800, seeds=1, loss_num=0,
                      samples_per_cond=4, likelihood_num=0, regression=str(trained / "regression" / "last.pt"))
    card = evaluate(Evaluation(options, CPU))
    mean = card["forecasts"]["regression"]
    assert set(card["forecasts"]) == {"regression"} and card["protocol"]["samples_per_cond"] == 4
    assert card["metrics"]["crps"]["mean"] < 0.95 * mean["crps"] and "spread_over_error" not in mean
    assert 0.6 < card["metrics"]["spread_over_error"]["mean"] < 1.4
    assert json.load(open(tmp_path / "card.json"))["forecasts"] == card["forecasts"]


def test_another_network_is_no_regression(trained, tmp_path):
    diffusion = str(trained / "diffusion" / "last.pt")
    options = Options(ckpt=diffusion, out=str(tmp_path), num=40, seeds=1, regression=diffusion)
    with pytest.raises(UserError, match="is no regression for these data.*--trainer regression"):
        Evaluation(options, CPU)  # before any sample is drawn


# ---- What evaluate.py adds for images and fields


def card_of(tmp_path, num=40, **changes):
    """The card and the pictures of a tiny run with these settings, and what was evaluated."""
    config = tiny(tmp_path, **{"class_conditional": False, **changes})
    TRAINERS[config.trainer](config, load_dataset(config.dataset, **vars(config)), CPU).train()
    ckpt, out = str(tmp_path / config.run_name / "last.pt"), str(tmp_path / "out")
    e = Evaluation(Options(ckpt=ckpt, out=out, num=num, seeds=1, likelihood_num=0, loss_num=0, neighbours_num=0), CPU)
    return evaluate(e), e


def test_samples_are_compared_with_their_condition(tmp_path):
    """`consistency` is the root mean square error of the downsampled samples, on the network's scale."""
    card, e = card_of(tmp_path, corruption="downsample", base="condition")
    error = F.avg_pool2d(e.spec.encode(e.samples), 4) - e.given.cond[:, :1]
    assert card["forecasts"]["samples"] == {"consistency": pytest.approx(error.square().mean().sqrt().item())}
    enlarged = card["forecasts"]["condition"]
    low = e.given.cond[::4, :1]
    again = e.spec.encode(e.spec.decode(F.interpolate(low, (8, 8), mode="bilinear")))
    exact = (F.avg_pool2d(again, 4) - low).square().mean().sqrt().item()
    assert {"psnr", "crps"} <= set(enlarged) and enlarged["consistency"] == pytest.approx(exact, rel=1e-3)
    assert "psnr" in card["metrics"] and "spectrum" not in e.pictures and len(e.given.truth) == 10


def test_masks_have_no_consistency(tmp_path):
    card, _ = card_of(tmp_path, corruption="mask_box")
    assert set(card["forecasts"]) == {"condition"} and "consistency" not in card["forecasts"]["condition"]


def test_fields_are_compared_with_persistence_and_by_spectra(tmp_path):
    """A trajectory that stands still: persistence is right. Its spectra are on the card."""
    fields = np.random.default_rng(0).standard_normal((12, 1, 1, 8, 8)).repeat(20, 1).astype(np.float32)
    for k, trajectory in enumerate(fields):
        folder = tmp_path / "data" / ("test" if k >= 10 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{k}.npy", trajectory)
    card, e = card_of(tmp_path, dataset=str(tmp_path / "data"), lag=1)
    persistence = card["forecasts"]["persistence"]
    assert persistence["rmse"] < 1e-5 and persistence["crps"] < 1e-5 and persistence["spectral_distance"] < 1e-3
    assert set(card["spectra"]) == {"truth", "samples", "persistence"}
    np.testing.assert_allclose(card["spectra"]["truth"], spectrum(e.given.truth))
    np.testing.assert_allclose(card["spectra"]["persistence"], card["spectra"]["truth"], rtol=1e-3)
    assert (tmp_path / "out" / "spectrum.png").exists() and "consistency" not in persistence
    assert card["metrics"]["crps"]["mean"] > 0.1 and isinstance(e.given, Cases)


def test_a_rollout_of_images_has_its_channels_last(tmp_path):
    """Frames of grey images, each with the one before as its condition."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8))
    np.save(tmp_path / "x_test.npy", np.random.default_rng(1).integers(0, 256, (30, 8, 8), np.uint8))
    config = tiny(tmp_path, class_conditional=False, dataset=str(tmp_path / "x.npy"), lag=1)
    TRAINERS[config.trainer](config, load_dataset(config.dataset, lag=1), CPU).train()
    out = str(tmp_path / "out")
    sample(["--ckpt", str(tmp_path / "digits" / "last.pt"), "--num", "4", "--samples_per_cond", "2", "--rollout", "3",
            "--out", out, "--device", "cpu"])
    found = np.load(out + ".npz")["arr_0"]
    assert found.shape == (4, 3, 8, 8, 1) and found.dtype == np.uint8
    assert Image.open(out + ".gif").n_frames == 3


def test_a_picture_of_one_condition_with_more_samples_than_it_shows():
    data = load_dataset("digits", corruption="downsample", downsample_factor=4)
    shown = torch.zeros(100, 1, 8, 8, dtype=torch.uint8)
    few, many = (picture_of(shown, cases=cases(data, 200, times, False), spec=data.spec) for times in (10, 200))
    assert many.width > few.width / 2 and many.height < few.height / 4  # a single row


def trajectories(folder, n=10, frames=6):
    for k, trajectory in enumerate(np.random.default_rng(0).standard_normal((n, frames, 2, 8, 8), np.float32)):
        np.save(folder / f"{k:02d}.npy", trajectory)
    return str(folder)


def test_a_small_test_split_conditions_of_a_file_and_a_picture_of_fields(tmp_path, capsys):
    """Real data are then halves of the training split. A file of frames has the channels that the data have."""
    (tmp_path / "x").mkdir()
    card, e = card_of(tmp_path, dataset=trajectories(tmp_path / "x"), lag=1, channels=(1,))
    assert len(e.data["test"]) == 5 and card["real"]["what"] == "one half of the training split, against the other"
    assert (tmp_path / "digits" / "real.png").exists()
    run = Loaded(Sample(ckpt=str(tmp_path / "digits" / "last.pt"), samples_per_cond=2), CPU)
    given = conditions_of(str(tmp_path / "x" / "09.npy"), run)
    expected = run.spec.condition(torch.from_numpy(np.load(tmp_path / "x" / "09.npy")[:, 1:]))
    assert torch.equal(given.cond, expected.repeat_interleave(2, 0)) and given.num == 12


def test_a_test_split_of_another_kind_is_refused(tmp_path, capsys):
    """In training the conditions are then those of the training split, and one line reports it."""
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8)
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "x_test.npy", (images / 255).astype(np.float32))
    card_of(tmp_path, dataset=str(tmp_path / "x.npy"), corruption="downsample")
    printed, words = capsys.readouterr().out, r"the test split has fields of shape \(1, 8, 8\) .* trained on items of"
    for start in ("conditions of samples are those of the training split", "what needs a test split is left out"):
        assert re.search(f"{start}: {words}", printed)


def test_the_loss_by_t_has_all_conditions(tmp_path, monkeypatch):
    """cond_dropout hides conditions in training, and not where the loss is measured."""
    config = tiny(tmp_path, class_conditional=False, corruption="downsample", cond_dropout=0.9)
    TRAINERS[config.trainer](config, load_dataset("digits", **vars(config)), CPU).train()
    options = Options(ckpt=str(tmp_path / "digits" / "last.pt"), out=str(tmp_path / "out"), num=40, loss_num=100)
    e, ones = Evaluation(options, CPU), []
    net = e.net
    e.net = lambda xt, t, label, cond: ones.append(cond[:, -1].min().item()) or net(xt, t, label, cond)
    losses(e, e.data["train"])
    assert ones and min(ones) == 1


def test_the_classifier_learns_clusters_of_items_that_are_read_one_at_a_time(monkeypatch):
    monkeypatch.setattr("metrics.CLASSIFIER_STEPS", 3)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    data = make_dataset(Items(list(images)), None)
    found = Evaluator(data, data, CPU)(torch.from_numpy(images[:20, None]))
    assert np.isfinite(list(found.values())).all()
