"""torchrun, without its traceback: `python launch.py [torchrun's options] main.py [arguments]`.

A process that fails has told why itself; torchrun would add some forty lines about it. This adds one, and only where a signal
ended the process, and exits with the status of the process that failed first, or that of a run which was stopped (75).
"""

import logging
import os
import signal
import sys
import tempfile

HANDLED = [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1]  # SIGUSR1 would kill torchrun and leave its processes alone
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
    HANDLED.append(signal.SIGHUP)
os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(number.name for number in HANDLED))
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # or restarted processes may read addresses of dead ones
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or a node that leaves first is told of in 20 lines, and names without DNS in more

try:
    import torch.distributed
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main
except ModuleNotFoundError as error:
    print(f"error: {error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)


def stop_once(number, frame):
    """torchrun's handler, for one signal only: a second one would break off its wait for the processes' last checkpoint."""
    if number not in HANDLED:  # some versions handle SIGHUP in any case
        return
    for handled in HANDLED:
        signal.signal(handled, signal.SIG_IGN)
    raise SignalException(f"signal {number}", sigval=signal.Signals(number))


def launch(told) -> int:
    """Runs torchrun; the exit status. `told` is the file in which a process that was stopped in good order leaves its own."""
    status = 0
    try:
        main()
    except SignalException as stop:
        status = 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        guess = {"SIGKILL": " (out of memory?)", "SIGABRT": " (NCCL time-out?)"}.get(name, "")
        print(f"error: process {rank} was ended by {name}{guess}", file=sys.stderr)
        return 128 - failure.exitcode  # as a shell tells it
    except (RendezvousError, torch.distributed.DistError) as error:
        print(f"error: the nodes did not meet ({type(error).__name__}): expected the same NODES and HEAD on all, HEAD the name of the "
              "first as the others know it, with a free port; look at /etc/hosts and firewalls", file=sys.stderr)
        return 1
    answer = told.read()
    if status and not answer:
        print(f"error: ended by {signal.Signals(status - 128).name}; the same command goes on from the last checkpoint", file=sys.stderr)
    return int(answer or status)


if __name__ == "__main__":
    script = next((i for i, word in enumerate(sys.argv) if i > 0 and word.endswith(".py")), len(sys.argv))
    sys.argv.insert(script, "--")  # or torchrun takes the script's --num for the beginning of one of its own options
    for name, level in (("multiprocessing.api", logging.CRITICAL), ("agent.server.api", logging.ERROR), ("rendezvous", logging.ERROR)):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(level)
    api._terminate_process_handler = stop_once
    for number in HANDLED:
        signal.signal(number, stop_once)
    with tempfile.NamedTemporaryFile("r", prefix="launch_status_") as told:
        os.environ["LAUNCH_STATUS"] = told.name
        sys.exit(launch(told))
