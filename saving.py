"""Checkpoints and the folder of a run: write, find, restore, and lock.

A checkpoint is one file of plain containers, numbers, strings and tensors, read with weights_only=True: a file cannot run code.
It holds the SHA-256 of its own content, and is written to a temporary file, synced and renamed: it is whole or not there.
`step_0001000.pt` are the last few and the milestones; `last.pt` is a second name (a hard link) of the newest.
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

import torch
from torch import nn

from utils import UserError, complain, first_line, write_atomically

LAST = "last.pt"  # the newest checkpoint in a run's folder
LOCK = "lock"
PARTS = {"net": dict, "ema": dict, "config": dict, "data": dict, "sha256": str}  # what every checkpoint has, among others
# Seconds: the run before may still be writing its last checkpoint; after a node failure, the file server may hold its lock for a while.
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
    buffer = io.BytesIO()  # torch.save into a file tells a full disk as an internal error
    torch.save(content, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def save(folder: str, state: dict, keep: int = 2, milestone_every: int = 0) -> None:
    """Writes `state` as the newest checkpoint of the run, as a whole or not at all, and removes old ones.

    The last `keep` stay, and those of every `milestone_every` steps (0: none). Raises UserError, and leaves all that was there,
    if the disk is full or cannot be written.
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
    older = [(n, old) for n, old in numbered(folder) if n <= step]  # one of a later step is damaged, and is written anew in its time
    for n, old in older[keep:]:
        if not (milestone_every and n % milestone_every == 0):
            with contextlib.suppress(OSError):
                os.remove(old)


def load(path: str, mmap: bool = False) -> dict:
    """The state that `save` wrote, its tensors on the CPU; with `mmap` they are read, and not verified, when they are used.

    Raises UserError if the file is missing, damaged, or no checkpoint.
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint {path}: expected a file such as ckpts/RUN_NAME/{LAST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file fails in many ways; torch's own words advise to trust it
        raise UserError(f"{path} cannot be read ({type(error).__name__}): it is truncated or damaged, none of ours, or made to run code; "
                        "use another") from error
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in PARTS.items()):
        raise UserError(f"{path} is no checkpoint of this project: expected a file such as ckpts/RUN_NAME/{LAST}")
    checksum = state.pop("sha256")
    if not mmap and checksum != digest(state):
        raise UserError(f"{path} is damaged: its content has not the SHA-256 that was written with it; use another")
    return state


def restore(net: nn.Module, weights: dict, path: str) -> None:
    """Loads `weights` of the checkpoint at `path` into `net`. Raises UserError if they are of another architecture."""
    mine, theirs = ({k: tuple(v.shape) for k, v in w.items()} for w in (net.state_dict(), weights))
    if mine != theirs:
        different = [k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
        first = f"{different[0]} is {theirs.get(different[0], 'absent')} there and {mine.get(different[0], 'absent')} here"
        raise UserError(f"{path} is of another architecture: {len(different)} tensors differ, the first: {first}; use the settings and "
                        "the code it was made with")
    net.load_state_dict(weights)


# ---- The folder of a run


def numbered(folder: str) -> list[tuple[int, str]]:
    """Step and path of every step_N.pt, the newest first. The name only orders them; a run takes its step from inside."""
    found = [(re.fullmatch(r"step_(\d+)\.pt", name), name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
    return sorted(((int(match[1]), os.path.join(folder, name)) for match, name in found if match), reverse=True)


def checkpoints(folder: str) -> list[str]:
    """Paths of all checkpoints: last.pt, then the others, the newest first."""
    last = os.path.join(folder, LAST)
    return [last] * os.path.exists(last) + [path for _, path in numbered(folder)]


def load_newest(folder: str, mmap: bool = False) -> tuple[dict, str]:
    """State and path of the newest checkpoint that can be read; one line on stderr tells if others had to be passed over.

    Raises UserError if there is none.
    """
    wrong = []
    for path in checkpoints(folder):
        try:
            state = load(path, mmap)
        except UserError as error:
            wrong.append(str(error).rpartition(";")[0])
            continue
        if wrong and not mmap:
            complain(f"{wrong[0]}; going back to {path}, of step {state['step']}")
        return state, path
    raise UserError(f"{folder} has no checkpoint that can be read: {wrong[0] if wrong else 'there is none'}; choose another --run_name, or "
                    "remove the folder to start anew")


def plain(settings: dict) -> dict:
    """Settings as JSON holds them: tuples become lists, None stays."""
    return json.loads(json.dumps(settings))


def settings_of(folder: str) -> dict | None:
    """The settings with which the run in this folder was made, or None if there is nothing in it to lose."""
    if checkpoints(folder):
        return load_newest(folder, mmap=True)[0]["config"]
    config, metrics = (os.path.join(folder, name) for name in ("config.json", "metrics.jsonl"))
    if not (os.path.isfile(config) and os.path.isfile(metrics) and os.path.getsize(metrics)):
        return None
    try:
        with open(config) as file:
            return dict(json.load(file))
    except (TypeError, ValueError) as error:
        raise UserError(f"{config} does not hold the settings of a run: choose another --run_name, or remove {folder}") from error


HELD = {}  # folder -> its open lock file; the system lets go of it when this process ends, however it ends


def lock(folder: str) -> None:
    """Keeps other processes from running in this folder as long as this one lives. Raises UserError if one does already."""
    path = os.path.abspath(os.path.join(folder, LOCK))
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
                raise UserError(f"{folder} is in use by {file.read().strip() or 'another process'}: wait for its end or stop it, or choose "
                                "another --run_name") from None
            time.sleep(0.1)
        except OSError as error:
            complain(f"{folder} is on a file system without locks ({first_line(error)}): start no second run in it")
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    HELD[path] = file


def open_run(folder: str, settings: dict, defaults: dict, may_change: set[str]) -> bool:
    """Makes and locks the run's folder, writes config.json there, and tells whether there is a checkpoint to go on from.

    Raises UserError if it is in use, or holds a run that was made with other settings, apart from those that `may_change`. A
    setting that did not exist then had the value of `defaults`.
    """
    try:
        os.makedirs(os.path.join(folder, "samples"), exist_ok=True)
        lock(folder)
    except OSError as error:
        raise UserError(f"cannot make the run's folder {folder} ({error.strerror}): choose another --run_name or --ckpt_dir") from error
    old, new = settings_of(folder), plain(settings)
    if old is not None:
        old = {**plain(defaults), **old}
        changed = [f"{k} ({old.get(k)} there, {new.get(k)} now)" for k in sorted(old.keys() | new.keys())
                   if k not in may_change and old.get(k) != new.get(k)]
        if changed:
            raise UserError(f"{folder} holds a run with other settings: {', '.join(changed)}; give it those settings to go on, or choose "
                            "another --run_name (or remove the folder) to start anew")
    for left in glob.glob(os.path.join(glob.escape(folder), "*.tmp*")):  # of a save that was killed
        os.remove(left)
    write_atomically(os.path.join(folder, "config.json"), json.dumps(settings, indent=2))
    return bool(checkpoints(folder))
