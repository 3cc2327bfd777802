"""The one-minute example, whole: at least 97% of 1,000 digits drawn by label are recognised as the digit asked for. Needs --slow."""

import time

import numpy as np
import pytest
from conftest import ROOT, run


def test_digits_are_recognised(tmp_path, request):
    if not request.config.getoption("--slow"):
        pytest.skip("trains for a minute: give --slow")
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    start = time.monotonic()
    trained = run("sh", ROOT / "run.sh", "digits", "--ckpt_dir", tmp_path, THREADS="", timeout=600)
    seconds = time.monotonic() - start
    assert trained.returncode == 0, trained.stderr
    drawn = run("python", "sample.py", "--ckpt", tmp_path / "digits" / "last.pt", "--num", "1000", "--out", tmp_path / "x.npz")
    assert drawn.returncode == 0, drawn.stderr
    real, samples = load_digits(), np.load(tmp_path / "x.npz")
    judge = SVC(gamma=0.001, C=10).fit(real.data, real.target)
    share = (judge.predict(samples["arr_0"].reshape(1000, 64) * (16 / 255)) == samples["arr_1"]).mean()
    print(f"\n{100 * share:.1f}% recognised; trained and drew its grids in {seconds:.0f} s")
    assert share >= 0.97
