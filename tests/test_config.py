"""Settings: one line each, which some part reads; presets hold only differences; contradictions are found."""

import ast
import dataclasses
import importlib
import re
import shutil

import pytest
from conftest import ROOT, run

from config import PRESETS, Config, marks, problems
from data_utils import Batches, cases, load_dataset
from distributed import set_up
from optimizers import learning_rate
from prediction import loss_weight
from processes import make_process
from sample import Options
from sampling import Field, draw, make_grid
from utils import parameters_of

NAMES = [field.name for field in dataclasses.fields(Config)]


def readers() -> dict[str, set[str]]:
    """For each setting the functions and classes that read it: they name it as a parameter, or as config.NAME."""
    found = {name: set() for name in NAMES}
    functions = load_dataset, Batches, cases, make_process, loss_weight, make_grid, draw, Field, learning_rate, set_up
    called = {f.__name__: f for f in functions}
    for file, table in re.findall(r'key_of\("(\w+)\.(\w+)"\)', (ROOT / "config.py").read_text()):
        called |= {f"{table}[{name!r}]": entry for name, entry in getattr(importlib.import_module(file), table).items()}
    for reader, function in called.items():
        for name in set(NAMES) & (parameters_of(function) if function else set()):
            found[name].add(reader)
    for file in ("main.py", "command_line.py", "build.py", "trainer.py", "runs.py", "logging_utils.py"):
        for function in ast.walk(ast.parse((ROOT / file).read_text())):
            for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
                owner = getattr(node, "value", None)
                name = getattr(owner, "id", getattr(owner, "attr", ""))
                if isinstance(node, ast.Attribute) and name in ("config", "c"):
                    found.get(node.attr, set()).add(f"{file[:-3]}.{function.name}")
    return found


def test_every_setting_is_read():
    """`python -m pytest tests/test_config.py -k is_read -s` prints who reads which setting."""
    table = readers()
    print("\n" + "\n".join(f"{name:24}{', '.join(sorted(found))}" for name, found in table.items()))
    assert [name for name, found in table.items() if not found] == []
    assert {"GRIDS['edm']", "PROCESSES['edm']"} == table["rho"]
    assert {"trainer.loop", "trainer.prepare_batch"} <= table["batch_size"]
    assert "trainer.loss" in table["target_type"] and "learning_rate" in table["warmup_steps"]


def test_every_setting_has_a_type_a_default_and_a_comment():
    source = (ROOT / "config.py").read_text()
    for name in NAMES:
        assert re.search(rf"^    {name}: .+ = .+  # \S.*\.$", source, re.M), name


def test_a_new_setting_is_one_line(tmp_path):
    """Its line alone brings the flag, its help, its range, the option of sample.py, and that it may change."""
    line = '    spice: Sampling[Share] = 0.25  # Spice of the samples.\n'
    source = (ROOT / "config.py").read_text()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "config.py").write_text(source.replace("    sampler: Sampling", line + "    sampler: Sampling"))
    script = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import sample
from command_line import parse, read_config
from config import Config, marks
assert read_config([]).spice == 0.25 and read_config(["--spice", "0.5"]).spice == 0.5
assert parse(sample.Options, ["--ckpt", "x"]).spice is None
assert parse(sample.Options, ["--ckpt", "x", "--spice", "0.5"]).spice == 0.5
assert "may change" in marks(Config)["spice"]
read_config(sys.argv[1:])
"""
    shown = run("python", "-c", script, "--help", COLUMNS="200")
    assert shown.returncode == 0 and "Spice of the samples." in shown.stdout, shown.stderr
    assert "spice is 1.0: expected a number in [0, 1)" in run("python", "-c", script, "--spice", "1").stderr


def test_presets_hold_only_what_differs():
    assert {"cifar10", "digits", "moons"} <= set(PRESETS)
    for preset, settings in PRESETS.items():
        assert problems(Config(**settings), 1) == [], preset
        assert Config(**settings).run_name == preset
        assert all(value != getattr(Config(), name) for name, value in settings.items()), preset


def test_sample_offers_the_settings_of_sampling_and_all_may_change():
    offered = {name for name, found in marks(Config).items() if "sampling" in found}
    section = (ROOT / "config.py").read_text().split("# ---- Sampling")[1].split("# ---- Evaluation")[0]
    names = set(re.findall(r"^    (\w+):", section, re.M))
    assert len(names) > 15
    assert names - {"sde_sampler", "num_samples"} == offered - {"bf16", "compile", "data_dir", "source"}
    assert offered <= {field.name for field in dataclasses.fields(Options)}
    assert all("may change" in marks(Config)[name] for name in names) and "may change" not in marks(Config)["source"]


@pytest.mark.parametrize("changes, words", [
    (dict(batch_size=3, accumulation_steps=4), "--batch_size 4 or more"),
    (dict(warmup_steps=11, num_training_steps=10), "--warmup_steps 1"),
    (dict(T_min=0.5, T_max=0.5), "T_min < T_max"),
    (dict(T_max=1.5), "T_min < T_max"),
    (dict(beta_min=0.0), "beta_min"),
    (dict(sigma_min=-1.0), "0 <= sigma_min"),
    (dict(compile_mode="reduce-overhead", accumulation_steps=2), "--compile_mode default, or --accumulation_steps 1"),
    (dict(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
    (dict(coupling="ot_within_class"), "--class_conditional True"),
    (dict(mode_scale=2.0), "a number in [-1, 1.75]"),
    (dict(rho=0.01), "[0.1, inf)"),
    (dict(sde_scale=-1.0), "[0, inf)"),
    (dict(guidance_scale=2.0), "--class_conditional True"),
    (dict(guidance_scale=2.0, class_conditional=True, label_dropout=0.0), "--label_dropout 0.1"),
    (dict(guidance_t_min=0.6, guidance_t_max=0.3), "lower --guidance_t_min"),
    (dict(churn_min=2.0), "above churn_max 1.0"),
    (dict(guidance_scale=2.0, class_conditional=True, label_dropout=0.0, cond_dropout=0.2), "guidance_scale 2.0 needs"),
    (dict(min_lr=1.0), "lower --min_lr"),
    (dict(channel_mults=()), "channel_mults"),
    (dict(channel_mults=(1, 0)), "(1, 0): expected a number in (0, inf)"),
    (dict(ema_decay=()), "ema_decay is (): expected a number in [0, 1)"),
    (dict(ema_decay=(0.9, 1.0)), "ema_decay is (0.9, 1.0): expected a number in [0, 1)"),
    (dict(ema_decay=1.0), "[0, 1)"),
    (dict(lr_decay_share=0.0), "(0, 1]"),
    (dict(run_name="a/b"), "run_name"),
    (dict(dropout=1.0), "[0, 1)"),
    (dict(batch_size=0), "(0, inf)"),
    (dict(base_lr=float("nan")), "finite"),
    (dict(base_lr=float("inf")), "finite"),
    (dict(logit_normal_loc=float("nan")), "finite"),
    (dict(seed=-1), "[0, 4294967296)"),
    (dict(seed=2**32), "[0, 4294967296)"),
    (dict(model_channels=1), "[2, inf)"),
    (dict(ckpt_dir=""), "--ckpt_dir ckpts"),
])
def test_contradictions_are_found(changes, words):
    found = problems(dataclasses.replace(Config(), **{"warmup_steps": 0, "num_training_steps": 10, **changes}), 1)
    assert len(found) >= 1 and words in found[0] and "\n" not in found[0]


def test_every_rank_has_a_row_for_each_part_of_the_batch():
    assert problems(Config(batch_size=128), 3) == problems(Config(batch_size=12, accumulation_steps=4), 3) == []
    assert "ranks (3)" in problems(Config(batch_size=11, accumulation_steps=4), 3)[0]
