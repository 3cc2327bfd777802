"""From settings to parts: bfloat16, compiling, networks that ignore settings, and too little memory."""

import contextlib
import dataclasses
import os

import numpy as np
import pytest
import torch
from conftest import make, metrics_of, run_ranks, tiny

import build
import data_utils
import metrics
import sample
import unet
import utils
from build import autocast, check_run, compiles, draw_all
from config import PRESETS, Config
from data_utils import Cases, load_dataset, make_dataset
from mlp import MLP
from utils import UserError, seed_torch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


# ---- bfloat16


@pytest.mark.parametrize("native", [False, True])
def test_bf16_is_the_default_on_a_gpu_that_has_it(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    # with bf16=True as well: a run of another GPU is sampled here
    assert build.uses_bf16(Config(), GPU) == build.uses_bf16(Config(bf16=True), GPU) == native
    assert not build.uses_bf16(Config(bf16=False), GPU)
    check_run(Config(), GPU)
    words = "bf16 is set, but Tesla T4 has no bfloat16, .*capability 8.0.*--bf16 False"
    with contextlib.nullcontext() if native else pytest.raises(UserError, match=words):
        check_run(Config(bf16=True), GPU)


def test_bf16_on_a_cpu_only_if_it_is_set():
    assert not build.uses_bf16(Config(), CPU) and build.uses_bf16(Config(bf16=True), CPU)
    with autocast(Config(bf16=True), CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


# ---- Networks and settings


class NoLabels(MLP):
    def __init__(self, data_shape, hidden_dim=8):
        super().__init__(data_shape, hidden_dim=hidden_dim)


def test_a_network_without_labels_is_not_trained_with_them(monkeypatch, tmp_path):
    monkeypatch.setitem(build.NETWORKS, "plain", NoLabels)
    points = make_dataset(np.random.default_rng(0).normal(size=(100, 2)), np.arange(100) % 2)
    config = tiny(tmp_path, network="plain")
    words = "class_conditional is set, but network plain takes no num_classes.*--class_conditional False"
    with pytest.raises(UserError, match=words):
        build.build(config, points.spec, CPU)
    build.build(dataclasses.replace(config, class_conditional=False), points.spec, CPU)


@pytest.mark.parametrize("changes, ignored", [
    ({}, ""), (PRESETS["moons"], ""), (PRESETS["digits_transformer"], ""),
    (dict(hidden_dim=64), "network unet does not read hidden_dim"),
    (dict(network="mlp", model_channels=64, num_layers=2), "network mlp does not read model_channels"),
])
def test_what_a_network_ignores_is_named(capsys, changes, ignored):
    check_run(Config(**changes), CPU)
    assert capsys.readouterr().out == (f"note: {ignored}\n" if ignored else "")


# ---- Compiling


def test_compiling_where_it_pays():
    long, short = build.TRAINING_STEPS, build.TRAINING_STEPS - 1
    assert compiles(Config(), GPU, long, long)
    assert not compiles(Config(), GPU, short, long) and not compiles(Config(), CPU, long, long)
    assert compiles(Config(compile=True), CPU, long, long) and not compiles(Config(compile=False), GPU, long, long)
    chosen = {name: PRESETS[name].get("num_training_steps", Config.num_training_steps) >= long for name in PRESETS}
    assert {name for name in chosen if not chosen[name]} == {
        "cifar10_debug", "digits", "digits_flow_map", "digits_transformer", "digits_superres", "digits_inpaint",
        "moons", "moons_to_eight_gaussians", "navier_stokes"}


@pytest.mark.parametrize("steps, setting, compiled", [
    (20, None, False), (build.TRAINING_STEPS, None, True), (20, True, True), (build.TRAINING_STEPS, False, False),
])
def test_training_is_compiled_if_long_or_set(tmp_path, digits, monkeypatch, capsys, steps, setting, compiled):
    """As on a GPU, with one line before the first step."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda net, mode: made.append(mode) or net)
    monkeypatch.setattr("runs.compiles", lambda config, device, *counts: compiles(config, GPU, *counts))
    make(tmp_path, digits, num_training_steps=steps, compile=setting)
    assert made == ["default"] * compiled and capsys.readouterr().out.count("compiling the network") == compiled


def test_many_samples_are_drawn_by_a_compiled_network(monkeypatch, tmp_path, capsys):
    """Batches of 4 and a last one of 2, with guidance, which calls the network without labels too.

    The graph runs as it is: that the compiler's code gives the same numbers is tested in test_trainer.py.
    """
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: torch_compile(net, backend="eager"))
    monkeypatch.setattr(build, "SAMPLING_STEPS", 6)
    config = tiny(tmp_path, network="mlp", hidden_dim=8, num_layers=1, guidance_scale=2.0, sampling_batch_size=4,
                  sampling_steps=3)
    moons = load_dataset("moons")
    process, net = build.build(config, moons.spec, CPU)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    settings = dict(cases=Cases(10, torch.arange(10) % 2), sampler="euler_maruyama")
    plain, calls = draw_all(config, moons.spec, process, net, CPU, **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = dataclasses.replace(config, compile=True)
    drawn, same_calls = draw_all(compiled, moons.spec, process, net, CPU, **settings)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 4  # with and without labels, and for a size that changes
    torch.testing.assert_close(drawn, plain, rtol=1e-4, atol=1e-4)
    assert calls == same_calls == 6 and capsys.readouterr().out.count("compiling the network") == 1
    draw_all(compiled, moons.spec, process, net, CPU, **settings)  # and again
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    sizes = set()
    monkeypatch.setattr(torch, "compile", lambda net: lambda xt, *others: sizes.add(len(xt)) or net(xt, *others))
    large = dataclasses.replace(compiled, sampling_batch_size=100, sampling_steps=60)
    draw_all(large, moons.spec, process, net, CPU, **settings)
    assert sizes == {10}  # no more than there are
    few = {**settings, "cases": Cases(4)}
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


def out_of_memory(*arguments):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def short_of_memory(net, limit):
    """The network, on a GPU that has memory for no more than `limit` items at once."""
    forward = net.forward

    net.forward = lambda xt, *others: (forward if len(xt) <= limit else out_of_memory)(xt, *others)


def test_training_continues_where_samples_need_too_much_memory(tmp_path, digits, capfd, monkeypatch):
    """Half the samples at once, then half of these, and so on. If not even one fits, there is no grid, and no error."""
    count = {"recognised": 1.0}
    monkeypatch.setattr("metrics.Evaluator", lambda *arguments: lambda samples, labels, truth: count)
    settings = dict(sample_every=2, evaluate_every=2, evaluation_samples=20, num_samples=20, batch_size=4,
                    sde_sampler=None)
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
def test_if_one_of_two_ranks_has_no_memory_for_features_both_stay_in_step(tmp_path, monkeypatch, cached):
    """Features of samples, or of the training split if its statistics are not cached: neither rank evaluates."""
    forward = metrics.Classifier.forward

    def short_on_rank_1(self, images):
        if os.environ["RANK"] == "1":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, images)

    monkeypatch.setattr(metrics.Classifier, "forward", short_on_rank_1)
    monkeypatch.setattr(metrics, "CLASSIFIER_STEPS", 2)
    monkeypatch.setattr(data_utils, "CACHE", str(tmp_path))
    if cached:
        monkeypatch.setattr(metrics, "statistics_of", lambda *arguments: {})
    result = run_ranks(2, tiny(tmp_path, evaluate_every=2, evaluation_samples=20))
    assert result.returncode == 0, result.stderr
    for step in (2, 4):
        words = f"no evaluation at step {step}: it failed on another rank"
        assert result.stderr.count(words) == 1, result.stderr
    assert [line["step"] for line in metrics_of(tmp_path / "digits")] == [1, 2, 3, 4]


def test_a_gpu_short_of_memory_ends_sample_py_in_one_line(tmp_path, digits, monkeypatch, capfd):
    make(tmp_path, digits).train()
    capfd.readouterr()
    monkeypatch.setattr(unet.UNet, "forward", out_of_memory)
    with pytest.raises(SystemExit) as end:
        sample.main(["--ckpt", str(tmp_path / "digits" / "last.pt"), "--num", "1", "--out", str(tmp_path / "x.npz")])
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert "out of memory for a single item (CUDA out of memory" in error


def test_unknown_errors_are_not_taken_for_little_memory():
    with pytest.raises(RuntimeError, match="a bug"):
        list(utils.in_batches(lambda part: (_ for _ in ()).throw(RuntimeError("a bug")), range(4), 2))
    parts = list(utils.in_batches(lambda part: part, range(3, 8), 2))
    assert parts == [range(3, 5), range(5, 7), range(7, 8)]
    with pytest.raises(UserError, match="out of memory for a single item"):
        list(utils.in_batches(lambda part: (_ for _ in ()).throw(MemoryError()), range(1), 2))


def test_a_sampler_that_cannot_leave_a_point_is_refused_where_it_draws(tmp_path):
    config = tiny(tmp_path, class_conditional=False, process="foellmer", base="condition", model_type="drift",
                  target_type="drift", T_max=1.0, corruption="downsample", sampler="euler_maruyama", sde_sampler=None)
    build.check_settings(config)
    data = load_dataset("digits", **vars(config))
    process, net = build.build(config, data.spec, CPU)
    cases = data.cases([0, 1])
    assert draw_all(config, data.spec, process, net, CPU, cases, "euler_maruyama")[0].shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="sampler heun cannot leave a point.*T_max 1.0: use --sampler euler_maruyama"):
        draw_all(config, data.spec, process, net, CPU, cases, "heun")
