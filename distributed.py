"""Devices and ranks: one process (rank) for one GPU, started by torchrun, and how the ranks wait for each other.

`set_up` gives a script its device and its process group, and turns the errors that a user can mend into one line.
`on_rank0` lets rank 0 work alone, `gather_rows` collects rows of all ranks, `Heartbeat` waits for ranks that still
work, and `StopAgreement` makes all ranks stop after the same step. With one process these do the obvious.
"""

import atexit
import contextlib
import datetime
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings

import torch
import torch.distributed as dist

from command_line import Stopped, end_stopped, fail, stop_listening, stop_requested
from utils import UserError, first_line, keep_freed_memory, out_of_memory

CALLS, HEARTBEATS = itertools.count(), itertools.count()  # of on_rank0, and of Heartbeat, alike on all ranks
PATIENCE = datetime.timedelta(hours=12)  # of the other ranks with what rank 0 does alone


# ---- Ranks


def rank() -> int:
    """This process among all, from 0; torchrun sets it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of ranks; torchrun sets it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def print0(*args) -> None:
    """Prints on rank 0 only, at once."""
    if rank() == 0:
        print(*args, flush=True)


def share(n: int) -> range:
    """The rows of n that belong to this rank: one run of rows for each rank, equal in length up to one row."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks in order, on the CPU of every rank; their numbers may differ. All ranks must call it."""
    parts = [rows.cpu()] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, rows.cpu().clone())  # a clone has nothing around it, which would be sent, too
    return torch.cat(parts)


def store():
    """The key-value store that the ranks share."""
    return dist.distributed_c10d._get_default_store()


def on_rank0(work):
    """`work()` on rank 0 while the others wait; its result, something small, on all.

    Raises UserError on all if rank 0 met one, or could not read or write a file. Any other error is raised on rank 0,
    and as a UserError on the others.
    """
    answer, bug, done = [None, None], None, f"work of rank 0, {next(CALLS)}"
    if rank() == 0:
        try:
            answer[0] = work()
        except (UserError, OSError) as error:
            answer[1] = str(error)
        except Exception as error:
            answer[1], bug = f"rank 0 failed ({type(error).__name__}: {first_line(error)})", error
        if world_size() > 1:
            store().set(done, "")
    else:
        store().wait([done], PATIENCE)  # the time-out of the group is for the exchange that follows
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if bug or answer[1] is not None:
        raise bug or UserError(answer[1])
    return answer[0]


def rank0_first(work):
    """`work(True)` on rank 0, and then `work(False)` on the others, which find what rank 0 fetched or made."""
    results = []
    on_rank0(lambda: results.append(work(True)))
    return results[0] if results else work(False)


def all_or_none(work):
    """`work()` on each rank. If it raises UserError on one, it does so on all. All ranks must call it."""
    result = failure = None
    try:
        result = work()
    except UserError as error:
        failure = str(error)
    if gather_rows(torch.tensor([failure is not None])).any():
        raise UserError(failure or "it failed on another rank")
    return result


class Heartbeat:
    """Lets ranks wait for each other as long as all of them make progress, however long that takes.

    Each calls `beat` now and then in its work, and `wait` at its end. All make as many of these objects, in one order.
    """

    DONE = 10**9  # more than there are beats

    def __init__(self, minutes: float):
        self.minutes, self.last_beat, self.name = minutes, -math.inf, f"heartbeat {next(HEARTBEATS)}"

    def beat(self, beats: int = 1) -> None:
        """Adds one to the beats of this rank, at most every second."""
        if world_size() > 1 and (beats > 1 or time.monotonic() - self.last_beat > 1):
            store().add(f"{self.name} of {rank()}", beats)
            self.last_beat = time.monotonic()

    def wait(self) -> None:
        """Waits until all have done their work. Raises RuntimeError if one makes no progress for so many minutes."""
        if rank() > 0:
            self.beat(self.DONE)
        for other in range(1, world_size()) if rank() == 0 else [0]:
            last, since = -1, time.monotonic()
            while (beats := store().add(f"{self.name} of {other}", 0)) < self.DONE:
                if beats != last:
                    last, since = beats, time.monotonic()
                if time.monotonic() - since > 60 * self.minutes:
                    raise RuntimeError(f"Timed out waiting for rank {other}")
                self.beat()
                time.sleep(0.02)
        if rank() == 0:
            self.beat(self.DONE)


class StopAgreement:
    """Called after every step, by all ranks: the signal that one of them got by the step before, the same on all, or 0.

    The answer comes one step late, so that no rank waits for the others; with `now` it comes at once.
    """

    exchange = None  # in flight, with the number that it leaves

    def __call__(self, now: bool = False) -> int:
        if not dist.is_initialized():
            return stop_requested()
        answer = self.wait()
        number = torch.tensor([stop_requested()])
        self.exchange = dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True), number
        return answer or (self.wait() if now else 0)

    def wait(self) -> int:
        """The answer to the last call, once all ranks have made it."""
        if self.exchange is None:
            return 0
        (work, number), self.exchange = self.exchange, None
        work.wait()
        return int(number)


# ---- Devices


@contextlib.contextmanager
def set_up(wanted: str, tf32: bool = True, timeout: float = 10.0, cudnn_benchmark: bool = True):
    """The device of this rank, with its process group if there are several ranks: gloo on CPUs, nccl on GPUs.

    The device index is the local rank. A rank waits `timeout` minutes for the others in a training step. An error that
    the user can mend (a UserError, too little memory, a lost rank) or a signal ends the program in one line. Raises
    UserError if there are GPUs that torch cannot use, unless `wanted` is cpu.
    """
    keep_freed_memory()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says the same
            gpu = wanted != "cpu" and torch.cuda.is_available()
        why = wanted != "cpu" and not gpu and unusable_gpus()
        if why or wanted == "cuda" and not gpu:
            raise UserError(f"no GPU to use: {why or 'this machine has none'}; or use --device cpu")
        device = torch.device("cpu")
        if gpu:
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            if local_rank >= torch.cuda.device_count():
                raise UserError(f"rank {local_rank} of this machine has no GPU of its own: there are "
                                f"{torch.cuda.device_count()}; start fewer, as GPUS=1 sh run.sh")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, cudnn_benchmark
        if world_size() > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout))
            if device.type == "cuda":  # gloo must fail first: NCCL's watchdog aborts the process, in pages of C++
                nccl = dist.distributed_c10d._get_default_group()._get_backend(device)
                nccl._set_default_timeout(datetime.timedelta(minutes=timeout + 1))
        yield device
    except (Exception, Stopped) as error:
        try:
            end(error, timeout)
            if not dist.is_initialized():
                raise
            traceback.print_exc()
            leave(1)
        except SystemExit as exit:
            if not dist.is_initialized():
                raise
            leave(exit.code)
    if dist.is_initialized():
        if device.type == "cuda":
            dist.destroy_process_group()
        leave(0)


def unusable_gpus() -> str | None:
    """Why torch does not see the GPUs of nvidia-smi, and what to do; None if there are none, or all are hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not shutil.which("nvidia-smi")
    if hidden or "GPU " not in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout:
        return None
    why = "CUDA_VISIBLE_DEVICES may name none"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = str(error).split(". ")[0]
    version = torch.__version__.split("+")[0]
    return (f"torch {torch.__version__} does not see them ({why}): pip install --force-reinstall torch=={version} "
            "with a driver from 580 on; docs/troubleshooting.md names the build for an older one")


# ---- The end

GPU_ERRORS = {
    "busy or unavailable":
        "another process holds this GPU, see nvidia-smi; end that, or choose another by CUDA_VISIBLE_DEVICES",
    "no kernel image is available":
        "torch was not built for this GPU: docs/troubleshooting.md says which build runs on which",
}
LOST = re.compile("gloo|NCCL|Connection (closed|reset)|Timed out|timeout|Broken pipe")


def end(error: BaseException, timeout: float) -> None:
    """Ends the program after `error`, in one line or none; returns if it is no mistake of the user's, but a bug."""
    text = str(error)
    if isinstance(error, Stopped):
        end_stopped(error)
    if isinstance(error, UserError):
        fail(text)
    if isinstance(error, BrokenPipeError):
        os._exit(1)  # or the interpreter's last flush prints an error
    if out_of_memory(error):
        fail(f"out of memory ({first_line(error)}): raise --accumulation_steps, or lower --batch_size or "
             "--model_channels")
    for words, advice in GPU_ERRORS.items():
        if words in text:
            fail(f"{first_line(error)}: {advice}")
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        fail(f"torch.compile failed ({first_line(error)}): use --compile False, or install a C++ compiler")
    lost = isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and LOST.search(text)
    if dist.is_initialized() and lost:
        nccl = text.partition("Last error:")[2].strip()
        if nccl and "ncclRemoteError" not in text:
            fail(f"NCCL failed ({nccl}): each rank needs a GPU of its own, and NCCL room in /dev/shm; NCCL_DEBUG=WARN "
                 "prints more", 1)
        end_lost(nccl or first_line(error), timeout)


def end_lost(why: str, timeout: float) -> None:
    """Ends a rank whose communication with the others failed, unless torchrun does so first and names the dead rank."""
    stop_listening(signal.SIG_DFL)
    time.sleep(3)
    why = why.split("] ", 1)[-1].split(". ")[0]  # gloo's own words, without a line of its source and good advice
    fail(f"lost touch with the other ranks ({why}): one of them ended, or was silent for {timeout:g} minutes "
         "(--timeout); the same command resumes the run from the last checkpoint", 1)


def leave(status: int) -> None:
    """Ends one of several processes, without the interpreter's own clean-up.

    Threads of gloo may still run then, and abort the process after all its work is done ("terminate called without an
    active exception", seen in 1 of some 20 runs on a busy machine).
    """
    atexit._run_exitfuncs()  # wandb's, among others
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
