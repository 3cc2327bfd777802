"""What the tests share: exact Gaussian data, tiny settings, and a way to run the scripts as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as run.sh has it: on a busy machine the tests are else several times slower
os.environ["WANDB_MODE"] = "disabled"  # a start of wandb takes a second; its own tests set another
GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # for the one test that wants a GPU; the others compare float32 on the CPU, everywhere
os.environ["CUDA_VISIBLE_DEVICES"] = ""
PATIENCE = 600  # seconds until a test takes what it waits for to hang: ten times what the longest of them takes on an idle machine
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "WANDB_API_KEY"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

import data_utils  # noqa: E402
from config import PRESETS, Config  # noqa: E402
from data_utils import load_dataset  # noqa: E402
from oracle import GaussianMixture  # noqa: E402
from processes import PROCESSES  # noqa: E402
from trainer import DiffusionTrainer  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also train the digits preset whole, for a minute")
    parser.addoption("--faults-long", action="store_true", help="also kill runs at 30 random moments, for some ten minutes")


def gaussian(process, kind="velocity", dims=1, mean=0.7, std=0.5) -> GaussianMixture:
    """Exact data N(mean, std^2), these numbers for each of the coordinates."""
    return GaussianMixture(process, kind, torch.full((1, dims), mean), std**2)


@pytest.fixture(params=list(PROCESSES))
def process(request):
    return PROCESSES[request.param]()


def tiny(tmp_path, **changes) -> Config:
    """The digits preset, made so small that a step takes milliseconds."""
    settings = dict(model_channels=8, batch_size=16, num_training_steps=4, warmup_steps=2, sampling_steps=2, num_samples=10, log_every=1,
                    sample_every=0, save_every=0, evaluate_every=0, ckpt_dir=str(tmp_path))
    return Config(**{**PRESETS["digits"], **settings, **changes})


@pytest.fixture(scope="session")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """Classifiers and statistics go to a folder of the tests."""
    before, data_utils.CACHE = data_utils.CACHE, str(tmp_path_factory.mktemp("cache"))
    yield
    data_utils.CACHE = before


def make(tmp_path, digits, **changes) -> DiffusionTrainer:
    """A trainer of tiny settings, with these changes, on the CPU."""
    return DiffusionTrainer(tiny(tmp_path, **changes), digits, torch.device("cpu"))


def metrics_of(folder) -> list[dict]:
    """The lines of a run's metrics.jsonl, without the speed, which differs from run to run."""
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def flags(config: Config) -> list[str]:
    """The command line that gives these settings on top of the defaults."""
    words = []
    for name, value in vars(config).items():
        if value != getattr(Config(), name):
            words += [f"--{name}", *([str(v) for v in value] if isinstance(value, tuple) else [str(value)])]
    return words


def run(*command, cwd=ROOT, timeout=PATIENCE, **environment):
    """Runs a command without a terminal; output as text in .stdout and .stderr."""
    env = {**os.environ, "PYTHON": sys.executable, "THREADS": "1", "OMP_NUM_THREADS": "1", **environment}
    words = [sys.executable if word == "python" else str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)


def launch(processes: int) -> list:
    """The words before a script that this many processes run."""
    return ["python", ROOT / "launch.py", f"--nproc-per-node={processes}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def assert_one_line_error(result, *words):
    """The command failed, said why in one line of stderr that holds `words`, and showed no traceback."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode not in (0, 1), result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stdout
    for word in words:
        assert word in lines[0], lines[0]
