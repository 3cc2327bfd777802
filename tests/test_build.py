"""From settings to parts: bfloat16 and compiling where they pay, networks that ignore settings; samples drawn by a compiled network."""

import dataclasses
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, flags, launch, make, metrics_of, run, tiny

import build
import utils
from build import autocast, check_bf16, compiles, draw_all, ignored
from config import PRESETS, Config
from data_utils import load_dataset, make_dataset
from mlp import MLP
from utils import UserError, native_bf16, seed_torch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


# ---- bfloat16


@pytest.mark.parametrize("capability, native", [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True)])
def test_bf16_is_the_default_on_a_gpu_that_has_it(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(build, "native_bf16", native_bf16.__wrapped__)
    assert build.uses_bf16(Config(), GPU) == build.uses_bf16(Config(bf16=True), GPU) == native  # a run of another GPU is sampled here
    assert not build.uses_bf16(Config(bf16=False), GPU)
    check_bf16(Config(), GPU)
    if not native:
        with pytest.raises(UserError, match="bf16 is set, but Tesla T4 has no bfloat16, .*capability 8.0.*--bf16 False"):
            check_bf16(Config(bf16=True), GPU)


@pytest.mark.parametrize("slower, native", [(1.3, True), (4.9, True), (5.1, False), (60.0, False)])
def test_a_cpu_that_emulates_bf16_is_recognized_by_its_speed(monkeypatch, capfd, slower, native):
    def repeat(work, number, repeat):
        return [0.002 * (slower if work().dtype == torch.bfloat16 else 1)] * repeat

    monkeypatch.setattr(utils.timeit, "repeat", repeat)
    monkeypatch.setattr(build, "native_bf16", native_bf16.__wrapped__)
    assert native_bf16.__wrapped__(CPU) == native
    assert not build.uses_bf16(Config(), CPU) and build.uses_bf16(Config(bf16=True), CPU)
    check_bf16(Config(), CPU)
    assert capfd.readouterr().err == ""
    check_bf16(Config(bf16=True), CPU)
    error = capfd.readouterr().err
    assert error == "" if native else error.count("\n") == 1 and "this CPU emulates bfloat16" in error and "--bf16 False" in error
    with autocast(Config(bf16=True), CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_training_in_emulated_bf16_says_so(tmp_path):
    """With the instructions hidden from torch, as far as it lets them be hidden; where it does not, it must not say so."""
    hidden = dict(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
    native = run("python", "-c", "import torch, utils; print(utils.native_bf16(torch.device('cpu')))", **hidden).stdout.strip()
    result = run("python", "main.py", *flags(tiny(tmp_path, bf16=True)), **hidden)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("this CPU emulates bfloat16") == (native == "False") and result.stderr.count("\n") <= 1


# ---- Networks and settings


class NoLabels(MLP):
    def __init__(self, data_shape, hidden_dim=8):
        super().__init__(data_shape, hidden_dim=hidden_dim)


def test_a_network_without_labels_is_not_trained_with_them(monkeypatch, tmp_path):
    monkeypatch.setitem(build.NETWORKS, "plain", NoLabels)
    points = make_dataset(np.random.default_rng(0).normal(size=(100, 2)), np.arange(100) % 2)
    config = tiny(tmp_path, network="plain")
    with pytest.raises(UserError, match="class_conditional is set, but network plain takes no num_classes.*--class_conditional False"):
        build.build(config, points.spec, CPU)
    build.build(dataclasses.replace(config, class_conditional=False), points.spec, CPU)


def test_what_a_network_ignores_is_named(tmp_path, capfd):
    assert ignored(Config()) == ignored(Config(**PRESETS["moons"])) == []
    assert ignored(Config(network="mlp", model_channels=64, num_layers=2)) == ["model_channels"]
    assert ignored(Config(hidden_dim=64)) == ["hidden_dim"]
    words = flags(tiny(tmp_path, network="mlp", dataset="moons", class_conditional=False))
    result = run("python", "main.py", *words)
    assert result.returncode == 0
    assert "note: network mlp does not read model_channels, channel_mults, num_res_blocks, attention_resolutions\n" in result.stdout


# ---- Compiling


def test_compiling_where_it_pays():
    long, short = build.TRAINING_STEPS, build.TRAINING_STEPS - 1
    assert compiles(Config(), GPU, long, long) and not compiles(Config(), GPU, short, long) and not compiles(Config(), CPU, long, long)
    assert compiles(Config(compile=True), CPU, long, long) and not compiles(Config(compile=False), GPU, long, long)
    chosen = {name: PRESETS[name].get("num_training_steps", Config.num_training_steps) >= long for name in PRESETS}
    assert {name for name in chosen if not chosen[name]} == {"cifar10_debug", "digits", "moons"}


@pytest.mark.parametrize("steps, setting, compiled", [(20, None, False), (build.TRAINING_STEPS, None, True), (20, True, True),
                                                      (build.TRAINING_STEPS, False, False)])
def test_training_is_compiled_if_it_is_long_or_asked_for(tmp_path, digits, monkeypatch, capsys, steps, setting, compiled):
    """As on a GPU, with one line before the first step."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda net, mode: made.append(mode) or net)
    monkeypatch.setattr("trainer.compiles", lambda config, device, *counts: compiles(config, GPU, *counts))
    make(tmp_path, digits, num_training_steps=steps, compile=setting)
    assert made == ["default"] * compiled and capsys.readouterr().out.count("compiling the network") == compiled


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_many_samples_are_drawn_by_one_graph(tmp_path, monkeypatch, capsys):
    """Batches of 4 and a last one of 2, with guidance, which asks without labels too: one size, one graph, and the same samples."""
    monkeypatch.setattr(build, "SAMPLING_STEPS", 6)
    config = tiny(tmp_path, network="mlp", hidden_dim=8, num_layers=1, guidance_scale=2.0, sampling_batch_size=4, sampling_steps=3)
    moons = load_dataset("moons")
    process, net = build.build(config, moons.spec, CPU)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    settings = dict(rows=range(10), labels=torch.arange(10) % 2, sampler="euler_maruyama")
    plain, calls = draw_all(config, moons.spec, process, net, CPU, **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = dataclasses.replace(config, compile=True)
    drawn, same_calls = draw_all(compiled, moons.spec, process, net, CPU, **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(drawn, plain, rtol=1e-4, atol=1e-4)
    assert calls == same_calls == 6 and capsys.readouterr().out.count("compiling the network") == 1
    draw_all(compiled, moons.spec, process, net, CPU, **settings)  # and again
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    sizes = set()
    monkeypatch.setattr(torch, "compile", lambda net: lambda xt, t, label: sizes.add(len(xt)) or net(xt, t, label))
    draw_all(dataclasses.replace(compiled, sampling_batch_size=100, sampling_steps=60), moons.spec, process, net, CPU, **settings)
    assert sizes == {10}  # no more than there are
    few = {**settings, "rows": range(4)}
    monkeypatch.setattr(torch, "compile", None)  # too few to pay
    draw_all(compiled, moons.spec, process, net, CPU, **few)


# ---- Seeds


def test_only_the_generator_of_the_device_is_seeded(monkeypatch):
    generators = [torch.Generator(), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch, "manual_seed", None)
    seed_torch(7, torch.device("cuda", 1))
    assert generators[1].initial_seed() == 7 != generators[0].initial_seed()
    seed_torch(8, CPU)
    assert torch.default_generator.initial_seed() == 8


# ---- Memory


def short_of_memory(net, limit):
    """The network, on a GPU that has memory for no more than `limit` items at once."""
    forward = net.forward

    def limited(xt, t, label=None):
        if len(xt) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(xt, t, label)

    net.forward = limited


def test_training_goes_on_where_grids_and_evaluations_need_too_much_memory(tmp_path, digits, capfd, monkeypatch):
    """Half the samples at once, and half of these, ...; and where not even one fits, the lines say so, and the run ends well."""
    monkeypatch.setattr("trainer.Judge", lambda *arguments: lambda samples, labels: {"recognised": float(len(samples))})
    settings = dict(sample_every=2, evaluate_every=2, evaluation_samples=20, num_samples=20, batch_size=4, sde_sampler=None)
    for limit in (5, 0):
        trainer = make(tmp_path, digits, run_name=f"limit{limit}", **settings)
        short_of_memory(trainer.ema.net, limit)
        trainer.train()
        error = capfd.readouterr().err
        assert trainer.step == 4 and error.count("out of memory for 20 items at once") == 4, error
        assert error.count("--sampling_batch_size 5 ") == 4
        assert ("no grid of ema weights by heun at step 2: out of memory for a single item" in error) == (limit == 0)
        assert ("no evaluation at step 4: out of memory for a single item" in error) == (limit == 0)
        lines = [line for line in open(tmp_path / f"limit{limit}" / "metrics.jsonl") if "recognised" in line]
        assert len(lines) == (2 if limit else 0)
        assert (tmp_path / f"limit{limit}" / "samples" / "ema_heun_0000004.png").exists() == (limit > 0)


@pytest.mark.parametrize("cached", [False, True])
def test_two_processes_of_which_one_has_no_memory_for_features_stay_in_step(tmp_path, cached):
    """Of samples, and of the training split where its statistics are not cached: both leave the evaluation out, and train on alike."""
    script = tmp_path / "script.py"
    script.write_text("""
import os, sys; sys.path.insert(0, sys.argv.pop(1))
import data_utils, extractors, main, metrics, torch
data_utils.CACHE, extractors.CLASSIFIER_STEPS, cached = sys.argv.pop(1), 2, sys.argv.pop(1) == "True"
def forward(self, images, plain=extractors.Classifier.forward):
    if os.environ["RANK"] == "1":
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    return plain(self, images)
extractors.Classifier.forward = forward
if cached:
    metrics.Judge.read = lambda *arguments: {}
main.start(main.main, resumable=True)
""")
    config = tiny(tmp_path, evaluate_every=2, evaluation_samples=20)
    result = run(*launch(2), script, ROOT, tmp_path, cached, *flags(config))
    assert result.returncode == 0, result.stderr
    assert all(result.stderr.count(f"no evaluation at step {step}: another process could not") == 1 for step in (2, 4)), result.stderr
    assert [line["step"] for line in metrics_of(tmp_path / "digits")] == [1, 2, 3, 4]


def test_a_gpu_short_of_memory_ends_sample_py_in_one_line(tmp_path, digits):
    make(tmp_path, digits).train()
    script = tmp_path / "script.py"
    script.write_text("""
import sys; sys.path.insert(0, sys.argv.pop(1))
import main, sample, torch, unet
def forward(self, xt, t, label=None):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")
unet.UNet.forward = forward
main.start(sample.main)
""")
    result = run("python", script, ROOT, "--ckpt", tmp_path / "digits" / "last.pt", "--num", "1", "--out",
                 tmp_path / "x.npz")
    assert_one_line_error(result, "out of memory for a single item (CUDA out of memory)")


def test_unknown_errors_are_not_taken_for_little_memory():
    with pytest.raises(RuntimeError, match="a bug"):
        list(utils.in_batches(lambda part, size: (_ for _ in ()).throw(RuntimeError("a bug")), range(4), 2))
    assert list(utils.in_batches(lambda part, size: (part, size), range(3, 8), 2)) == [(range(3, 5), 2), (range(5, 7), 2), (range(7, 8), 2)]
    assert utils.out_of_memory(MemoryError()) and not utils.out_of_memory(types.SimpleNamespace())
