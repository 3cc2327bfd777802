"""Helpers: settings and names, shapes, seeds and noise by row, memory, torchvision's import, whole files, progress."""

import contextlib
import ctypes
import json
import os
import sys

import pytest
import torch
from conftest import run

from logging_utils import Progress
from utils import (
    UserError,
    append_dims,
    call_with_settings,
    first_line,
    import_torchvision,
    invert,
    look_up,
    make_seed,
    make_seeds,
    row_noise,
    seed_torch,
    write_atomically,
)


def test_settings_reach_the_functions_that_have_them_as_parameters():
    def function(x, y=2):
        return x, y

    assert call_with_settings(function, {"x": 1, "z": 3}) == (1, 2)
    assert call_with_settings(function, {"x": 1, "z": 3}, x=5, y=6) == (5, 6)
    assert call_with_settings(lambda x, **others: (x, others), {"x": 1, "z": 3}) == (1, {"z": 3})
    for takes in (function, lambda x, **others: x):
        with pytest.raises(TypeError, match="no parameter yy"):
            call_with_settings(takes, {"x": 1}, yy=2)


def test_unknown_names_are_answered_with_the_known_ones():
    assert look_up({"a": 1}, "a") == 1
    with pytest.raises(UserError, match="'c' is not known here: expected one of a, b"):
        look_up({"a": 1, "b": 2}, "c")


def test_first_line():
    assert [first_line(error) for error in (ValueError("\n one\ntwo"), ValueError(" "), OSError())] == [
        "one", "ValueError", "OSError"]


def test_shapes():
    assert append_dims(torch.rand(3), 4).shape == (3, 1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invert(dtype):
    """A falling function; 50 halvings of [-1, 3] reach the precision of both types."""
    x = torch.linspace(-1, 3, 9, dtype=dtype).reshape(3, 3)
    found = invert(lambda x: (-x).exp(), (-x).exp(), -1, 3)
    assert found.dtype == dtype
    torch.testing.assert_close(found, x)


# ---- Randomness


def test_seeds_differ_by_key_and_order():
    keys = [(0,), (1,), (0, 1), (1, 0), ("noise", 0), ("step", 0), (0, "noise")]
    assert len({make_seed(*k) for k in keys}) == len(keys)
    assert make_seed(3, "noise", 7) == make_seed(3, "noise", 7)


def test_many_seeds_from_the_same_keys():
    seeds = make_seeds(5, "noise", 3)
    assert seeds[:2] == make_seeds(2, "noise", 3) and seeds[0] == make_seed("noise", 3) and len(set(seeds)) == 5
    seed_torch(seeds[0], torch.device("cpu"))
    drawn = torch.randn(3)
    torch.manual_seed(seeds[0])
    assert torch.equal(drawn, torch.randn(3))


def test_row_noise_is_a_function_of_the_row_and_the_call():
    def draw(rows, seed=5):
        noise = row_noise(rows, (2, 3), "cpu", seed, "noise")
        return torch.stack([noise(), noise()])

    whole = draw(range(100))
    for rows in (range(0, 1), range(15, 17), range(16, 32), range(40, 99)):
        assert torch.equal(draw(rows), whole[:, rows.start : rows.stop])
    assert len(whole.flatten().unique()) == whole.numel()
    assert not torch.equal(draw(range(100), 6), whole)
    big = row_noise(range(4000), (16,), "cpu", 0)()
    assert abs(big.mean()) < 0.02 and abs(big.std() - 1) < 0.01  # five standard errors of 64,000 draws


# ---- Memory, libraries, files


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_kept():
    """A block that was freed and is taken again costs no new pages, once the heap has settled.

    The C library keeps up to seven of the slivers that aligning a block cuts off, for each of their sizes. Until it has
    them, a block that was freed can be too short, by a sliver, for the next one of its size.
    """
    script = """
import resource, torch
from utils import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
by_default = sum(faults() for _ in range(10))
keep_freed_memory()
print([by_default, sum([faults() for _ in range(40)][-10:])])
"""
    by_default, kept = json.loads(run("python", "-c", script).stdout)
    assert 10 * kept < by_default


def test_torchvision_imports_beside_a_cpu_torch():
    """Whichever test of this session imports it first; the second time finds it whole."""
    for _ in range(2):
        torchvision = import_torchvision()
        assert torchvision.datasets.CIFAR10 and torchvision.utils.make_grid(torch.zeros(4, 1, 8, 8)).shape[0] == 3


def test_write_atomically_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "file")
    write_atomically(path, lambda file: file.write(b"older"))
    os.link(path, tmp_path / "link")
    write_atomically(path, "old")
    assert (tmp_path / "link").read_text() == "older"  # the new file has the name, the old one is as it was
    os.remove(tmp_path / "link")

    def fails(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*file \(No space left on device\): make room"):
        write_atomically(path, fails)
    assert open(path).read() == "old" and os.listdir(tmp_path) == ["file"]
    write_atomically(str(tmp_path / "a" / "new" / "folder"), "")  # it makes the folders
    with pytest.raises(UserError, match="cannot write .*choose another folder"):
        write_atomically(str(tmp_path / "file" / "no folder"), "")


# ---- Progress


def test_progress_is_a_bar_on_a_terminal_and_lines_in_a_log(monkeypatch, capsys):
    """In a log file the first line comes after 30 s, and then one every 30 s."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Progress("decoding", range(100), "image") as progress:
        for n, now[0] in ((1, 10.0), (2, 40.0), (3, 50.0)):
            progress.update(n)
    with Progress("heun: 0 of 4 samples", unit="network call") as progress:
        for n, now[0] in ((1, 60.0), (2, 100.0)):
            progress.update(n)
    assert capsys.readouterr().out == "decoding: 3 of 100 images\nheun: 0 of 4 samples: 3 network calls\n"
    monkeypatch.undo()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("decoding", range(100), "image") as progress:
        progress.set_description("still decoding", refresh=False)
        progress.update(30)
        assert progress.n == 30 and "still decoding:  30%" in str(progress)


def test_a_loop_has_a_line_every_30_seconds_in_a_log(monkeypatch, capsys):
    """Though tqdm's monitor, a thread, looks every 10 s for bars that were not shown for long."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    progress = Progress("solving", range(100))
    for _ in progress:
        now[0] += 1.0
        if progress.miniters > 1 and now[0] - progress.last_print_t >= progress.maxinterval:  # as the monitor does
            progress.miniters = 1
            progress.refresh(nolock=True)
    assert capsys.readouterr().out == "".join(f"solving: {n} of 100 steps\n" for n in (30, 60, 90))


def test_a_terminal_without_a_width_has_a_bar():
    terminal, its_end = os.openpty()  # 0 columns, as long as nobody sets them
    shown, stderr = b"", os.dup(2)
    os.dup2(its_end, 2)
    try:
        with open(its_end, "w") as file, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", file)
            with Progress("drawing", range(2)) as progress:
                progress.update()
                progress.refresh()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    with contextlib.suppress(OSError):  # raised when all is read, as nobody has its other end open
        while part := os.read(terminal, 10_000):
            shown += part
    os.close(terminal)
    assert "50%|" in shown.decode()
