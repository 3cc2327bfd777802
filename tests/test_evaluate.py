"""evaluate.py: figures against what is exact, cards, any number of processes, evaluation in training, and one-line errors."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, flags, gaussian, launch, make, metrics_of, run, tiny
from PIL import Image
from test_logging_utils import read_wandb

import evaluate
import saving
from cards import git_commit
from data_utils import load_dataset, make_dataset
from evaluate import Options
from evaluation import Evaluation, steps_for
from likelihood import bits_per_dim
from sampling import ODE_SAMPLERS, SDE_SAMPLERS
from trainer import TRAINERS, DiffusionTrainer
from utils import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A conditional run on digits, points, unlabelled images without a test split, and Gaussian points with one."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    np.savez(folder / "plain.npz", rng.integers(0, 256, (60, 8, 8), np.uint8))
    for name in ("normal.npy", "normal_test.npy"):
        np.save(folder / name, np.array([3.0, -1.0]) + np.array([0.1, 20.0]) * rng.standard_normal((2000, 2)))
    points = dict(network="mlp", hidden_dim=16, num_layers=1, class_conditional=False)
    for changes in (dict(num_training_steps=20, base_lr=1e-2), dict(run_name="points", dataset="moons", **points),
                    dict(run_name="plain", dataset=str(folder / "plain.npz"), class_conditional=False),
                    dict(run_name="normal", dataset=str(folder / "normal.npy"), **points)):
        config = tiny(folder, **changes)
        DiffusionTrainer(config, load_dataset(config.dataset), CPU).train()
    return folder


def evaluation(runs, name, tmp_path, **changes):
    return Evaluation(Options(ckpt=str(runs / name / "last.pt"), out=str(tmp_path / "out"), **{"num": 40, "seeds": 2, **changes}), CPU)


# ---- Against what is exact


def test_nats_of_points_are_those_of_the_oracle_in_the_datas_own_units(runs, tmp_path):
    """Each coordinate is normal, so that on the network's scale, of mean 0 and deviation 1, the data are N(0, 1) but for their number."""
    e = evaluation(runs, "normal", tmp_path, likelihood_num=400, rtol=1e-6, atol=1e-6)
    e.net = gaussian(e.process, "velocity", dims=2, mean=0.0, std=1.0)
    found = e.likelihood()
    test = e.data["test"].data
    exact = 0.5 * (((test - e.spec.mean) / np.array(e.spec.std)) ** 2).sum(1) + np.log(2 * math.pi) + np.log(e.spec.std).sum()
    assert found["nats"] == pytest.approx(exact.mean(), abs=4 * found["standard_error"]) and found["items"] == 400
    assert found["standard_error"] == pytest.approx(exact.std() / 20, rel=0.2)
    e.likelihood_num = 2000
    assert e.likelihood()["nats"] == pytest.approx(exact.mean(), abs=1e-3)  # all of them


def test_bits_per_dimension_of_images(runs, tmp_path):
    """Of images that the oracle holds for independent N(0, 0.8^2) pixels: its density, times the width of a bin."""
    e = evaluation(runs, "digits", tmp_path, likelihood_num=297)
    e.net = gaussian(e.process, "velocity", dims=64, mean=0.0, std=0.8)
    e.net, oracle = (lambda xt, t, label: oracle(xt.flatten(1), t).reshape(xt.shape)), e.net
    x0 = e.spec.encode(torch.from_numpy(e.data["test"].data)).flatten(1)
    exact = bits_per_dim(oracle.log_prob(x0.double(), torch.zeros(297, dtype=torch.float64)), 64)
    found = e.likelihood()
    assert found["bits_per_dim"] == pytest.approx(exact.mean().item(), abs=2e-3)
    assert found["standard_error"] == pytest.approx(exact.std().item() / math.sqrt(297), rel=0.02)


def test_loss_by_t_is_that_of_the_best_velocity(runs, tmp_path):
    """For N(0, 1) data and rectified flow, E |x1 - x0 - E[x1 - x0 | xt]|^2 = 1 / ((1 - t)^2 + t^2)."""
    e = evaluation(runs, "normal", tmp_path, loss_num=4000)
    t, losses = e.losses(e.process, gaussian(e.process, "velocity", dims=2, mean=0.0, std=1.0), e.data["train"])
    assert len(t) == len(losses) == 4000
    for batch in t.reshape(-1, e.config.batch_size):  # one in each part of the range
        parts = (batch - e.config.T_min) / (e.config.T_max - e.config.T_min) * e.config.batch_size
        assert sorted(np.clip(parts, 0, e.config.batch_size - 1e-3).astype(int)) == list(range(e.config.batch_size))
    exact = 1 / ((1 - t) ** 2 + t**2)
    for part in np.array_split(np.argsort(t), 5):
        error = (losses - exact)[part]
        assert abs(error.mean()) < 4 * error.std() / math.sqrt(len(part)), t[part].mean()


def test_steps_for_is_what_fits(process):
    field = dict(process=process, model_type="velocity", sde_diffusion="sigma", corrector_snr=0.16, churn=1.0, churn_min=0.0, churn_max=80,
                 seed=0, T_min=1e-3, T_max=0.99, grid="edm", rho=7.0)
    for name in {**ODE_SAMPLERS, **SDE_SAMPLERS}:
        if name == "dopri5":
            continue
        assert steps_for(name, 35, **field, denoise=True) == {"heun": 17, "edm_churn": 17, "midpoint": 17, "rk4": 8, "stochastic_heun": 17,
                                                              "predictor_corrector": 17}.get(name, 34), name
        for calls in (1, 4, 5, 20):
            steps = steps_for(name, calls, **field)
            assert 0 <= steps <= calls
            per_step = {"rk4": 4, "heun": 2, "midpoint": 2, "stochastic_heun": 2, "predictor_corrector": 2, "edm_churn": 2}.get(name, 1)
            assert abs(steps * per_step - calls) <= per_step, (name, calls, steps)
            guided = steps_for(name, 2 * calls, **field, labels=torch.zeros(1, dtype=torch.int64), guidance_scale=2.0)
            assert guided == steps == steps_for(name, 2 * calls, **field, guide=1, guidance_scale=2.0), name


# ---- The card and what lies beside it


def test_everything_of_a_conditional_run(runs, tmp_path, capsys):
    e = evaluation(runs, "digits", tmp_path, likelihood_num=10, loss_num=200, curve=(2, 5), reference="both", seeds=2)
    card = e.run()
    folder = tmp_path / "out"
    assert json.loads((folder / "card.json").read_text()) == json.loads(json.dumps(card))
    names = [f"classifier_{name}{suffix}" for suffix in ("", "_test") for name in ("kid", "precision", "recall")]
    assert {"classifier_fd40", "classifier_fd40_test", "recognised", *names} == set(card["metrics"])
    for row in card["metrics"].values():
        assert row["min"] <= row["mean"] <= row["max"] and row["min"] < row["max"] or row["std"] == 0
        assert math.isfinite(row["real"]) and len(row["values"]) == 2 and row["mean"] == pytest.approx(np.mean(row["values"]))
        assert row["std"] == pytest.approx(abs(np.diff(row["values"])).item() / 2**0.5)
    assert card["metrics"]["recognised"]["real"] > 0.9
    assert card["metrics"]["classifier_precision"]["real"] < 1  # items of the reference itself would get 1
    assert card["metrics"]["classifier_fd40"]["real"] < card["metrics"]["classifier_fd40"]["min"]
    assert card["real"] == {"items": 40, "what": ["40 items of the test split", "40 items of the training split"]}
    assert card["nfe"] == 3 and card["drawing"]["sampler"] == "heun" and card["seeds"] == [0, 1] and card["step"] == 20
    assert card["protocol"]["reference"]["train"]["items"] == 1500 and len(card["protocol"]["extractor"]["sha256"]) == 64
    for name in ("samples", "neighbours", "loss_by_t", "quality_against_cost"):
        assert Image.open(folder / f"{name}.png").width >= 200
    rows = list(csv.DictReader(open(folder / "loss_by_t.csv")))
    assert len(rows) == 20 and {"raw_train", "raw_test", "ema_train", "ema_test", "ema_test_error"} < set(rows[0])
    rows = list(csv.DictReader(open(folder / "quality_against_cost.csv")))
    assert {row["sampler"] for row in rows} == {*ODE_SAMPLERS, *SDE_SAMPLERS}
    assert all(float(row["nfe"]) <= 5 for row in rows if row["sampler"] != "dopri5")
    said = capsys.readouterr().out
    for words in ("2 x 40 samples by heun, 2 steps, 3 network calls", "bits per dimension, of 10 test items", "near-copies", "card.json"):
        assert words in said


def test_raw_and_ema_weights_are_told_apart(runs, tmp_path):
    settings = dict(likelihood_num=0, loss_num=100, neighbours_num=0)
    cards = [evaluation(runs, "digits", tmp_path, weights=weights, **settings).run() for weights in ("raw", "ema")]
    assert cards[0]["metrics"] != cards[1]["metrics"]
    assert cards[0]["loss"] == cards[1]["loss"] and cards[0]["loss"]["raw_train"] != cards[0]["loss"]["ema_train"]
    assert not {"likelihood", "neighbours", "curve"} & set(cards[0])


def test_without_labels_and_test_split(runs, tmp_path, capsys):
    card = evaluation(runs, "plain", tmp_path, num=20, loss_num=50).run()
    assert "without a test split, and what needs it: there is no test split" in capsys.readouterr().out
    assert card["real"]["what"] == ["20 items of one half of the training split, against the other"] and "likelihood" not in card
    assert set(card["neighbours"]) == {"items", "near_copies", "median_distance"} and "ema_train" in card["loss"]
    with pytest.raises(UserError, match="no test split"):
        evaluation(runs, "plain", tmp_path, reference="test")


def test_points(runs, tmp_path):
    card = evaluation(runs, "points", tmp_path, num=300, likelihood_num=20, loss_num=100, curve=(4,)).run()
    assert set(card["metrics"]) == {"energy_distance", "sliced_wasserstein", "c2st"} and card["protocol"]["extractor"] is None
    assert card["metrics"]["c2st"]["real"] < 0.6 < card["metrics"]["c2st"]["mean"]  # it was trained for four steps
    assert card["likelihood"]["items"] == 20 and "neighbours" not in card and card["curve"]["metric"] == "sliced_wasserstein"


def test_where_real_items_are_fewer_both_are_told_at_that_number(runs, tmp_path, capsys):
    card = evaluation(runs, "digits", tmp_path, num=320, seeds=1, likelihood_num=0, loss_num=0, neighbours_num=0).run()
    beside = card["real"]
    assert beside["items"] == 297 and set(beside["metrics"]) - set(card["metrics"]) == {"classifier_fd297"}
    assert all(row["real"] is None and row["std"] is None for row in card["metrics"].values())
    assert all(math.isfinite(row["real"]) for row in beside["metrics"].values())
    assert beside["metrics"]["classifier_kid"]["mean"] != card["metrics"]["classifier_kid"]["mean"]
    assert "the first 297 samples of each set, as many as there are real items" in capsys.readouterr().out


def test_a_late_failure_leaves_the_card(runs, tmp_path, monkeypatch):
    e = evaluation(runs, "digits", tmp_path, likelihood_num=0)
    monkeypatch.setattr(e, "neighbours", lambda: (_ for _ in ()).throw(UserError("no")))
    with pytest.raises(UserError):
        e.run()
    assert "metrics" in json.loads((tmp_path / "out" / "card.json").read_text())


def test_without_inception_it_takes_the_classifier_unless_it_was_asked_for(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("extractors.no_answer", lambda url: "no answer")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", rng.integers(0, 256, (30, 32, 32, 3), np.uint8), np.arange(30) % 2)
    config = tiny(tmp_path, run_name="colour", dataset=str(tmp_path / "x.npz"), num_training_steps=2)
    DiffusionTrainer(config, load_dataset(config.dataset), CPU).train()
    monkeypatch.setattr("extractors.CLASSIFIER_STEPS", 2)
    e = evaluation(tmp_path, "colour", tmp_path)
    assert e.judge.extractor.kind == "classifier"
    assert "Inception's weights cannot be had (no answer): get https" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be had"):
        evaluation(tmp_path, "colour", tmp_path, extractor="inception")
    with pytest.raises(UserError, match="none.pth' is no file"):
        evaluation(tmp_path, "colour", tmp_path, inception_weights="none.pth")


def test_the_loss_is_that_of_the_runs_own_trainer(runs, tmp_path, monkeypatch):
    """Its batches, as of a coupling, and its loss; here data without spread, and a loss that begins at 1,000."""
    class Own(DiffusionTrainer):
        def prepare_batch(self, step):
            return super().prepare_batch(step)._replace(x0=torch.zeros(16, 2))

        def loss(self, batch):
            assert not batch.x0.any()
            return 1000 + super().loss(batch)

    e = evaluation(runs, "points", tmp_path, loss_num=64)
    plain = e.loss()
    e.config.coupling, e.config.sde_sampler = "ot", None  # pairs that are near, with a smaller loss
    assert e.loss()["ema_train"] < plain["ema_train"]
    monkeypatch.setitem(TRAINERS, "own", Own)
    state = saving.load(str(runs / "points" / "last.pt"))
    saving.save(str(tmp_path), {**state, "config": {**state["config"], "trainer": "own"}})
    own = evaluation(tmp_path, ".", tmp_path, loss_num=64).loss()
    assert all(1000 < own[name] < 1010 for name in ("raw_train", "ema_train", "raw_test", "ema_test"))


def test_the_loss_is_that_of_plain_items_of_the_split(runs, tmp_path):
    """Without flips and label dropout, whatever the run has; times and noise are those of the seed."""
    batches = []

    class Watched(DiffusionTrainer):
        def loss(self, batch):
            batches.append(batch)
            return super().loss(batch)

    times = {}
    for seed in (0, 0, 5):
        e = evaluation(runs, "digits", tmp_path, loss_num=100, seed=seed)
        e.config.random_flip, e.config.label_dropout, e.trainer = True, 0.9, Watched
        t, _ = e.losses(e.process, e.net, e.data["test"])
        assert times.setdefault(seed, t.tolist()) == t.tolist()
    assert times[0] != times[5]
    test = e.data["test"]
    items = {(image.tobytes(), label) for image, label in zip(test.data, test.labels)}
    assert all((image.numpy().tobytes(), label) in items for b in batches for image, label in zip(e.spec.decode(b.x0), b.label.tolist()))


def test_the_loss_of_test_vectors_is_on_the_scale_of_training(runs, tmp_path):
    """And not on that of the test split, whose mean and deviation are others."""
    e = evaluation(runs, "normal", tmp_path, loss_num=2000)
    net = gaussian(e.process, "velocity", dims=2, mean=0.0, std=1.0)
    data = e.data["test"]
    test = make_dataset(3 * data.data, None)
    same, wider = (e.losses(e.process, net, split)[1].mean() for split in (data, test))
    assert wider > 2 * same


def test_near_copies_are_found(runs, tmp_path):
    e = evaluation(runs, "digits", tmp_path)
    images = torch.from_numpy(e.data["test"].data[:40]).clone()
    images[:10] = torch.from_numpy(e.data["train"].data[100:110])
    e.samples = images
    found = e.neighbours()
    assert found["near_copies"] == 0.25 + found["test"]["near_copies"] and found["items"] == 40


def test_labels_are_as_frequent_as_in_the_data(runs, tmp_path):
    e = evaluation(runs, "digits", tmp_path, num=150)
    _, labels, _ = e.draw(0, "euler")
    expected = np.bincount(e.data["train"].labels) / 10
    assert np.abs(np.bincount(labels, minlength=10) - expected).max() <= 2


def test_network_calls_count_guidance_and_what_an_adaptive_solver_takes(runs, tmp_path):
    plain, guided = (evaluation(runs, "digits", tmp_path, num=10, guidance_scale=s).draw(0, "euler")[2] for s in (1.0, 2.0))
    assert (plain, guided) == (2, 4)
    assert evaluation(runs, "digits", tmp_path, num=10, guidance_scale=2.0, guide=str(runs / "digits" / "last.pt")).draw(0, "euler")[2] == 4
    e = evaluation(runs, "digits", tmp_path, num=10)
    calls = [e.draw(0, "dopri5", rtol=tolerance, atol=tolerance)[2] for tolerance in (1e-1, 1e-4)]
    assert 5 < calls[0] < calls[1]


def test_two_processes_give_the_same_card(runs, tmp_path):
    """Odd numbers, so that the shares differ; to rounding, which may move a pixel by one."""
    cards = []
    for name, words in (("one", ["python"]), ("two", launch(2))):
        result = run(*words, "evaluate.py", "--ckpt", runs / "digits" / "last.pt", "--num", "61", "--seeds", "2", "--likelihood_num", "13",
                     "--loss_num", "101", "--neighbours_num", "33", "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr
        cards.append(json.loads((tmp_path / name / "card.json").read_text()))
    one, two = cards
    assert one["protocol"] == two["protocol"] and (one["processes"], two["processes"]) == (1, 2) and one["nfe"] == two["nfe"]
    for name, row in one["metrics"].items():
        assert row["values"] == pytest.approx(two["metrics"][name]["values"], rel=1e-2, abs=1e-3), name
    assert one["likelihood"]["bits_per_dim"] == pytest.approx(two["likelihood"]["bits_per_dim"], abs=1e-3)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4) and one["neighbours"]["items"] == two["neighbours"]["items"] == 33
    assert one["neighbours"]["median_distance"] == pytest.approx(two["neighbours"]["median_distance"], rel=1e-3)
    for name in ("samples.png", "neighbours.png"):
        a, b = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "two"))
        assert abs(a - b).max() <= 1, name


def test_wandb_has_the_numbers_and_the_pictures(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    card = evaluation(runs, "digits", tmp_path, likelihood_num=5, loss_num=100).run()
    config, history = read_wandb(tmp_path / "out")
    (line,) = [line for line in history if "recognised" in line]
    assert line["recognised"] == card["metrics"]["recognised"]["mean"] and line["step"] == 20
    assert line["bits_per_dim"] == pytest.approx(card["likelihood"]["bits_per_dim"])
    assert {"samples/path", "neighbours/path", "loss_by_t/path"} & set(line) or {"samples", "neighbours", "loss_by_t"} <= {
        name.split("/")[0] for name in line}
    assert config["protocol"]["samples"] == 40


# ---- Cards side by side


def test_compare(runs, tmp_path, capfd):
    paths = []
    for sampler, num in (("heun", 40), ("euler", 40), ("heun", 30)):
        e = evaluation(runs, "digits", tmp_path, sampler=sampler, num=num, likelihood_num=0, loss_num=0, neighbours_num=0)
        e.folder = str(tmp_path / f"{sampler}{num}")
        (tmp_path / f"{sampler}{num}").mkdir()
        e.run()
        paths.append(f"{e.folder}/card.json")
    capfd.readouterr()
    evaluate.main(["compare", *paths[:2]])
    head, *rows = capfd.readouterr().out.splitlines()
    assert len(rows) == 2 and rows[0].split()[:5] == ["digits", "20", "ema", "heun", "3"] and rows[1].split()[3:5] == ["euler", "2"]
    card = json.loads(open(paths[1]).read())
    assert f"{card['metrics']['recognised']['mean']:.4g}" == rows[1].split()[head.split().index("recognised")]
    (tmp_path / "none.json").write_text("[1]")
    for arguments, words in [([paths[0], paths[2]], "cannot be compared: they differ in samples"), ([], "needs cards"),
                             ([str(tmp_path / "none.json")], "it is no card"), (["nowhere.json"], "No such file")]:
        with pytest.raises(SystemExit) as end:
            evaluate.main(["compare", *arguments])
        error = capfd.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and words in error, error


def test_one_line_errors(runs, tmp_path, capfd):
    digits = str(runs / "digits" / "last.pt")
    state = saving.load(digits)
    saving.save(str(tmp_path), {**state, "config": {**state["config"], "dataset": "moons"}})
    for arguments, words in [
        (["--ckpt", "none.pt"], "no checkpoint"),
        (["--ckpt", digits, "--seeds", "0"], "seeds is 0"),
        (["--ckpt", digits, "--num", "1"], "num is 1: expected 2 or more"),
        (["--ckpt", digits, "--loss_num", "-1"], "loss_num is -1"),
        (["--ckpt", digits, "--curve", "0"], "expected numbers of network calls"),
        (["--ckpt", digits, "--extractor", "inceptoin"], "invalid choice"),
        (["--ckpt", digits, "--extractor", "inception", "--inception_weights", "none.pth"], "is no file"),
        (["--ckpt", digits, "--extractor", "classifier", "--inception_weights", "x.pth"], "leave one or both out"),
        (["--ckpt", runs / "points" / "last.pt", "--extractor", "classifier"], "is for images"),
        (["--ckpt", digits, "--out", digits], "cannot make the folder"),
        (["--ckpt", tmp_path / "last.pt"], "set --data_dir"),
        (["--ckpt", digits, "--sampelr", "heun"], "did you mean --sampler"),
    ]:
        with pytest.raises(SystemExit) as end:
            evaluate.main([str(word) for word in arguments])
        error = capfd.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and words in error, error
    assert_one_line_error(run("python", "evaluate.py", "--ckpt", "README.md"), "README.md cannot be read")


def test_the_commit_is_told():
    assert git_commit() == "unknown" or len(git_commit().removesuffix("-dirty")) == 40


# ---- In training


def test_training_evaluates_and_goes_on_exactly(tmp_path, digits):
    settings = dict(evaluate_every=2, evaluation_samples=20, num_training_steps=6, save_every=2, keep_checkpoints=5)
    make(tmp_path / "a", digits, **settings).train()
    lines = metrics_of(tmp_path / "a" / "digits")
    found = [line for line in lines if "recognised" in line]
    assert [line["step"] for line in found] == [2, 4, 6] and all("classifier_fd20" in line and "loss" not in line for line in found)
    part = make(tmp_path / "b", digits, **settings)
    part.loop(4)
    part.logger.finish()
    make(tmp_path / "b", digits, **settings).train()
    assert metrics_of(tmp_path / "b" / "digits") == lines
    assert Image.open(tmp_path / "a" / "digits" / "curves.png").width > 1500


def test_an_evaluation_that_a_signal_broke_off_is_made_up_for(tmp_path, digits):
    settings = dict(evaluate_every=2, evaluation_samples=20, num_training_steps=4)
    whole = make(tmp_path / "a", digits, **settings)
    whole.train()
    part = make(tmp_path / "b", digits, **settings)
    part.evaluate = lambda: None  # as if broken off
    part.loop(2)
    part.save()
    part.logger.finish()
    make(tmp_path / "b", digits, **settings).train()
    assert metrics_of(tmp_path / "b" / "digits") == metrics_of(tmp_path / "a" / "digits")


def test_training_goes_on_if_an_evaluation_fails(tmp_path, digits, capsys, monkeypatch):
    def fail(*arguments, **settings):
        raise UserError("no room")

    monkeypatch.setattr("trainer.Judge", fail)
    make(tmp_path, digits, evaluate_every=2).train()
    assert capsys.readouterr().err.count("no evaluation at step") == 2


def test_two_processes_evaluate_as_one(tmp_path):
    found = []
    for name, words in (("one", ["python"]), ("two", launch(2))):
        config = tiny(tmp_path / name, evaluate_every=4, evaluation_samples=31, num_training_steps=4)
        result = run(*words, "main.py", *flags(config))
        assert result.returncode == 0, result.stderr
        found.append(metrics_of(tmp_path / name / "digits")[-1])
    assert found[0].pop("kind") == found[1].pop("kind") == "evaluation"
    assert "recognised" in found[0] and found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-3)
