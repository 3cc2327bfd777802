"""Tests the whole one-minute example of the README; needs --slow.

At least 97% of 1,000 digits, drawn by label, must be recognised as the digit of their label.
"""

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
    checkpoint, samples_file = tmp_path / "digits" / "last.pt", tmp_path / "samples.npz"
    sampled = run("python", "sample.py", "--ckpt", checkpoint, "--num", "1000", "--out", samples_file)
    assert sampled.returncode == 0, sampled.stderr
    data, samples = load_digits(), np.load(samples_file)
    classifier = SVC(gamma=0.001, C=10).fit(data.data, data.target)
    recognised = (classifier.predict(samples["arr_0"].reshape(1000, 64) * (16 / 255)) == samples["arr_1"]).mean()
    print(f"\n{100 * recognised:.1f}% recognised; training and its sample grids took {seconds:.0f} s")
    assert recognised >= 0.97
