"""Does what the README's recipes say, each with a change to one file of a copy of the project."""

import json
import re
import shutil

import pytest
from conftest import ROOT, flags, run, tiny

README = (ROOT / "README.md").read_text()


def recipe(title):
    """The code blocks of a recipe, each with the file that its heading line names."""
    section = README.split(f"### {title}\n")[1].split("\n### ")[0].split("\n## ")[0]
    return re.findall(r"`(\w+\.py)`.*?```python\n(.*?)```", section, re.S)


def train_copy(tmp_path, changed, *arguments):
    """Trains a few steps with a copy of the project in which (old, new) is replaced in one file."""
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "tests", "data", "ckpts", "__pycache__", "wandb"))
    for file, old, new in changed:
        text = (copy / file).read_text()
        assert text.count(old) == 1
        (copy / file).write_text(text.replace(old, new))
    result = run("python", "main.py", "digits", *flags(tiny(tmp_path)), *arguments, cwd=copy)
    assert result.returncode == 0, result.stderr
    (last,) = [json.loads(line) for line in open(tmp_path / "digits" / "metrics.jsonl")][-1:]
    assert last["step"] == 4
    return result, copy, last


def row(table, code):
    """A row for the dictionary: the change that the recipe's last line, a comment, shows."""
    return re.search(rf"{table} = {{\.\.\., (.*?)}}", code).group(1)


@pytest.mark.parametrize("title, table, arguments", [
    ("Your own data set", "DATASETS", ["--dataset", "stripes"]),
    ("Your own process", "PROCESSES", ["--process", "power"]),
    ("Your own time sampler", "TIME_SAMPLERS", ["--time_sampler", "late"]),
    ("Your own architecture", "NETWORKS", ["--network", "tiny"]),
])
def test_a_new_entry_of_a_dictionary(tmp_path, title, table, arguments):
    ((file, code),) = recipe(title)
    start = f"\n{table} = {{"
    changed = [(file, start, f"\n{code}\n{start}{row(table, code)}, ")]
    _, copy, _ = train_copy(tmp_path, changed, *arguments)
    assert arguments[1] in run("python", "main.py", "--help", cwd=copy, COLUMNS="300").stdout


def test_the_oracle_in_a_script(tmp_path):
    (code,) = re.findall(r"`oracle.py` is.*?```python\n(.*?)```", README, re.S)
    (tmp_path / "script.py").write_text(code)
    result = run("python", tmp_path / "script.py", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"tensor\((.*?)[,)]", result.stdout).group(1)) < 1e-3


def test_your_own_loss(tmp_path):
    ((file, code),) = recipe("Your own loss")
    old = "        return weight * mean_flat((prediction - target(config.target_type, c, batch.x0, batch.x1)) ** 2)\n"
    train_copy(tmp_path, [(file, old, code)])
    plain = run("python", "main.py", "digits", *flags(tiny(tmp_path, run_name="plain")))
    assert plain.returncode == 0
    losses = [json.loads(open(tmp_path / name / "metrics.jsonl").readline())["loss"] for name in ("digits", "plain")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("name, before, arguments", [
    ("classifier_mean_shift", "    return found\n\n\ndef inception_score", []),
    ("mean_shift", "        return found\n\n\n# ---- Features", ["--dataset", "moons", "--network", "mlp"]),
])
def test_your_own_metric(tmp_path, name, before, arguments):
    ((file, code),) = recipe("Your own metric")
    indent = re.match(" *", before)[0]
    changed = [(file, before, f"{indent}{code.strip()}\n{before}")]
    _, _, last = train_copy(tmp_path, changed, "--evaluate_every", "4", "--evaluation_samples", "30", *arguments)
    assert last[name] > 0
