"""Helpers: choosing by name, shapes, pixel ranges, seeds and noise by row, shares of rows, torchvision's import, whole files."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, launch, run

import utils
from utils import (
    RowNoise,
    UserError,
    append_dims,
    choose,
    gather_rows,
    make_seed,
    make_seeds,
    mean_flat,
    on_rank0,
    seed_torch,
    share,
    to_uint8,
    write_atomically,
)


def test_choose_passes_only_what_is_named():
    table = {"a": lambda x, y=2: (x, y), "b": lambda: "b"}
    assert choose(table, "a", x=1, z=3) == (1, 2)
    assert choose(table, "b", x=1) == "b"
    with pytest.raises(UserError, match="'c' is not known here: expected one of a, b"):
        choose(table, "c")


def test_shapes():
    assert append_dims(torch.rand(3), 4).shape == (3, 1, 1, 1)
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(mean_flat(x), torch.stack([row.mean() for row in x]))


def test_to_uint8_keeps_every_pixel_value_and_clamps():
    pixels = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.003])).tolist() == [0, 255, 128]


def test_seeds_differ_by_key_and_order():
    keys = [(0,), (1,), (0, 1), (1, 0), ("noise", 0), ("step", 0), (0, "noise")]
    assert len({make_seed(*k) for k in keys}) == len(keys)
    assert make_seed(3, "noise", 7) == make_seed(3, "noise", 7)


def test_row_noise_is_a_function_of_the_row_and_the_call():
    def draw(rows, seed=5):
        noise = RowNoise(rows, (2, 3), "cpu", seed, "noise")
        return torch.stack([noise(), noise()])

    whole = draw(range(100))
    for rows in (range(0, 1), range(15, 17), range(16, 32), range(40, 99)):
        assert torch.equal(draw(rows), whole[:, rows.start : rows.stop])
    assert len(whole.flatten().unique()) == whole.numel()
    assert not torch.equal(draw(range(100), 6), whole)
    big = RowNoise(range(4000), (16,), "cpu", 0)()
    assert abs(big.mean()) < 0.02 and abs(big.std() - 1) < 0.01  # five standard errors of 64,000 draws


def test_shares_cover_all_rows_once(monkeypatch):
    for n in (1, 5, 64):
        for world in (1, 2, 3, 8):
            monkeypatch.setenv("WORLD_SIZE", str(world))
            rows = []
            for rank in range(world):
                monkeypatch.setenv("RANK", str(rank))
                rows += share(n)
            assert rows == list(range(n))


def test_one_process_needs_no_group():
    x = torch.randn(3, 2)
    assert torch.equal(gather_rows(x), x)
    assert on_rank0(lambda: 7) == 7
    with pytest.raises(UserError, match="no room"):
        on_rank0(lambda: (_ for _ in ()).throw(OSError("no room")))


def test_two_processes_gather_uneven_rows_and_share_an_error(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
from utils import UserError, gather_rows, on_rank0, rank, rank0_first, share
dist.init_process_group("gloo")
for n in (1, 5):
    mine = share(n)
    assert gather_rows(torch.arange(n)[mine.start:mine.stop]).tolist() == list(range(n))
assert on_rank0(lambda: rank() + 10) == 10
order = rank0_first(lambda first: (rank(), first))
assert order == (rank(), rank() == 0)
def bad(first):
    assert rank() == 0, "rank 1 must not start"
    raise UserError("told once")
try:
    rank0_first(bad)
    raise SystemExit("no error")
except UserError as error:
    assert str(error) == "told once"
import os; os._exit(0)  # as main.leave does
""")
    result = run(*launch(2), script)
    assert result.returncode == 0, result.stderr


def test_torchvision_imports_beside_a_cpu_torch():
    code = "import utils; tv = utils.import_torchvision(); tv.datasets.CIFAR10, tv.utils.make_grid; utils.import_torchvision()"
    result = run("python", "-c", code)
    assert result.returncode == 0, result.stderr


def test_write_atomically_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "file")
    write_atomically(path, lambda file: file.write(b"older"))
    os.link(path, tmp_path / "link")
    write_atomically(path, lambda file: file.write(b"old"))
    assert (tmp_path / "link").read_text() == "older"  # the new file took the name; the old one was not written into
    os.remove(tmp_path / "link")

    def fails(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_atomically(path, fails)
    assert open(path).read() == "old" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(str(tmp_path / "no" / "folder"), lambda file: file.write(b""))


def test_print0(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    utils.print0("quiet")
    monkeypatch.setenv("RANK", "0")
    utils.print0("loud")
    assert capsys.readouterr().out == "loud\n"


def test_progress_is_a_bar_on_a_terminal_and_lines_in_a_log(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(utils.time, "monotonic", lambda: now[0])
    with utils.Progress("decoding", 100, "image") as progress:
        for n, now[0] in ((1, 10.0), (2, 40.0), (3, 50.0)):
            progress.update(n)
    assert capsys.readouterr().out == "decoding: 3 of 100 images\n"
    monkeypatch.undo()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with utils.Progress("decoding", 100, "image") as progress:
        progress.update(30, "still decoding")
        assert progress.bar.n == 30 and "still decoding:  30%" in str(progress.bar)


def test_a_terminal_that_tells_no_width_has_a_bar():
    terminal, its_end = os.openpty()  # 0 columns, as long as nobody sets them
    code = "import utils; bar = utils.progress_bar(total=2); bar.update(); bar.close()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=its_end, check=True)
    assert "50%|" in os.read(terminal, 10_000).decode()


def test_seeds_of_one_kind():
    seeds = make_seeds(5, "noise", 3)
    assert seeds[:2] == make_seeds(2, "noise", 3) and seeds[0] == make_seed("noise", 3) and len(set(seeds)) == 5
    seed_torch(seeds[0], torch.device("cpu"))
    mine = torch.randn(3)
    torch.manual_seed(seeds[0])
    assert torch.equal(mine, torch.randn(3))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_kept():
    """A block that was freed and is taken again costs no new pages, once the heap has settled.

    The C library keeps up to seven of the slivers that aligning a block cuts off, for each of their sizes. Until it has
    them, a block that was freed can be too short, by a sliver, for the next one of its size.
    """
    faults = []
    for first in ("None", "keep_freed_memory()"):
        script = f"""
import resource, torch
from utils import keep_freed_memory
{first}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(40)][-10:])
"""
        faults.append(sum(json.loads(run("python", "-c", script).stdout)))
    assert 10 * faults[1] < faults[0], faults
