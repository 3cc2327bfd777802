"""Measures the seconds from `sh run.sh digits` to its first step: `python tests/benchmark_start.py`."""

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter


def measure_start():
    """The seconds; not a number if the step does not come."""
    begin = perf_counter()
    with (tempfile.TemporaryDirectory() as folder,
          subprocess.Popen(["sh", "run.sh", "digits", "--log_every", "1", "--ckpt_dir", folder],
                           cwd=Path(__file__).resolve().parent.parent,
                           env={"WANDB_MODE": "offline"} | os.environ | {"PYTHON": sys.executable},
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run):
        seconds = next((perf_counter() - begin for line in run.stdout if line.startswith(b"step 1/")), math.nan)
        run.terminate()
        run.communicate()
    return seconds


if __name__ == "__main__":
    print(f"sh run.sh digits, to the first step: {measure_start():.1f} s")
