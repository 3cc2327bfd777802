"""Checkpoints: saved, loaded, damaged, or made to run code; and run folders with other settings, or in use."""

import json
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from conftest import PATIENCE, ROOT
from torch import nn

import saving
from utils import UserError

STATE = {"step": 3, "net": {"w": torch.randn(3)}, "ema": {}, "config": {"a": [1, 2], "b": None}, "data": {}}


def save(folder, step=3, **settings):
    saving.save(str(folder), {**STATE, "step": step}, **settings)


def test_there_and_back(tmp_path):
    save(tmp_path)
    again = saving.load(str(tmp_path / "last.pt"))
    assert again.keys() == STATE.keys() and again["config"] == STATE["config"]
    assert torch.equal(again["net"]["w"], STATE["net"]["w"])
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "step_0000003.pt"]
    assert os.path.samefile(tmp_path / "last.pt", tmp_path / "step_0000003.pt")


def test_where_there_are_no_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    for step in (3, 4):
        save(tmp_path, step)
        assert saving.load(str(tmp_path / "last.pt"))["step"] == step
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


def test_the_last_few_and_the_milestones_are_kept(tmp_path):
    for step in range(2, 21, 2):
        save(tmp_path, step, keep=3, milestone_every=10)
        assert saving.load(str(tmp_path / "last.pt"))["step"] == step
    assert [step for step, _ in saving.numbered(str(tmp_path))] == [20, 18, 16, 10]
    save(tmp_path, 22, keep=1)
    assert [step for step, _ in saving.numbered(str(tmp_path))] == [22]


def test_missing_truncated_and_foreign(tmp_path):
    path = str(tmp_path / "last.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        saving.load(path)
    save(tmp_path)
    whole = open(path, "rb").read()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        open(path, "wb").write(whole[:cut])
        with pytest.raises(UserError, match="cannot be read"):
            saving.load(path)
    for text in (b"hello world\n", b"a", b"1,2\n3,4\n"):
        open(path, "wb").write(text)
        with pytest.raises(UserError, match="cannot be read"):
            saving.load(path)
    for content in ({"weights": 1}, torch.zeros(3), STATE):  # the last one without a checksum
        torch.save(content, path)
        with pytest.raises(UserError, match="no checkpoint of this project"):
            saving.load(path)
        with pytest.raises(UserError, match="no checkpoint that can be read: .*no checkpoint of this project"):
            saving.load_newest(str(tmp_path))
    torch.save({**STATE, "sha256": None}, path)
    with pytest.raises(UserError, match="SHA-256"):
        saving.load(path)


def test_a_flipped_bit_anywhere_changes_nothing_or_is_found(tmp_path):
    """Every byte of a small checkpoint in turn. The bytes that do not matter are zip's own, as dates and padding."""
    save(tmp_path)
    path, found = tmp_path / "last.pt", 0
    whole = path.read_bytes()
    assert len(whole) < 5000
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            state = saving.load(str(path))
            assert saving.digest(state) == saving.digest(STATE), position
        except UserError:
            found += 1
    weight = whole.find(STATE["net"]["w"].numpy().tobytes())
    assert weight > 0 and found > 500
    path.write_bytes(whole[:weight] + bytes([whole[weight] ^ 1]) + whole[weight + 1 :])
    with pytest.raises(UserError, match="SHA-256"):
        saving.load(str(path))


def test_a_digest_sees_types_shapes_names_and_order():
    states = [{"a": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(6)},
              {"a": torch.zeros(2, 3, dtype=torch.int32)}, {"b": torch.zeros(2, 3)}, {"a": [1, 2]}, {"a": [2, 1]},
              {"a": [1, [2]]}, {"a": [[1], 2]}, {"a": 1}, {"a": "1"}, {"a": None}]
    assert len({saving.digest(state) for state in states}) == len(states)
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    assert saving.digest(x.contiguous(memory_format=torch.channels_last)) == saving.digest(x)


def test_damaged_ones_are_skipped_in_one_line(tmp_path, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    folder = str(tmp_path)
    assert saving.load_newest(folder)[0]["step"] == 3 and capsys.readouterr().err == ""
    for step, kept in ((3, 2), (2, 1)):
        with open(tmp_path / f"step_{step:07d}.pt", "r+b") as file:  # last.pt is the same file
            file.truncate(1000)
        state, path = saving.load_newest(folder)
        error = capsys.readouterr().err
        assert state["step"] == kept and path.endswith(f"step_{kept:07d}.pt")
        assert error.count("\n") == 1 and "last.pt cannot be read" in error
        assert f"going back to {path}, of step {kept}" in error
    assert saving.load_newest(folder)[0]["config"] == STATE["config"]
    capsys.readouterr()
    save(tmp_path, 2, keep=1)  # the run resumes, and writes over them
    assert saving.load_newest(folder)[0]["step"] == 2 and [n for n, _ in saving.numbered(folder)] == [3, 2]
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    words = "no checkpoint that can be read: .*last.pt cannot be read.*--run_name, or remove"
    with pytest.raises(UserError, match=words):
        saving.load_newest(folder)


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
    wrong_shape, missing = {"weight": torch.ones(3, 4), "bias": torch.zeros(3)}, {"weight": torch.ones(3, 2)}
    many = {**wrong_shape, "bias": torch.zeros(3), **{f"layer{k}": torch.ones(3) for k in range(1000)}}
    for weights, words in ((wrong_shape, r"\(size mismatch for weight: .*\)"), (missing, r'\(Missing .* "bias". ?\)'),
                           (many, r"\(Unexpected [^)]*.{180,200}\)")):
        with pytest.raises(UserError, match=f"^x.pt is of another architecture {words}: use the settings") as raised:
            saving.restore(net, weights, "x.pt")
        assert "\n" not in str(raised.value)


def test_other_data():
    """Means and deviations are compared to rounding, and numbers of items exactly."""
    here = dict(shape=(1, 8, 8), mean=[0.5, 0.1], items=1_000_000)
    saving.check_data("x.pt", here | dict(shape=[1, 8, 8], mean=[0.500001, 0.1]), here)
    for name, there in (("items", 1_000_001), ("mean", [0.5001, 0.1]), ("mean", [0.5]), ("shape", (1, 8, 9))):
        with pytest.raises(UserError, match=f"^x.pt is of other data \\({name} .* here .*--run_name$"):
            saving.check_data("x.pt", here | {name: there}, here)


def open_run(folder, settings):
    return saving.open_run(folder, settings, {}, {"log_every"})


def test_run_folder(tmp_path):
    """Other settings are refused as soon as there is a checkpoint to lose."""
    folder = str(tmp_path / "run")
    settings = {"lr": 0.1, "mults": (1, 2), "bf16": None, "log_every": 5}
    plain = {"lr": 0.1, "mults": [1, 2], "bf16": None, "log_every": 5}
    assert open_run(folder, {**settings, "lr": 0.3}) is None
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')  # lines without a checkpoint are no run
    assert open_run(folder, settings) is None
    assert json.load(open(tmp_path / "run" / "config.json")) == plain
    saving.save(folder, {**STATE, "config": settings})
    (tmp_path / "run" / "config.json").write_text("{")  # the settings are in the checkpoint
    (tmp_path / "run" / "samples").mkdir()
    left = [tmp_path / "run" / name for name in ("last.pt.tmp77", "samples/raw_heun_0000003.png.tmp77")]
    for path in left:
        path.write_text("of a save that was killed")
    assert open_run(folder, {**settings, "log_every": 7}) == os.path.join(folder, "last.pt")
    assert json.load(open(tmp_path / "run" / "config.json"))["log_every"] == 7
    assert not any(path.exists() for path in left)
    with pytest.raises(UserError, match=r"lr \(0.1 there, 0.2 now\), new \(None there, 1 now\); .*another --run_name"):
        open_run(folder, {**settings, "lr": 0.2, "new": 1})
    assert json.load(open(tmp_path / "run" / "config.json"))["lr"] == 0.1


def test_a_setting_that_was_added_since(tmp_path):
    """The run was made as if with its default."""
    save(tmp_path)
    settings = {**STATE["config"], "added": 5}
    assert saving.open_run(str(tmp_path), settings, {"added": 5}, set()) == str(tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"other settings: added \(6 there, 5 now\)"):
        saving.open_run(str(tmp_path), settings, {"added": 6}, set())


def test_run_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --run_name or --ckpt_dir"):
        open_run(str(tmp_path / "file" / "run"), {})


def test_a_folder_in_use_is_refused(tmp_path, monkeypatch):
    """By another process as long as it lives; this one may open it again."""
    folder = str(tmp_path / "run")
    code = "import sys, saving; saving.open_run(sys.argv[1], {}, {}, set()); print('open', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        monkeypatch.setattr(saving, "WAIT_FOR_LOCK", 0.2)
        with pytest.raises(UserError, match=rf"in use by process {other.pid} on .*, started .*--run_name"):
            open_run(folder, {})
        monkeypatch.setattr(saving, "WAIT_FOR_LOCK", PATIENCE)
        monkeypatch.setattr(saving.time, "sleep", lambda seconds: other.kill())  # called when it waits
        assert open_run(folder, {}) is None  # it waited for the end of the other one
        assert other.wait() == -signal.SIGKILL
    assert open_run(folder, {}) is None


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    failure = OSError(38, "Function not implemented")
    monkeypatch.setattr(saving.fcntl, "flock", lambda *arguments: (_ for _ in ()).throw(failure))
    assert open_run(str(tmp_path / "run"), {}) is None
    assert "without locks" in capsys.readouterr().err
