"""Does what README.md and docs/ say: the recipes, all in one copy of the project; their scripts, commands and links."""

import ast
import json
import re
import shlex
import shutil
import textwrap

import numpy as np
import pytest
from conftest import ROOT, flags, launch, make, run, tiny
from sklearn.datasets import load_digits

import evaluate
import sample
from command_line import parse, read_config
from data_utils import load_dataset

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = README.split("\n## Change one thing\n")[1].split("\n## ")[0].split("\n### ")[1:]


# ---- A copy of the project, changed as the README says


def copy_of_project(folder):
    ignored = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "data", "ckpts", "wandb")
    return shutil.copytree(ROOT, folder, ignore=ignored)


def definition(tree, name: str):
    """The node that defines `name`: a class, a function, or a dictionary."""
    (node,) = [node for node in tree.body if name in (getattr(node, "name", None), *map(
        ast.unparse, getattr(node, "targets", [])))]
    return node


def insert(path, name: str, code: str):
    """Writes a recipe into a file: its entry into the dictionary `name` and the rest above it; or, of a function or a
    class `name`, above the last line, indented as that line."""
    lines = path.read_text().splitlines()
    node = definition(ast.parse("\n".join(lines)), name)
    if isinstance(node, ast.Assign):
        (entry,) = re.findall(rf"^# {name} = {{\.\.\., (.*)}}$", code, re.M)
        line, column = node.value.lineno - 1, node.value.col_offset + 1  # after the {
        assert isinstance(node.value, ast.Dict)
        lines[line] = f"{lines[line][:column]}{entry}, {lines[line][column:]}"
        last = node
    else:
        last = node.body[-1]
        assert isinstance(last, ast.Return if isinstance(node, ast.FunctionDef) else ast.AnnAssign)
    lines.insert(last.lineno - 1, textwrap.indent(textwrap.dedent(code), last.col_offset * " "))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with all recipes, each where the README says."""
    copy = copy_of_project(tmp_path_factory.mktemp("recipes") / "project")
    for recipe in RECIPES:
        words, code = re.fullmatch(r"(.*?)```python\n(.*?)```\s*", recipe, re.S).groups()
        for setting in re.findall(r"`(\w+: [^`]+ # [^`]+)`", words):
            insert(copy / "config.py", "Config", setting)
        file, place = re.search(r"In `(\w+\.py)`, (.*)", words, re.S).groups()
        for name in re.findall(r"(?:above|of)\s`(\w+)`", place)[: 1 if place.startswith("above") else None]:
            insert(copy / file, name, code)
    return copy


def run_mains(copy, **arguments):
    """Calls the `main` of scripts of the copy, one after the other, in one process; classifiers take 5 steps."""
    program = "import metrics\nmetrics.CLASSIFIER_STEPS = 5\n" + "".join(
        f"import {script}\n{script}.main({list(map(str, words))})\n" for script, words in arguments.items())
    result = run("python", "-c", program, cwd=copy)
    assert result.returncode == 0, result.stderr


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- The recipes


def test_all_recipes_are_found(project):
    assert len(RECIPES) == 7
    for name in ("stripes", "Power", "power: Positive", "Late", "Tiny", "blend", "Robust", "mean_shift"):
        changed = [path.name for path in project.glob("*.py") if name in path.read_text()]
        assert changed and not any(name in (ROOT / file).read_text() for file in changed), name


def test_entries_of_dictionaries(project, tmp_path):
    """Data set, process with its setting, time sampler and architecture train together; images get the new metric."""
    chosen = dict(dataset="stripes", process="power", time_sampler="late", network="tiny")
    words = [word for name, value in chosen.items() for word in (f"--{name}", value)]
    config = tiny(tmp_path, evaluate_every=4, evaluation_samples=30, importance_weights=True)
    run_mains(project, main=["digits", *flags(config), *words, "--power", "3"])
    made = json.loads((tmp_path / "digits" / "config.json").read_text())
    assert {**chosen, "power": 3.0}.items() <= made.items()
    assert [line["step"] for line in lines_of(tmp_path / "digits")] == [1, 2, 3, 4, 4]
    assert lines_of(tmp_path / "digits")[-1]["classifier_mean_shift"] > 0
    shown = run("python", "main.py", "--help", cwd=project, COLUMNS="300").stdout
    assert all(name in shown for name in (*chosen.values(), "robust", "exponent of t"))
    refused = run("python", "main.py", "digits", "--power", "-1", cwd=project)
    assert "power is -1.0: expected a number in (0, inf)" in refused.stderr


@pytest.fixture(scope="module")
def robust(project, tmp_path_factory):
    """A run by the README's trainer, on vectors, evaluated and sampled: folder, settings, and options of evaluation."""
    folder = tmp_path_factory.mktemp("robust")
    np.save(folder / "digits.npy", load_digits().data)  # vectors (1797, 64)
    config = tiny(folder, dataset=str(folder / "digits.npy"), network="mlp", hidden_dim=32, class_conditional=False,
                  batch_size=256)  # the items of a batch depend on the name of the file
    last = folder / "digits" / "last.pt"
    options = ["--ckpt", last, "--num", "10", "--seeds", "1", "--likelihood_num", "0", "--loss_num", "500",
               "--weights", "raw"]
    run_mains(project, main=[*flags(config), "--trainer", "robust"],
              evaluate=[*options, "--out", folder / "1"],
              sample=["--ckpt", last, "--num", "4", "--out", folder / "x.npz"])
    return folder, config, options


def test_your_own_trainer(project, robust):
    """Its loss is nearly the square root of the usual one, in training and in evaluation, on one rank and two."""
    folder, config, options = robust
    make(folder, load_dataset(config.dataset), **{**vars(config), "run_name": "plain"}).train()
    loss, plain = (lines_of(folder / name)[-1]["loss"] for name in ("digits", "plain"))
    assert loss == pytest.approx(plain**0.5, rel=0.15) and abs(loss - plain) > 0.1
    result = run(*launch(2), "evaluate.py", *options, "--out", folder / "2", cwd=project)
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((folder / name / "card.json").read_text())["loss"]["train"] for name in "12")
    assert one == pytest.approx(two, rel=1e-4)
    assert (folder / "x.npz").exists()
    assert one == pytest.approx(loss, rel=0.1)


def test_a_checkpoint_of_a_trainer_that_is_not_here(tmp_path, digits, capsys):
    trainer = make(tmp_path, digits)
    trainer.config.trainer = "robust"
    trainer.save()
    with pytest.raises(SystemExit) as end:
        sample.main(["--ckpt", str(tmp_path / "digits" / "last.pt"), "--num", "4", "--out", str(tmp_path / "x.npz")])
    assert end.value.code == 2
    assert "'robust' is not known here: expected one of diffusion" in capsys.readouterr().err


def test_your_own_objective(project, tmp_path):
    config = tiny(tmp_path, sampler="flow_map", sde_sampler=None)
    run_mains(project, main=[*flags(config), "--objective", "blend"])
    assert len(lines_of(tmp_path / "digits")) == 4


def test_your_own_metric_of_vectors(robust):
    assert json.loads((robust[0] / "1" / "card.json").read_text())["metrics"]["mean_shift"]["mean"] > 0


# ---- What projects with fields and conditions start with

CONDITIONS = README.split("\n## Start with fields, pairs and forecasts\n")[1].split("\n## ")[0].split("\n### ")[1:]
SMALL = """import sys, numpy as np, data_utils, metrics, main, sample, evaluate
metrics.CLASSIFIER_STEPS, data_utils.CACHE = 5, "cache"
data_utils.vorticity = lambda n, frames, seed: np.random.default_rng(seed).normal(size=(n // 15, 12, 1, 32, 32))
"""
TINY = ("--num_training_steps 4 --warmup_steps 2 --model_channels 8 --num_res_blocks 1 --batch_size 16 --num_samples 8 "
        "--sampling_steps 2 --evaluate_every 4 --evaluation_samples 24 --save_every 0 --sample_every 0").split()


@pytest.mark.parametrize("recipe", CONDITIONS[:5], ids=lambda text: text.splitlines()[0])
def test_commands_of_a_recipe(recipe, tmp_path):
    """Every command of it, in its order, with small data and a small network."""
    program, folder = SMALL, tmp_path / "DIR"
    folder.mkdir()
    for i in range(4):
        np.save(folder / f"run_{i}.npy", np.random.default_rng(i).normal(size=(5, 3, 16, 16)).astype(np.float32))
    for suffix, n in (("", 1500), ("_test", 297)):  # a partner for each of the digits
        np.savez(tmp_path / f"FILE{suffix}.npz", np.random.default_rng(0).integers(256, size=(n, 8, 8), dtype=np.uint8))
    lines = "".join(re.findall(r"```sh\n(.*?)```", recipe, re.S)).splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "sh":
            program += f"main.main({words[2:] + TINY})\n"
        elif words[1] == "sample.py":
            program += f"sample.main({words[2:] + ['--num', '8', '--sampling_steps', '2']})\n"
        else:
            program += f"evaluate.main({words[2:] + ['--num', '80', '--seeds', '1', '--likelihood_num', '2']})\n"
    assert len(lines) >= 2
    result = run("python", "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    for name in re.findall(r"# (\w+\.gif)", recipe):
        assert (tmp_path / name).exists(), name


# ---- What else the documents say


def test_the_oracle_in_a_script(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mathematics.md").read_text(), re.S)
    exec(code, {})
    assert float(re.search(r"tensor\((.*?)[,)]", capsys.readouterr().out)[1]) < 1e-3


def test_training_without_the_files_that_may_be_deleted(tmp_path):
    names, command = re.search(r"You may delete (.*?): `(python main\.py .*?)`", README, re.S).groups()
    copy = copy_of_project(tmp_path / "project")
    for name in re.findall("`(.*?)`", names):
        shutil.rmtree(copy / name) if name.endswith("/") else (copy / name).unlink()
    result = run(*command.split(), *flags(tiny(tmp_path)), cwd=copy)
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in lines_of(tmp_path / "digits")] == [1, 2, 3, 4]


def test_commands():
    """The scripts understand every command of the documents."""
    read = {"run.sh": read_config, "sample.py": lambda words: parse(sample.Options, words),
            "evaluate.py": lambda words: parse(evaluate.Options, words)}
    found = []
    for path in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.S):
            for line in block.replace("\\\n", "").splitlines():
                words = [] if "$" in line else shlex.split(line, comments=True)
                for script in read.keys() & words:
                    arguments = words[words.index(script) + 1 :]
                    if arguments[:1] != ["compare"]:
                        found.append(read[script](arguments))
    assert len(found) > 20


def test_every_file_has_its_place():
    table = README.split("\n## Find your way in the files\n")[1].split("\nYou may delete")[0]
    assert set(re.findall(r"`(\w+\.py)`", table)) == {path.name for path in ROOT.glob("*.py")}


def test_links_and_pictures():
    """Every link of the documents leads to a file and a heading, and no picture is large."""
    headings = {path: [re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                       for line in path.read_text().splitlines() if line.startswith("#")] for path in DOCUMENTS}
    for path in DOCUMENTS:
        for link in re.findall(r"\]\((?!http)(.*?)\)|src=\"(.*?)\"", path.read_text()):
            file, _, heading = "".join(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), (path.name, link)
            assert not heading or heading in headings[target], (path.name, link)
            assert target.suffix == ".md" or target.stat().st_size < 150_000, link
        for file in re.findall(r"tests/\w+\.py", path.read_text()):
            assert (ROOT / file).exists(), (path.name, file)
