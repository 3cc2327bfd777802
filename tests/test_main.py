"""The command line: presets, both spellings of a flag, one-line errors, and that the allowed names are those of the dictionaries."""

import dataclasses
import importlib
import time

import pytest
from conftest import ROOT, assert_one_line_error, run

import main
from config import CHOICES, PRESETS, Config


def test_allowed_names_are_those_of_the_dictionaries():
    for file, table, *_ in CHOICES.values():
        assert main.names_in(file, table) == tuple(getattr(importlib.import_module(file[:-3]), table))


def test_presets_and_flags():
    assert main.read_config([]) == Config()
    words = "digits --weight-decay 0.1 --base_lr=3e-4 --channel-mults 1 2 2 --bf16 True --T_min 0.01"
    config = main.read_config(words.split())
    expected = dict(PRESETS["digits"], weight_decay=0.1, base_lr=3e-4, channel_mults=(1, 2, 2), bf16=True, T_min=0.01)
    assert config == Config(**expected)
    assert main.read_config(["--random_flip", "false"]).random_flip is False
    assert main.read_config(["moons", "--dataset", "some/file.npz"]).dataset == "some/file.npz"
    assert "base_lr 0.0003, " in main.in_short(config) and "seed" not in main.in_short(config)


def test_help_shows_settings_defaults_comments_and_names_and_is_quick():
    start = time.monotonic()
    result = run("python", "main.py", "--help", COLUMNS="200")
    assert result.returncode == 0 and time.monotonic() - start < 10
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in result.stdout
    for words in ("{rf,cosine,linear_vp,", "{euler,heun,midpoint,rk4,ddim,dpmpp_2m,dopri5,euler_maruyama,", "{None,euler_maruyama,",
                  "(default: 128)", "fashion_mnist", "after warm-up."):
        assert words in result.stdout, words


@pytest.mark.parametrize("arguments, words", [
    (["nope"], ["'nope' is no preset", "digits"]),
    (["--foo", "1"], ["--foo is no setting", "--run_name", "--tf32"]),
    (["--bathc-size", "4"], ["did you mean --batch_size?"]),
    (["--batch_size", "x"], ["--batch-size", "'x'", "expected int"]),
    (["--base_lr", "fast"], ["--base-lr", "expected float"]),
    (["--base_lr"], ["--base-lr"]),
    (["--process", "rff"], ["'rff'", "rf", "cosine", "linear_vp"]),
    (["--random_flip", "3"], ["True", "False"]),
    (["--channel_mults", "a"], ["--channel-mults"]),
    (["--channel_mults", "1,2"], ["--channel-mults", "spaces between"]),
    (["digits", "stray"], ["stray"]),
    (["digits", "--"], ["'--' is no setting"]),
    (["--digits"], ["without dashes", "sh run.sh digits"]),
    (["--dataset", "cifar11"], ["cifar11", "cifar10", "FILE.npz"]),
    (["--warmup_steps", "9", "--num_training_steps", "8"], ["warmup_steps 9 is longer", "--warmup_steps 0"]),
])
def test_wrong_command_lines_end_in_one_line(arguments, words, capfd):
    with pytest.raises(SystemExit) as end:
        main.read_config(arguments)
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, error


@pytest.mark.parametrize("arguments, words", [
    (["digits", "--device", "cuda"], ["--device cpu"]),
    (["digits", "--T_min", "0", "--target_type", "x1", "--model_type", "x0"], ["T_min 0.0", "--T_min 1e-4"]),
    (["--data_dir", "{tmp}/none"], ["CIFAR10 is not in", "cifar-10-binary.tar.gz", "digits"]),
    (["image_folder", "--data_dir", "{tmp}/none"], ["{tmp}/none", "class folders"]),
    (["moons", "--class_conditional", "True", "--dataset", "{tmp}/x.npy"], ["no labels", "--class_conditional False"]),
    (["digits", "--dataset", "{tmp}/x.npz"], ["cannot read {tmp}/x.npz"]),
    (["digits", "--channel_mults", "1", "2", "2", "2", "2"], ["halves 8 x 8"]),
])
def test_what_only_the_data_or_the_machine_can_tell(arguments, words, tmp_path):
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    environment = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    result = run("python", "main.py", *arguments, "--ckpt_dir", tmp_path, "--wandb", "disabled", **environment)
    assert_one_line_error(result, *[w.format(tmp=tmp_path) for w in words])


def test_rank_0_speaks_and_the_others_only_if_it_does_not():
    """Under torchrun they are ended while they wait (test_run.py has that); alone, as with a GPU too few, they say why."""
    assert_one_line_error(run("python", "main.py", "--foo", RANK="1", WORLD_SIZE="2"), "process 1: --foo is no setting")
    assert run("python", "main.py", "--help", RANK="1", WORLD_SIZE="2").stdout == ""


def test_help_imports_nothing_heavy():
    code = "import sys, main; main.read_config([]); print([m for m in ('torch', 'wandb', 'sklearn', 'numpy') if m in sys.modules])"
    assert run("python", "-c", code, cwd=ROOT).stdout.strip() == "[]"
