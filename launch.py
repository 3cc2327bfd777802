"""torchrun, without its traceback: `python launch.py [torchrun's options] main.py [arguments]`.

A rank that fails prints its own error, to which torchrun would add some forty lines. This adds one line, and only if a
signal ended a rank (exit status 128 + its number), or if the nodes did not meet (1). Otherwise the exit status is that
of the rank that failed first. A training run that a signal stopped has 75.
"""

import logging
import os
import signal
import sys

from command_line import SIGNALS, STATUS, fail

HANDLED = [*SIGNALS, signal.SIGQUIT]  # by default SIGUSR1 would kill torchrun, not the ranks
os.environ |= {
    "PET_SIGNALS_TO_HANDLE": ",".join(number.name for number in HANDLED),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or ranks that are started again may read addresses of dead ones
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # or 20 lines report a node that leaves first, and more a name unknown to DNS
} | os.environ

try:
    from torch.distributed import DistError
    from torch.distributed.elastic import multiprocessing, rendezvous
    from torch.distributed.run import main
except ModuleNotFoundError as error:
    fail(f"{error}: pip install -r requirements.txt")


def stop_once(number, frame):
    """Replaces torchrun's handler, and acts once: a second signal would end the wait for the last checkpoint."""
    if number not in HANDLED:  # some versions of torchrun handle SIGHUP in any case
        return
    for handled in HANDLED:
        signal.signal(handled, signal.SIG_IGN)
    raise multiprocessing.SignalException(f"signal {number}", sigval=signal.Signals(number))


def launch(resumable):
    """Runs torchrun; returns the exit status. After a signal that is 75, if the script is `resumable`."""
    try:
        main()
        return 0
    except multiprocessing.SignalException as stop:
        return STATUS if resumable else 128 + stop.sigval
    except multiprocessing.errors.ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        if status >= 0:
            return status
        name = signal.Signals(-status).name
        guess = {"SIGKILL": " (out of memory?)", "SIGABRT": " (NCCL time-out?)"}.get(name, "")
        fail(f"rank {rank} was ended by {name}{guess}", 128 - status)  # as in a shell
    except (rendezvous.RendezvousError, DistError) as error:
        fail(f"the nodes did not meet ({type(error).__name__}): expected the same NODES and HEAD on all, and as HEAD a "
             "name of the first node that the others know, with a free port; look at /etc/hosts and firewalls", 1)


if __name__ == "__main__":
    script = next((i for i, word in enumerate(sys.argv) if i > 0 and word.endswith(".py")), len(sys.argv))
    sys.argv.insert(script, "--")  # or torchrun takes the script's --num for one of its own options, shortened
    for name in ("multiprocessing.api", "agent.server.api", "rendezvous"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    multiprocessing.api._terminate_process_handler = stop_once
    for number in HANDLED:
        signal.signal(number, stop_once)
    sys.exit(launch(resumable=any(word.endswith("main.py") for word in sys.argv)))
