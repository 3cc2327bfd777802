"""Stopping on request: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP end a run after the step in hand, with a checkpoint.

Training holds the signals (`with hold()`) and asks after each step whether to stop; all processes must act alike, which
`Agreement` sees to. At any other time a signal raises `Stopped` at once, since there is nothing to save. Only the first signal
counts. A process whose launcher has died stops as well. The exit status 75 says: stopped, and the same command goes on.
"""

import contextlib
import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
STATUS = 75  # exit status of a run that was stopped: EX_TEMPFAIL of sysexits.h, "try again later"
LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None  # torchrun, if it started this process


class Stopped(BaseException):
    """A signal asked the program to end. No Exception, so that what handles errors lets it pass."""


class State:
    number = 0  # of the first signal that came
    held = False  # it is left to the training loop
    resumable = False  # the same command goes on


def listen(resumable: bool) -> None:
    """Handles the signals from now on; SIGHUP stays ignored where it was, as under nohup."""
    State.resumable = resumable
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)


def listen_no_more(then) -> None:
    """From now on a signal does nothing (SIG_IGN), since the process ends in good order, or ends it at once (SIG_DFL)."""
    for number in SIGNALS:
        if signal.getsignal(number) == on_signal:
            signal.signal(number, then)


def on_signal(number: int, frame) -> None:
    first, State.number = not State.number, State.number or number
    if first and not State.held:
        raise Stopped(name(number))


def name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def asked() -> int:
    """The number of the signal that came, or 0. Without its launcher a process stops as by SIGHUP."""
    if LAUNCHER and os.getppid() != LAUNCHER:
        return State.number or signal.SIGHUP
    return State.number


@contextlib.contextmanager
def hold():
    """Leaves signals to the code within, which asks for them."""
    State.held = True
    try:
        yield
    finally:
        State.held = False


class Agreement:
    """Called after every step, by all processes: the signal that one of them got by the step before, the same on all, or 0.

    The answer comes a step late, so that no process waits for the others, but for `now`. One process alone learns of it at once.
    """

    def __init__(self):
        self.work = None

    def __call__(self, now: bool = False) -> int:
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            return asked()
        answer = self.wait()
        self.number = torch.tensor([asked()])
        self.work = dist.all_reduce(self.number, dist.ReduceOp.MAX, async_op=True)
        return answer or (self.wait() if now else 0)

    def wait(self) -> int:
        """The answer to the last question, once all processes have asked it."""
        if self.work is None:
            return 0
        self.work.wait()
        self.work = None
        return int(self.number)
