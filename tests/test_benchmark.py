"""The benchmark: it measures what it says, of the network and data of its settings, and its figures fit together."""

import json
import math
import os
import threading
import types
from multiprocessing import Pipe

import pytest
import torch
from conftest import ROOT, assert_one_line_error, launch, make, run, tiny

import benchmark
import build
import measuring
import peers
from config import PRESETS
from utils import native_bf16

TINY = ["--preset", "digits", "--model_channels", "8", "--batch_size", "8", "--num_samples", "4", "--sampling_steps", "4", "--rounds", "1",
        "--seconds", "0.01", "--wandb", "disabled", "--device", "cpu", "--starting", "False"]


def rows_of(path) -> dict:
    return {row["what"]: row for row in json.load(open(path))["rows"]}


def test_the_whole_of_it(tmp_path):
    out = tmp_path / "b.json"
    result = run("python", ROOT / "benchmark.py", *TINY, "--out", out, "--scaling", "True", "--memory_steps", "80", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = rows_of(out)
    trainer, bare = rows["trainer"], rows["bare network, float32"]
    assert trainer["of_bare_network"] > 0 and trainer["images_per_s"] > 0
    flops = rows["network, forward and backward"]["GFLOP_per_image"]
    assert bare["GFLOP_per_s"] == pytest.approx(bare["images_per_s"] * flops)
    for kind in ("float32", "bfloat16") if native_bf16(torch.device("cpu")) else ("float32",):
        for ceiling in ("matrix product", "3 x 3 convolution"):
            row = rows[f"{ceiling}, {kind}, one process"]
            expected = rows[f"bare network, {kind}"]["GFLOP_per_s"] / row["GFLOP_per_s"]
            assert row["reached_by_the_bare_network"] == pytest.approx(expected, rel=1e-6)  # one round: the median is that of one
    assert {name: rows[name]["calls"] for name in ("euler", "heun", "midpoint", "rk4", "dpmpp_2m", "stochastic_heun")} == {
        "euler": 4, "heun": 7, "midpoint": 8, "rk4": 16, "dpmpp_2m": 4, "stochastic_heun": 7}
    assert rows["heun"]["evaluations_per_s"] == pytest.approx(7 * rows["heun"]["images_per_s"])
    assert any("growth" in name for name in rows)
    content = json.load(open(out))
    scaling = {row["part"]: row["exponent"] for row in content["rows"] if "exponent" in row}
    assert set(scaling) == {"scaling with batch size", "scaling with model_channels, batch 2", "scaling with image side, batch 2",
                            "scaling with processes"}
    assert content["settings"]["model_channels"] == 8 and content["machine"]["torch"] == torch.__version__
    assert "step " not in result.stdout  # the trainer's own lines
    assert not list(tmp_path.glob("ckpts")) and not (ROOT / "ckpts" / "benchmark").exists()


def test_what_is_emulated_is_left_out(tmp_path, monkeypatch, capsys):
    """bfloat16 on a CPU that has none, in one line, so that nothing takes minutes."""
    monkeypatch.setattr(measuring, "native_bf16", lambda device: False)
    out = tmp_path / "b.json"
    benchmark.main([*TINY, "--out", str(out), "--sampling", "False"])
    assert capsys.readouterr().out.count("this device has no bfloat16 of its own: it is not measured\n") == 1
    rows = rows_of(out)
    assert "trainer" in rows and "matrix product, float32, one process" in rows and not any("bfloat16" in name for name in rows)
    options = benchmark.Options(bf16=True)
    assert measuring.kinds(options, torch.device("cpu")) == [False, True]  # asked for


def test_on_two_processes(tmp_path):
    out = tmp_path / "b.json"
    result = run(*launch(2), ROOT / "benchmark.py", *TINY, "--out", out, "--sampling", "False")
    assert result.returncode == 0, result.stderr
    rows = rows_of(out)
    assert "on 2 processes" in rows["trainer"]["part"]
    assert 0 <= rows["exchange of gradients, beside the backward pass"]["of_the_step"] < 1


def test_the_operations_of_a_convolution_and_of_its_gradient():
    conv, x = torch.nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 8, 8, requires_grad=True)
    assert measuring.flops_of(lambda: conv(x).sum().backward()) == 3 * 2 * (2 * 8 * 8) * 5 * 3 * 9


def test_the_operations_of_an_attention_and_of_one_image(tmp_path, digits):
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    attention = torch.nn.functional.scaled_dot_product_attention
    assert measuring.flops_of(lambda: attention(q, k, v).sum().backward()) == 6 * 2 * (2 * 3) * 16 * 16 * 8
    bare = measuring.Bare(make(tmp_path, digits), False)
    assert bare.flops() == measuring.flops_of(lambda: bare.backward(bare.trainer.net, rows=slice(1)))


def test_the_largest_batch_that_fits_to_an_eighth(tmp_path, digits, monkeypatch):
    """On a GPU that has memory for 37 images: 32, and 4 more; nothing of it stays."""
    trainer = make(tmp_path, digits)
    bare, forward = measuring.Bare(trainer, False), trainer.net.forward

    def limited(xt, t, label=None):
        assert xt.is_contiguous(memory_format=torch.channels_last)
        if len(xt) > 37:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(xt, t, label)

    monkeypatch.setattr(trainer.net, "forward", limited)
    assert measuring.largest_batch(trainer, bare) == 36
    assert len(bare.target) == 16 and all(p.grad is None for p in trainer.net.parameters())


def test_ceilings_count_their_operations(tmp_path, digits):
    trainer = make(tmp_path, digits)
    for work, count in measuring.ceilings(trainer, bf16=False).values():
        assert measuring.flops_of(work) == count


def test_turns_measure_one_step_of_each():
    """By works that tell seconds without taking them; the second step is the one that counts."""
    steps = []

    def work(name, seconds):
        return lambda n: steps.append((name, n)) or n * seconds * (1 if len(steps) > 1 else 100)

    times = measuring.in_turns({"a": work("a", 0.002), "b": work("b", 0.01)}, rounds=3, seconds=0.04)
    assert times == {"a": pytest.approx([0.002] * 3), "b": pytest.approx([0.01] * 3)}
    assert measuring.ratio(times, "b", "a") == pytest.approx(5)
    assert steps == [("a", 1), ("a", 1), ("b", 1), ("b", 1), *2 * [("a", 20), ("b", 4), ("b", 4), ("a", 20)]][:10]


def test_the_exponent_of_a_power_law():
    assert measuring.exponent({n: 3.0 * n**1.7 for n in (8, 16, 32)}) == pytest.approx(1.7)


def test_scaling_of_a_network_of_ones_own(tmp_path, monkeypatch, digits):
    """One without a width is measured against the rest."""
    class Own(torch.nn.Conv2d):
        def __init__(self, data_shape):
            super().__init__(data_shape[0], data_shape[0], 3, padding=1)

        def forward(self, xt, t, label=None):
            return super().forward(xt)

    monkeypatch.setitem(build.NETWORKS, "own", Own)
    monkeypatch.setattr(measuring, "measure_processes", lambda *arguments: None)
    options = benchmark.Options(**vars(tiny(tmp_path, network="own", class_conditional=False)), rounds=1, seconds=0.001)
    table = benchmark.Table()
    measuring.measure_scaling(table, options, make(tmp_path, digits, network="own", class_conditional=False))
    assert {row["part"] for row in table.rows} == {"scaling with batch size", "scaling with image side, batch 4"}


def test_a_peer_answers_with_its_operations_and_its_seconds(monkeypatch):
    """The process that serves a peer, here in a thread and with a small peer: per image, and as many steps as asked for."""
    steps = []

    def small(images):
        net = torch.nn.Conv2d(3, 4, 3)
        return net, lambda: net(images).square().mean(), lambda: steps.append(1)

    monkeypatch.setitem(peers.PEERS, "small", small)
    here, there = Pipe()
    arguments = (there, "small", "as it is", 2, torch.device("cpu"), torch.get_num_threads())
    thread = threading.Thread(target=peers.serve_peer, args=arguments)
    thread.start()
    assert here.recv() == 2 * 2 * (30 * 30) * 4 * 3 * 9  # forward and the weights' gradient: the images want none
    here.send(3)
    assert here.recv() > 0 and len(steps) == 3
    here.send(0)
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("end", ["error", "death"])
def test_a_peer_that_fails_is_told_of(monkeypatch, end, tmp_path, digits, capfd):
    """Here every peer fails in its process, by an error or by its death; the others are measured, and this one named."""

    def broken(images):
        os._exit(1) if end == "death" else (_ for _ in ()).throw(RuntimeError("no such kernel"))

    class Forked:  # in place of a spawned process, which would not know of `broken`
        def __init__(self, target, args, daemon):
            self.args = args

        def start(self):
            child = os.fork()
            if child == 0:
                peers.PEERS["torchcfm"] = broken
                peers.serve(*self.args)
                os._exit(0)

    monkeypatch.setattr(peers, "PEERS", {"torchcfm": broken})
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(peers, "get_context", lambda name: types.SimpleNamespace(Process=Forked, Pipe=Pipe))
    options = types.SimpleNamespace(batch_size=2, rounds=1, seconds=0.01, bf16=False)
    peers.measure_peers(benchmark.Table(), options, make(tmp_path, digits))
    expected = "its process was ended" if end == "death" else "RuntimeError: no such kernel"
    assert capfd.readouterr().out.count(f"torchcfm, as it is, cannot be measured ({expected})") == 1


@pytest.mark.parametrize("package, name", [("torchcfm", "torchcfm"), ("denoising_diffusion_pytorch", "denoising_diffusion_pytorch")])
def test_the_peers_train(package, name):
    pytest.importorskip(package)
    torch.manual_seed(0)
    net, loss, update = peers.PEERS[name](torch.rand(1, 3, 32, 32) * 2 - 1)
    before = [p.clone() for p in net.parameters()]
    value = loss()
    value.backward()
    update()
    assert math.isfinite(value.item()) and any(not torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_every_preset_has_options_and_data_without_download():
    for preset, settings in PRESETS.items():
        options = benchmark.Options(preset=preset, **settings)
        if options.dataset in measuring.SHAPES:
            assert measuring.load(options).data.shape == measuring.SHAPES[options.dataset]


@pytest.mark.parametrize("flags, words", [
    (["--preset", "cifar"], ["preset", "cifar10_debug"]),
    (["--rounds", "0"], ["rounds is 0"]),
    (["--seconds", "-1"], ["seconds is -1.0: expected more than 0"]),
    (["--out", "/nowhere/b.json"], ["out is"]),
    (["--batch", "3"], ["--batch is no setting", "--batch_size"]),
    (["--preset", "digits", "--batch_size", "2", "--accumulation_steps", "4"], ["batch_size 2 is less than 4"]),
])
def test_bad_options(flags, words):
    assert_one_line_error(run("python", ROOT / "benchmark.py", *flags), *words)
