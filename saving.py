"""Writes, finds, reads and restores checkpoints, and opens and locks the folder of a run.

A checkpoint is one file of plain containers, numbers, strings and tensors, read with weights_only=True: it cannot run
code. It holds the SHA-256 of its own content, and is written to a temporary file, synced and renamed: it is whole or
not there. `step_0001000.pt` are the last few and the milestones; `last.pt` is a second name (hard link) of the newest.
"""

import fcntl
import functools
import hashlib
import io
import json
import os
import socket
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from utils import UserError, first_line, warn, write_atomically

LAST = "last.pt"  # the newest checkpoint in a run's folder
# Seconds: the run before may still be writing; after a node failure, the file server may hold its lock for a while.
WAIT_FOR_LOCK = 120.0 if os.environ.get("SLURM_RESTART_COUNT") else 10.0


# ---- One file


def digest(content):
    """The SHA-256 of nested dictionaries, lists, tensors, numbers and strings, as hexadecimal digits."""
    hashed = hashlib.sha256()

    def add(x):
        if isinstance(x, torch.Tensor):
            hashed.update(f"{x.dtype} {tuple(x.shape)}".encode())
            hashed.update(x.cpu().flatten().view(torch.uint8).numpy())
        elif isinstance(x, (dict, list, tuple)):
            hashed.update(f"{len(x)} of".encode())
            for item in x.items() if isinstance(x, dict) else x:
                add(item)
        else:
            hashed.update(repr(x).encode())

    add(content)
    return hashed.hexdigest()


def write_tensors(path, content):
    """torch.save, as a whole or not at all. Raises UserError if the disk is full or cannot be written."""
    buffer = io.BytesIO()  # into a file, torch.save reports a full disk as an internal error
    torch.save(content, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def write_state(path, state):
    """Writes a file that `load` reads, as `write_tensors` does."""
    write_tensors(path, {**state, "sha256": digest(state)})


def save(folder, state, keep=2, milestone_every=0):
    """Writes `state` as the newest checkpoint of the run, as a whole or not at all, and removes old ones.

    The last `keep` stay, and those of every `milestone_every` steps (0: none). Raises UserError, and leaves what was
    there, if the disk is full or cannot be written.
    """
    step = state["step"]
    path = f"{folder}/step_{step:07d}.pt"
    last = f"{folder}/{LAST}"
    write_state(path, state)
    try:
        os.link(path, f"{last}.tmp")
        os.replace(f"{last}.tmp", last)
    except OSError:  # no hard links on this file system
        write_state(last, state)
    older = [(n, old) for n, old in numbered(folder) if n <= step]  # a later one is damaged
    for n, old in older[keep:]:
        if milestone_every == 0 or n % milestone_every:
            os.remove(old)


def load(path):
    """The state that `save` or `write_state` wrote, tensors on the CPU. Raises UserError if it is missing, damaged, or
    another file.
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint {path}: expected a file such as ckpts/RUN_NAME/{LAST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways; torch's own words advise to trust it
        raise UserError(f"{path} cannot be read ({type(error).__name__}): it is truncated or damaged, no checkpoint, "
                        "or made to run code; use another") from error
    if not isinstance(state, dict) or "sha256" not in state:
        raise UserError(f"{path} is no checkpoint of this project: expected a file such as ckpts/RUN_NAME/{LAST}")
    if state.pop("sha256") != digest(state):
        raise UserError(f"{path} is damaged: its content has not the SHA-256 that was written with it; use another")
    return state


def restore(net, weights, path):
    """Loads `weights` of the checkpoint at `path` into `net`. Raises UserError if they are of another architecture."""
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        difference = str(error).splitlines()[1].strip()[:200]  # the first one; the line before names the class
        raise UserError(f"{path} is of another architecture ({difference}): use the settings and the code it was made "
                        "with") from error


def check_data(path, there, here):
    """Raises UserError if the checkpoint at `path` is of other data: shape, classes, scale or number of items."""
    for name, value in here.items():
        rounding = 0 if name == "items" else 1e-5  # of means and deviations
        if np.shape(there[name]) != np.shape(value) or not np.allclose(there[name], value, rtol=rounding):
            raise UserError(f"{path} is of other data ({name} {there[name]}, here {value}): give it its own data, or "
                            "choose another --run_name")


# ---- The folder of a run


def numbered(folder, name="step"):
    """Step and path of every NAME_N.pt, the newest first. The name only orders them: the file holds the step."""
    return sorted(((int(n), str(path)) for path in Path(folder).glob(f"{name}_*.pt")
                   if (n := path.stem.removeprefix(f"{name}_")).isdecimal()), reverse=True)


def load_newest(folder):
    """State and path of the newest checkpoint that can be read; a line on stderr reports those that cannot.

    (None, None) if there is none. Raises UserError if there are some, and none can be read.
    """
    failure = None
    for path in filter(os.path.exists, [f"{folder}/{LAST}", *(path for _, path in numbered(folder))]):
        try:
            state = load(path)
        except UserError as error:
            failure = failure or str(error).partition(";")[0]
            continue
        if failure:
            warn(f"{failure}; going back to {path}, of step {state['step']}")
        return state, path
    if failure:
        raise UserError(f"{folder} has no checkpoint that can be read: {failure}; choose another --run_name, or remove "
                        "the folder to start anew")
    return None, None


@functools.cache  # holds the open file: the system releases the lock when this process ends, however it ends
def lock(folder):
    """Keeps other processes out of this folder, an absolute path, as long as this one lives. Returns the open file.

    Raises UserError if another process runs there.
    """
    file = open(f"{folder}/lock", "a+")
    deadline = time.monotonic() + WAIT_FOR_LOCK
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise UserError(f"{folder} is in use by {file.read().strip() or 'another process'}: wait for its end "
                                "or stop it, or choose another --run_name") from None
            time.sleep(0.1)
        except OSError as error:
            warn(f"{folder} is on a file system without locks ({first_line(error)}): start no second run in it")
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file


def open_run(folder, settings, defaults, may_change):
    """Makes and locks the run's folder and writes config.json. Returns the path of its newest checkpoint, if any.

    Raises UserError if the folder is in use, or has a checkpoint with other settings, except those that `may_change`. A
    setting that did not exist then had the value of `defaults`.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        lock(os.path.abspath(folder))
    except OSError as error:
        raise UserError(f"cannot make the run's folder {folder} ({error.strerror}): choose another --run_name or "
                        "--ckpt_dir") from error
    state, newest = load_newest(folder)
    if state:
        there = defaults | state["config"]
        changed = [f"{k} ({there.get(k)} there, {settings.get(k)} now)" for k in sorted(settings | there)
                   if k not in may_change and there.get(k) != settings.get(k)]
        if changed:
            raise UserError(f"{folder} holds a run with other settings: {', '.join(changed)}; give it those settings "
                            "to resume it, or choose another --run_name (or remove the folder) to start anew")
    for temporary in [*Path(folder).glob("*.tmp*"), *Path(folder).glob("samples/*.tmp*")]:  # of a save that was killed
        temporary.unlink()
    write_atomically(f"{folder}/config.json", json.dumps(settings, indent=2))
    return newest
