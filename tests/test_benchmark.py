"""The benchmark: it measures what it says, of the network and data of its settings, and its figures fit together."""

import contextlib
import io
import json
import math
import os
from collections import Counter
from types import SimpleNamespace

import benchmark_peers
import benchmark_start
import numpy as np
import pytest
import torch
from benchmark_fields import FieldOptions
from benchmark_peers import PeerOptions, measure_peers
from conftest import ROOT, assert_one_line_error, launch, run, tiny
from torch._dynamo.utils import counters

import benchmark
from benchmark import Options, bare_network, ceilings, flops_of
from config import HERE
from data_utils import make_dataset
from trainer import DiffusionTrainer

TINY = ["digits", "--model_channels", "8", "--batch_size", "8", "--num_samples", "4",
        "--sampling_steps", "4", "--rounds", "1", "--seconds", "0.001", "--log_every", "1", "--wandb", "disabled",
        "--device", "cpu"]


def trainer_of(tmp_path, dataset, **changes) -> DiffusionTrainer:
    """A trainer of tiny settings, to be measured in one round."""
    options = Options(**vars(tiny(tmp_path, wandb="disabled", **changes)), rounds=1, seconds=0.001)
    trainer = DiffusionTrainer(options, dataset, torch.device("cpu"))
    trainer.open_run()
    return trainer


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a run of the benchmark writes and prints."""
    folder, printed = tmp_path_factory.mktemp("benchmark"), io.StringIO()
    counters.clear()  # of other tests
    with contextlib.redirect_stdout(printed):
        benchmark.main([*TINY, "--parts", "training", "sampling", "--out", str(folder / "b.json")])
    return {**json.load(open(folder / "b.json")), "printed": printed.getvalue()}


def test_the_figures_of_training_fit_together(report, tmp_path, digits):
    rows = report["training"]
    trainer, bare = rows["trainer"], rows["bare network"]
    assert trainer["of_bare_network"] == pytest.approx(trainer["images_per_s"] / bare["images_per_s"])  # of one round
    same = trainer_of(tmp_path, digits, batch_size=8)
    flops = flops_of(lambda: bare_network(same)[0](same.net)) / 8
    assert bare["GFLOP_per_s_and_rank"] == pytest.approx(bare["images_per_s"] * flops / 1e9)
    for name in ("matrix product", "3 x 3 convolution"):
        expected = bare["GFLOP_per_s_and_rank"] / rows[name]["GFLOP_per_s_and_rank"]
        assert rows[name]["reached_by_the_bare_network"] == pytest.approx(expected)
    for name in ("batch of data, noise and times", "clipping, optimizer and EMA"):
        assert rows[name]["of_the_step"] > 0  # below 1, but for the noise of a busy machine
    assert 0.1 < rows["peak memory of the benchmark, with the ceilings"]["GiB"] < 100
    assert "torch.compile" not in rows and "exchange of gradients, beside the backward pass" not in rows


def test_every_sampler_is_measured_by_its_network_calls(report):
    rows = report["sampling"]
    (left_out,) = (name for name in rows if not rows[name])
    assert left_out.startswith("flow_map: sampler flow_map needs a network") and rows.pop(left_out) == {}
    assert set(rows) == set(benchmark.SAMPLERS) - {"flow_map"}
    calls = {"euler": 4, "heun": 7, "midpoint": 8, "rk4": 16, "dpmpp_2m": 4, "stochastic_heun": 7}
    assert {name: rows[name]["calls"] for name in calls} == calls
    assert all(row["of_bare_calls"] > 0 and row["images_per_s"] > 0 for row in rows.values())


def test_settings_and_machine_are_reported_and_nothing_is_left(report):
    assert report["settings"]["model_channels"] == 8 and report["machine"]["bf16"] is False
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["ranks"] == 1
    assert "of_bare_network" in report["printed"] and "step 1/" not in report["printed"]  # the trainer's own lines
    assert not os.path.exists(os.path.join(HERE, "ckpts", "benchmark"))


def test_on_two_ranks(tmp_path):
    out = tmp_path / "b.json"
    result = run(*launch(2), ROOT / "benchmark.py", *TINY, "--parts", "training", "--out", out)
    assert result.returncode == 0, result.stderr
    content = json.load(open(out))
    assert content["machine"]["ranks"] == 2 and "\ntraining\n" in result.stdout
    assert 0 <= content["training"]["exchange of gradients, beside the backward pass"]["of_the_step"] < 1


# ---- How it is measured


def test_the_operations_of_a_convolution_and_of_its_gradient():
    conv, x = torch.nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 8, 8, requires_grad=True)
    assert flops_of(lambda: conv(x).sum().backward()) == 3 * 2 * (2 * 8 * 8) * 5 * 3 * 9


def test_the_operations_of_an_attention():
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    attention = torch.nn.functional.scaled_dot_product_attention
    assert flops_of(lambda: attention(q, k, v).sum().backward()) == 6 * 2 * (2 * 3) * 16 * 16 * 8


def test_functions_are_timed_alternately(monkeypatch):
    """One step of each, by functions that take no time; the second step is the one that counts."""
    steps = []

    def clock(function, n):
        function(n)
        return {"a": 0.002, "b": 0.01}[steps[-1][0]] + len(steps) / 1e6  # later ones are slower

    monkeypatch.setattr(benchmark, "clock", clock)
    functions = {name: lambda n, name=name: steps.append((name, n)) for name in ("a", "b")}
    times = benchmark.time_alternately(functions, SimpleNamespace(rounds=3, seconds=0.04))
    assert times["a"].tolist() == pytest.approx([0.002005, 0.002007, 0.002009])
    assert times["b"].tolist() == pytest.approx([0.010006, 0.010008, 0.010010])
    assert steps == [("a", 1), ("a", 1), ("b", 1), ("b", 1)] + [("a", 20), ("b", 4)] * 3


def test_the_clock_includes_the_work(monkeypatch):
    """It gives the seconds of one step."""
    seconds = [10.0]
    monkeypatch.setattr(benchmark, "timer", lambda: seconds[0])

    def work():
        seconds[0] += 2.0

    assert benchmark.clock(benchmark.repeated(work), 5) == 2.0 and seconds == [20.0]


def test_the_median_of_the_rounds_is_reported(monkeypatch, tmp_path, capsys):
    rows = [("first", {"s": np.array([3.0, 1.0, 2.0]), "n": 7})]
    monkeypatch.setitem(benchmark.PARTS, "training", lambda trainer: rows)
    benchmark.main([*TINY, "--parts", "training", "--out", str(tmp_path / "b.json")])
    assert json.load(open(tmp_path / "b.json"))["training"] == {"first": {"s": 2.0, "n": 7.0}}
    assert "        2 s         7 n" in capsys.readouterr().out


def test_the_bare_network_takes_steps_of_the_trainers_network(tmp_path, digits):
    trainer = trainer_of(tmp_path, digits)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.1
    before, average = ([p.clone() for p in net.parameters()] for net in (trainer.net, trainer.ema.net))
    bare_network(trainer)[1]()
    for net, old in ((trainer.net, before), (trainer.ema.net, average)):
        assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), old))
    assert all(p.grad is None for p in trainer.net.parameters())


@pytest.mark.parametrize("bf16", [False, True])
def test_ceilings_are_of_the_networks_width_rows_and_type(tmp_path, digits, bf16):
    works = ceilings(trainer_of(tmp_path, digits, bf16=bf16, accumulation_steps=2))
    gradients = works["3 x 3 convolution"]()
    assert [g.shape for g in gradients] == [(8, 8, 8, 8), (8, 8, 3, 3)]
    assert {g.dtype for g in gradients} == {torch.bfloat16 if bf16 else torch.float32}


def test_a_network_without_convolutions_is_not_compared_with_one(tmp_path, digits):
    """A transformer on images: the ceiling is the matrix product alone."""
    trainer = trainer_of(tmp_path, digits, network="transformer", depth=1, hidden_dim=8, heads=2)
    assert set(ceilings(trainer)) == {"matrix product"}
    rows = dict(benchmark.measure_training(trainer))
    assert rows["matrix product"]["reached_by_the_bare_network"] > 0 and "3 x 3 convolution" not in rows


def test_what_torch_compile_does_is_counted(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(benchmark, "counters", {"stats": Counter(unique_graphs=4), "graph_break": Counter(a=2, b=1)})
    rows = dict(benchmark.measure_training(trainer_of(tmp_path, digits)))
    assert rows["torch.compile"] == {"graphs": 4, "graph_breaks": 3}


@pytest.mark.parametrize("printed, comes", [(["wandb: offline\n", "step 1/650  loss 1\n"], True), ([], False)])
def test_start_is_measured_to_the_first_step(monkeypatch, printed, comes):
    """With a command that prints at once, or nothing."""
    commands = []

    class Popen:
        def __init__(self, command, cwd, env, **pipes):
            commands.append(command)
            self.stdout = iter(line.encode() for line in printed)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        terminate = communicate = __enter__

    monkeypatch.setattr(benchmark_start.subprocess, "Popen", Popen)
    seconds = benchmark_start.measure_start()
    assert 0 < seconds < 60 if comes else math.isnan(seconds)
    (command,) = commands
    assert " ".join(command).startswith("sh run.sh digits ") and not os.path.exists(command[-1])  # a folder of its own


# ---- The other library


@pytest.fixture
def photographs(tmp_path):
    dataset = make_dataset(np.zeros((16, 3, 32, 32), np.uint8), None)
    return trainer_of(tmp_path, dataset, class_conditional=False, batch_size=2)


def test_a_peer_is_measured_beside_the_trainer(monkeypatch, photographs):
    steps = []
    monkeypatch.setattr(benchmark_peers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(benchmark_peers, "torchcfm_step", lambda batch_size, device: lambda: steps.append(batch_size))
    ((name, row),) = measure_peers(photographs)
    assert name == "torchcfm" and (row["images_per_s"] > 0).all() and (row["trainer_over_it"] < 1).all()
    assert len(steps) > 3 and set(steps) == {2}


def test_torchcfm_trains(monkeypatch):
    unet, nets = pytest.importorskip("torchcfm.models.unet.unet").UNetModelWrapper, []
    monkeypatch.setattr("torchcfm.models.unet.unet.UNetModelWrapper",
                        lambda **settings: nets.append(unet(**settings)) or nets[0])
    step = benchmark_peers.torchcfm_step(1, torch.device("cpu"))
    for _ in range(2):
        before = [p.clone() for p in nets[0].parameters()]
        step()
        assert all(p.isfinite().all() for p in nets[0].parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, nets[0].parameters()))


# ---- Settings and data


def test_peers_need_photographs_and_the_library(tmp_path, digits, photographs, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_peers, "torchcfm_step", None)
    for trainer, spec in ((trainer_of(tmp_path / "digits", digits), "there"), (photographs, None)):
        monkeypatch.setattr(benchmark_peers.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert list(measure_peers(trainer)) == []
        assert "only for images of 3 x 32 x 32, and where torchcfm is installed" in capsys.readouterr().out


def test_peers_need_a_single_rank(photographs, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_peers, "torchcfm_step", None)
    monkeypatch.setattr(benchmark_peers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert list(measure_peers(photographs)) == [] and "on one rank" in capsys.readouterr().out


def test_the_script_of_peers_reports_its_part(tmp_path, monkeypatch, capsys):
    """By the command line of the benchmark, here with data that it is not for."""
    monkeypatch.setattr(benchmark_peers.importlib.util, "find_spec", lambda name: None)
    benchmark.main([*TINY, "--out", str(tmp_path / "b.json")], PeerOptions)
    report = json.load(open(tmp_path / "b.json"))
    assert report["settings"]["parts"] == ["peers"] and report["peers"] == {}
    assert "\npeers\n  only for images" in capsys.readouterr().out


def test_training_from_a_file_is_measured_beside_memory(tmp_path, capsys):
    options = [*TINY, "--gigabytes", "0.01", "--out", str(tmp_path / "b.json")]
    benchmark.main(options, FieldOptions)
    rows = json.load(open(tmp_path / "b.json"))["fields"]
    epoch, training = rows["an epoch of batches from the file"], rows["training from the file"]
    assert epoch["MiB_of_file"] == pytest.approx(0.01 * 1e9 / 2**20, rel=1e-3) and abs(epoch["MiB_more_memory"]) < 100
    assert training["items_per_s"] > 0 and training["of_memory"] > 0
    assert capsys.readouterr().out.count("items of shape (4, 8, 8)") == 2
    assert benchmark.main(["moons", *options[1:], "--network", "mlp"], FieldOptions) is None
    assert "only beside images or fields" in capsys.readouterr().out


def test_nothing_is_downloaded(tmp_path, monkeypatch):
    """CIFAR-10 is made here; other data are read, and never with download=True."""
    small = make_dataset(np.zeros((4, 1, 28, 28), np.uint8), None)
    monkeypatch.setattr(benchmark, "load_dataset", lambda name, **settings: small)
    for name, shape in (("cifar10", (50_000, 3, 32, 32)), ("mnist", (4, 1, 28, 28))):
        options = Options(**vars(tiny(tmp_path, dataset=name, class_conditional=False, wandb="disabled")))
        trainer = benchmark.make_trainer(options, torch.device("cpu"), str(tmp_path / name))
        assert trainer.dataset.data.shape == shape and trainer.config.num_training_steps == 10**9


@pytest.mark.parametrize("flags, words", [
    (["cifar"], ["'cifar' is no preset", "cifar10_debug"]),
    (["--parts", "memory"], ["parts", "sampling"]),
    (["--wandb", "maybe"], ["wandb", "disabled"]),
    (["--rounds", "0"], ["rounds is 0"]),
    (["--seconds", "-1"], ["seconds is -1.0: expected a number in (0, inf)"]),
    (["--batch", "3"], ["--batch", "--batch-size"]),
    (["digits", "--batch_size", "2", "--accumulation_steps", "4"], ["batch_size 2 is less than 4"]),
    (["digits", "--class_conditional", "False", "--guidance_scale", "2"], ["guidance_scale 2.0 needs a network"]),
    ([*TINY, "--parts", "--out", "/dev/null/b.json"], ["cannot write /dev/null/b.json"]),
])
def test_bad_options(flags, words, capfd):
    with pytest.raises(SystemExit) as end:
        benchmark.main(flags)
    out, err = capfd.readouterr()
    assert_one_line_error(SimpleNamespace(returncode=end.value.code, stdout=out, stderr=err), *words)
