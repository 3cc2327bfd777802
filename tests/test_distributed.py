"""Ranks: who prints, shares of rows, rows and errors of all ranks on each."""

import pytest
import torch
from conftest import ROOT, launch, run

from distributed import gather_rows, on_rank0, print0, rank0_first, share
from utils import UserError


def test_print0(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    print0("quiet")
    monkeypatch.setenv("RANK", "0")
    print0("loud")
    assert capsys.readouterr().out == "loud\n"


def test_shares_cover_all_rows_once(monkeypatch):
    for n in (1, 5, 64):
        for world in (1, 2, 3, 8):
            monkeypatch.setenv("WORLD_SIZE", str(world))
            shares = []
            for rank in range(world):
                monkeypatch.setenv("RANK", str(rank))
                shares.append(share(n))
            assert sum(map(list, shares), []) == list(range(n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_rank_needs_no_group():
    x = torch.randn(3, 2)
    assert torch.equal(gather_rows(x), x)
    assert on_rank0(lambda: 7) == 7 and rank0_first(lambda first: first) is True
    with pytest.raises(UserError, match="no room"):
        on_rank0(lambda: (_ for _ in ()).throw(OSError("no room")))


def test_two_ranks_gather_uneven_rows_and_share_an_error(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
from distributed import all_or_none, gather_rows, on_rank0, rank, rank0_first, share
from utils import UserError
dist.init_process_group("gloo")
for n in (1, 5):
    rows = share(n)
    assert gather_rows(torch.arange(n)[rows.start:rows.stop]).tolist() == list(range(n))
assert on_rank0(lambda: rank() + 10) == 10
assert rank0_first(lambda first: (rank(), first)) == (rank(), rank() == 0)

def error_of(function, work):
    try:
        function(work)
    except UserError as error:
        return str(error)

def fails(first):
    assert rank() == 0, "rank 1 must not start"
    raise UserError("reported once")

def fails_on_rank_1():
    if rank() == 1:
        raise UserError("no memory")

assert error_of(rank0_first, fails) == "reported once"
assert error_of(all_or_none, fails_on_rank_1) == ("it failed on another rank", "no memory")[rank()]
os._exit(0)  # as distributed.leave does
""")
    result = run(*launch(2), script)
    assert result.returncode == 0, result.stderr
