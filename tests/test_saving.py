"""Checkpoints: there and back, missing, truncated, foreign, made to run code; run folders with other settings."""

import json
import os
import pickle

import pytest
import torch
from torch import nn

import saving
from utils import UserError

STATE = {"step": 3, "net": {"w": torch.randn(3)}, "ema": {}, "config": {"a": [1, 2], "b": None}, "data": {}}


def test_there_and_back(tmp_path):
    path = str(tmp_path / "last.pt")
    saving.save(path, STATE)
    again = saving.load(path)
    assert again["config"] == STATE["config"] and torch.equal(again["net"]["w"], STATE["net"]["w"])
    assert os.listdir(tmp_path) == ["last.pt"]


def test_missing_truncated_and_foreign(tmp_path):
    path = str(tmp_path / "last.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        saving.load(path)
    saving.save(path, STATE)
    whole = open(path, "rb").read()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        open(path, "wb").write(whole[:cut])
        with pytest.raises(UserError, match="cannot be read"):
            saving.load(path)
    for text in (b"hello world\n", b"a", b"1,2\n3,4\n"):
        open(path, "wb").write(text)
        with pytest.raises(UserError, match="cannot be read"):
            saving.load(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(UserError, match="no checkpoint of this project"):
        saving.load(path)
    torch.save({**STATE, "data": None}, path)
    with pytest.raises(UserError, match="no checkpoint of this project"):
        saving.load(path)


class Bomb:
    def __reduce__(self):
        return (open, (Bomb.path, "w"))


def test_a_file_made_to_run_code_is_refused(tmp_path):
    Bomb.path = str(tmp_path / "exploded")
    for write in (lambda file: torch.save({**STATE, "bomb": Bomb()}, file), lambda file: pickle.dump(Bomb(), file)):
        with open(tmp_path / "bad.pt", "wb") as file:
            write(file)
        with pytest.raises(UserError, match="cannot be read"):
            saving.load(str(tmp_path / "bad.pt"))
        assert not os.path.exists(Bomb.path)


def test_another_architecture(tmp_path):
    net = nn.Linear(2, 3)
    saving.restore(net, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "x.pt")
    assert torch.equal(net.weight, torch.ones(3, 2))
    for weights in ({"weight": torch.ones(3, 4), "bias": torch.zeros(3)}, {"weight": torch.ones(3, 2)}):
        with pytest.raises(UserError, match="another architecture: 1 tensors differ"):
            saving.restore(net, weights, "x.pt")


@pytest.mark.parametrize("saved", [True, False])
def test_run_folder(tmp_path, saved):
    """Other settings are refused as soon as there is a checkpoint or a line of metrics to lose."""
    folder, metrics = str(tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    settings = {"lr": 0.1, "mults": (1, 2), "bf16": None, "log_every": 5}
    plain = {"lr": 0.1, "mults": [1, 2], "bf16": None, "log_every": 5}
    assert saving.open_run(folder, {**settings, "lr": 0.3}, set()) is False
    assert saving.open_run(folder, settings, set()) is False  # nothing there to lose yet
    assert json.load(open(tmp_path / "run" / "config.json")) == plain
    if saved:
        saving.save(os.path.join(folder, saving.LAST), {**STATE, "config": plain})
        (tmp_path / "run" / "config.json").unlink()  # the settings are in the checkpoint
        (tmp_path / "run" / "last.pt.tmp77").write_text("of a save that was killed")
    else:
        metrics.write_text('{"step": 1}\n')
    assert saving.open_run(folder, {**settings, "log_every": 7}, {"log_every"}) is saved
    assert json.load(open(tmp_path / "run" / "config.json"))["log_every"] == 7
    assert not (tmp_path / "run" / "last.pt.tmp77").exists()
    with pytest.raises(UserError, match=r"lr \(0.1 there, 0.2 now\), new \(None there, 1 now\); .*another --run_name"):
        saving.open_run(folder, {**settings, "lr": 0.2, "new": 1}, {"log_every"})
    assert json.load(open(tmp_path / "run" / "config.json"))["lr"] == 0.1


def test_damaged_settings(tmp_path):
    saving.open_run(str(tmp_path), {"lr": 0.1}, set())
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for text in ("[1]", "{", "7"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="does not hold the settings"):
            saving.open_run(str(tmp_path), {"lr": 0.1}, set())


def test_run_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --run_name or --ckpt_dir"):
        saving.open_run(str(tmp_path / "file" / "run"), {}, set())
