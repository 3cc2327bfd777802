"""Does what the README's recipes say, each with a change to one file of a copy of the project."""

import json
import re
import shutil

import pytest
from conftest import ROOT, assert_one_line_error, flags, launch, run, tiny

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


def test_your_own_trainer(tmp_path):
    """Trained, sampled, and evaluated by its own loss, which is nearly the square root of the usual one, on one process and two."""
    ((file, code),) = recipe("Your own trainer")
    start = "\nTRAINERS = {"
    changed = [(file, start, f"\n{code}\n{start}{row('TRAINERS', code)}, ")]
    _, copy, last = train_copy(tmp_path, changed, "--trainer", "robust")
    plain = run("python", "main.py", "digits", *flags(tiny(tmp_path, run_name="plain")))
    assert plain.returncode == 0
    plain = json.loads(open(tmp_path / "plain" / "metrics.jsonl").readlines()[-1])["loss"]
    assert last["loss"] == pytest.approx(plain**0.5, rel=0.1) and abs(last["loss"] - plain) > 0.1
    losses = []
    for words in (["python"], launch(2)):
        result = run(*words, "evaluate.py", "--ckpt", tmp_path / "digits" / "last.pt", "--out", tmp_path / "card", "--num", "10",
                     "--seeds", "1", "--likelihood_num", "0", "--loss_num", "500", "--neighbours_num", "0", cwd=copy)
        assert result.returncode == 0, result.stderr
        losses.append(json.loads((tmp_path / "card" / "card.json").read_text())["loss"]["raw_train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(last["loss"], rel=0.1)
    drawn = run("python", "sample.py", "--ckpt", tmp_path / "digits" / "last.pt", "--num", "4", "--out", tmp_path / "x.npz", cwd=copy)
    assert drawn.returncode == 0, drawn.stderr
    elsewhere = run("python", "sample.py", "--ckpt", tmp_path / "digits" / "last.pt", "--num", "4", "--out", tmp_path / "x.npz")
    assert_one_line_error(elsewhere, "'robust' is not known here: expected one of diffusion")


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
