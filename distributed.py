"""Devices and ranks: one process (rank) for one GPU, started by torchrun, and how the ranks wait for each other.

`set_up` gives a script its device and its process group, and turns the errors that a user can mend into one line.
`on_rank0` lets rank 0 work alone, `gather_rows` collects rows of all ranks, and `agreed_stop` makes all ranks stop
after the same step. With one process these do the obvious.
"""

import atexit
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from command_line import Stopped, end_stopped, fail, rank, stop_listening, stop_requested, world_size
from utils import OUT_OF_MEMORY, UserError, first_line, keep_freed_memory

CALLS = itertools.count()  # numbers the calls of on_rank0, in the same way on all ranks
PATIENCE = timedelta(hours=12)  # how long the other ranks wait for what rank 0 does alone


# ---- Ranks


def print0(*args):
    """Prints on rank 0 only, at once."""
    if rank() == 0:
        print(*args, flush=True)


def share(n):
    """The rows of n that belong to this rank: one run of rows for each rank, equal in length up to one row."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


def gather_rows(rows):
    """The rows of all ranks in order, on every rank's CPU. Ranks may have different numbers. All must call it."""
    parts = [rows.cpu()] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, rows.cpu().clone())  # of a view, the whole storage would be sent
    return torch.cat(parts)


def on_rank0(work, *arguments):
    """`work(*arguments)` on rank 0 while the others wait; its result, something small, on all.

    Raises UserError on all if rank 0 met one, or could not read or write a file. Any other error is raised on rank 0,
    and as a UserError on the others.
    """
    result = failure = bug = None
    if rank() == 0:
        try:
            result = work(*arguments)
        except (UserError, OSError) as error:
            failure = str(error)
        except Exception as error:
            failure = f"rank 0 failed ({type(error).__name__}: {first_line(error)})"
            bug = error
    if world_size() > 1:
        done = f"work of rank 0, {next(CALLS)}"
        answer = [result, failure]
        store = dist.distributed_c10d._get_default_store()  # which the ranks share
        if rank() == 0:
            store.set(done, "")
        else:
            store.wait([done], PATIENCE)  # the time-out of the group is for the exchange that follows
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        result, failure = answer
    if failure is not None:
        raise bug or UserError(failure)
    return result


def rank0_first(work):
    """`work(True)` on rank 0, and then `work(False)` on the others, which find what rank 0 fetched or made.

    If it raises UserError on one, it does so on all.
    """
    results = []
    on_rank0(lambda: results.append(work(True)))
    return all_or_none(lambda: results[0] if results else work(False))


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


def agreed_stop():
    """The number of the signal that one of the ranks got, the same on all, or 0. All ranks must call it."""
    number = torch.tensor(stop_requested())
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)  # by gloo, which waits for no GPU
    return number.item()


# ---- Devices


@contextlib.contextmanager
def set_up(device, tf32=True, timeout=10.0, cudnn_benchmark=True, **settings):
    """The device of this rank, with its process group if there are several ranks: gloo on CPUs, nccl on GPUs.

    `device` is auto, cpu or cuda; the index is the local rank. A rank waits `timeout` minutes for the others in a
    training step. An error that the user can mend (a UserError, too little memory, a lost rank) or a signal ends the
    program in one line. Raises UserError if there are GPUs that torch cannot use, unless `device` is cpu.
    """
    keep_freed_memory()
    status = 0
    try:
        with warnings.catch_warnings(record=True) as reasons:
            gpu = device != "cpu" and torch.cuda.is_available()
        if gpu:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32
            torch.backends.cudnn.benchmark = cudnn_benchmark
        elif device == "cuda" or device == "auto" and has_nvidia_gpus():
            why = reasons[0].message if reasons else "there is none, or CUDA_VISIBLE_DEVICES or the build hides it"
            raise UserError(f"torch {torch.__version__} sees no GPU here ({why}): use --device cpu, or the build of "
                            "torch for your driver, which docs/troubleshooting.md names")
        else:
            device = torch.device("cpu")
        if world_size() > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(minutes=timeout))
            if gpu:  # gloo must fail first: NCCL's watchdog aborts the process, in pages of C++
                nccl = dist.distributed_c10d._get_default_group()._get_backend(device)
                nccl._set_default_timeout(timedelta(minutes=timeout + 1))
        yield device
    except BrokenPipeError:
        raise  # `start` ends the program
    except (Exception, Stopped) as error:
        try:
            end(error, timeout)
            traceback.print_exc()
            status = 1
        except SystemExit as exit:
            status = exit.code
    if dist.is_initialized():
        # Without the interpreter's own clean-up: threads of gloo may still run then, and abort the process after all
        # its work is done ("terminate called without an active exception", in 1 of some 20 runs on a busy machine).
        if gpu and not status:
            dist.destroy_process_group()
        atexit._run_exitfuncs()  # wandb's, among others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def has_nvidia_gpus():
    """Whether nvidia-smi lists GPUs, and the user has not hidden all of them from programs."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and "GPU 0:" in subprocess.getoutput("nvidia-smi -L")  # which may be missing


# ---- The end

ADVICE = {  # by words of an error's type, module or text
    OUT_OF_MEMORY: "out of memory: raise --accumulation_steps, or lower --batch_size or --model_channels",
    "busy or unavailable":
        "another process holds this GPU, see nvidia-smi; end that, or choose another by CUDA_VISIBLE_DEVICES",
    "invalid device ordinal": "this rank has no GPU of its own: start fewer, as GPUS=1 sh run.sh",
    "no kernel image is available":
        "torch was not built for this GPU: docs/troubleshooting.md says which build runs on which",
    "torch._(dynamo|inductor)": "torch.compile failed: use --compile False, or install a C++ compiler",
    "^(?!.*ncclRemoteError).*NCCL error":
        "NCCL failed: each rank needs a GPU of its own, and NCCL room in /dev/shm; NCCL_DEBUG=WARN prints more",
}
LOST = re.compile("gloo|NCCL|Dist.*Error|Connection (closed|reset)|Timed out|timeout|Broken pipe")


def end(error, timeout):
    """Ends the program after `error`, in one line or none; returns if it is no mistake of the user's, but a bug."""
    if isinstance(error, Stopped):
        end_stopped(error)
    if isinstance(error, UserError):
        fail(str(error))
    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    why = str(error).partition("Last error:")[2].strip() or first_line(error)  # NCCL's words come last
    for words, advice in ADVICE.items():
        if re.search(words, text, re.DOTALL):
            fail(f"{why}: {advice}")
    if dist.is_initialized() and isinstance(error, RuntimeError) and LOST.search(text):
        stop_listening(signal.SIG_DFL)
        time.sleep(3)  # torchrun ends this rank first, where it can, and names the dead one
        why = why.split("] ", 1)[-1].split(". ")[0]  # gloo's own words, without a line of its source and good advice
        fail(f"lost touch with the other ranks ({why}): one of them ended, or was silent for {timeout:g} minutes "
             "(--timeout); the same command resumes the run from the last checkpoint", 1)

