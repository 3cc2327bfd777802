"""torchrun, without its traceback: `python launch.py [torchrun's options] main.py [arguments]`.

A process that ends badly has told why itself. torchrun would add some forty lines about it; this exits with the status of
the process that failed first.
"""

import os
import sys

os.environ.setdefault("LOGLEVEL", "CRITICAL")  # of torchrun's own log

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.run import main  # noqa: E402

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)  # a signal is -number
