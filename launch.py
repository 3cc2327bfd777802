"""torchrun, without its traceback: `python launch.py [torchrun's options] main.py [arguments]`.

A rank that fails prints its own error, to which torchrun would add some forty lines. This adds one line, and only if a
signal ended the rank. The exit status is that of the rank that failed first, or that of a stopped run (75).
"""

import logging
import os
import signal
import sys
import tempfile

HANDLED = [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1]  # SIGUSR1 would kill torchrun, not the ranks
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
    HANDLED.append(signal.SIGHUP)
for name, value in {
    "PET_SIGNALS_TO_HANDLE": ",".join(number.name for number in HANDLED),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or ranks that are started again may read addresses of dead ones
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # or 20 lines report a node that leaves first, and more a name unknown to DNS
}.items():
    os.environ.setdefault(name, value)

try:
    from torch.distributed import DistError
    from torch.distributed.elastic import multiprocessing, rendezvous
    from torch.distributed.run import main
except ModuleNotFoundError as error:
    print(f"error: {error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)


def stop_once(number, frame):
    """Replaces torchrun's handler, and acts once: a second signal would end the wait for the last checkpoint."""
    if number not in HANDLED:  # some versions of torchrun handle SIGHUP in any case
        return
    for handled in HANDLED:
        signal.signal(handled, signal.SIG_IGN)
    raise multiprocessing.SignalException(f"signal {number}", sigval=signal.Signals(number))


def launch(status_file) -> int:
    """Runs torchrun; returns the exit status. Ranks that stop after a checkpoint leave their own in `status_file`."""
    status = 0
    try:
        main()
    except multiprocessing.SignalException as stop:
        status = 128 + stop.sigval
    except multiprocessing.errors.ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        guess = {"SIGKILL": " (out of memory?)", "SIGABRT": " (NCCL time-out?)"}.get(name, "")
        print(f"error: rank {rank} was ended by {name}{guess}", file=sys.stderr)
        return 128 - failure.exitcode  # as in a shell
    except (rendezvous.RendezvousError, DistError) as error:
        sys.exit(f"error: the nodes did not meet ({type(error).__name__}): expected the same NODES and HEAD on all, "
                 "and as HEAD a name of the first node that the others know, with a free port; look at /etc/hosts and "
                 "firewalls")
    own_status = status_file.read()
    if status and not own_status:
        print(f"error: ended by {signal.Signals(status - 128).name}; the same command resumes the run from the last "
              "checkpoint", file=sys.stderr)
    return int(own_status or status)


if __name__ == "__main__":
    script = next((i for i, word in enumerate(sys.argv) if i > 0 and word.endswith(".py")), len(sys.argv))
    sys.argv.insert(script, "--")  # or torchrun takes the script's --num for one of its own options, shortened
    for name in ("multiprocessing.api", "agent.server.api", "rendezvous"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    multiprocessing.api._terminate_process_handler = stop_once
    for number in HANDLED:
        signal.signal(number, stop_once)
    with tempfile.NamedTemporaryFile("r", prefix="launch_status_") as status_file:
        os.environ["LAUNCH_STATUS"] = status_file.name
        sys.exit(launch(status_file))
