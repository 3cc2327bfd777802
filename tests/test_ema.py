"""Tests of the averages of weights: their formulas, their buffers, synthesis, and that runs save and resume them."""

import json

import numpy as np
import pytest
import torch
from conftest import make, metrics_of, run_ranks, tiny
from scipy.integrate import quad
from torch import nn

import saving
from command_line import read_config
from data_utils import load_dataset
from ema import EMA, LENGTHS, averages, exponent, inner_product, power, synthesis
from evaluate import main as evaluate
from sample import Loaded, Options, load_net, main
from trainer import DiffusionTrainer

CPU = torch.device("cpu")
SEVERAL = dict(ema_decay=(0.9, 0.3), ema_snapshot_every=2, num_training_steps=8, lr_schedule="constant",
               sde_sampler=None, sampler="euler", num_samples=1)


def path(steps, net):
    """A random walk of the weights with a drift; yields the number of steps before each."""
    torch.manual_seed(0)
    for n in range(steps):
        with torch.no_grad():
            net.weight.add_(0.01 + 0.1 * torch.randn_like(net.weight))
        yield n


def test_formula_with_warmup():
    net = nn.Linear(2, 1)
    ema, expected = EMA(net, 0.9), net.weight.detach().clone()
    for n in range(30):
        with torch.no_grad():
            net.weight.add_(1.0)
        ema.update(n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    torch.testing.assert_close(ema.net.weight, expected)
    assert not ema.net.weight.requires_grad and net.weight.requires_grad


def test_buffers_are_copied_and_the_state_restores():
    net = nn.BatchNorm1d(3)
    ema = EMA(net, 0.9)
    net(torch.randn(8, 3) + 5)
    ema.update(0)
    assert torch.equal(ema.net.running_mean, net.running_mean) and ema.net.num_batches_tracked == 1
    restored_ema = EMA(nn.BatchNorm1d(3), 0.9)
    restored_ema.net.load_state_dict(ema.net.state_dict())
    for restored, saved in zip(restored_ema.net.state_dict().values(), ema.net.state_dict().values(), strict=True):
        assert torch.equal(restored, saved)


def test_several_decays_are_averages_of_their_own():
    net = nn.Linear(2, 1)
    emas, first, second = averages(net, 0.9, 0.5, lengths=[0.1]), EMA(net, 0.9), EMA(net, 0.5)
    for n in path(30, net):
        for ema in (*emas.values(), first, second):
            ema.update(n)
    assert list(emas) == ["ema", "ema_0.5", "ema_length_0.1"]
    assert torch.equal(emas["ema"].net.weight, first.net.weight)
    assert torch.equal(emas["ema_0.5"].net.weight, second.net.weight)
    assert not torch.equal(first.net.weight, second.net.weight)


# ---- Power functions, against numerical integration


def profile(t, gamma):
    return lambda tau: (gamma + 1) * tau**gamma / t ** (gamma + 1) if tau <= t else 0.0


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.28])
def test_the_length_is_the_relative_standard_deviation(length):
    p = profile(1.0, exponent(length))
    moments = [quad(lambda tau, k: tau**k * p(tau), 0, 1, (k,))[0] for k in range(3)]
    assert moments[0] == pytest.approx(1) and (moments[2] - moments[1] ** 2) ** 0.5 == pytest.approx(length, rel=1e-6)


def test_inner_products():
    for t_a, gamma_a, t_b, gamma_b in ((3.0, 5.0, 7.0, 2.0), (7.0, 5.0, 3.0, 2.0), (4.0, 0.5, 4.0, 9.0)):
        p_a, p_b = profile(t_a, gamma_a), profile(t_b, gamma_b)
        found = quad(lambda tau, p, q: p(tau) * q(tau), 0, min(t_a, t_b), (p_a, p_b))[0]
        assert inner_product(t_a, gamma_a, t_b, gamma_b) == pytest.approx(found, rel=1e-8)


def test_the_average_of_a_power_weighs_each_step_by_the_integral_of_its_function():
    """The start has no weight at all."""
    net, weights = nn.Linear(2, 1), []
    ema = EMA(net, power(0.2))
    for n in path(40, net):
        weights.append(net.weight.detach().clone().double())
        ema.update(n)
    shares = np.diff((np.arange(41) / 40) ** (exponent(0.2) + 1))
    expected = sum(share * weight for share, weight in zip(shares, weights))
    torch.testing.assert_close(ema.net.weight.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length, error", [(0.03, 0.1), (0.07, 1e-3), (0.15, 2e-3), (0.25, 0.03)])
def test_synthesis_against_the_average_that_was_tracked(length, error):
    """The error is relative to the distance of the average of this length from the others."""
    net = nn.Linear(20, 20)
    emas, steps, kept = [EMA(net, power(own)) for own in (*LENGTHS, length)], [], []
    for n in path(1000, net):
        for ema in emas:
            ema.update(n)
        if (n + 1) % 50 == 0:
            steps.append(n + 1)
            kept += [ema.net.weight.double().clone() for ema in emas[:2]]
    factors = synthesis(steps, 1000, length)
    assert factors.shape == (20, 2) and factors.sum() == pytest.approx(1)
    found = sum(factor * weight for factor, weight in zip(factors.flatten(), kept))
    right = emas[2].net.weight.double()
    assert (found - right).norm() < error * min((right - weight).norm() for weight in kept[-2:])


def test_own_lengths_are_recovered():
    for k, own in enumerate(LENGTHS):
        factors = synthesis([100, 200, 350], 200, own)
        np.testing.assert_allclose(factors, np.eye(6)[2 + k].reshape(3, 2), atol=1e-9)


# ---- Runs


@pytest.mark.parametrize("stop", [3, 4])
def test_resuming_is_bit_equal(tmp_path, digits, without_curves, stop):
    """Of all averages, and of the snapshots; also of those that an interrupted run wrote after its checkpoint."""
    make(tmp_path, digits, run_name="straight", **SEVERAL).train()
    broken = make(tmp_path, digits, run_name="broken", **SEVERAL)
    broken.loop(stop)
    broken.save()
    broken.loop(7)  # and is killed
    assert broken.step == 7
    resumed = make(tmp_path, digits, run_name="broken", **SEVERAL)
    assert resumed.step == stop
    resumed.train()
    a, b = (saving.load(f"{tmp_path}/{name}/last.pt") for name in ("straight", "broken"))
    names = {"ema", "ema_0.3", "ema_length_0.05", "ema_length_0.1"}
    assert {name for name in a if name.startswith("ema")} == names
    assert all(saving.digest(a[name]) == saving.digest(b[name]) for name in a.keys() - {"config"})
    assert len({saving.digest(a[name]) for name in names}) == 4
    for n in (2, 4, 6, 8):
        assert len({saving.digest(saving.load(f"{tmp_path}/{name}/snapshot_000000{n}.pt"))
                    for name in ("straight", "broken")}) == 1


def test_a_snapshot_is_there_before_its_checkpoint(tmp_path, digits, without_curves, monkeypatch):
    """Or a kill between the two would lose it."""
    trainer = make(tmp_path, digits, **SEVERAL, save_every=2)
    monkeypatch.setattr(trainer, "save", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.loop(8)
    assert saving.load(f"{tmp_path}/digits/snapshot_0000002.pt").keys() == {"ema_length_0.05", "ema_length_0.1"}


def test_a_full_disk_costs_a_snapshot_and_no_run(tmp_path, digits, without_curves, monkeypatch, capsys):
    trainer, write = make(tmp_path, digits, **SEVERAL), saving.write_tensors

    def full(path, content):
        if "snapshot_0000004" in path:
            raise saving.UserError("no room")
        write(path, content)

    monkeypatch.setattr(saving, "write_tensors", full)
    trainer.train()
    assert capsys.readouterr().err == "warning: no room\n"
    assert sorted(int(path.stem[9:]) for path in (tmp_path / "digits").glob("snapshot_*")) == [2, 6, 8]


def test_the_default_checkpoint_has_the_keys_it_had_and_an_old_one_resumes(tmp_path, digits, without_curves):
    make(tmp_path, digits, num_training_steps=2).train()
    last = f"{tmp_path}/digits/last.pt"
    state = saving.load(last)
    assert list(state) == ["step", "net", "ema", "optimizer", "items", "window", "skipped", "config", "data"]
    assert state["config"]["ema_decay"] == 0.99
    for name in ("ema_snapshot_every", "optimizer", "lr_decay_start", "lr_decay_share", "clip_x0"):
        del state["config"][name]
    saving.save(tmp_path / "digits", state)
    resumed = make(tmp_path, digits, num_training_steps=4)
    assert resumed.step == 2
    assert len(Loaded(Options(ckpt=last), CPU).state) == 9
    resumed.train()


def test_two_ranks_write_the_snapshots_of_one(tmp_path):
    for ranks in (1, 2):
        result = run_ranks(ranks, tiny(tmp_path, run_name=f"{ranks}", **SEVERAL))
        assert result.returncode == 0, result.stderr
    a, b = (saving.load(f"{tmp_path}/{ranks}/snapshot_0000008.pt") for ranks in (1, 2))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    assert metrics_of(tmp_path / "1")[7]["loss"] == pytest.approx(metrics_of(tmp_path / "2")[7]["loss"], rel=1e-4)


# ---- Drawing


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits):
    """A run of 60 steps with snapshots, which also tracks the length 0.15."""
    folder = tmp_path_factory.mktemp("averages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runs.LENGTHS", (*LENGTHS, 0.15))
        patch.setattr("logging_utils.Logger.curves", lambda self: None)
        settings = dict(SEVERAL, num_training_steps=63, ema_snapshot_every=5, base_lr=1e-2, log_every=100)
        make(folder, digits, **settings).train()
    return folder / "digits"


def weights_of(folder, **options):
    net = load_net(f"{folder}/last.pt", options.pop("weights", "ema"), CPU, **options)[-1]
    return torch.cat([p.detach().flatten() for p in net.parameters()]).double()


def test_synthesis_of_a_run_is_the_average_that_was_tracked(folder):
    """At the step of the checkpoint, which is none of the snapshots'. A snapshot after it changes nothing."""
    assert len(list(folder.glob("snapshot_*"))) == 12
    for own in LENGTHS:
        found, right = weights_of(folder, ema_length=own), weights_of(folder, weights=f"ema_length_{own}")
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)
    found, right, near = (weights_of(folder, **options) for options in (
        dict(ema_length=0.15), dict(weights="ema_length_0.15"), dict(weights="ema_length_0.1")))
    assert (found - right).norm() < 0.02 * (near - right).norm()
    later = folder / "snapshot_0000065.pt"
    later.write_text("none")
    assert torch.equal(weights_of(folder, ema_length=0.15), found)
    later.unlink()


def test_weights_by_the_name_of_their_decay(folder, tmp_path, capsys):
    state = saving.load(f"{folder}/last.pt")
    for weights, key in (("ema", "ema"), ("ema_0.9", "ema"), ("ema_0.3", "ema_0.3"), ("raw", "net")):
        run = Loaded(Options(ckpt=f"{folder}/last.pt", weights=weights), CPU)
        assert saving.digest(run.net.state_dict()) == saving.digest(state[key]), weights
    main(["--ckpt", f"{folder}/last.pt", "--num", "2", "--ema_length", "0.07", "--out", str(tmp_path / "x")])
    assert "2 samples of ema_length_0.07 weights at step 63" in capsys.readouterr().out


def test_decays_from_the_command_line():
    """One stays a number, so that the checkpoints of one decay are as they were."""
    for words, decay in ((["0.9"], 0.9), (["0.9", "0.99"], (0.9, 0.99))):
        assert read_config(["digits", "--ema_decay", *words]).ema_decay == decay


def test_a_card_names_its_weights(tmp_path, capsys, without_curves):
    """And so does the line by which `evaluate.py compare` shows it."""
    points = dict(network="mlp", hidden_dim=16, num_layers=1, dataset="moons", class_conditional=False)
    config = tiny(tmp_path, **SEVERAL, **points)
    DiffusionTrainer(config, load_dataset("moons"), CPU).train()
    evaluate(["--ckpt", f"{tmp_path}/digits/last.pt", "--ema_length", "0.2", "--num", "40", "--seeds", "1",
              "--likelihood_num", "0", "--loss_num", "0"])
    (folder,) = (tmp_path / "digits" / "evaluation").iterdir()
    assert folder.name.startswith("digits_0000008_ema_length_0.2_euler_")
    card = json.loads((folder / "card.json").read_text())
    assert card["options"]["weights"] == "ema_length_0.2" and card["options"]["ema_length"] == 0.2
    assert "step 8, ema_length_0.2 weights: 1 x 40 samples by euler" in capsys.readouterr().out


@pytest.mark.parametrize("words, error", [
    ("--weights ema_0.7", "'ema_0.7' is not known here: expected one of raw, ema, ema_0.3, ema_length_0.05"),
    ("--ema_length 0.1 --weights raw", "leave --weights raw out"),
    ("--ema_length 0.1 --weights ema_0.3", "leave --weights ema_0.3 out"),
    ("--ema_length 0.5", "ema_length is 0.5: expected a number in [0.01, 0.28]"),
])
def test_weights_that_are_not_there_in_one_line(folder, capfd, words, error):
    with pytest.raises(SystemExit):
        main(["--ckpt", f"{folder}/last.pt", "--num", "2", *words.split()])
    shown = capfd.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and error in shown, shown


def test_no_snapshots_in_one_line(folder, tmp_path):
    copied = tmp_path / "last.pt"
    copied.write_bytes((folder / "last.pt").read_bytes())
    words = "none before step 63 are beside .*: train with --ema_snapshot_every 3, or"
    with pytest.raises(saving.UserError, match=words):
        Loaded(Options(ckpt=str(copied), ema_length=0.1), CPU)


def test_snapshots_of_another_network_in_one_line(folder, tmp_path, digits, without_curves):
    make(tmp_path, digits, run_name="other", num_training_steps=2, model_channels=16).train()
    for path in (*folder.glob("snapshot_*"), tmp_path / "other" / "last.pt"):  # of 2 steps, and of 63
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "snapshot_0000001.pt").write_bytes((folder / "snapshot_0000005.pt").read_bytes())
    with pytest.raises(saving.UserError, match="has no averages of this network, which ema_length needs: give --ckpt"):
        Loaded(Options(ckpt=str(tmp_path / "last.pt"), ema_length=0.1), CPU)
