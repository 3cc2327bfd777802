"""torchrun, without its traceback: `python launch.py [torchrun's options] main.py [arguments]`.

A process that fails has told why itself; torchrun would add some forty lines about it. This adds one, and only where a signal
ended the process, and exits with the status of the process that failed first.
"""

import logging
import signal
import sys

try:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main
except ModuleNotFoundError as error:
    print(f"error: {error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    script = next((i for i, word in enumerate(sys.argv) if i > 0 and word.endswith(".py")), len(sys.argv))
    sys.argv.insert(script, "--")  # or torchrun takes the script's --num for the beginning of one of its own options
    for name, level in (("multiprocessing", logging.CRITICAL), ("agent.server", logging.ERROR)):
        logging.getLogger(f"torch.distributed.elastic.{name}.api").setLevel(level)
    try:
        main()
    except SignalException as stop:
        if stop.sigval != signal.SIGINT:  # the processes themselves tell of Ctrl-C
            print(f"error: stopped by {stop.sigval.name}; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(f"error: process {rank} was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}", file=sys.stderr)
        sys.exit(128 - failure.exitcode)  # as a shell tells it
