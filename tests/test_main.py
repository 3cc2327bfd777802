"""The command line: presets, both spellings of a flag, errors of one line; and GPUs, by fakes of torch's calls."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
import urllib.request
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, flags, run, tiny

import command_line
import distributed
import main
from config import PRESETS, Config, Sampler, key_of
from sampling import SAMPLERS


def test_allowed_names_are_those_of_the_dictionaries():
    tables = set(re.findall(r'key_of\("([\w.]+)"\)', (ROOT / "config.py").read_text()))
    assert len(tables) > 10
    for table in tables:
        file, name = table.split(".")
        assert get_args(key_of(table)) == tuple(getattr(importlib.import_module(file), name))
    assert get_args(Sampler) == tuple(SAMPLERS)


def test_presets_and_flags():
    assert command_line.read_config([]) == Config()
    words = "digits --weight-decay 0.1 --base_lr=3e-4 --channel-mults 1 2 2 --bf16 True --T_min 0.01"
    config = command_line.read_config(words.split())
    expected = dict(PRESETS["digits"], weight_decay=0.1, base_lr=3e-4, channel_mults=(1, 2, 2), bf16=True, T_min=0.01)
    assert config == Config(**expected)
    assert command_line.read_config(["--random_flip", "False"]).random_flip is False
    assert command_line.read_config(["moons", "--dataset", "some/file.npz"]).dataset == "some/file.npz"
    assert "base_lr 0.0003, " in command_line.in_short(config) and "seed" not in command_line.in_short(config)


def test_output_that_nobody_reads_on(tmp_path):
    """As of `main.py | head -1`: it ends without a word."""
    command = [sys.executable, ROOT / "main.py", "digits", *flags(tiny(tmp_path, num_training_steps=100_000))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_help_shows_settings_defaults_comments_and_names():
    result = run("python", "main.py", "--help", COLUMNS="200")
    assert result.returncode == 0, result.stderr
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in result.stdout
    for words in ("{rf,cosine,linear_vp,", "{euler,heun,midpoint,rk4,ddim,dpmpp_2m,dopri5,flow_map,euler_maruyama,",
                  "{None,euler_maruyama,", "(default: 128)", "fashion_mnist", "after warm-up."):
        assert words in result.stdout, words


@pytest.mark.parametrize("arguments, words", [
    (["nope"], ["'nope' is no preset", "digits"]),
    (["--foo", "1"], ["Unrecognized options: --foo", "`--help` lists all settings"]),
    (["--bathc-size", "4"], ["Perhaps you meant: --batch-size"]),
    (["--batch_size", "x"], ["--batch-size", "int", "'x'"]),
    (["--base_lr", "fast"], ["--base-lr", "float: 'fast'"]),
    (["--base_lr"], ["--base-lr"]),
    (["--process", "rff"], ["'rff'", "rf", "cosine", "linear_vp"]),
    (["--random_flip", "3"], ["True", "False"]),
    (["--channel_mults", "a"], ["--channel-mults"]),
    (["--channel_mults", "1,2"], ["--channel-mults", "spaces separate"]),
    (["digits", "stray"], ["stray"]),
    (["digits", "--"], ["'--' is no setting"]),
    (["--digits"], ["Unrecognized options: --digits"]),
    (["--warmup_steps", "9", "--num_training_steps", "8"], ["warmup_steps 9 is longer", "--warmup_steps 0"]),
])
def test_wrong_command_lines_end_in_one_line(arguments, words, capfd):
    with pytest.raises(SystemExit) as end:
        command_line.read_config(arguments)
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, error


@pytest.mark.parametrize("arguments, words", [
    (["digits", "--device", "cuda"], ["--device cpu"]),
    (["digits", "--T_min", "0", "--target_type", "x1", "--model_type", "x0"], ["T_min 0.0", "--T_min 1e-4"]),
    (["--data_dir", "{tmp}/none"], ["CIFAR10 is not in", "cifar-10-python.tar.gz", "digits"]),
    (["image_folder", "--data_dir", "{tmp}/none"], ["{tmp}/none", "class folders"]),
    (["moons", "--class_conditional", "True", "--dataset", "{tmp}/x.npy"], ["no labels", "--class_conditional False"]),
    (["digits", "--dataset", "{tmp}/x.npz"], ["cannot read {tmp}/x.npz"]),
    (["digits", "--channel_mults", "1", "2", "2", "2", "2"], ["halves 8 x 8"]),
    (["--dataset", "cifar11"], ["'cifar11' is not known here", "cifar10", "a FILE.npz"]),
])
def test_errors_of_the_data_and_the_machine_are_one_line(arguments, words, tmp_path, monkeypatch, capfd):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # which keeps the proxies of its first call
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    np.save(tmp_path / "x.npy", np.zeros((4, 2)))
    with pytest.raises(SystemExit) as end:
        main.main([*arguments, "--ckpt_dir", str(tmp_path), "--wandb", "disabled"])
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word.format(tmp=tmp_path) in error, error


def test_rank_0_prints_errors_and_the_others_only_if_it_does_not():
    """Under torchrun they are ended while they wait (see test_run.py). Alone, as with a GPU too few, they print why."""
    wrong = run("python", "main.py", "--foo", RANK="1", WORLD_SIZE="2")
    assert_one_line_error(wrong, "rank 1: Unrecognized options: --foo")
    assert run("python", "main.py", "--help", RANK="1", WORLD_SIZE="2").stdout == ""


def test_help_imports_nothing_heavy():
    code = ("import sys, command_line, main; command_line.read_config([]); "
            "print({'torch', 'wandb', 'sklearn', 'numpy'} & set(sys.modules))")
    assert run("python", "-c", code, cwd=ROOT).stdout.strip() == "set()"


# ---- GPUs, by a fake of the calls that ask for them


def nvidia_smi(folder, lists="GPU 0: NVIDIA A100 (UUID: GPU-1)"):
    """A PATH with an nvidia-smi that lists these GPUs."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{lists}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPUs here")
def test_gpus_that_torch_cannot_use_are_not_ignored(tmp_path, monkeypatch):
    """One line says why, and what to install. With --device cpu, or hidden GPUs, one rank trains on the CPU."""
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path))
    words = [word for word in flags(tiny(tmp_path)) if word not in ("--device", "cpu")]
    result = run("sh", "run.sh", *words, CUDA_VISIBLE_DEVICES="0")
    assert_one_line_error(result, "sees no GPU here", "--device cpu", "docs/troubleshooting.md")
    assert result.returncode == 2
    for device, visible in (("cpu", "0,1"), ("auto", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        result = run("sh", "run.sh", *words, "--device", device, PYTHON="echo")  # shows the command
        assert result.returncode == 0 and "--nproc-per-node=1 " in result.stdout, result
        with distributed.set_up(device) as chosen:
            assert chosen == torch.device("cpu")


def test_why_torch_does_not_see_them(monkeypatch, tmp_path, capfd):
    """torch warns of the reason as it looks for GPUs; the error line holds it."""
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn("driver too old (12040)", stacklevel=1))
    with pytest.raises(SystemExit), distributed.set_up("auto"):
        pass
    assert "sees no GPU here (driver too old (12040))" in capfd.readouterr().err
    assert distributed.has_nvidia_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not distributed.has_nvidia_gpus()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert distributed.has_nvidia_gpus()
    nvidia_smi(tmp_path, "No devices found.")
    assert not distributed.has_nvidia_gpus()


class FakeGroup:
    """Keeps the time-outs that it is given, in minutes."""

    def __init__(self):
        self.minutes = {}

    def init(self, backend, timeout):
        self.backend, self.minutes["gloo"] = backend, timeout.total_seconds() / 60

    def _get_backend(self, device):
        assert device.type == "cuda"
        return self

    def _set_default_timeout(self, timeout):
        self.minutes["nccl"] = timeout.total_seconds() / 60


def test_gloo_times_out_before_nccls_watchdog(monkeypatch):
    """gloo reports a rank that hangs in one line, a minute before NCCL would abort. Also the settings of cuDNN."""
    group = FakeGroup()
    fakes = dict(is_available=lambda: True, device_count=lambda: 2, set_device=lambda device: None)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.distributed, "init_process_group", group.init)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_group", lambda: group)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("LOCAL_RANK", "1")
    for benchmark in (True, False):
        try:
            with distributed.set_up("auto", tf32=False, timeout=7.0, cudnn_benchmark=benchmark) as device:
                assert device == torch.device("cuda", 1)
                assert torch.backends.cudnn.benchmark == benchmark and not torch.backends.cudnn.allow_tf32
        finally:
            torch.set_float32_matmul_precision("highest")
    assert group.backend == "cpu:gloo,cuda:nccl" and group.minutes == {"gloo": 7.0, "nccl": 8.0}


NCCL = """NCCL error in: .../ProcessGroupNCCL.cpp:3690, {kind} (run with NCCL_DEBUG=WARN for details)
{kind}: This usually reflects something.
Last error:
{last}"""
DUPLICATE = "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 5e000"
FULL = "Error while creating shared memory segment /dev/shm/nccl-h2HcBv (size 9637888), error: No space left (28)"
AWAY = "socketProgress: Connection closed by remote peer node2<41234>"


def nccl_error(kind, last):
    return torch.distributed.DistBackendError(NCCL.format(kind=kind, last=last))


@pytest.mark.parametrize("error, status, words", [
    (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ..."), 2,
     "CUDA error: out of memory: out of memory"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 2, "out of memory: raise"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 2,
     "--accumulation_steps"),
    (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nSearch for ..."), 2,
     "see nvidia-smi"),
    (torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"), 2,
     "not built for this GPU"),
    (nccl_error("ncclInvalidUsage", DUPLICATE), 2, f"{DUPLICATE}: NCCL failed"),
    (nccl_error("ncclSystemError", FULL), 2, f"{FULL}: NCCL failed"),
    (nccl_error("ncclRemoteError", AWAY), 1, f"the other ranks ({AWAY})"),
])
def test_errors_of_gpus_end_in_one_line(monkeypatch, capfd, error, status, words):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as end:
        distributed.end(error, 10.0)
    printed = capfd.readouterr().err
    assert end.value.code == status and printed.startswith("error: "), printed
    assert printed.count("\n") == 1 and words in printed, printed


def test_a_bug_is_no_error_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert distributed.end(RuntimeError("shapes cannot be multiplied"), 10.0) is None
