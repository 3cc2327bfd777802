"""Runs that are killed or stopped, or that meet a full disk or a lost rank, end as if nothing had happened.

Processes, signals, files and disks are real. `python -m pytest tests/test_faults.py --faults-long -s` also kills runs
at 30 random moments and prints how many came out bit-equal.
"""

import contextlib
import fcntl
import functools
import glob
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import PATIENCE, ROOT, assert_one_line_error, flags, launch, make, metrics_of, run, run_ranks, tiny

import command_line
import distributed
import main
import sampling
import saving
from data_utils import load_dataset
from trainer import DiffusionTrainer
from utils import UserError

FAULTS = dict(num_training_steps=60, warmup_steps=5, base_lr=1e-3, lr_schedule="cosine", time_sampler="stratified",
              random_flip=True, dropout=0.2, log_every=4, save_every=6)
pytestmark = pytest.mark.usefixtures("without_curves")


# ---- A run in the background


class Run:
    """`sh run.sh`, or `python main.py` for one rank, in the background.

    All processes that it starts have the folder in their arguments.
    """

    attempts = itertools.count()

    def __init__(self, folder, ranks=2, restarts=0, **changes):
        config = tiny(folder, **{**FAULTS, **changes})
        self.folder, self.name = folder / config.run_name, f"ckpt_dir {folder}"
        self.output = folder.with_name(f"{folder.name}_{config.run_name}.out")  # of all attempts
        self.errors = folder.with_name(f"{folder.name}_{config.run_name}_{next(self.attempts)}.err")
        command = ["sh", ROOT / "run.sh"] if ranks > 1 else [sys.executable, ROOT / "main.py"]
        environment = {**os.environ, "PYTHON": sys.executable, "THREADS": "1", "GPUS": str(ranks),
                       "WANDB_MODE": config.wandb or "disabled", "RESTARTS": str(restarts)}
        with open(self.output, "a") as output, open(self.errors, "w") as errors:
            self.process = subprocess.Popen([*command, *flags(config)], stdin=subprocess.DEVNULL, stdout=output,
                                            stderr=errors, env=environment, start_new_session=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def wait_for(self, ready, seconds=PATIENCE):
        """Until `ready()`, with the run alive."""
        deadline = time.monotonic() + seconds
        while not ready():
            alive = time.monotonic() < deadline and self.process.poll() is None
            assert alive, self.errors.read_text() + self.output.read_text()
            time.sleep(0.01)

    def wait_for_checkpoint(self, step):
        self.wait_for(lambda: any(n >= step for n, _ in saving.numbered(str(self.folder))))

    def workers(self):
        """Process ids of the workers, in order of rank."""
        if "launch.py" not in open(f"/proc/{self.process.pid}/cmdline").read():
            return [self.process.pid]
        return children(self.process.pid)

    def signal_workers(self, number):
        for pid in self.workers():
            os.kill(pid, number)

    def end(self, seconds=PATIENCE):
        """Waits for the end. Returns the exit status and the text of stderr."""
        status = self.process.wait(timeout=seconds)
        return status, self.errors.read_text()

    def kill(self):
        """SIGKILL to the launcher and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        subprocess.run(["pkill", "-KILL", "-f", self.name], check=False)
        self.process.wait()


def children(pid) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


def finish(folder, ranks=2, **changes):
    """Resumes the run of the same settings, up to its end. Returns the texts of stdout and stderr."""
    again = run_ranks(ranks, tiny(folder, **{**FAULTS, **changes}))
    assert again.returncode == 0, again.stderr
    return again.stdout, again.stderr


def result_of(folder):
    """What must be bit-equal: weights, EMA, optimizer and step, as a digest; and the metrics, without the speed."""
    state = saving.load(str(folder / "last.pt"))
    state.pop("config")
    return saving.digest(state), metrics_of(folder)


@pytest.fixture
def straight(shared):
    """The function that gives the result of a run without faults, made once in a session."""

    def result(ranks=2, **changes):
        folder = shared / "_".join(map(str, ["straight", ranks, *changes]))
        folder.mkdir(exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            finish(folder, ranks, **changes)  # which does nothing if it is there
        digest, lines = result_of(folder / "digits")
        assert [line["step"] for line in lines] == list(range(4, 61, 4))
        return digest, lines

    return result


# ---- Killed


def test_killed_twice_and_started_again_is_bit_equal(tmp_path, straight):
    """SIGKILL to all processes, at the start and near the end; wandb has one run of it all."""
    for step in (1, 40):
        with Run(tmp_path, wandb="offline") as killed:
            killed.wait_for_checkpoint(step)
            killed.kill()
        for folder in (tmp_path / "digits" / "wandb").glob("offline-run-*_*"):  # named by the second
            folder.rename(folder.with_name(f"offline-run-{step}-{folder.name.split('-')[-1]}"))
    output, _ = finish(tmp_path, wandb="offline")
    assert "resuming " in output
    assert result_of(tmp_path / "digits") == straight()
    folders = list((tmp_path / "digits" / "wandb").glob("offline-run-*"))
    assert len(folders) == 3
    assert {path.name.split("-")[-1] for path in folders} == {(tmp_path / "digits" / "wandb_id").read_text().split()[0]}
    assert not [name for name in os.listdir(tmp_path / "digits") if ".tmp" in name]


def test_killed_at_random_moments(request, tmp_path, straight):
    """30 runs, each killed once between its first file and its end, and started again. How many come out bit-equal?"""
    if not request.config.getoption("--faults-long"):
        pytest.skip("takes some five minutes: --faults-long")
    rng, equal, length = random.Random(0), 0, {}
    for ranks in (1, 2):  # how long does a run take, from its first file on?
        with Run(tmp_path, ranks, run_name=f"whole{ranks}") as whole:
            whole.wait_for(whole.folder.exists)
            start = time.monotonic()
            assert whole.end()[0] == 0
            length[ranks] = time.monotonic() - start
    for i in range(30):
        ranks, folder = 1 + i % 2, tmp_path / str(i)
        folder.mkdir()
        moment = rng.uniform(0, length[ranks])
        with Run(folder, ranks) as killed:
            killed.wait_for(killed.folder.exists)
            time.sleep(moment)
            killed.kill()
        steps = [n for n, _ in saving.numbered(str(killed.folder))]
        finish(folder, ranks)
        same = result_of(killed.folder) == straight(ranks)
        equal += same
        print(f"{i}: {ranks} ranks, killed {moment:.2f} s of {length[ranks]:.2f} s after its first file, "
              f"checkpoints {steps}: {'bit-equal' if same else 'DIFFERENT'}")
    print(f"{equal} of 30 came out bit-equal")
    assert equal == 30


def test_one_of_two_is_killed(tmp_path, straight):
    """It ends all, with one line, and the same command resumes the run. With restarts the run resumes by itself."""
    with Run(tmp_path) as broken:
        broken.wait_for_checkpoint(12)
        os.kill(broken.workers()[1], signal.SIGKILL)
        status, errors = broken.end()
    assert status == 137 and "rank 1 was ended by SIGKILL" in errors and "Traceback" not in errors, errors
    last = max(step for step, _ in saving.numbered(str(tmp_path / "digits")))
    with Run(tmp_path, restarts=2) as broken:
        broken.wait_for_checkpoint(last + 1)
        os.kill(broken.workers()[1], signal.SIGKILL)
        status, errors = broken.end()
    assert status == 0 and "Traceback" not in errors, errors
    assert broken.output.read_text().count("resuming ") == 2
    assert result_of(tmp_path / "digits") == straight()


def test_the_launcher_is_killed(tmp_path, straight):
    """Its orphans stop by themselves with a checkpoint. The same command may be given at once, and waits for them."""
    with Run(tmp_path) as orphans:
        orphans.wait_for_checkpoint(12)
        workers = orphans.workers()
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        orphans.process.kill()
        orphans.process.wait()
        with Run(tmp_path) as again:
            again.wait_for(lambda: again.output.read_text().count("items of shape") == 2)  # it waits for the folder
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
            status, errors = again.end()
        assert status == 0, errors
        assert "stopped by SIGHUP at step 1" in orphans.errors.read_text()
    assert result_of(tmp_path / "digits") == straight()


# ---- Moved to another number of ranks


def test_a_run_resumes_on_another_number_of_ranks(tmp_path, straight):
    """The losses are those of one rank to rounding without dropout, and close to them with dropout, which differs."""
    changes = dict(dropout=0.0, lr_schedule="constant")
    for ranks, steps in ((1, 16), (2, 60)):
        finish(tmp_path, ranks, num_training_steps=steps, run_name="moved", **changes)
    stayed, (_, moved) = straight(1, **changes)[1], result_of(tmp_path / "moved")
    assert [line["learning_rate"] for line in moved] == [line["learning_rate"] for line in stayed]
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in stayed], rel=1e-4)

    with Run(tmp_path) as killed:
        killed.wait_for_checkpoint(12)
        killed.kill()
    finish(tmp_path, 1)
    stayed, (_, moved) = straight()[1], result_of(tmp_path / "digits")
    a, b = (torch.tensor([line["loss"] for line in lines]) for lines in (moved, stayed))
    assert len(a) == len(b) and (a - b).abs().max() > 0 and (a - b).abs().mean() < 0.5 * b[4:].std()


# ---- Stopped


def stop_and_resume(tmp_path, straight, number, ranks, target=None, again=False, checkpoint=12, **changes):
    """Stops a run by the signal at this checkpoint, and resumes it: one line, status 75, a checkpoint, the same end."""
    with Run(tmp_path, ranks, **changes) as stopped:
        stopped.wait_for_checkpoint(checkpoint)
        os.kill(stopped.workers()[target] if target is not None else stopped.process.pid, number)
        while again and stopped.process.poll() is None:  # impatiently
            os.kill(stopped.process.pid, number)
            time.sleep(0.01)
        status, errors = stopped.end()
    assert status == command_line.STATUS and errors.count("\n") == 1, (status, errors)
    assert f"stopped by {command_line.signal_name(number)} at step" in errors, errors
    assert "the same command resumes it" in errors
    step = saving.load(str(stopped.folder / "last.pt"))["step"]
    assert f"at step {step}, with a checkpoint" in errors and checkpoint <= step < 60
    finish(tmp_path, ranks, sample_every=changes.get("sample_every", 0))
    assert result_of(stopped.folder) == straight(ranks)
    return step


@pytest.mark.parametrize("number, ranks, target, again", [
    (signal.SIGTERM, 2, None, True),
    (signal.SIGUSR1, 2, None, False),
    (signal.SIGTERM, 1, None, True),
    (signal.SIGINT, 2, 1, False),  # to one of two ranks: both stop
])
def test_a_signal_stops_a_run_with_a_checkpoint(tmp_path, straight, number, ranks, target, again):
    stop_and_resume(tmp_path, straight, number, ranks, target, again)


@pytest.mark.parametrize("target, sampling_steps", [(None, 100_000), (1, 500)])
def test_a_signal_breaks_off_sampling(tmp_path, straight, target, sampling_steps):
    """The grids of step 30 would take minutes; or one rank alone gets the signal. The resumed run draws them."""
    long = dict(sample_every=30, sampling_steps=sampling_steps)
    step = stop_and_resume(tmp_path, straight, signal.SIGTERM, 2, target, checkpoint=30, **long)
    assert step == 30
    assert len(os.listdir(tmp_path / "digits" / "samples")) == 8  # two steps, two weights, two samplers


def test_a_signal_breaks_off_an_evaluation(tmp_path, straight):
    """That of step 30 would take minutes. The resumed run makes up for it. Evaluations leave the training as it is."""
    evaluations = dict(evaluate_every=30, evaluation_samples=20)
    with Run(tmp_path, 2, **evaluations, sampling_steps=100_000) as stopped:
        stopped.wait_for_checkpoint(30)
        os.kill(stopped.process.pid, signal.SIGTERM)
        status, errors = stopped.end()
    assert status == command_line.STATUS and errors.count("\n") == 1, errors
    assert "at step 30, with a checkpoint" in errors, errors
    finish(tmp_path, 2, **evaluations)
    digest, lines = result_of(tmp_path / "digits")
    assert [line["step"] for line in lines if "recognised" in line] == [30, 60]
    assert (digest, [line for line in lines if "recognised" not in line]) == straight()


def test_ctrl_c_in_a_terminal(tmp_path):
    """The terminal sends SIGINT to all processes of the foreground, the shell and wandb's among them."""
    terminal, its_end = os.openpty()
    config = tiny(tmp_path, **{**FAULTS, "num_training_steps": 100_000, "wandb": "offline"})
    environment = {**os.environ, "PYTHON": sys.executable, "THREADS": "1", "GPUS": "2", "WANDB_MODE": "offline"}
    process = subprocess.Popen(["sh", ROOT / "run.sh", *flags(config)], stdin=its_end, stdout=its_end, stderr=its_end,
                               env=environment, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(its_end, termios.TIOCSCTTY, 0))
    os.close(its_end)
    shown, deadline = b"", time.monotonic() + PATIENCE
    os.set_blocking(terminal, False)
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError, OSError):
            shown += os.read(terminal, 100_000)
        if (tmp_path / "digits" / "last.pt").exists():
            os.write(terminal, b"\x03")
            break
        time.sleep(0.05)
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError, OSError):
            shown += os.read(terminal, 100_000)
        time.sleep(0.05)
    with contextlib.suppress(BlockingIOError, OSError):
        shown += os.read(terminal, 100_000)
    assert process.wait(1) == command_line.STATUS, shown.decode()
    assert b"stopped by Ctrl-C at step" in shown and b"Traceback" not in shown, shown.decode()


def test_a_signal_before_training_ends_at_once(tmp_path):
    """There is nothing to save; here while it waits for the folder, which another run holds."""
    with Run(tmp_path, 1, num_training_steps=100_000) as other:
        other.wait_for_checkpoint(1)
        with Run(tmp_path, 1, num_training_steps=100_000) as stopped:
            # both write into one file
            stopped.wait_for(lambda: stopped.output.read_text().count("items of shape") == 2)
            stopped.process.terminate()
            status, errors = stopped.end()
        assert status == command_line.STATUS and errors == "stopped by SIGTERM; the same command resumes it\n"


def has_met_the_others(pid):
    """Whether a rank has its threads of gloo. While the ranks still meet, in C++, none hears a signal."""
    names = []
    for path in glob.glob(f"/proc/{pid}/task/*/comm"):
        with contextlib.suppress(OSError), open(path) as file:
            names.append(file.read().strip())
    return any("gloo" in name for name in names)


def test_sampling_that_is_stopped(tmp_path, digits):
    """It cannot be resumed, and its status is that of a signal."""
    make(tmp_path, digits).train()
    command = ["sample.py", "--ckpt", tmp_path / "digits" / "last.pt", "--out", tmp_path / "x.npz",
               "--sampling_steps", "1000000"]
    with subprocess.Popen([sys.executable, *launch(2)[1:], *command], cwd=ROOT, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as process:
        deadline, listening = time.monotonic() + PATIENCE, []
        while len(listening) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            listening = [pid for pid in children(process.pid) if has_met_the_others(pid)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and errors == "stopped by Ctrl-C\n", errors


def test_nohup_outlives_the_terminal(tmp_path):
    """Under nohup, which ignores SIGHUP, the launcher and the ranks ignore it too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        lasting = Run(tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    with lasting:
        lasting.wait_for_checkpoint(12)
        for pid in [lasting.process.pid, *lasting.workers()]:
            os.kill(pid, signal.SIGHUP)
        status, errors = lasting.end()
    assert status == 0 and not errors, errors


# ---- Files


@pytest.mark.parametrize("damage", ["truncated", "flipped", "code"])
def test_a_damaged_checkpoint_is_ignored(tmp_path, digits, capfd, damage):
    """The newest is of step 60, the one before of step 54; the run goes back to that, and ends the same."""
    folder = tmp_path / "digits"
    make(tmp_path, digits, **FAULTS).train()
    expected, content = result_of(folder), (folder / "last.pt").read_bytes()
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":  # a bit of a weight
        matrix = next(x for x in saving.load(str(folder / "last.pt"))["net"].values() if x.ndim == 2)
        place = content.find(matrix.numpy().tobytes())
        assert place > 0
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    else:
        content = b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "exploded").encode()
    (folder / "last.pt").write_bytes(content)  # and the file of step 60, which is the same
    capfd.readouterr()
    make(tmp_path, digits, **FAULTS).train()
    output, errors = capfd.readouterr()
    assert errors.count("\n") == 1, errors
    assert "last.pt" in errors and "going back to" in errors and "step_0000054.pt" in errors, errors
    assert "from step 54" in output and not (tmp_path / "exploded").exists()
    assert result_of(folder) == expected


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 3 MB, a file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk):
    """A file that takes all the room of the disk."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def test_a_full_disk(small_disk, straight):
    """A save that fails is reported, and training continues. Older checkpoints stay. With room, it is done again."""
    with Run(small_disk, 1) as full:
        full.wait_for_checkpoint(12)
        full.signal_workers(signal.SIGSTOP)
        before = saving.numbered(str(full.folder))
        fill(small_disk)
        full.signal_workers(signal.SIGCONT)
        full.wait_for(lambda: "cannot write " in full.errors.read_text())
        full.signal_workers(signal.SIGSTOP)
        assert saving.numbered(str(full.folder)) == before and all(saving.load(path) for _, path in before)
        os.remove(small_disk / "filler")
        full.signal_workers(signal.SIGCONT)
        status, errors = full.end()
    assert status == 0 and "make room" in errors and "Traceback" not in errors, errors
    assert result_of(full.folder) == straight(1)


def test_a_disk_that_stays_full(small_disk, straight):
    """The run ends with one more line. Its last checkpoint is whole; with room, the same command resumes from it."""
    with Run(small_disk, 1) as full:
        full.wait_for_checkpoint(12)
        full.signal_workers(signal.SIGSTOP)
        fill(small_disk)
        full.signal_workers(signal.SIGCONT)
        status, errors = full.end()
    assert status == 2 and "Traceback" not in errors, errors
    assert errors.splitlines()[-1].startswith("error: the checkpoint of step 60 cannot be written; make room"), errors
    os.remove(small_disk / "filler")
    output, _ = finish(small_disk, 1)
    assert "resuming " in output and result_of(full.folder) == straight(1)


def test_a_full_disk_without_root(tmp_path, digits, capsys, monkeypatch):
    """Each attempt is reported, and none leaves a part of a file. A limit of file sizes stands in for the disk."""
    trainer = make(tmp_path, digits, num_training_steps=6, save_every=2)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, old[1][1]))
    try:
        with pytest.raises(UserError, match="the checkpoint of step 6 cannot be written; make room"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old[1])
        signal.signal(signal.SIGXFSZ, old[0])
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 6, warnings
    assert all(line.startswith("warning: cannot write") and "make room" in line for line in warnings), warnings
    assert not [f for f in os.listdir(tmp_path / "digits") if f.endswith(".pt") or ".tmp" in f]


def test_a_save_that_failed_is_tried_again_at_the_next_line_of_metrics(tmp_path, digits, capsys, monkeypatch):
    tried, save = [], saving.save

    def fails_once(folder, state, *settings):
        tried.append(state["step"])
        if len(tried) == 1:
            raise UserError("cannot write it (No space left on device)")
        save(folder, state, *settings)

    monkeypatch.setattr(saving, "save", fails_once)
    make(tmp_path, digits, num_training_steps=16, log_every=4, save_every=6, milestone_every=10).train()
    assert tried == [6, 8, 10, 12, 16] and capsys.readouterr().err.count("warning: cannot write it") == 1
    assert [n for n, _ in saving.numbered(str(tmp_path / "digits"))] == [16, 12, 10]


def test_no_checkpoint_without_the_metrics_up_to_it(tmp_path, digits, capsys, monkeypatch):
    """Or a run that is killed then, and resumes from it, would lack their lines for ever."""
    trainer = make(tmp_path, digits)
    full = UserError("cannot write metrics.jsonl (No space left on device)")
    monkeypatch.setattr(trainer.logger, "write_all", lambda: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match="the checkpoint of step 4 cannot be written"):
        trainer.train()
    assert "No space left" in capsys.readouterr().err and not list((tmp_path / "digits").glob("*.pt"))


def test_a_copied_folder_resumes_under_its_own_name(tmp_path, digits):
    make(tmp_path, digits, lr_schedule="constant").train()
    shutil.copytree(tmp_path / "digits", tmp_path / "copy")
    copy = make(tmp_path, digits, lr_schedule="constant", run_name="copy", num_training_steps=8)
    assert copy.step == 4
    copy.train()
    assert saving.load(str(tmp_path / "copy" / "last.pt"))["step"] == 8
    assert saving.load(str(tmp_path / "digits" / "last.pt"))["step"] == 4


# ---- Two at once, and one that hangs


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    with Run(tmp_path, 1, num_training_steps=100_000) as first:
        first.wait_for_checkpoint(6)
        status, errors = Run(tmp_path, 1, num_training_steps=100_000).end()
        assert status == 2 and errors.count("\n") == 1, errors
        assert f"error: {first.folder} is in use by process {first.workers()[0]} on" in errors, errors
        step = max(n for n, _ in saving.numbered(str(first.folder)))
        first.wait_for_checkpoint(step + 6)


@pytest.mark.parametrize("where", ["training", "sampling", "waiting"])
def test_a_rank_that_hangs_is_ended_by_the_time_out(tmp_path, monkeypatch, where):
    """Rank 1 is stopped in a training step, while it draws the one sample, or while rank 0 writes a checkpoint."""
    def script(arguments):
        if distributed.rank() == 1:
            (tmp_path / "pid").write_text(str(os.getpid()))
        main.main(arguments)

    def stop_rank_1_before(owner, name, when):
        function = getattr(owner, name)

        def stop_first(*arguments, **settings):
            if when(*arguments):
                (tmp_path / "stopped").touch()
                os.kill(int((tmp_path / "pid").read_text()), signal.SIGSTOP)
            return function(*arguments, **settings)

        monkeypatch.setattr(owner, name, stop_first)

    if where == "training":
        stop_rank_1_before(DiffusionTrainer, "prepare_batch", lambda self, step: distributed.rank() == 1 and step == 8)
    elif where == "sampling":
        stop_rank_1_before(sampling.Field, "predict", lambda *arguments: distributed.rank() == 1)
    else:
        stop_rank_1_before(saving, "save", lambda *arguments: True)
    settings = {**FAULTS, "timeout": 0.1, "num_samples": 1, "sde_sampler": None, "sample_every": 6}
    result = run_ranks(2, tiny(tmp_path, **settings), script)
    assert result.returncode == 1 and time.time() - (tmp_path / "stopped").stat().st_mtime > 5, result.stderr
    assert result.stderr.count("\n") == 1 and "error: lost touch with the other ranks" in result.stderr
    assert "silent for 0.1 minutes (--timeout)" in result.stderr, result.stderr


def test_long_sampling_does_not_trip_the_time_out(tmp_path, monkeypatch):
    """Both ranks draw a sample for 5 s and more, twice, with a time-out of 3 s."""
    predict = sampling.Field.predict
    monkeypatch.setattr(sampling.Field, "predict", lambda *arguments: time.sleep(0.1) or predict(*arguments))
    config = tiny(tmp_path, num_samples=2, sampling_steps=50, sampler="euler", sde_sampler=None, timeout=0.05)
    result = run_ranks(2, config)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert len(os.listdir(tmp_path / "digits" / "samples")) == 2


# ---- Work of rank 0


@pytest.mark.parametrize("error, seconds, status, words", [
    (UserError("no such data"), 5, 2, "error: no such data"),  # the time-out of a step is 3 s
    (OSError(28, "No space left on device"), 0, 2, "No space left on device"),
    (KeyError("a bug"), 0, 1, "KeyError: 'a bug'"),
])
def test_an_error_on_rank_0_ends_all_ranks_at_once(tmp_path, error, seconds, status, words):
    def work():
        time.sleep(seconds)
        raise error

    def script(arguments):
        with distributed.set_up("cpu", timeout=0.05):
            distributed.on_rank0(work)

    result = run_ranks(2, tiny(tmp_path), script)
    assert result.returncode == status and words in result.stderr, result.stderr
    assert "rank 1" not in result.stderr and result.stderr.count("Traceback") == (status == 1)


def test_a_download_that_fails_ends_all_ranks_at_once(tmp_path):
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    result = run("sh", ROOT / "run.sh", "--data_dir", tmp_path, "--ckpt_dir", tmp_path, "--wandb", "disabled",
                 GPUS="2", **proxy)
    assert_one_line_error(result, "CIFAR10 is not in", "cannot be downloaded", "'digits'")


# ---- Losses and gradients that are not finite


def spoil(trainer, steps, how):
    """Makes the loss of these steps infinite, or their gradient alone."""
    loss, prepare_batch, at = trainer.loss, trainer.prepare_batch, []
    trainer.prepare_batch = lambda step: at.append(step) or prepare_batch(step)

    def spoilt(batch):
        losses = loss(batch)
        if at[-1] not in steps:
            return losses
        if how == "loss":
            return losses + torch.tensor([torch.inf] + [0.0] * (len(losses) - 1))  # whose gradient would be finite
        zero = next(trainer.net.parameters()).sum() * 0
        return losses + torch.sqrt(zero * zero)  # 0, with the gradient 0 / 0

    trainer.loss = spoilt


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_is_skipped(tmp_path, digits, capsys, how, fused):
    """Weights and moments stay as they were, bit for bit. It is not in the metrics, but reported."""
    settings = dict(num_training_steps=6, base_lr=1e-3, log_every=3, time_sampler="stratified", sample_every=0)
    trainer = make(tmp_path, digits, **settings)
    if not fused:
        trainer.optimizer = torch.optim.SGD(trainer.net.parameters(), momentum=0.9)
    states, ema_update = [], trainer.ema.update

    def update(n):
        states.append(saving.digest([trainer.net.state_dict(), trainer.optimizer.state_dict()["state"]]))
        ema_update(n)

    trainer.ema.update = update
    spoil(trainer, {3}, how)
    trainer.train()
    assert states[3] == states[2] and len(set(states)) == 5
    assert all(x.isfinite().all() for net in (trainer.net, trainer.ema.net) for x in net.state_dict().values())
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "warning: step 3 has a loss or gradient that is not finite (gradient norm " in error
    assert "and is skipped; trainer.prepare_batch(3) is its batch" in error
    lines = [json.loads(line) for line in open(tmp_path / "digits" / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [3, 6]
    assert all(0 < line["loss"] < 10 and 0 < line["grad_norm"] < 100 for line in lines)


def test_many_in_a_row_end_the_run(tmp_path, digits, capsys):
    """Steps 5 to 7 are not finite: the run stops after step 7, with a good checkpoint. A resumed run counts on."""
    settings = dict(num_training_steps=20, log_every=1, save_every=2, max_skipped_steps=3, sample_every=0)
    trainer = make(tmp_path, digits, **settings)
    spoil(trainer, {1, 2, 5, 6, 7}, "loss")
    words = "3 steps in a row .* up to step 7, and the last checkpoint is good"
    with pytest.raises(UserError, match=words):
        trainer.train()
    state = saving.load(str(tmp_path / "digits" / "last.pt"))
    assert state["step"] == 6 and state["skipped"] == 1
    assert all(x.isfinite().all() for part in (state["net"], state["ema"]) for x in part.values())
    again = make(tmp_path, digits, **settings)
    spoil(again, {6, 7}, "loss")
    with pytest.raises(UserError, match="3 steps in a row"):
        again.train()
    assert "step 1 has" in capsys.readouterr().err
    lines = [json.loads(line) for line in open(tmp_path / "digits" / "metrics.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, 8)) and "loss" not in lines[5] and "loss" in lines[4]
    less = make(tmp_path, digits, **{**settings, "max_skipped_steps": 1})  # than the checkpoint counts already
    spoil(less, {6}, "loss")
    with pytest.raises(UserError, match="2 steps in a row .* up to step 6"):
        less.train()


def train_with_a_bad_rank(arguments):
    """Trains; on rank 1 the losses of steps 3 and 8 are infinite."""
    config = command_line.read_config(arguments)
    with distributed.set_up("cpu"):
        trainer = DiffusionTrainer(config, load_dataset("digits"), torch.device("cpu"))
        trainer.open_run()
        if distributed.rank() == 1:
            spoil(trainer, {3, 8}, "loss")
        trainer.train()


def test_all_ranks_skip_a_step_that_one_finds_bad(tmp_path):
    """Only rank 1 meets an infinite loss. The weights of both stay together, or their losses would differ."""
    result = run_ranks(2, tiny(tmp_path, num_training_steps=12, save_every=4), train_with_a_bad_rank)
    assert result.returncode == 0 and result.stderr.count("is skipped") == 2, result.stderr
    assert "step 3 has" in result.stderr and "step 8 has" in result.stderr
    state = saving.load(str(tmp_path / "digits" / "last.pt"))
    assert all(x.isfinite().all() for part in (state["net"], state["ema"]) for x in part.values())
    assert all(s["step"] == 10 for s in state["optimizer"]["state"].values())  # of 12


# ---- Watching that fails


def test_a_grid_that_cannot_be_drawn_does_not_end_the_run(tmp_path, digits, capsys, monkeypatch):
    @functools.wraps(sampling.draw)
    def draw(*arguments, sampler, **settings):
        if sampler == "dopri5":
            raise UserError("sampler dopri5 found no step")
        return sampling.draw(*arguments, sampler=sampler, **settings)

    monkeypatch.setattr("build.draw", draw)
    make(tmp_path, digits, sampler="dopri5").train()
    assert capsys.readouterr().err.count("warning: no grid of") == 2
    assert len(os.listdir(tmp_path / "digits" / "samples")) == 2 and (tmp_path / "digits" / "last.pt").exists()
