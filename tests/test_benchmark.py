"""The benchmark: it measures what it says, of the network and data of its settings, and its figures fit together."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, launch, run, tiny

import benchmark
from benchmark import bare_network, ceilings, flops_of
from command_line import HERE
from config import PRESETS
from data_utils import make_dataset
from trainer import DiffusionTrainer

TINY = ["--preset", "digits", "--model_channels", "8", "--batch_size", "8", "--num_samples", "4",
        "--sampling_steps", "4", "--rounds", "1", "--seconds", "0.001", "--log_every", "1", "--wandb", "disabled",
        "--device", "cpu"]


def trainer_of(tmp_path, dataset, **changes) -> DiffusionTrainer:
    """A trainer of tiny settings, to be measured in one round."""
    options = benchmark.Options(**vars(tiny(tmp_path, wandb="disabled", **changes)), rounds=1, seconds=0.001)
    trainer = DiffusionTrainer(options, dataset, torch.device("cpu"))
    trainer.open_run()
    return trainer


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a run of the benchmark writes and prints."""
    folder, printed = tmp_path_factory.mktemp("benchmark"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        benchmark.main([*TINY, "--parts", "training", "sampling", "--out", str(folder / "b.json")])
    content = json.load(open(folder / "b.json"))
    return {**content, "rows": {row["what"]: row for row in content["rows"]}, "printed": printed.getvalue()}


def test_the_figures_of_training_fit_together(report, tmp_path, digits):
    rows = report["rows"]
    trainer, bare = rows["trainer"], rows["bare network"]
    assert trainer["part"] == "training" and trainer["of_bare_network"] > 0 and trainer["images_per_s"] > 0
    same = trainer_of(tmp_path, digits, batch_size=8)
    flops = flops_of(lambda: bare_network(same)[0](same.net)) / 8
    assert bare["GFLOP_per_s_and_rank"] == pytest.approx(bare["images_per_s"] * flops / 1e9)
    for name in ("matrix product", "3 x 3 convolution"):
        expected = bare["GFLOP_per_s_and_rank"] / rows[name]["GFLOP_per_s_and_rank"]
        assert rows[name]["reached_by_the_bare_network"] == pytest.approx(expected)  # of one round, the median too
    for name in ("batch of data, noise and times", "clipping, optimizer and EMA"):
        assert 0 < rows[name]["of_the_step"] < 1
    assert 0.1 < rows["peak memory"]["GiB"] < 100
    assert "torch.compile" not in rows and "exchange of gradients, beside the backward pass" not in rows


def test_every_sampler_is_measured_by_its_network_calls(report):
    rows = {name: row for name, row in report["rows"].items() if row["part"] == "sampling"}
    assert set(rows) == set(benchmark.SAMPLERS)
    calls = {"euler": 4, "heun": 7, "midpoint": 8, "rk4": 16, "dpmpp_2m": 4, "stochastic_heun": 7}
    assert {name: rows[name]["calls"] for name in calls} == calls
    assert all(row["of_bare_calls"] > 0 and row["images_per_s"] > 0 for row in rows.values())


def test_settings_and_machine_are_reported_and_nothing_is_left(report):
    assert report["settings"]["model_channels"] == 8 and report["settings"]["bf16"] is False
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["ranks"] == 1
    assert "of_bare_network" in report["printed"] and "step 1/" not in report["printed"]  # the trainer's own lines
    assert not os.path.exists(os.path.join(HERE, "ckpts", "benchmark"))


def test_on_two_ranks(tmp_path):
    out = tmp_path / "b.json"
    result = run(*launch(2), ROOT / "benchmark.py", *TINY, "--parts", "training", "peers", "--out", out)
    assert result.returncode == 0, result.stderr
    content = json.load(open(out))
    rows = {row["what"]: row for row in content["rows"]}
    assert content["machine"]["ranks"] == 2 and "\ntraining\n" in result.stdout and "\npeers\n" not in result.stdout
    assert 0 <= rows["exchange of gradients, beside the backward pass"]["of_the_step"] < 1


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
        return n * {"a": 0.002, "b": 0.01}[steps[-1][0]]

    monkeypatch.setattr(benchmark, "clock", clock)
    functions = {name: lambda n, name=name: steps.append((name, n)) for name in ("a", "b")}
    times = benchmark.time_alternately(functions, rounds=3, seconds=0.04)
    assert times == {"a": pytest.approx([0.002] * 3), "b": pytest.approx([0.01] * 3)}
    assert benchmark.ratio(times, "b", "a") == pytest.approx(5)
    assert steps == [("a", 1), ("a", 1), ("b", 1), ("b", 1),
                     ("a", 20), ("b", 4), ("b", 4), ("a", 20), ("a", 20), ("b", 4)]


def test_the_clock_includes_the_work():
    x = torch.ones(400, 400)
    assert benchmark.clock(benchmark.repeated(lambda: x @ x), 50) > benchmark.clock(lambda: None) > 0


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


def test_what_torch_compile_does_is_counted(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(benchmark, "counters", {"stats": Counter(unique_graphs=1), "graph_break": Counter(a=2, b=1)})
    row = dict(benchmark.measure_training(trainer_of(tmp_path, digits)))["torch.compile"]
    assert row["s_for_the_first_call"] > 0 and row["graph_breaks"] == 3 and row["recompilations"] == 0


def test_start_is_measured_to_the_first_line(tmp_path, digits, monkeypatch):
    """With commands that print at once; `--help` prints nothing."""
    commands = []

    class Popen:
        def __init__(self, command, cwd, env, **pipes):
            commands.append(command)
            self.stdout = iter(["wandb: offline\n", "step 1/650  loss 1\n"] if command[0] == "sh" else [])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        terminate = communicate = __enter__

    monkeypatch.setattr(benchmark.subprocess, "Popen", Popen)
    empty, again, usage = (row["s"] for _, row in benchmark.measure_start(trainer_of(tmp_path, digits)))
    assert 0 < empty < 60 and 0 < again < 60 and math.isnan(usage)
    assert [command[:2] for command in commands[:2]] == [("sh", "run.sh")] * 2
    assert commands[0][-1] != commands[1][-1]  # another run each time


# ---- Peers


class Pipe:
    """The end of a pipe at which messages wait, and then the other end closes."""

    def __init__(self, *messages):
        self.messages, self.sent = list(messages), []
        self.send = self.sent.append

    def recv(self):
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)


@pytest.mark.parametrize("as_here", [False, True])
def test_a_peer_answers_with_its_operations_and_its_seconds(tmp_path, monkeypatch, as_here):
    """And takes as many steps as it is told; `as_here` in bfloat16 and channels_last."""
    nets, updates, outputs = [], [], []

    def small(images):
        nets.append(torch.nn.Conv2d(3, 4, 3))

        def loss():
            outputs.append(nets[0](images))
            return outputs[-1].float().square().mean()

        return nets[0], loss, lambda: updates.append(1)

    monkeypatch.setitem(benchmark.PEERS, "small", small)
    monkeypatch.setattr(benchmark.signal, "signal", lambda *arguments: None)
    pipe = Pipe(3, 1)
    benchmark.serve(pipe, "small", tiny(tmp_path, batch_size=2, bf16=True), torch.device("cpu"), as_here)
    flops, *seconds = pipe.sent
    assert flops == 2 * 2 * (2 * 30 * 30) * 4 * 3 * 9  # forward and the weights' gradient: the images need none
    assert len(seconds) == 2 and min(seconds) > 0 and len(updates) == 4
    assert outputs[0].dtype == (torch.bfloat16 if as_here else torch.float32)
    assert nets[0].weight.is_contiguous(memory_format=torch.channels_last) == as_here


@pytest.fixture
def photographs():
    return make_dataset(np.zeros((16, 3, 32, 32), np.uint8), None)


SMALL = dict(class_conditional=False, batch_size=2)


def test_peers_are_measured_beside_the_trainer(tmp_path, monkeypatch, photographs):
    """By processes that answer at once: each takes as many steps as the trainer's turn asks, and is ended."""
    pipes, ended = [], []

    class Answering(Pipe):
        def __init__(self):
            super().__init__(1e6)
            self.send = lambda n: self.messages.append(n)

    class Process:
        def __init__(self, target, args, daemon):
            pipes.append(args[0])
            assert pickle.loads(pickle.dumps(args[1:])) == args[1:]  # as a process that is spawned needs

        start = join = lambda self: None

        def kill(self):
            ended.append(self)

    context = SimpleNamespace(Process=Process, Pipe=lambda: (Answering(), open(os.devnull)))
    monkeypatch.setattr(benchmark, "get_context", lambda name: context)
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: name == "torchcfm" or None)
    rows = dict(benchmark.measure_peers(trainer_of(tmp_path, photographs, **SMALL)))
    assert list(rows) == ["torchcfm, as it is", "torchcfm, with memory, channels_last and type as here"]
    assert all(row["images_per_s"] > 0 and row["trainer_over_it_per_operation"] > 0 for row in rows.values())
    assert len(ended) == 2 and all(end.closed for end in pipes)  # or a process that died would not be noticed


@pytest.mark.parametrize("end", ["error", "death"])
def test_a_peer_that_fails_is_reported(monkeypatch, end, tmp_path, photographs, capfd):
    """Here every peer fails in its process, by an error or by its death; the benchmark continues."""

    def broken(images):
        os._exit(1) if end == "death" else (_ for _ in ()).throw(RuntimeError("no such kernel"))

    monkeypatch.setattr(benchmark, "PEERS", {"torchcfm": broken})
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: name)
    # a spawned process would not have `broken`
    monkeypatch.setattr(benchmark, "get_context", lambda name: multiprocessing.get_context("fork"))
    rows = dict(benchmark.measure_peers(trainer_of(tmp_path, photographs, **SMALL)))
    assert rows["torchcfm, as it is: its process ended, with the error above"] == {} and len(rows) == 2
    assert ("RuntimeError: no such kernel" in capfd.readouterr().err) == (end == "error")


@pytest.mark.parametrize("name", list(benchmark.PEERS))
def test_the_peers_train(tmp_path, monkeypatch, name):
    pytest.importorskip(name)
    peer, nets, before = benchmark.PEERS[name], [], []

    def watched(images):
        parts = peer(images)
        nets.append(parts[0])
        before.extend(p.clone() for p in parts[0].parameters())
        return parts

    monkeypatch.setitem(benchmark.PEERS, name, watched)
    monkeypatch.setattr(benchmark.signal, "signal", lambda *arguments: None)
    pipe = Pipe(1)
    benchmark.serve(pipe, name, tiny(tmp_path, batch_size=1), torch.device("cpu"), as_here=False)
    assert len(pipe.sent) == 2 and all(p.isfinite().all() for p in nets[0].parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, nets[0].parameters()))


# ---- Settings and data


def test_peers_need_photographs(tmp_path, digits, capsys):
    assert list(benchmark.measure_peers(trainer_of(tmp_path, digits))) == []
    assert "only for images of 3 x 32 x 32" in capsys.readouterr().out


def test_nothing_is_downloaded(tmp_path, monkeypatch):
    """CIFAR-10 is random pixels; other data are read, and never with download=True."""
    for preset, settings in PRESETS.items():
        assert benchmark.Options(preset=preset, **settings).rounds == 5
    small = make_dataset(np.zeros((4, 1, 28, 28), np.uint8), None)
    monkeypatch.setattr(benchmark, "load_dataset", lambda name, data_dir, image_size: small)
    for name, shape in (("cifar10", (50_000, 3, 32, 32)), ("mnist", (4, 1, 28, 28))):
        options = benchmark.Options(**vars(tiny(tmp_path, dataset=name, class_conditional=False, wandb="disabled")))
        trainer = benchmark.make_trainer(options, torch.device("cpu"), str(tmp_path / name))
        assert trainer.dataset.data.shape == shape and trainer.config.num_training_steps == 10**9


@pytest.mark.parametrize("flags, words", [
    (["--preset", "cifar"], ["preset", "cifar10_debug"]),
    (["--parts", "memory"], ["parts", "sampling"]),
    (["--wandb", "maybe"], ["wandb", "disabled"]),
    (["--rounds", "0"], ["rounds is 0"]),
    (["--seconds", "-1"], ["seconds is -1.0: expected more than 0"]),
    (["--batch", "3"], ["--batch", "--batch-size"]),
    (["--preset", "digits", "--batch_size", "2", "--accumulation_steps", "4"], ["batch_size 2 is less than 4"]),
    (["--preset=digits", "--class_conditional", "False", "--guidance_scale", "2"], ["guidance_scale 2.0 needs labels"]),
    ([*TINY, "--parts", "--out", "/nowhere/b.json"], ["cannot write /nowhere/b.json"]),
])
def test_bad_options(flags, words, capfd):
    with pytest.raises(SystemExit) as end:
        benchmark.main(flags)
    out, err = capfd.readouterr()
    assert_one_line_error(SimpleNamespace(returncode=end.value.code, stdout=out, stderr=err), *words)
