"""evaluate.py: figures against exact ones, cards, any number of ranks, evaluation in training, one-line errors."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, gaussian, launch, make, metrics_of, run, run_ranks, tiny
from PIL import Image
from test_logging_utils import read_wandb

import saving
from data_utils import load_dataset, make_dataset
from evaluate import (
    PARTS,
    Evaluation,
    Options,
    evaluate,
    git_commit,
    likelihood,
    loss_by_t,
    losses,
    main,
    neighbours,
)
from likelihood import bits_per_dim
from sampling import ODE_SAMPLERS, SAMPLERS
from trainer import TRAINERS, DiffusionTrainer
from utils import UserError

CPU = torch.device("cpu")
ONLY_DISTANCES = dict(likelihood_num=0, loss_num=0, neighbours_num=0)
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def runs(runs):
    """Beside the runs on digits and moons, unlabelled images without a test split, and Gaussian points with one."""
    rng = np.random.default_rng(0)
    np.savez(runs / "plain.npz", rng.integers(0, 256, (60, 8, 8), np.uint8))
    for name in ("normal.npy", "normal_test.npy"):
        np.save(runs / name, np.array([3.0, -1.0]) + np.array([0.1, 20.0]) * rng.standard_normal((2000, 2)))
    points = dict(network="mlp", hidden_dim=16, num_layers=1)
    for changes in (dict(run_name="plain", dataset=str(runs / "plain.npz")),
                    dict(run_name="normal", dataset=str(runs / "normal.npy"), **points)):
        config = tiny(runs, class_conditional=False, **changes)
        DiffusionTrainer(config, load_dataset(config.dataset), CPU).train()
    return runs


def evaluation(runs, name, tmp_path, **changes):
    """What the parts measure, for few samples."""
    out = str(tmp_path / "out")
    options = {"ckpt": str(runs / name / "last.pt"), "out": out, "num": 40, "seeds": 2, **changes}
    return Evaluation(Options(**options), CPU)


def measured(part, e):
    """What a part adds to the card."""
    part(e)
    return e.card[part.__name__]


# ---- Against what is exact


def test_nats_of_points_are_those_of_the_oracle_in_the_datas_own_units(runs, tmp_path):
    """Each coordinate is normal. On the network's scale, of mean 0 and deviation 1, the data are nearly N(0, 1)."""
    e = evaluation(runs, "normal", tmp_path, likelihood_num=400, rtol=1e-6, atol=1e-6)
    e.net = gaussian(e.process, "velocity", dims=2, mean=0.0, std=1.0)
    found = measured(likelihood, e)
    test = e.data["test"].data[:]
    squares = (((test - e.spec.mean) / np.array(e.spec.std)) ** 2).sum(1)
    exact = 0.5 * squares + np.log(2 * math.pi) + np.log(e.spec.std).sum()
    assert found["nats"] == pytest.approx(exact.mean(), abs=4 * found["standard_error"]) and found["items"] == 400
    assert found["standard_error"] == pytest.approx(exact.std() / 20, rel=0.2)
    e.options.likelihood_num = 2000
    assert measured(likelihood, e)["nats"] == pytest.approx(exact.mean(), abs=1e-3)  # all of them


def test_bits_per_dimension_of_images(runs, tmp_path):
    """Of images that the oracle holds for independent N(0, 0.8^2) pixels: its density, times the width of a bin."""
    e = evaluation(runs, "digits", tmp_path, likelihood_num=30, rtol=1e-4, atol=1e-4)
    e.net = gaussian(e.process, "velocity", dims=64, mean=0.0, std=0.8)
    e.net, oracle = (lambda xt, t, label, cond: oracle(xt.flatten(1), t).reshape(xt.shape)), e.net
    items = e.random_items(e.data["test"], 30).truth
    log_p = oracle.log_prob(e.spec.encode(items).flatten(1).double(), torch.zeros(30, dtype=torch.float64))
    exact = bits_per_dim(log_p, 64)
    found = measured(likelihood, e)
    assert found["bits_per_dim"] == pytest.approx(exact.mean().item(), abs=4e-3)
    assert found["standard_error"] == pytest.approx(exact.std().item() / 30**0.5, rel=0.03)


def test_the_likelihood_is_that_of_the_network_without_guidance(runs, tmp_path):
    settings = dict(likelihood_num=3, rtol=1e-2, atol=1e-2)
    found = [measured(likelihood, evaluation(runs, "digits", tmp_path, guidance_scale=scale, **settings))
             for scale in (1.0, 3.0)]
    assert found[0] == found[1]


def test_loss_by_t_is_that_of_the_best_velocity(runs, tmp_path):
    """For N(0, 1) data and rectified flow, E |x1 - x0 - E[x1 - x0 | xt]|^2 = 1 / ((1 - t)^2 + t^2)."""
    e = evaluation(runs, "normal", tmp_path, loss_num=4000)
    e.net = gaussian(e.process, "velocity", dims=2, mean=0.0, std=1.0)
    t, values = losses(e, e.data["train"])
    assert len(t) == len(values) == 4000
    for batch in t.reshape(-1, e.config.batch_size):  # one in each part of the range
        parts = (batch - e.config.T_min) / (e.config.T_max - e.config.T_min) * e.config.batch_size
        assert sorted(np.clip(parts, 0, e.config.batch_size - 1e-3).astype(int)) == list(range(e.config.batch_size))
    exact = 1 / ((1 - t) ** 2 + t**2)
    for part in np.array_split(np.argsort(t), 5):
        error = (values - exact)[part]
        assert abs(error.mean()) < 4 * error.std() / math.sqrt(len(part)), t[part].mean()


# ---- The card and what lies beside it


def test_everything_of_a_conditional_run(runs, tmp_path, capsys):
    e = evaluation(runs, "digits", tmp_path, likelihood_num=10, loss_num=200, curve=(5, 2))
    card = evaluate(e)
    folder = tmp_path / "out"
    assert json.loads((folder / "card.json").read_text()) == json.loads(json.dumps(card))
    names = [f"classifier_{name}" for name in ("fd40", "kid", "precision", "recall")]
    assert list(card["metrics"]) == [*names, "recognised"]
    for row in card["metrics"].values():
        assert row["min"] <= row["mean"] <= row["max"] and row["min"] < row["max"] or row["std"] == 0
        assert math.isfinite(row["real"]) and len(row["values"]) == 2
        assert row["mean"] == pytest.approx(np.mean(row["values"]))
        assert row["std"] == pytest.approx(abs(np.diff(row["values"])).item() / 2**0.5)
    assert card["metrics"]["recognised"]["real"] > 0.9
    assert card["metrics"]["classifier_precision"]["real"] < 1  # items of the reference itself would get 1
    assert card["metrics"]["classifier_fd40"]["real"] < card["metrics"]["classifier_fd40"]["min"]
    assert (card["real"]["items"], card["real"]["what"]) == (40, "the other split")
    assert card["real"]["metrics"] == {name: row["real"] for name, row in card["metrics"].items()}
    assert card["nfe"] == 3 and card["config"]["sampler"] == "heun" and card["step"] == 20
    assert (card["options"]["seeds"], card["options"]["weights"]) == (2, "ema")
    protocol = card["protocol"]
    assert protocol["reference"]["split"] == "train" and protocol["reference"]["items"] == 1500
    assert list(map(len, protocol["extractors"].values())) == [64] == [len(protocol["reference"]["sha256"])]
    for name in ("samples", "neighbours", "loss_by_t", "quality_against_cost"):
        assert Image.open(folder / f"{name}.png").width >= 200
    for split in ("train", "test"):
        t, values = np.transpose(card["loss"][f"{split}_by_t"])
        assert len(t) == 20 and (np.diff(t) > 0).all()
        assert np.mean(values) == pytest.approx(card["loss"][split], rel=0.1)
    printed = capsys.readouterr().out
    for words in ("2 x 40 samples by heun, 3 network calls", "real data   classifier_fd40 ", ", of 40 items of",
                  "likelihood  bits_per_dim", ", of 10 test items", "near-copies", "rk4  ", "card.json"):
        assert words in printed


def test_the_curve_has_all_samplers_at_so_many_steps_over_the_network_calls_that_they_took(runs, tmp_path, monkeypatch):
    e = evaluation(runs, "digits", tmp_path, curve=(3, 2), guidance_scale=2.0, **ONLY_DISTANCES)
    drawn, lines, picture = [], {}, Image.new("L", (1, 1))
    monkeypatch.setattr(e, "draw", lambda cases, **settings: drawn.append(settings) or Evaluation.draw(
        e, cases, **settings))
    monkeypatch.setattr("evaluate.log_plot", lambda found, *arguments, **settings: lines.update(found) or picture)
    card = evaluate(e)
    points = {(point["sampler"], point.get("sampling_steps", point.get("rtol"))): point
              for point in card["curve"]["points"]}
    fixed = SAMPLERS.keys() - {"dopri5", "flow_map"}  # the latter is for networks of two times
    assert set(points) == {("dopri5", 0.1), ("dopri5", 0.01), *((name, steps) for name in fixed for steps in (2, 3))}
    assert (points["euler", 3]["nfe"], points["heun", 2]["nfe"], points["rk4", 3]["nfe"]) == (6, 6, 24)
    assert {"sampler": "dopri5", "rtol": 0.01, "atol": 0.01} in drawn
    # two seeds, and a try of flow_map
    assert len(drawn) == 3 + len(points) and {"sampler": "rk4", "sampling_steps": 3} in drawn
    metric = card["curve"]["metric"]
    assert metric == "classifier_fd40"
    for name, (x, y) in lines.items():
        assert [x, y] == [[point[key] for (sampler, _), point in points.items() if sampler == name]
                          for key in ("nfe", metric)], name


def test_a_coupling_without_score_has_a_curve_of_the_ode_alone(runs, tmp_path):
    e = evaluation(runs, "points", tmp_path, curve=(1,), **ONLY_DISTANCES)
    e.config.coupling, e.config.sde_sampler = "ot", None
    assert {point["sampler"] for point in evaluate(e)["curve"]["points"]} == set(ODE_SAMPLERS) - {"flow_map"}


def test_raw_and_ema_weights_give_different_figures(runs, tmp_path):
    settings = dict(likelihood_num=0, loss_num=100, neighbours_num=0)
    cards = [evaluate(evaluation(runs, "digits", tmp_path, weights=weights, **settings)) for weights in ("raw", "ema")]
    assert cards[0]["metrics"] != cards[1]["metrics"] and cards[0]["loss"]["train"] != cards[1]["loss"]["train"]
    assert not {"likelihood", "neighbours", "curve"} & set(cards[0])


def test_without_labels_and_test_split(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("metrics.CLASSIFIER_STEPS", 3)
    card = evaluate(evaluation(runs, "plain", tmp_path, num=20, loss_num=50))
    assert "what needs a test split is left out: there is no test split" in capsys.readouterr().out
    assert card["real"]["items"] == 20
    assert card["real"]["what"] == "one half of the training split, against the other"
    assert card["metrics"]["classifier_precision"]["real"] < 1  # items of the same half would get 1
    assert "likelihood" not in card
    assert set(card["neighbours"]) == {"items", "near_copies"} and set(card["loss"]) == {"draws", "train", "train_by_t"}
    with pytest.raises(UserError, match="no test split"):
        evaluation(runs, "plain", tmp_path, reference="test")


def test_the_test_split_as_reference(runs, tmp_path):
    """Real data are then the training split, whose labels the classifier has learned."""
    card = evaluate(evaluation(runs, "digits", tmp_path, reference="test", seeds=1, **ONLY_DISTANCES))
    assert (card["real"]["items"], card["real"]["what"]) == (40, "the other split")
    assert card["protocol"]["reference"]["split"] == "test" and card["metrics"]["recognised"]["real"] is None
    assert {name for name in card["metrics"] if not name.endswith("_test")} == {"recognised"}


def test_points(runs, tmp_path):
    card = evaluate(evaluation(runs, "points", tmp_path, num=300, likelihood_num=20, loss_num=100, curve=(1,)))
    assert set(card["metrics"]) == {"energy_distance", "sliced_wasserstein", "wasserstein", "c2st"}
    assert card["protocol"]["extractors"] == {}
    assert card["metrics"]["c2st"]["real"] < 0.6 < card["metrics"]["c2st"]["mean"]  # it was trained for four steps
    assert card["likelihood"]["items"] == 20 and "neighbours" not in card
    assert card["curve"]["metric"] == "sliced_wasserstein"


def test_where_real_items_are_fewer_they_are_shown_with_their_number(runs, tmp_path, capsys):
    card = evaluate(evaluation(runs, "digits", tmp_path, num=320, seeds=1, **ONLY_DISTANCES))
    real = card["real"]
    assert real["items"] == 297 and set(real["metrics"]) - set(card["metrics"]) == {"classifier_fd297"}
    assert all("real" not in row and row["std"] is None for row in card["metrics"].values())
    assert f"classifier_fd297 {real['metrics']['classifier_fd297']:.4g}" in capsys.readouterr().out


def test_a_late_failure_leaves_the_card(runs, tmp_path, monkeypatch):
    def fail(e):
        raise UserError("no")

    monkeypatch.setattr("evaluate.PARTS", [*PARTS[:2], fail])
    with pytest.raises(UserError):
        evaluate(evaluation(runs, "digits", tmp_path, likelihood_num=0))
    assert "metrics" in json.loads((tmp_path / "out" / "card.json").read_text())


def test_an_out_that_cannot_be_written_fails_before_the_work(runs, tmp_path, monkeypatch):
    e = evaluation(runs, "points", tmp_path, out=str(runs / "points" / "last.pt"))
    monkeypatch.setattr(e, "draw", None)
    with pytest.raises(UserError, match="cannot write .*card.json"):
        evaluate(e)


def test_inception_is_for_colour_images_of_32_pixels_unless_another_extractor_is_chosen(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda request: (_ for _ in ()).throw(OSError("no answer")))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", rng.integers(0, 256, (30, 32, 32, 3), np.uint8), np.arange(30) % 2)
    config = tiny(tmp_path, run_name="colour", dataset=str(tmp_path / "x.npz"), num_training_steps=2)
    DiffusionTrainer(config, load_dataset(config.dataset), CPU).train()
    monkeypatch.setattr("metrics.CLASSIFIER_STEPS", 2)
    for folder, name, options in ((tmp_path, "colour", {}), (runs, "digits", {"extractor": "inception"})):
        with pytest.raises(UserError, match=r"cannot get Inception's weights \(no answer\): download https"):
            evaluation(folder, name, tmp_path, **options)
    e = evaluation(tmp_path, "colour", tmp_path, extractor="classifier")
    assert e.evaluator.extractor is e.evaluator.classifier


def loss_of(e):
    loss_by_t(e)
    return e.card["loss"]


def test_the_loss_is_that_of_the_runs_own_trainer(runs, tmp_path, monkeypatch):
    """Its batches, as of a coupling, and its loss; here data without spread, and a loss that begins at 1,000."""
    class Own(DiffusionTrainer):
        def prepare_batch(self, step):
            return super().prepare_batch(step)._replace(x0=torch.zeros(16, 2))

        def loss(self, batch):
            assert not batch.x0.any()
            return 1000 + super().loss(batch)

    e = evaluation(runs, "points", tmp_path, loss_num=64)
    plain = loss_of(e)
    e.config.coupling, e.config.sde_sampler = "ot", None  # pairs that are near, with a smaller loss
    assert loss_of(e)["train"] < plain["train"]
    monkeypatch.setitem(TRAINERS, "own", Own)
    state = saving.load(str(runs / "points" / "last.pt"))
    saving.save(str(tmp_path), {**state, "config": {**state["config"], "trainer": "own"}})
    own = loss_of(evaluation(tmp_path, ".", tmp_path, loss_num=64))
    assert all(1000 < own[split] < 1010 for split in ("train", "test"))


def test_the_loss_is_that_of_plain_items_of_the_split(runs, tmp_path, monkeypatch):
    """Without flips and label dropout, whatever the run has; times and noise are those of the seed."""
    batches = []

    class Watched(DiffusionTrainer):
        def loss(self, batch):
            batches.append(batch)
            return super().loss(batch)

    monkeypatch.setitem(TRAINERS, "diffusion", Watched)
    times = {}
    for seed in (0, 0, 5):
        e = evaluation(runs, "digits", tmp_path, loss_num=100, seed=seed)
        e.config.random_flip, e.config.label_dropout = True, 0.9
        t, _ = losses(e, e.data["test"])
        assert times.setdefault(seed, t.tolist()) == t.tolist()
    assert times[0] != times[5]
    test = e.data["test"]
    items = {(image.tobytes(), label) for image, label in zip(test.data, test.labels)}
    assert all((image.numpy().tobytes(), label) in items
               for b in batches for image, label in zip(e.spec.decode(b.x0), b.label.tolist()))


def test_the_loss_of_test_vectors_is_on_the_scale_of_training(runs, tmp_path):
    """And not on that of the test split, whose mean and deviation are others."""
    e = evaluation(runs, "normal", tmp_path, loss_num=2000)
    e.net = gaussian(e.process, "velocity", dims=2, mean=0.0, std=1.0)
    data = e.data["test"]
    assert data.spec == e.data["train"].spec == e.spec
    test = replace(make_dataset(3 * data.data[:], None), spec=data.spec)
    same, wider = (losses(e, split)[1].mean() for split in (data, test))
    assert wider > 2 * same


def test_near_copies_are_found(runs, tmp_path):
    e = evaluation(runs, "digits", tmp_path)
    images = torch.from_numpy(e.data["test"].data[:40]).clone()
    images[:10] = torch.from_numpy(e.data["train"].data[100:110])
    e.samples = images
    found = measured(neighbours, e)
    assert 0.25 <= found["near_copies"] < 0.4 and found["items"] == 40
    e.samples = images[10:]
    assert measured(neighbours, e)["near_copies"] == (40 * found["near_copies"] - 10) / 30


def test_labels_are_as_frequent_as_in_the_data(runs, tmp_path):
    e = evaluation(runs, "digits", tmp_path, num=150)
    expected = np.bincount(e.data["train"].labels) / 10
    assert np.abs(np.bincount(e.given.labels, minlength=10) - expected).max() <= 2


def test_network_calls_count_guidance_and_what_an_adaptive_solver_takes(runs, tmp_path):
    def calls(sampler="euler", rtol=1e-5, **changes):
        e = evaluation(runs, "digits", tmp_path, num=10, **changes)
        return e.draw(e.given, sampler=sampler, rtol=rtol, atol=rtol)[1]

    assert calls() == 2 and calls(guidance_scale=2.0) == 4
    assert calls(guidance_scale=2.0, guide=str(runs / "digits" / "last.pt")) == 4
    assert 5 < calls("dopri5", 1e-1) < calls("dopri5", 1e-4)


def test_two_ranks_give_the_same_card(runs, tmp_path, cache_folder):
    """Odd numbers, so that the shares differ; to rounding, which may move a pixel by one."""
    numbers = dict(num=61, seeds=2, likelihood_num=13, loss_num=101, neighbours_num=33, out=str(tmp_path / "one"))
    evaluate(evaluation(runs, "digits", tmp_path, **numbers))
    words = [word for name, value in {**numbers, "out": tmp_path / "two"}.items() for word in (f"--{name}", value)]
    (tmp_path / "script.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import data_utils, evaluate
data_utils.CACHE = {cache_folder!r}
evaluate.start(evaluate.main)
""")
    result = run(*launch(2), tmp_path / "script.py", "--ckpt", runs / "digits" / "last.pt", *words)
    assert result.returncode == 0, result.stderr
    cards = [json.loads((tmp_path / name / "card.json").read_text()) for name in ("one", "two")]
    one, two = cards
    assert one["protocol"] == two["protocol"] and one["nfe"] == two["nfe"]
    for name, row in one["metrics"].items():
        assert row["values"] == pytest.approx(two["metrics"][name]["values"], rel=1e-2, abs=1e-3), name
    assert one["likelihood"]["bits_per_dim"] == pytest.approx(two["likelihood"]["bits_per_dim"], abs=1e-3)
    assert one["loss"]["draws"] == two["loss"]["draws"] == 112  # seven batches of 16
    for split in ("train", "test"):
        assert one["loss"][split] == pytest.approx(two["loss"][split], rel=1e-4)
        np.testing.assert_allclose(one["loss"][f"{split}_by_t"], two["loss"][f"{split}_by_t"], rtol=1e-3)
    assert one["neighbours"] == two["neighbours"] and one["neighbours"]["items"] == 33
    for name in ("samples.png", "neighbours.png"):
        a, b = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "two"))
        assert abs(a - b).max() <= 1, name


def test_wandb_has_the_numbers_and_the_pictures(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    card = evaluate(evaluation(runs, "digits", tmp_path, likelihood_num=5, loss_num=100))
    config, history = read_wandb(tmp_path / "out")
    (line,) = [line for line in history if "recognised" in line]
    assert line["recognised"] == card["metrics"]["recognised"]["mean"] and line["step"] == 20
    assert line["bits_per_dim"] == pytest.approx(card["likelihood"]["bits_per_dim"])
    assert {"samples", "neighbours", "loss_by_t"} <= {name.split("/")[0] for name in line}
    assert config["protocol"]["samples"] == 40


# ---- Cards side by side


def test_compare(runs, tmp_path, capfd):
    paths = []
    for sampler, num in (("heun", 40), ("euler", 40), ("heun", 30)):
        out = tmp_path / f"{sampler}{num}"
        evaluate(evaluation(runs, "digits", tmp_path, sampler=sampler, num=num, out=str(out), **ONLY_DISTANCES))
        paths.append(f"{out}/card.json")
    capfd.readouterr()
    main(["compare", *paths[:2]])
    rows = capfd.readouterr().out.splitlines()
    for path, row, words in zip(paths[:2], rows, ("heun, 3 network calls", "euler, 2 network calls"), strict=True):
        assert row.endswith(f" digits, step 20, ema weights: 2 x 40 samples by {words}, guidance 1"), row
        metrics = json.loads(open(path).read())["metrics"]
        assert all(f"{name} {numbers['mean']:.4g} " in row for name, numbers in metrics.items()), row
    (tmp_path / "none.json").write_text("[1]")
    for arguments, words in [([paths[0], paths[2]], "cannot be compared: they differ in samples"), ([], "needs cards"),
                             ([str(tmp_path / "none.json")], "expected a card"), (["nowhere.json"], "No such file")]:
        with pytest.raises(SystemExit) as end:
            main(["compare", *arguments])
        error = capfd.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and words in error, error


def test_one_line_errors(runs, tmp_path, capfd):
    digits = str(runs / "digits" / "last.pt")
    state = saving.load(digits)
    saving.save(str(tmp_path), {**state, "config": {**state["config"], "dataset": "moons"}})
    for arguments, words in [
        (["--ckpt", "none.pt"], "no checkpoint"),
        (["--ckpt", digits, "--seeds", "0"], "seeds is 0"),
        (["--ckpt", digits, "--num", "9"], "num is 9: expected a number in [10, inf)"),
        (["--ckpt", digits, "--loss_num", "-1"], "loss_num is -1"),
        (["--ckpt", digits, "--likelihood_num", "1"], "expected 2 or more, or 0"),
        (["--ckpt", digits, "--curve", "0"], "expected numbers of steps"),
        (["--ckpt", digits, "--extractor", "inceptoin"], "invalid choice"),
        (["--ckpt", runs / "points" / "last.pt", "--extractor", "classifier"], "is for images"),
        (["--ckpt", digits, "--out", digits], "cannot write"),
        (["--ckpt", tmp_path / "last.pt"], "set --data_dir"),
        (["--ckpt", digits, "--sampelr", "heun"], "Perhaps you meant: --sampler"),
    ]:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in arguments])
        error = capfd.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and words in error, error
    assert_one_line_error(run("python", "evaluate.py", "--ckpt", "README.md"), "README.md cannot be read")


def test_the_commit():
    assert git_commit() == "unknown" or len(git_commit().removesuffix("-dirty")) == 40


# ---- In training


def test_training_evaluates_and_resumes_exactly(tmp_path, digits):
    settings = dict(evaluate_every=2, evaluation_samples=20, num_training_steps=4, save_every=2, keep_checkpoints=5)
    make(tmp_path / "a", digits, **settings).train()
    lines = metrics_of(tmp_path / "a" / "digits")
    found = [line for line in lines if "recognised" in line]
    assert [line["step"] for line in found] == [2, 4]
    assert all("classifier_fd20" in line and "loss" not in line for line in found)
    part = make(tmp_path / "b", digits, **settings)
    part.loop(2)
    part.logger.finish()
    make(tmp_path / "b", digits, **settings).train()
    assert metrics_of(tmp_path / "b" / "digits") == lines
    assert Image.open(tmp_path / "a" / "digits" / "curves.png").height > 600  # with panels of the evaluation


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


def test_training_continues_if_an_evaluation_fails(tmp_path, digits, capsys, monkeypatch):
    def fail(*arguments, **settings):
        raise UserError("no room")

    monkeypatch.setattr("metrics.Evaluator", fail)
    make(tmp_path, digits, evaluate_every=2).train()
    assert capsys.readouterr().err.count("no evaluation at step") == 2


def test_two_ranks_evaluate_as_one(tmp_path, digits):
    settings = dict(evaluate_every=4, evaluation_samples=31, num_training_steps=4)
    make(tmp_path / "one", digits, **settings).train()
    result = run_ranks(2, tiny(tmp_path / "two", **settings))
    assert result.returncode == 0, result.stderr
    found = [metrics_of(tmp_path / name / "digits")[-1] for name in ("one", "two")]
    assert found[0].pop("kind") == found[1].pop("kind") == "evaluation"
    assert "recognised" in found[0] and found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-3)
