"""The command line: presets, both spellings of a flag, one-line errors, and that the allowed names are those of the dictionaries."""

import dataclasses
import importlib
import os

import pytest
import torch
from conftest import ROOT, assert_one_line_error, flags, run, tiny

import main
from config import CHOICES, PRESETS, Config


def test_allowed_names_are_those_of_the_dictionaries():
    for file, table, *_ in CHOICES.values():
        assert main.names_in(file, table) == tuple(getattr(importlib.import_module(file[:-3]), table))


def test_presets_and_flags():
    assert main.read_config([]) == Config()
    words = "digits --weight-decay 0.1 --base_lr=3e-4 --channel-mults 1 2 2 --bf16 True --T_min 0.01"
    config = main.read_config(words.split())
    expected = dict(PRESETS["digits"], weight_decay=0.1, base_lr=3e-4, channel_mults=(1, 2, 2), bf16=True, T_min=0.01)
    assert config == Config(**expected)
    assert main.read_config(["--random_flip", "false"]).random_flip is False
    assert main.read_config(["moons", "--dataset", "some/file.npz"]).dataset == "some/file.npz"
    assert "base_lr 0.0003, " in main.in_short(config) and "seed" not in main.in_short(config)


def test_help_shows_settings_defaults_comments_and_names():
    result = run("python", "main.py", "--help", COLUMNS="200")
    assert result.returncode == 0, result.stderr
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in result.stdout
    for words in ("{rf,cosine,linear_vp,", "{euler,heun,midpoint,rk4,ddim,dpmpp_2m,dopri5,euler_maruyama,", "{None,euler_maruyama,",
                  "(default: 128)", "fashion_mnist", "after warm-up."):
        assert words in result.stdout, words


@pytest.mark.parametrize("arguments, words", [
    (["nope"], ["'nope' is no preset", "digits"]),
    (["--foo", "1"], ["--foo is no setting", "--run_name", "--tf32"]),
    (["--bathc-size", "4"], ["did you mean --batch_size?"]),
    (["--batch_size", "x"], ["--batch-size", "'x'", "expected int"]),
    (["--base_lr", "fast"], ["--base-lr", "expected float"]),
    (["--base_lr"], ["--base-lr"]),
    (["--process", "rff"], ["'rff'", "rf", "cosine", "linear_vp"]),
    (["--random_flip", "3"], ["True", "False"]),
    (["--channel_mults", "a"], ["--channel-mults"]),
    (["--channel_mults", "1,2"], ["--channel-mults", "spaces between"]),
    (["digits", "stray"], ["stray"]),
    (["digits", "--"], ["'--' is no setting"]),
    (["--digits"], ["without dashes", "sh run.sh digits"]),
    (["--dataset", "cifar11"], ["cifar11", "cifar10", "FILE.npz"]),
    (["--warmup_steps", "9", "--num_training_steps", "8"], ["warmup_steps 9 is longer", "--warmup_steps 0"]),
])
def test_wrong_command_lines_end_in_one_line(arguments, words, capfd):
    with pytest.raises(SystemExit) as end:
        main.read_config(arguments)
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, error


@pytest.mark.parametrize("arguments, words", [
    (["digits", "--device", "cuda"], ["--device cpu"]),
    (["digits", "--T_min", "0", "--target_type", "x1", "--model_type", "x0"], ["T_min 0.0", "--T_min 1e-4"]),
    (["--data_dir", "{tmp}/none"], ["CIFAR10 is not in", "cifar-10-binary.tar.gz", "digits"]),
    (["image_folder", "--data_dir", "{tmp}/none"], ["{tmp}/none", "class folders"]),
    (["moons", "--class_conditional", "True", "--dataset", "{tmp}/x.npy"], ["no labels", "--class_conditional False"]),
    (["digits", "--dataset", "{tmp}/x.npz"], ["cannot read {tmp}/x.npz"]),
    (["digits", "--channel_mults", "1", "2", "2", "2", "2"], ["halves 8 x 8"]),
])
def test_what_only_the_data_or_the_machine_can_tell(arguments, words, tmp_path):
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    environment = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    result = run("python", "main.py", *arguments, "--ckpt_dir", tmp_path, "--wandb", "disabled", **environment)
    assert_one_line_error(result, *[w.format(tmp=tmp_path) for w in words])


def test_rank_0_speaks_and_the_others_only_if_it_does_not():
    """Under torchrun they are ended while they wait (test_run.py has that); alone, as with a GPU too few, they say why."""
    assert_one_line_error(run("python", "main.py", "--foo", RANK="1", WORLD_SIZE="2"), "process 1: --foo is no setting")
    assert run("python", "main.py", "--help", RANK="1", WORLD_SIZE="2").stdout == ""


def test_help_imports_nothing_heavy():
    code = "import sys, main; main.read_config([]); print([m for m in ('torch', 'wandb', 'sklearn', 'numpy') if m in sys.modules])"
    assert run("python", "-c", code, cwd=ROOT).stdout.strip() == "[]"


# ---- GPUs, by a fake of the calls that ask for them


def nvidia_smi(folder, lists="GPU 0: NVIDIA A100 (UUID: GPU-1)"):
    """A PATH with an nvidia-smi that lists these GPUs."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{lists}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPUs here")
def test_gpus_that_torch_cannot_use_are_not_passed_over(tmp_path):
    """One line that says why and what to install; --device cpu, or hiding them, trains on the CPU, in one process."""
    words, seen = flags(tiny(tmp_path)), dict(PATH=nvidia_smi(tmp_path), CUDA_VISIBLE_DEVICES="0")
    words = [word for word in words if word not in ("--device", "cpu")]
    result = run("sh", "run.sh", *words, **seen)
    assert_one_line_error(result, "no GPU to use: torch", "does not see them", "pip install --force-reinstall torch==", "--device cpu")
    assert result.returncode == 2
    for device, visible in ((["--device", "cpu"], "0,1"), ([], "")):
        result = run("sh", "run.sh", *words, *device, "--run_name", f"run{visible}", **{**seen, "CUDA_VISIBLE_DEVICES": visible})
        assert result.returncode == 0 and "on 1 x cpu" in result.stdout, result.stderr


def test_why_torch_does_not_see_them(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by ...")

    monkeypatch.setattr(torch.cuda, "init", init)
    assert "(The NVIDIA driver on your system is too old (found version 12040)): pip install" in main.unusable_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert main.unusable_gpus() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert main.unusable_gpus()
    nvidia_smi(tmp_path, "No devices found.")
    assert main.unusable_gpus() is None


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


def test_gloo_speaks_before_ncclls_watchdog(monkeypatch):
    """A process that hangs is told of by gloo in one line, a minute before NCCL would abort; and cuDNN and TF32 are set as asked."""
    group = FakeGroup()
    for name, fake in (("is_available", lambda: True), ("device_count", lambda: 2), ("set_device", lambda device: None)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.distributed, "init_process_group", group.init)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_group", lambda: group)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("LOCAL_RANK", "1")
    for benchmark in (True, False):
        try:
            with main.set_up("auto", tf32=False, timeout=7.0, cudnn_benchmark=benchmark) as device:
                assert device == torch.device("cuda", 1)
                assert torch.backends.cudnn.benchmark == benchmark and not torch.backends.cudnn.allow_tf32
        finally:
            torch.set_float32_matmul_precision("highest")
    assert group.backend == "cpu:gloo,cuda:nccl" and group.minutes == {"gloo": 7.0, "nccl": 8.0}


NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, {kind} (run with NCCL_DEBUG=WARN for details)
{kind}: This usually reflects something.
Last error:
{last}"""
DUPLICATE = "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 5e000"
FULL = "Error while creating shared memory segment /dev/shm/nccl-h2HcBv (size 9637888), error: No space left on device (28)"
AWAY = "socketProgress: Connection closed by remote peer node2<41234>"


@pytest.mark.parametrize("error, status, words", [
    (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ..."), 2, "out of memory (CUDA error: out of memory)"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 2, "out of memory (cuDNN error"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 2, "--accumulation_steps"),
    (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nSearch for ..."), 2, "see nvidia-smi"),
    (torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"), 2, "not built for this GPU"),
    (torch.distributed.DistBackendError(NCCL.format(kind="ncclInvalidUsage", last=DUPLICATE)), 1, f"NCCL failed ({DUPLICATE})"),
    (torch.distributed.DistBackendError(NCCL.format(kind="ncclSystemError", last=FULL)), 1, f"NCCL failed ({FULL})"),
    (torch.distributed.DistBackendError(NCCL.format(kind="ncclRemoteError", last=AWAY)), 1, f"the other processes ({AWAY})"),
])
def test_errors_of_gpus_end_in_one_line(monkeypatch, capfd, error, status, words):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(main.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as end:
        main.end(error, 10.0)
    said = capfd.readouterr().err
    assert end.value.code == status and said.startswith("error: ") and said.count("\n") == 1 and words in said, said


def test_a_bug_is_no_error_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert main.end(RuntimeError("shapes cannot be multiplied"), 10.0) is None
