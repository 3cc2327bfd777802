"""sample.py: what it writes, that samples do not depend on batches or processes, and its one-line errors."""

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, launch, run, tiny
from PIL import Image

import saving
from data_utils import load_dataset
from sample import main
from trainer import DiffusionTrainer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A conditional run on digits, whose weights are far from the start, and an unconditional one on points."""
    folder = tmp_path_factory.mktemp("runs")
    digits = tiny(folder, num_training_steps=20, base_lr=1e-2)
    points = tiny(folder, run_name="points", dataset="moons", network="mlp", hidden_dim=16, num_layers=1, class_conditional=False)
    worse = tiny(folder, run_name="worse", model_channels=4, num_training_steps=5)
    other = tiny(folder, run_name="other", num_training_steps=2, process="cosine", model_type="x1")
    for config in (digits, points, worse, other):
        DiffusionTrainer(config, load_dataset(config.dataset), torch.device("cpu")).train()
    return folder


def sample(tmp_path, ckpt, *arguments, name="x", processes=1):
    out = tmp_path / f"{name}.npz"
    words = ["--ckpt", str(ckpt), "--out", str(out), *map(str, arguments)]
    if processes == 1:
        main(words)
    else:
        result = run(*launch(processes), "sample.py", *words)
        assert result.returncode == 0, result.stderr
    return np.load(out)


def fails(capfd, *arguments):
    """The one line with which sample.py ends for these arguments."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in arguments])
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_images_labels_and_picture(checkpoints, tmp_path):
    ckpt = checkpoints / "digits" / "last.pt"
    file = sample(tmp_path, ckpt, "--num", "25")
    assert file["arr_0"].shape == (25, 8, 8, 1) and file["arr_0"].dtype == np.uint8
    assert file["arr_1"].dtype == np.int64 and file["arr_1"].tolist() == [i % 10 for i in range(25)]
    assert Image.open(tmp_path / "x.png").width >= 450
    assert sample(tmp_path, ckpt, "--num", "5", "--labels", "3,7")["arr_1"].tolist() == [3, 7, 3, 7, 3]


@pytest.mark.parametrize("sampler", ["heun", "euler_maruyama"])
def test_samples_do_not_depend_on_batches_or_processes(checkpoints, tmp_path, sampler):
    ckpt, common = checkpoints / "digits" / "last.pt", ["--num", "33", "--sampler", sampler, "--guidance_scale", "1.5"]
    whole = sample(tmp_path, ckpt, *common)["arr_0"].astype(int)
    for other in (sample(tmp_path, ckpt, *common, "--batch_size", "7", name="y"), sample(tmp_path, ckpt, *common, name="z", processes=2)):
        assert abs(other["arr_0"].astype(int) - whole).max() <= 1  # rounding
    assert len(np.unique(whole, axis=0)) == 33


def test_every_option_matters(checkpoints, tmp_path):
    ckpt = checkpoints / "digits" / "last.pt"
    options = ["", "--weights raw", "--sampler euler", "--sampling_steps 6", "--guidance_scale 3", "--seed 1", "--labels 4", "--grid edm",
               "--guidance_scale 3 --guidance_t_max 0.5", "--sampler stochastic_heun", "--sampler stochastic_heun --sde_diffusion sin2",
               "--bf16 True"]
    drawn = [sample(tmp_path, ckpt, "--num", "10", "--sampling_steps", "5", *o.split())["arr_0"] for o in options]
    for i in range(len(drawn)):
        for j in range(i):
            assert not np.array_equal(drawn[i], drawn[j]), (options[i], options[j])


def test_many_samples_are_drawn_compiled_if_one_likes(checkpoints, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(torch, "compile", lambda net: made.append(net) or net)
    monkeypatch.setattr("build.SAMPLING_STEPS", 20)
    for words, compiled in (("", 0), ("--compile False", 0), ("--compile True", 1), ("--compile True --batch_size 40", 0)):
        sample(tmp_path, checkpoints / "digits" / "last.pt", "--num", "40", "--batch_size", "4", "--sampling_steps", "2", *words.split())
        assert len(made) == capsys.readouterr().out.count("compiling the network") == compiled
        made.clear()


def test_bf16_that_is_emulated_is_told_of(checkpoints, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("build.native_bf16", lambda device: False)
    for words, told in (("--bf16 True", 1), ("", 0)):
        sample(tmp_path, checkpoints / "digits" / "last.pt", "--num", "2", *words.split())
        assert capfd.readouterr().err.count("this CPU emulates bfloat16") == told


def test_autoguidance(checkpoints, tmp_path, capfd):
    """A run of fewer steps guides: its own network as guide changes nothing, another does; also where there are no labels."""
    ckpt, worse = checkpoints / "digits" / "last.pt", checkpoints / "worse" / "last.pt"
    plain, same, guided = (sample(tmp_path, ckpt, "--num", "10", *words)["arr_0"].astype(int) for words in (
        [], ["--guidance_scale", "2", "--guide", ckpt], ["--guidance_scale", "2", "--guide", worse]))
    assert abs(same - plain).max() <= 1 and abs(guided - plain).max() > 10
    points = checkpoints / "points" / "last.pt"
    assert np.isfinite(sample(tmp_path, points, "--num", "10", "--guidance_scale", "2", "--guide", points)["arr_0"]).all()
    for words, said in ((["--guide", worse], "does nothing"), (["--guide", points, "--guidance_scale", "2"], "differs in its data"),
                        (["--guide", checkpoints / "other" / "last.pt", "--guidance_scale", "2"], "differs in process, model_type")):
        assert said in fails(capfd, "--ckpt", ckpt, "--num", "2", "--out", tmp_path / "x.npz", *words)


def test_points(checkpoints, tmp_path):
    file = sample(tmp_path, checkpoints / "points" / "last.pt", "--num", "40")
    assert file["arr_0"].shape == (40, 2) and file["arr_0"].dtype == np.float32 and file.files == ["arr_0"]
    assert Image.open(tmp_path / "x.png").size == (500, 500)  # the checkpoint holds no data to lay beside


def test_one_line_errors(checkpoints, tmp_path, capfd):
    digits, points = checkpoints / "digits" / "last.pt", checkpoints / "points" / "last.pt"
    (tmp_path / "short.pt").write_bytes(digits.read_bytes()[:5000])
    state = saving.load(str(digits))
    saving.save(str(tmp_path), {**state, "config": {**state["config"], "model_channels": 16}})
    for arguments, words in [
        (["--ckpt", tmp_path / "none.pt"], ["no checkpoint"]),
        (["--ckpt", tmp_path / "short.pt"], ["truncated"]),
        (["--ckpt", tmp_path / "last.pt"], ["another architecture"]),
        (["--ckpt", digits, "--labels", "3,11"], ["0 to 9"]),
        (["--ckpt", points, "--labels", "3"], ["takes none"]),
        (["--ckpt", points, "--guidance_scale", "2"], ["--guidance_scale 1"]),
        (["--ckpt", digits, "--sampler", "dopri"], ["euler_maruyama"]),
        (["--ckpt", digits, "--num", "0"], ["num is 0"]),
        (["--ckpt", digits, "--guidance_t_min", "1.5"], ["guidance_t_min 1.5 is above guidance_t_max 1.0"]),
        (["--ckpt", digits, "--num", "2", "--out", tmp_path / "no" / "x.npz"], ["a folder that is there"]),
        (["--ckpt", digits, "--num", "2", "--out", tmp_path / "x.png"], ["expected a FILE.npz"]),
        (["--ckpt", digits, "--seed", "-1"], ["seed is -1"]),
        (["--ckpt", digits, "--guidance_scale", "nan"], ["finite"]),
        (["--ckpt", digits, "--sampler", "none"], ["error: invalid choice 'none'"]),
        (["--ckpt", "README.md"], ["README.md cannot be read"]),
        ([], ["error: Missing", "--ckpt"]),
    ]:
        error = fails(capfd, *arguments)
        for word in words:
            assert word in error, error


def test_the_script(checkpoints, tmp_path):
    """As a user calls it."""
    result = run("python", "sample.py", "--ckpt", checkpoints / "points" / "last.pt", "--num", "3", "--out", tmp_path / "x.npz")
    assert result.returncode == 0 and "3 samples of ema weights at step" in result.stdout and str(tmp_path / "x.png") in result.stdout
    assert_one_line_error(run("python", "sample.py", "--ckpt", "README.md"), "README.md cannot be read")
