"""Checkpoints and the folder of a run: write, find, restore.

A checkpoint is one file of plain containers, numbers, strings and tensors, read with weights_only=True: a file cannot run code.
It is written to a temporary file and renamed, so `last.pt` is whole whenever it is there.
"""

import io
import json
import os
import pickle

import torch
from torch import nn

from utils import UserError, first_line, write_atomically

LAST = "last.pt"  # the newest checkpoint in a run's folder


def save(path: str, state: dict) -> None:
    """Writes `state` to `path` as a whole or not at all. Raises UserError if the disk is full or cannot be written."""
    buffer = io.BytesIO()  # torch.save into a file tells a full disk as an internal error
    torch.save(state, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load(path: str, device="cpu") -> dict:
    """The state that `save` wrote, its tensors on `device`. Raises UserError if the file is missing, damaged, or no checkpoint."""
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint {path}: expected a file such as ckpts/RUN_NAME/{LAST}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): it is truncated, damaged or no checkpoint; use another") from error
    if not isinstance(state, dict) or not {"step", "net", "ema", "config", "data"} <= state.keys():
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


def open_run(folder: str, settings: dict, may_change: set[str]) -> bool:
    """Makes the run's folder, writes config.json there, and tells whether there is a checkpoint to go on from.

    Raises UserError if there is one that was made with other settings, apart from those that `may_change`.
    """
    path = os.path.join(folder, "config.json")
    resume = os.path.exists(os.path.join(folder, LAST))
    if resume and os.path.exists(path):
        try:
            with open(path) as file:
                old = json.load(file)
        except ValueError as error:
            raise UserError(f"{path} is no JSON ({error}): mend it, or choose another --run_name") from error
        new = plain(settings)
        changed = [f"{k} ({old.get(k)} there, {new.get(k)} now)" for k in sorted(old.keys() | new.keys())
                   if k not in may_change and old.get(k) != new.get(k)]
        if changed:
            raise UserError(f"{folder} holds a run with other settings: {', '.join(changed)}; give it those settings to go on, or choose "
                            "another --run_name (or remove the folder) to start anew")
    try:
        os.makedirs(os.path.join(folder, "samples"), exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run's folder {folder} ({error}): choose another --ckpt_dir") from error
    write_atomically(path, lambda file: file.write(json.dumps(settings, indent=2).encode()))
    return resume
