"""From the command line to a running script, and how it ends: flags, errors of one line, and signals.

`parse` fills a dataclass of settings from flags; wrong ones end the program in one line, by `fail`. `start` runs a
script and listens to signals: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP raise `Stopped`, except in training, which
defers them (`deferred_signals`) and asks after each step whether to stop (`stop_requested`), to write a checkpoint
first. Only the first signal counts. Which of the ranks a process is can be asked here too. Nothing here is heavy to
import.
"""

import contextlib
import dataclasses
import inspect
import io
import os
import re
import signal
import sys
import time
from typing import Annotated, get_type_hints

from config import PRESETS, Config, marks, out_of_range, problems

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
    SIGNALS.append(signal.SIGHUP)
STATUS = 75  # of a stopped run, which the same command resumes: EX_TEMPFAIL of sysexits.h, "try again later"
LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None  # torchrun, if it started this process


def rank():
    """This process among all, from 0; torchrun sets it."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """Number of ranks; torchrun sets it."""
    return int(os.environ.get("WORLD_SIZE", 1))


# ---- Signals


class Stopped(BaseException):
    """A signal ended the program. No Exception, so that what handles errors lets it pass."""


class Received:
    number = 0  # of the first signal
    deferred = False  # the training loop deals with it
    resumable = False  # the same command resumes the run


def on_signal(number, frame):
    if Received.number:
        return
    Received.number = number
    if not Received.deferred:
        raise Stopped(signal_name(number))


def signal_name(number):
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def stop_requested():
    """The number of the signal that came, or 0. A process whose launcher has died stops as by SIGHUP."""
    if LAUNCHER and os.getppid() != LAUNCHER:
        return Received.number or signal.SIGHUP
    return Received.number


@contextlib.contextmanager
def deferred_signals():
    """Leaves signals to the code within, which asks for them by `stop_requested`."""
    Received.deferred = True
    try:
        yield
    finally:
        Received.deferred = False


def stop_listening(then):
    """From now on a signal is ignored (SIG_IGN), or ends the process at once (SIG_DFL)."""
    for number in SIGNALS:
        if signal.getsignal(number) == on_signal:
            signal.signal(number, then)


# ---- Start and end


def start(script, resumable=False):
    """Runs `script(arguments)`. After a signal it ends in one line; after a closed pipe, as of `| head`, in none.

    If the script is `resumable`, that line and the exit status say that the same command resumes the run.
    """
    Received.resumable = resumable
    for number in SIGNALS:
        signal.signal(number, on_signal)
    try:
        script(sys.argv[1:])
    except Stopped as stop:
        end_stopped(stop)
    except BrokenPipeError:
        os._exit(1)


def fail(message, status=2):
    """Ends the program with one line on stderr and this exit status. Rank 0 prints an error that all ranks have."""
    stop_listening(signal.SIG_DFL)
    if rank() > 0:
        time.sleep(5)  # when one process ends, torchrun ends them all: this prints only if rank 0 printed nothing
        message = f"rank {rank()}: {message}"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def end_stopped(stop):
    """Ends the program after a signal, with one line on stderr. Further signals are ignored."""
    stop_listening(signal.SIG_IGN)
    if rank() == 0:
        resume = "; the same command resumes it" if Received.resumable else ""
        print(f"stopped by {stop}{resume}", file=sys.__stderr__)  # also where stderr is redirected
    sys.exit(STATUS if Received.resumable else 128 + Received.number)


# ---- Flags


def optional_settings(cls, mark):
    """A dataclass of the settings of `cls` with this mark, with the same types and comments. None: as in the run."""
    from typing_extensions import Doc

    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)\.$", inspect.getsource(cls), re.M))
    types = get_type_hints(cls)
    fields = [(name, Annotated[(types[name] | None, *found, Doc(f"{comments[name]}; None: the run's own."))], None)
              for name, found in marks(cls).items() if mark in found]
    return dataclasses.make_dataclass(f"Optional{cls.__name__}", fields)


def parse(cls, arguments, default=None, description=None):
    """The dataclass `cls` filled from `arguments`. Wrong ones, or numbers out of range, end the program in one line."""
    try:
        import tyro
    except ModuleNotFoundError as error:
        fail(f"{error}: pip install -r requirements.txt")
    messages = io.StringIO()
    if "--" in arguments:
        fail("'--' is no setting: expected --setting value")
    try:
        stdout = open(os.devnull, "w", encoding="utf-8") if rank() > 0 else sys.stdout
        with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(stdout):
            options = tyro.cli(cls, args=arguments, default=default, description=description,
                               config=(tyro.conf.FlagConversionOff,))
    except SystemExit as end:
        if not end.code:
            raise
        box = re.sub("[│╭╮╰╯─]", " ", messages.getvalue().partition("\n")[2])  # without its title
        fail(f"{box.partition('For full helptext')[0]} (`--help` lists all settings; spaces separate several numbers)")
    for problem in out_of_range(options):
        fail(problem)
    return options


def read_config(arguments, cls=Config, usage="Trains a diffusion model. Usage: main.py"):
    """The settings of `[PRESET] [--setting value ...]`. Wrong or contradictory ones end the program in one line.

    `cls` is Config, or a dataclass that adds settings to it. `usage` is the start of what `--help` prints.
    """
    preset = "cifar10"
    if arguments and not arguments[0].startswith("-"):
        preset, *arguments = arguments
    if preset not in PRESETS:
        fail(f"{preset!r} is no preset: expected one of {', '.join(PRESETS)}, and then --setting value")
    config = parse(cls, arguments, cls(**PRESETS[preset]),
                   f"{usage} [PRESET] [--setting value ...], with PRESET one of {', '.join(PRESETS)}. The defaults "
                   f"below are those of {preset}.")
    for problem in problems(config, world_size()):
        fail(problem)
    return config


def in_short(config):
    """The settings that differ from the defaults."""
    changed = [f"{name} {value}" for name, value in vars(config).items() if value != getattr(Config, name)]
    return ", ".join(changed) or "all settings at their defaults"
