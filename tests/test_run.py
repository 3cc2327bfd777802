"""End to end, as a user runs it: `sh run.sh`, its options, the launcher, and the same losses on one rank or several."""

import json
import shutil

import pytest
import torch
from conftest import GPU, ROOT, assert_one_line_error, flags, launch, metrics_of, run, run_ranks, tiny
from test_logging_utils import read_wandb
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import saving
from trainer import DiffusionTrainer

SETTINGS = dict(num_training_steps=12, warmup_steps=5, base_lr=1e-3, time_sampler="stratified", random_flip=True)


@pytest.mark.parametrize("changes", [
    {},
    dict(coupling="ot_within_class", sde_sampler=None, time_sampler="edm_log_normal", importance_weights=True,
         loss_weighting="min_snr"),
])
@pytest.mark.usefixtures("without_curves")
def test_one_rank_two_ranks_and_two_accumulation_steps_agree(tmp_path, changes):
    """Losses to 1e-4 relative; weights to 1e-4, where Adam moved them by about 1e-2.

    float32 sums in another order differ by 1e-7, and Adam magnifies that where a gradient is near zero. Three ranks
    have 5 or 6 of the 16 rows, in parts of 2 or 3.
    """
    runs = {}
    for name, ranks, parts in (("one", 1, 1), ("two", 2, 1), ("parts", 1, 2), ("uneven", 3, 2)):
        result = run_ranks(ranks, tiny(tmp_path, run_name=name, accumulation_steps=parts, **{**SETTINGS, **changes}))
        assert result.returncode == 0, result.stderr
        lines = metrics_of(tmp_path / name)
        state = saving.load(str(tmp_path / name / "last.pt"))
        runs[name] = [line["loss"] for line in lines], [line["grad_norm"] for line in lines], state
    losses, norms, state = runs.pop("one")
    assert len(losses) == 12 and losses[-1] < losses[0]
    for name, (other_losses, other_norms, other) in runs.items():
        assert other_losses == pytest.approx(losses, rel=1e-4), name
        assert other_norms == pytest.approx(norms, rel=1e-2), name
        for part, other_part in ((state["net"], other["net"]), (state["ema"], other["ema"])):
            for key in part:
                torch.testing.assert_close(other_part[key], part[key], rtol=0, atol=1e-4)


def test_gradients_are_exchanged_once_a_step(tmp_path, monkeypatch):
    """Two ranks, three micro-batches, two steps: each bucket of gradients is reduced twice, not six times."""
    train = DiffusionTrainer.train

    def train_and_count(trainer):
        trainer.open_run()
        buckets = []

        def hook(state, bucket):
            buckets.append(bucket.index())
            return allreduce_hook(state, bucket)

        trainer.ddp.register_comm_hook(torch.distributed.group.WORLD, hook)
        train(trainer)
        print("exchanges", sorted(buckets))
        assert buckets and all(buckets.count(i) == 2 for i in set(buckets)), buckets

    monkeypatch.setattr(DiffusionTrainer, "train", train_and_count)
    result = run_ranks(2, tiny(tmp_path, batch_size=12, accumulation_steps=3, num_training_steps=2, warmup_steps=0))
    assert result.returncode == 0 and "exchanges [0" in result.stdout, result.stderr


def test_on_a_gpu(tmp_path):
    """As a user has it there: bf16 and torch.compile on. The loss falls, and samples are drawn."""
    environment = dict(GPUS="1", CUDA_VISIBLE_DEVICES=GPU)
    # nvidia-smi alone may be there without a GPU, or beside a CPU build of torch
    code = "import torch; print(torch.cuda.is_available())"
    if not shutil.which("nvidia-smi") or run("python", "-c", code, **environment).stdout.strip() != "True":
        pytest.skip("no GPU here that torch can use")
    config = tiny(tmp_path, num_training_steps=100, base_lr=3e-3, log_every=50, dropout=0.1, accumulation_steps=2)
    result = run("sh", ROOT / "run.sh", *flags(config), "--device", "cuda", **environment)
    assert result.returncode == 0 and "1 x cuda" in result.stdout, result.stderr
    first, last = (json.loads(line)["loss"] for line in open(tmp_path / "digits" / "metrics.jsonl"))
    assert last < first
    drawn = run("python", "sample.py", "--ckpt", tmp_path / "digits" / "last.pt", "--num", "20", "--out",
                tmp_path / "x.npz", **environment)
    assert drawn.returncode == 0, drawn.stderr


def test_preset_through_run_sh_with_wandb(tmp_path):
    config = tiny(tmp_path, run_name="my run", wandb="offline")
    words = flags(config)
    result = run("sh", ROOT / "run.sh", "digits", *words, cwd="/", GPUS="2")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    folder = tmp_path / "my run"
    for name in ("last.pt", "metrics.jsonl", "samples/ema_heun_0000004.png"):
        assert (folder / name).exists() and str(folder / name.split("/")[0]) in result.stdout
    logged, history = read_wandb(folder)
    assert logged["channel_mults"] == [1, 2] and logged["compile"] is None and set(vars(config)) <= set(logged)
    assert [h["step"] for h in history if "loss" in h] == [1, 2, 3, 4]
    assert sum(any("ema_heun" in k for k in h) for h in history) == 1
    again = run("sh", ROOT / "run.sh", "digits", *words, GPUS="1")
    assert again.returncode == 0 and "trained already" in again.stdout
    words[words.index("--base_lr") + 1] = "0.5"
    other = run("python", "main.py", "digits", *words)
    assert_one_line_error(other, f"base_lr ({config.base_lr} there, 0.5 now)", "--run_name")


def test_bad_input_through_the_launcher_is_one_line(tmp_path):
    result = run("sh", ROOT / "run.sh", "digits", "--dataset", tmp_path / "no.npz", "--ckpt_dir", tmp_path, GPUS="2")
    assert_one_line_error(result, "cannot read")
    assert result.returncode == 2
    result = run("python", "main.py", "--batch_size", "1", WORLD_SIZE="2")
    assert_one_line_error(result, "batch_size 1 is less than 2: ranks (2)")


@pytest.mark.parametrize("options, words", [
    (dict(NODES="2"), "HEAD=NAME:PORT"),
    (dict(NODES="2", HEAD="node1"), "expected NAME:PORT"),
    (dict(NODES="2", HEAD="node1:x"), "HEAD=NAME:PORT"),
    (dict(NODES="two"), "NODES is 'two'"),
    (dict(GPUS="0"), "GPUS is '0'"),
    (dict(THREADS="-3"), "THREADS is '-3'"),
    (dict(RESTARTS="often"), "RESTARTS is 'often'"),
    (dict(PYTHON="/nowhere/python"), "no /nowhere/python here"),
])
def test_wrong_options_of_run_sh(options, words):
    assert_one_line_error(run("sh", ROOT / "run.sh", "digits", **options), words)


def test_a_crash_keeps_its_traceback_and_a_signal_is_named(tmp_path):
    (tmp_path / "crash.py").write_text("raise RuntimeError('a bug')")
    (tmp_path / "killed.py").write_text("import os; os.kill(os.getpid(), 9)")
    (tmp_path / "aborted.py").write_text("import os; os.abort()")
    crash, killed = run(*launch(1), tmp_path / "crash.py"), run(*launch(1), tmp_path / "killed.py")
    aborted = run(*launch(1), tmp_path / "aborted.py")
    assert aborted.returncode == 134 and "rank 0 was ended by SIGABRT (NCCL time-out?)" in aborted.stderr
    assert crash.returncode == 1 and crash.stderr.count("Traceback") == 1 and "a bug" in crash.stderr
    assert killed.returncode == 137 and "SIGKILL" in killed.stderr and "Traceback" not in killed.stderr
