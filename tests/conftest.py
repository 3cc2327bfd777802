"""What the tests share: exact Gaussian data, tiny settings, and a way to run the scripts as a user does.

pytest-xdist runs several tests at once (`addopts` in pyproject.toml); `-s` or `-n 0` runs one at a time.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # several tests run at once; and sums are compared bit for bit
os.environ["WANDB_MODE"] = "disabled"  # a start of wandb takes a second; the tests of wandb set another
GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # for the one test on a GPU; all others compare float32 on the CPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""
PATIENCE = 600  # seconds until a test counts as hung: ten times what the longest takes on an idle machine
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "WANDB_API_KEY"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

import data_utils  # noqa: E402
import main  # noqa: E402
from check import GaussianMixture  # noqa: E402
from config import PRESETS, Config  # noqa: E402
from data_utils import load_dataset  # noqa: E402
from processes import PROCESSES  # noqa: E402
from trainer import DiffusionTrainer  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also train the digits preset whole, for a minute")
    parser.addoption("--faults-long", action="store_true", help="also kill runs at 30 random moments, for 10 minutes")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """`-s` shows what tests print: they then run in this process, one after the other."""
    if config.option.capture == "no":
        config.option.numprocesses = 0


def pytest_collection_modifyitems(items):
    """Tests that share a fixture of their module run on one worker. Those with files, which take longest, run first."""
    for item in items:
        if any(fixture[-1].scope == "module" for fixture in item._fixtureinfo.name2fixturedefs.values()):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
    items.sort(key=lambda item: "tmp_path" not in item.fixturenames)


def gaussian(process, kind="velocity", dims=1, mean=0.7, std=0.5) -> GaussianMixture:
    """Exact data N(mean, std^2), these numbers for each of the coordinates."""
    return GaussianMixture(process, kind, torch.full((1, dims), mean), std**2)


@pytest.fixture(params=list(PROCESSES))
def process(request):
    return PROCESSES[request.param]()


def tiny(tmp_path, **changes) -> Config:
    """The digits preset, made so small that a step takes milliseconds."""
    settings = dict(model_channels=8, batch_size=16, num_training_steps=4, warmup_steps=2, sampling_steps=2,
                    num_samples=10, log_every=1, sample_every=0, save_every=0, evaluate_every=0, ckpt_dir=str(tmp_path))
    return Config(**{**PRESETS["digits"], **settings, **changes})


@pytest.fixture(scope="session")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """A folder of this session that all workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


@pytest.fixture
def without_curves(monkeypatch):
    """No picture of curves, in this process and its forks: it takes a second, nearly all the time of a tiny run."""
    monkeypatch.setattr("logging_utils.Logger.curves", lambda self: None)


def make(tmp_path, digits, **changes) -> DiffusionTrainer:
    """A trainer of tiny settings, with these changes, on the CPU, with its run open."""
    trainer = DiffusionTrainer(tiny(tmp_path, **changes), digits, torch.device("cpu"))
    trainer.open_run()
    return trainer


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
    env = {**os.environ, "PYTHON": sys.executable, "THREADS": "1", **environment}
    words = [sys.executable if word == "python" else str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=timeout)


def launch(ranks: int) -> list:
    """The words before a script that this many ranks run."""
    return ["python", ROOT / "launch.py", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0"]


def run_ranks(ranks: int, config: Config, script=main.main):
    """Runs `script(flags)` with these settings on so many ranks; output as text in .stdout and .stderr.

    The ranks are forks of this process, which has imported torch already: `run` with `launch` takes seconds longer.
    As under torchrun, an error of rank 0 ends the others.
    """
    import torch._dynamo  # noqa: F401  or each fork would import it

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = dict(WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port,
                       TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
    children, statuses = [], []
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        for rank in range(ranks):
            children.append(os.fork())
            if children[-1] == 0:
                os.environ.update({name: str(value) for name, value in environment.items()}, RANK=str(rank))
                run_in_fork(script, flags(config), output, errors)
        for child in children:
            if any(statuses):
                os.kill(child, signal.SIGKILL)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        texts = [(file.seek(0), file.read())[1] for file in (output, errors)]
    return subprocess.CompletedProcess(flags(config), next(filter(None, statuses), 0), *texts)


def run_in_fork(script, arguments, output, errors):
    """`script(arguments)`, and the end of this process, without what pytest does at its own end."""
    atexit._clear()
    signal.alarm(PATIENCE)
    status = 1
    try:
        for file, number in ((output, 1), (errors, 2)):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        script(arguments)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def assert_ranks_parts_and_halves(tmp_path, config: Config):
    """Losses on two ranks, and with accumulation, are those of one rank; a run in two halves ends bit for bit as a
    whole one.
    """
    def with_changes(name, **changes):
        return replace(config, ckpt_dir=str(tmp_path / name), **changes)

    for name, ranks, changes in (("one", 1, {}), ("two", 2, {}), ("parts", 1, dict(accumulation_steps=3))):
        result = run_ranks(ranks, with_changes(name, **changes))
        assert result.returncode == 0, result.stderr
    for steps in (config.num_training_steps // 2, config.num_training_steps):
        assert run_ranks(1, with_changes("halves", num_training_steps=steps)).returncode == 0
    one, two, parts, halves = (
        metrics_of(tmp_path / name / config.run_name) for name in ("one", "two", "parts", "halves"))
    for lines in (two, parts):
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert halves == one and len(one) == config.num_training_steps
    whole, resumed = (torch.load(tmp_path / name / config.run_name / "last.pt", weights_only=True)
                      for name in ("one", "halves"))
    assert all(torch.equal(whole["ema"][key], resumed["ema"][key]) for key in whole["ema"])


def assert_one_line_error(result, *words):
    """The command failed, said why in one line of stderr that holds `words`, and showed no traceback."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode not in (0, 1), result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stdout
    for word in words:
        assert word in lines[0], lines[0]


# ---- What the tests of sample.py, evaluate.py and metrics.py share


@pytest.fixture(scope="session")
def cache_folder(shared):
    return str(shared / "cache")


@pytest.fixture
def own_cache(cache_folder, monkeypatch):
    """Classifiers and statistics go to a folder of the tests, the same in all of them: each is made once."""
    monkeypatch.setattr(data_utils, "CACHE", cache_folder)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A conditional run on digits, whose weights are far from the start, and a run on points without labels."""
    folder = tmp_path_factory.mktemp("runs")
    points = dict(run_name="points", dataset="moons", class_conditional=False, network="mlp", hidden_dim=16,
                  num_layers=1)
    for config in (tiny(folder, num_training_steps=20, base_lr=1e-2), tiny(folder, **points)):
        DiffusionTrainer(config, load_dataset(config.dataset), torch.device("cpu")).train()
    return folder
