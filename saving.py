"""Writes, finds, reads and restores checkpoints, and opens and locks the folder of a run.

A checkpoint is one file of plain containers, numbers, strings and tensors, read with weights_only=True: it cannot run
code. It holds the SHA-256 of its own content, and is written to a temporary file, synced and renamed: it is whole or
not there. `step_0001000.pt` are the last few and the milestones; `last.pt` is a second name (hard link) of the newest.
"""

import contextlib
import fcntl
import glob
import hashlib
import io
import json
import os
import re
import shutil
import socket
import time
import warnings

import numpy as np
import torch
from torch import nn

from utils import UserError, first_line, warn, write_atomically

LAST = "last.pt"  # the newest checkpoint in a run's folder
PARTS = {"net": dict, "ema": dict, "config": dict, "data": dict, "sha256": str}  # what every checkpoint has, and more
# Seconds: the run before may still be writing; after a node failure, the file server may hold its lock for a while.
WAIT_FOR_LOCK = 120.0 if os.environ.get("SLURM_RESTART_COUNT") else 10.0


# ---- One file


def digest(content) -> str:
    """The SHA-256 of nested dictionaries, lists, tensors, numbers and strings, as hexadecimal digits."""
    hashed = hashlib.sha256()

    def add(x):
        if isinstance(x, torch.Tensor):
            hashed.update(f"{x.dtype} {tuple(x.shape)}".encode())
            hashed.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(x, (dict, list, tuple)):
            hashed.update(f"{len(x)} of".encode())
            for item in x.items() if isinstance(x, dict) else x:
                add(item)
        else:
            hashed.update(repr(x).encode())

    add(content)
    return hashed.hexdigest()


def write_tensors(path: str, content: dict) -> None:
    """torch.save, as a whole or not at all. Raises UserError if the disk is full or cannot be written."""
    buffer = io.BytesIO()  # into a file, torch.save reports a full disk as an internal error
    torch.save(content, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def save(folder: str, state: dict, keep: int = 2, milestone_every: int = 0) -> None:
    """Writes `state` as the newest checkpoint of the run, as a whole or not at all, and removes old ones.

    The last `keep` stay, and those of every `milestone_every` steps (0: none). Raises UserError, and leaves what was
    there, if the disk is full or cannot be written.
    """
    step, last = state["step"], os.path.join(folder, LAST)
    path = os.path.join(folder, f"step_{step:07d}.pt")
    write_tensors(path, {**state, "sha256": digest(state)})
    try:
        os.link(path, f"{last}.tmp")
        os.replace(f"{last}.tmp", last)
    except OSError:  # no hard links on this file system
        with open(path, "rb") as source:
            write_atomically(last, lambda file: shutil.copyfileobj(source, file))
    older = [(n, old) for n, old in numbered(folder) if n <= step]  # a later one is damaged, and will be overwritten
    for n, old in older[keep:]:
        if not (milestone_every and n % milestone_every == 0):
            with contextlib.suppress(OSError):
                os.remove(old)


def load(path: str) -> dict:
    """The state that `save` wrote, tensors on the CPU. Raises UserError if it is missing, damaged, or another file."""
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint {path}: expected a file such as ckpts/RUN_NAME/{LAST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways; torch's own words advise to trust it
        raise UserError(f"{path} cannot be read ({type(error).__name__}): it is truncated or damaged, no checkpoint, "
                        "or made to run code; use another") from error
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in PARTS.items()):
        raise UserError(f"{path} is no checkpoint of this project: expected a file such as ckpts/RUN_NAME/{LAST}")
    if state.pop("sha256") != digest(state):
        raise UserError(f"{path} is damaged: its content has not the SHA-256 that was written with it; use another")
    return state


def restore(net: nn.Module, weights: dict, path: str) -> None:
    """Loads `weights` of the checkpoint at `path` into `net`. Raises UserError if they are of another architecture."""
    here, there = ({k: tuple(v.shape) for k, v in w.items()} for w in (net.state_dict(), weights))
    if here != there:
        different = [k for k in sorted(here.keys() | there.keys()) if here.get(k) != there.get(k)]
        first = f"{different[0]} is {there.get(different[0], 'absent')} there, {here.get(different[0], 'absent')} here"
        raise UserError(f"{path} is of another architecture: {len(different)} tensors differ, the first: {first}; use "
                        "the settings and the code it was made with")
    net.load_state_dict(weights)


def check_data(path: str, there: dict, here: dict) -> None:
    """Raises UserError if the checkpoint at `path` is of data with another shape, classes or scale."""
    for name, value in plain(here).items():
        same = np.shape(there[name]) == np.shape(value) and np.allclose(there[name], value, rtol=1e-5)  # rounding
        if not same:
            raise UserError(f"{path} is of other data, {name} {there[name]}, not {value}: give it those, or another "
                            "--run_name")


# ---- The folder of a run


def numbered(folder: str) -> list[tuple[int, str]]:
    """Step and path of every step_N.pt, the newest first. The name only orders them: the step of a run is inside."""
    found = [(re.fullmatch(r".*step_(\d+)\.pt", path), path) for path in glob.glob(f"{glob.escape(folder)}/step_*.pt")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def checkpoints(folder: str) -> list[str]:
    """Paths of all checkpoints: last.pt, then the others, the newest first."""
    last = os.path.join(folder, LAST)
    return [last] * os.path.exists(last) + [path for _, path in numbered(folder)]


def load_newest(folder: str) -> tuple[dict, str]:
    """State and path of the newest checkpoint that can be read; a line on stderr reports those that cannot.

    Raises UserError if there is none.
    """
    errors = []
    for path in checkpoints(folder):
        try:
            state = load(path)
        except UserError as error:
            errors.append(str(error).rpartition(";")[0])
            continue
        if errors:
            warn(f"{errors[0]}; going back to {path}, of step {state['step']}")
        return state, path
    raise UserError(f"{folder} has no checkpoint that can be read: {errors[0]}; choose another --run_name, or remove "
                    "the folder to start anew")


def plain(settings: dict) -> dict:
    """Settings as JSON holds them: tuples become lists, None stays."""
    return json.loads(json.dumps(settings))


def write_json(path: str, content: dict) -> None:
    """Writes a JSON file, as a whole or not at all, and its folder. Raises UserError if it cannot be written."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_atomically(path, json.dumps(content, indent=2))


HELD = {}  # folder -> its open lock file; the system releases it when this process ends, however it ends


def lock(folder: str) -> None:
    """Keeps other processes out of this folder as long as this one lives. Raises UserError if one runs there."""
    path = os.path.abspath(os.path.join(folder, "lock"))
    if path in HELD:
        return
    file = open(path, "a+")
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
    HELD[path] = file


def open_run(folder: str, settings: dict, defaults: dict, may_change: set[str]) -> str | None:
    """Makes and locks the run's folder and writes config.json. Returns the path of its newest checkpoint, if any.

    Raises UserError if the folder is in use, or holds a run (a checkpoint, or a line of metrics) with other settings,
    except those that `may_change`. A setting that did not exist then had the value of `defaults`.
    """
    path, metrics = os.path.join(folder, "config.json"), os.path.join(folder, "metrics.jsonl")
    try:
        os.makedirs(os.path.join(folder, "samples"), exist_ok=True)
        lock(folder)
    except OSError as error:
        raise UserError(f"cannot make the run's folder {folder} ({error.strerror}): choose another --run_name or "
                        "--ckpt_dir") from error
    new = there = plain(settings)
    state, newest = load_newest(folder) if checkpoints(folder) else (None, None)
    if state:
        there = state["config"]
    elif os.path.isfile(path) and os.path.isfile(metrics) and os.path.getsize(metrics):
        try:
            with open(path) as file:
                there = dict(json.load(file))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} does not hold the settings of a run: choose another --run_name, or remove "
                            f"{folder}") from error
    there = {**plain(defaults), **there}
    changed = [f"{k} ({there.get(k)} there, {new.get(k)} now)" for k in sorted(there.keys() | new.keys())
               if k not in may_change and there.get(k) != new.get(k)]
    if changed:
        raise UserError(f"{folder} holds a run with other settings: {', '.join(changed)}; give it those settings to "
                        "resume it, or choose another --run_name (or remove the folder) to start anew")
    for temporary in glob.glob(os.path.join(glob.escape(folder), "*.tmp*")):  # of a save that was killed
        os.remove(temporary)
    write_json(path, settings)
    return newest
