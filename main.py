"""Trains. `python main.py [PRESET] [--setting value ...]`, or `sh run.sh [PRESET] [--setting value ...]` for all GPUs of the machine.

Merges the command line into the preset's settings, sets up the device and the processes that torchrun started, loads the data,
and hands off to `DiffusionTrainer`. What is heavy to import is imported once the settings are known to be right. The other
scripts take the command line, the device and the one-line errors from here.
"""

import ast
import atexit
import contextlib
import dataclasses
import datetime
import difflib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import warnings
from typing import Literal, Union

import stopping
from config import CHOICES, PRESETS, Config, out_of_range, problems
from stopping import Stopped

HERE = os.path.dirname(os.path.abspath(__file__))


def fail(message: str, status: int = 2):
    """Ends the program with one line on stderr and this exit status. What all processes meet, rank 0 alone tells."""
    stopping.listen_no_more(signal.SIG_DFL)
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        time.sleep(5)  # when one process ends, torchrun ends them all: this one speaks only if rank 0 had nothing to say
        message = f"process {rank}: {message}"
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def lost(why: str, timeout: float):
    """Ends a process whose communication with the others failed, unless torchrun does so first: it tells which one died."""
    stopping.listen_no_more(signal.SIG_DFL)
    time.sleep(3)
    why = why.split("] ", 1)[-1].split(". ")[0]  # gloo's own words, without a line of its source and good advice
    fail(f"lost touch with the other processes ({why}): one of them ended, or was silent for {timeout:g} minutes (--timeout); the same "
         "command goes on from the last checkpoint", 1)


def stopped(what: Stopped):
    """Ends the program, which a signal asked to end, with one line on stderr. Another signal does not spoil it."""
    stopping.listen_no_more(signal.SIG_IGN)
    resumable = stopping.State.resumable
    status = stopping.STATUS if resumable else 128 + stopping.State.number
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"stopped by {what}{'; the same command goes on' if resumable else ''}", file=sys.stderr, flush=True)
    sys.exit(0 if tell_launcher(status) else status)


def tell_launcher(status: int | str) -> bool:
    """Leaves the exit status where launch.py looks for it, since torchrun takes any but 0 for a failure. Whether launch.py is there."""
    if "LAUNCH_STATUS" not in os.environ:
        return False
    with open(os.environ["LAUNCH_STATUS"], "w") as file:
        file.write(str(status))
    return True


# ---- The command line


def names_in(file: str, table: str) -> tuple[str, ...]:
    """The keys of the dictionary `table` in `file`, read from its source: importing it would import torch, and `--help` would wait."""
    with open(os.path.join(HERE, file)) as source:
        body = ast.parse(source.read()).body
    values = {getattr(node.targets[0], "id", None): node.value for node in body if isinstance(node, ast.Assign)}

    def keys(value):
        if isinstance(value, ast.BinOp):  # of two dictionaries, A | B
            return keys(value.left) + keys(value.right)
        return keys(values[value.id]) if isinstance(value, ast.Name) else tuple(key.value for key in value.keys)

    return keys(values[table])


def parse(cls: type, arguments: list[str], default=None, description: str | None = None, choices: dict | None = None):
    """The dataclass `cls` filled from `arguments` with tyro; wrong ones, or numbers out of range, end the program in one line.

    `choices` maps a field to the (file, dictionary) whose keys are its allowed values, with other types that are allowed.
    """
    try:
        import tyro
    except ModuleNotFoundError as error:
        fail(f"{error}: pip install -r requirements.txt")

    for field in dataclasses.fields(cls):
        if field.name in (choices or {}):
            file, table, *others = choices[field.name]
            none = [type(None)] if field.default is None else []
            field.type = cls.__annotations__[field.name] = Union[(Literal[names_in(file, table)], *others, *none)]
    if "--" in arguments:
        fail("'--' is no setting: expected --setting value")
    arguments = [{"true": "True", "false": "False"}.get(word, word) for word in arguments]
    quiet = int(os.environ.get("RANK", 0)) > 0
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = tyro.cli(cls, args=arguments, default=default, description=description, console_outputs=not quiet,
                               config=(tyro.conf.FlagConversionOff,))
    except SystemExit as end:
        if end.code in (0, None):
            raise
    else:
        for problem in out_of_range(vars(options)):
            fail(problem)
        return options
    box = [line.strip("│╭╮╰╯ ").strip() for line in said.getvalue().splitlines() if line.startswith(("│", "╭", "╰"))]
    end = next((i for i, line in enumerate(box) if line.startswith("──")), len(box))
    box = box[1:end]  # the rest points to --help
    known = ["--" + field.name for field in dataclasses.fields(cls)]
    given = ["--" + a[2:].split("=")[0].replace("-", "_") for a in arguments if a.startswith("--")]
    unknown = [a for a in given if a not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        fail(f"{unknown[0]} is no setting{f'; did you mean {close[0]}?' if close else ':'} allowed are {' '.join(known)}")
    for field in dataclasses.fields(cls):
        if f"--{field.name.replace('_', '-')}:" in " ".join(box):
            many = str(field.type).startswith("tuple")
            expected = field.type.__name__ if isinstance(field.type, type) else field.type
            box.append("(expected whole numbers with spaces between)" if many else f"(expected {expected})")
    fail(" ".join(box).rstrip(".") + "; `--help` lists all settings")


def read_config(arguments: list[str]) -> Config:
    """The settings of `[PRESET] [--setting value ...]`. Ends the program in one line if they are unknown, wrong or contradictory."""
    preset = "cifar10"
    if arguments and not arguments[0].startswith("-"):
        preset, *arguments = arguments
    if preset not in PRESETS:
        fail(f"{preset!r} is no preset: expected one of {', '.join(PRESETS)}, and then --setting value")
    for word in arguments:
        if word.startswith("--") and word[2:] in PRESETS:
            fail(f"{word} is no setting: the preset is the first word, without dashes, as in `sh run.sh {word[2:]}`")
    description = (f"Trains a diffusion model. Usage: main.py [PRESET] [--setting value ...], with PRESET one of {', '.join(PRESETS)}. "
                   f"The defaults below are those of {preset}.")
    config = parse(Config, arguments, Config(**PRESETS[preset]), description, CHOICES)
    datasets = names_in(*CHOICES["dataset"][:2])
    if config.dataset not in datasets and not config.dataset.endswith((".npz", ".npy")):
        fail(f"dataset {config.dataset!r} is not known: expected one of {', '.join(datasets)}, or a FILE.npz or FILE.npy")
    for problem in problems(config, int(os.environ.get("WORLD_SIZE", 1))):
        fail(problem)
    return config


def in_short(config: Config) -> str:
    """The settings that differ from the defaults."""
    changed = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    words = [f"{name} {value}".replace(" ", "\0") for name, value in changed.items()]  # a setting is not broken over lines
    text = ", ".join(words) or "all settings at their defaults"
    return textwrap.fill(text, width=120, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False).replace("\0", " ")


# ---- Devices and processes


def unusable_gpus() -> str | None:
    """Why torch does not see the GPUs that nvidia-smi lists, and what to do; None if there are none, or CUDA_VISIBLE_DEVICES hides them."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not shutil.which("nvidia-smi")
    if hidden or "GPU " not in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout:
        return None
    why = "CUDA_VISIBLE_DEVICES may name none"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = str(error).split(". ")[0]
    return (f"torch {torch.__version__} does not see them ({why}): pip install --force-reinstall torch=={torch.__version__.split('+')[0]} "
            "with a driver from 580 on, or the build that the README names for an older one")


@contextlib.contextmanager
def set_up(wanted: str, tf32: bool = True, timeout: float = 10.0, cudnn_benchmark: bool = True):
    """The device of this process, with its process group where torchrun started several; gloo on CPUs, nccl on GPUs.

    The device index is the local rank. A process waits `timeout` minutes for the others in a step of training. On the way out,
    what the user can mend ends the program in one line: a UserError, too little memory, a lost process; and so does a signal.
    Raises UserError if there are GPUs that torch cannot use, unless `wanted` is cpu.
    """
    import torch
    import torch.distributed as dist

    from utils import UserError, keep_freed_memory, world_size

    keep_freed_memory()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is said below
            gpu = wanted != "cpu" and torch.cuda.is_available()
        why = wanted != "cpu" and not gpu and unusable_gpus()
        if why or wanted == "cuda" and not gpu:
            raise UserError(f"no GPU to use: {why or 'this machine has none'}; or use --device cpu")
        device = torch.device("cpu")
        if gpu:
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            if local_rank >= torch.cuda.device_count():
                raise UserError(f"process {local_rank} of this machine has no GPU of its own: it has {torch.cuda.device_count()}; "
                                "start fewer, as GPUS=1 sh run.sh")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, cudnn_benchmark
        if world_size() > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout))
            if device.type == "cuda":  # gloo is to speak first: NCCL's watchdog aborts the process, in pages of C++
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


def end(error: BaseException, timeout: float) -> None:
    """Ends the program after `error`, in one line or none; does nothing if it is no mistake of the user's, but a bug."""
    import torch.distributed as dist

    from utils import UserError, first_line, out_of_memory

    text = str(error)
    if isinstance(error, Stopped):
        stopped(error)
    if isinstance(error, UserError):
        fail(text)
    if isinstance(error, BrokenPipeError):
        os._exit(1)  # or the interpreter's last flush tells of it
    if out_of_memory(error):
        fail(f"out of memory ({first_line(error)}): raise --accumulation_steps, or lower --batch_size or --model_channels")
    for words, advice in GPU_ERRORS.items():
        if words in text:
            fail(f"{first_line(error)}: {advice}")
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        fail(f"torch.compile failed ({first_line(error)}): use --compile False, or install a C++ compiler")
    if dist.is_initialized() and (isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and LOST.search(text)):
        nccl = text.partition("Last error:")[2].strip()
        if nccl and "ncclRemoteError" not in text:
            fail(f"NCCL failed ({nccl}): each process needs a GPU of its own, and NCCL room in /dev/shm; NCCL_DEBUG=WARN prints more", 1)
        lost(nccl or first_line(error), timeout)


GPU_ERRORS = {
    "busy or unavailable": "another process holds this GPU, see nvidia-smi; end that, or choose another by CUDA_VISIBLE_DEVICES",
    "no kernel image is available": "torch was not built for this GPU; the README says which build runs on which GPU",
}
LOST = re.compile("gloo|NCCL|Connection (closed|reset)|Timed out|timeout|Broken pipe")


def leave(status: int) -> None:
    """Ends one of several processes, without the interpreter's own clean-up.

    Threads of gloo may still run then, and abort the process after all its work is done ("terminate called without an active
    exception", seen in 1 of some 20 runs on a busy machine).
    """
    atexit._run_exitfuncs()  # wandb's, among others
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(arguments: list[str]) -> None:
    config = read_config(arguments)
    with set_up(config.device, config.tf32, config.timeout, config.cudnn_benchmark) as device:
        from build import check_bf16, check_settings, ignored
        from data_utils import check_labels, load_dataset
        from trainer import TRAINERS
        from utils import print0, rank0_first, world_size

        print0(f"{config.run_name} on {world_size()} x {device.type}\n{in_short(config)}")
        check_settings(config)
        check_bf16(config, device)
        if unread := ignored(config):
            print0(f"note: network {config.network} does not read {', '.join(unread)}")
        if config.class_conditional:
            check_labels(config.dataset)
        dataset = rank0_first(lambda first: load_dataset(config.dataset, config.data_dir, config.image_size, download=first))
        TRAINERS[config.trainer](config, dataset, device).train()


def start(script, resumable: bool = False) -> None:
    """Runs `script(arguments)`; a signal ends it in one line, a reader such as `head` that has enough in none.

    If it is `resumable`, the same command goes on after a signal, and the line and the exit status say so.
    """
    stopping.listen(resumable)
    tell_launcher("")  # of an attempt before this one there may be something
    try:
        script(sys.argv[1:])
    except Stopped as stop:
        stopped(stop)
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    start(main, resumable=True)
