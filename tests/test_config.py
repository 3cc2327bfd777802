"""Settings: every one has a comment and is read somewhere, presets hold only differences, contradictions are found."""

import ast
import dataclasses
import inspect
import re

import pytest
from conftest import ROOT

import trainer
from config import CHOICES, MAY_CHANGE, PRESETS, Config, problems
from processes import PROCESSES
from time_samplers import TIME_SAMPLERS

NAMES = [field.name for field in dataclasses.fields(Config)]


def read_settings():
    """Settings that the code reads: attributes of a config, and arguments of the classes that `choose` builds from the settings."""
    read = set()
    for file in ("main.py", "trainer.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if owner in ("config", "c"):
                    read.add(node.attr)
    for table in (PROCESSES, TIME_SAMPLERS, trainer.NETWORKS):
        for cls in table.values():
            read |= set(inspect.signature(cls).parameters)
    return read


def test_every_setting_is_read():
    assert set(NAMES) - read_settings() == set()


def test_every_setting_has_a_type_a_default_and_a_comment():
    source = (ROOT / "config.py").read_text()
    for name in NAMES:
        assert re.search(rf"^    {name}: .+ = .+  # \S.*\.$", source, re.M), name


def test_presets_hold_only_what_differs():
    assert set(PRESETS) == {"cifar10", "cifar10_debug", "digits", "mnist", "fashion_mnist", "image_folder", "moons"}
    for preset, settings in PRESETS.items():
        assert problems(Config(**settings), 1) == [], preset
        assert Config(**settings).run_name == preset
        assert all(value != getattr(Config(), name) for name, value in settings.items()), preset
    assert set(CHOICES) | MAY_CHANGE <= set(NAMES)


@pytest.mark.parametrize("changes, words", [
    (dict(batch_size=10, accumulation_steps=4), "--batch_size 12"),
    (dict(warmup_steps=11, num_training_steps=10), "--warmup_steps 1"),
    (dict(T_min=0.5, T_max=0.5), "T_min < T_max"),
    (dict(T_max=1.5), "T_min < T_max"),
    (dict(beta_min=0.0), "beta_min"),
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


def test_processes_divide_the_batch():
    assert problems(Config(batch_size=128), 8) == []
    assert "processes (3)" in problems(Config(batch_size=128), 3)[0]
