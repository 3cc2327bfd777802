"""Checkpoints and the folder of a run: write, find, restore.

A checkpoint is one file of plain containers, numbers, strings and tensors, read with weights_only=True: a file cannot run code.
It is written to a temporary file and renamed, so `last.pt` is whole whenever it is there.
"""

import glob
import io
import json
import os
import warnings

import torch
from torch import nn

from utils import UserError, write_atomically

LAST = "last.pt"  # the newest checkpoint in a run's folder


def save(path: str, state: dict) -> None:
    """Writes `state` to `path` as a whole or not at all. Raises UserError if the disk is full or cannot be written."""
    buffer = io.BytesIO()  # torch.save into a file tells a full disk as an internal error
    torch.save(state, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load(path: str, mmap: bool = False) -> dict:
    """The state that `save` wrote, its tensors on the CPU, or read when they are used (`mmap`).

    Raises UserError if the file is missing, damaged, or no checkpoint.
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint {path}: expected a file such as ckpts/RUN_NAME/{LAST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file fails in many ways; torch's own words advise to trust it
        raise UserError(f"{path} cannot be read ({type(error).__name__}): it is truncated, damaged or none of ours; use another") from error
    if not isinstance(state, dict) or not all(isinstance(state.get(name), dict) for name in ("net", "ema", "config", "data")):
        raise UserError(f"{path} is no checkpoint of this project: expected a file such as ckpts/RUN_NAME/{LAST}")
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


def plain(settings: dict) -> dict:
    """Settings as JSON holds them: tuples become lists, None stays."""
    return json.loads(json.dumps(settings))


def settings_of(folder: str) -> dict | None:
    """The settings with which the run in this folder was made, or None if there is nothing in it to lose."""
    last, config, metrics = (os.path.join(folder, name) for name in (LAST, "config.json", "metrics.jsonl"))
    if os.path.exists(last):
        return load(last, mmap=True)["config"]
    if not (os.path.isfile(config) and os.path.isfile(metrics) and os.path.getsize(metrics)):
        return None
    try:
        with open(config) as file:
            return dict(json.load(file))
    except (TypeError, ValueError) as error:
        raise UserError(f"{config} does not hold the settings of a run: choose another --run_name, or remove {folder}") from error


def open_run(folder: str, settings: dict, may_change: set[str]) -> bool:
    """Makes the run's folder, writes config.json there, and tells whether there is a checkpoint to go on from.

    Raises UserError if it holds a run that was made with other settings, apart from those that `may_change`.
    """
    old, new = settings_of(folder), plain(settings)
    if old is not None:
        changed = [f"{k} ({old.get(k)} there, {new.get(k)} now)" for k in sorted(old.keys() | new.keys())
                   if k not in may_change and old.get(k) != new.get(k)]
        if changed:
            raise UserError(f"{folder} holds a run with other settings: {', '.join(changed)}; give it those settings to go on, or choose "
                            "another --run_name (or remove the folder) to start anew")
    try:
        os.makedirs(os.path.join(folder, "samples"), exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run's folder {folder} ({error.strerror}): choose another --run_name or --ckpt_dir") from error
    for left in glob.glob(os.path.join(glob.escape(folder), "*.tmp*")):  # of a save that was killed
        os.remove(left)
    write_atomically(os.path.join(folder, "config.json"), lambda file: file.write(json.dumps(settings, indent=2).encode()))
    return os.path.exists(os.path.join(folder, LAST))
