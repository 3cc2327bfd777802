"""Settings: every one has a comment and is read somewhere, presets hold only differences, contradictions are found."""

import ast
import dataclasses
import inspect
import re

import pytest
from conftest import ROOT

import build
from config import CHOICES, MAY_CHANGE, PRESETS, Config, problems
from optimizers import learning_rate
from prediction import LOSS_WEIGHTINGS, loss_weight
from processes import PROCESSES, make_process
from sample import Options
from sampling import GRIDS, SAMPLERS, Field, draw, make_grid
from time_samplers import TIME_SAMPLERS

NAMES = [field.name for field in dataclasses.fields(Config)]


def read_settings():
    """Settings that the code reads: attributes of a config, and arguments of what is called with all settings."""
    read = set()
    for file in ("main.py", "build.py", "trainer.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if owner in ("config", "c"):
                    read.add(node.attr)
    tables = (PROCESSES, TIME_SAMPLERS, build.NETWORKS, LOSS_WEIGHTINGS, GRIDS, SAMPLERS)
    functions = (make_process, loss_weight, make_grid, draw, Field, learning_rate)
    for called in (*functions, *(entry for table in tables for entry in table.values())):
        read |= set(inspect.signature(called).parameters)
    return read


def test_every_setting_is_read():
    assert set(NAMES) - read_settings() == set()


def test_every_setting_has_a_type_a_default_and_a_comment():
    source = (ROOT / "config.py").read_text()
    for name in NAMES:
        assert re.search(rf"^    {name}: .+ = .+  # \S.*\.$", source, re.M), name


def test_presets_hold_only_what_differs():
    assert set(PRESETS) == {"cifar10", "cifar10_debug", "cifar10_edm", "digits", "mnist", "fashion_mnist", "image_folder", "moons"}
    for preset, settings in PRESETS.items():
        assert problems(Config(**settings), 1) == [], preset
        assert Config(**settings).run_name == preset
        assert all(value != getattr(Config(), name) for name, value in settings.items()), preset
    assert set(CHOICES) | MAY_CHANGE <= set(NAMES)


def test_sample_offers_every_setting_of_sampling_and_all_may_change():
    section = (ROOT / "config.py").read_text().split("# ---- Sampling")[1].split("# ---- Evaluation")[0]
    names = set(re.findall(r"^    (\w+):", section, re.M))
    assert len(names) > 15 and names <= MAY_CHANGE
    assert names - {"sde_sampler", "num_samples", "sampling_batch_size"} <= {field.name for field in dataclasses.fields(Options)}


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
    (dict(guidance_t_min=0.6, guidance_t_max=0.3), "lower --guidance_t_min"),
    (dict(churn_min=2.0), "above churn_max 1.0"),
    (dict(mode_scale=2.0), "from -1 to 1.75"),
    (dict(rho=0.01), "0.1 or more"),
    (dict(sde_scale=-1.0), "0 or more"),
    (dict(guidance_scale=2.0), "--class_conditional True"),
    (dict(guidance_scale=2.0, class_conditional=True, label_dropout=0.0), "--label_dropout 0.1"),
    (dict(min_lr=1.0), "lower --min_lr"),
    (dict(channel_mults=()), "channel_mults"),
    (dict(run_name="a/b"), "run_name"),
    (dict(dropout=1.0), "[0, 1)"),
    (dict(batch_size=0), "more than 0"),
    (dict(base_lr=float("nan")), "finite"),
    (dict(base_lr=float("inf")), "finite"),
    (dict(logit_normal_loc=float("nan")), "finite"),
    (dict(seed=-1), "0 or more"),
    (dict(seed=2**32), "less than 2^32"),
    (dict(model_channels=1), "2 or more"),
    (dict(ckpt_dir=""), "--ckpt_dir ckpts"),
])
def test_contradictions_are_found(changes, words):
    found = problems(dataclasses.replace(Config(), **{"warmup_steps": 0, "num_training_steps": 10, **changes}), 1)
    assert len(found) >= 1 and words in found[0] and "\n" not in found[0]


def test_every_process_has_a_row_for_each_part_of_the_batch():
    assert problems(Config(batch_size=128), 3) == problems(Config(batch_size=12, accumulation_steps=4), 3) == []
    assert "processes (3)" in problems(Config(batch_size=11, accumulation_steps=4), 3)[0]
