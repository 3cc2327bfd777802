"""sample.py: what it writes, that samples do not depend on batches or ranks, trajectories, and its one-line errors."""

import os

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, launch, run, tiny
from PIL import Image

import saving
from check import GaussianMixture
from data_utils import Cases, load_dataset
from processes import PROCESSES
from sample import Loaded, Options, load_guide, main, trajectory
from sampling import SAMPLERS, Field, heun_step, make_grid
from trainer import DiffusionTrainer
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoints(runs):
    """Beside the runs on digits and points, a worse run on digits, and one of another process and prediction."""
    for config in (tiny(runs, run_name="worse", model_channels=4, num_training_steps=5),
                   tiny(runs, run_name="other", num_training_steps=2, process="cosine", model_type="x1")):
        DiffusionTrainer(config, load_dataset(config.dataset), CPU).train()
    return runs


def sample(tmp_path, ckpt, *arguments, name="x", ranks=1):
    out = tmp_path / f"{name}.npz"
    words = ["--ckpt", str(ckpt), "--out", str(out), *map(str, arguments)]
    if ranks == 1:
        main(words)
    else:
        result = run(*launch(ranks), "sample.py", *words)
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
    assert sample(tmp_path, ckpt, "--num", "5", "--labels", "3", "7")["arr_1"].tolist() == [3, 7, 3, 7, 3]


@pytest.mark.parametrize("sampler", ["heun", "euler_maruyama"])
def test_samples_do_not_depend_on_batches(checkpoints, tmp_path, sampler):
    ckpt, common = checkpoints / "digits" / "last.pt", ["--num", "33", "--sampler", sampler, "--guidance_scale", "1.5"]
    whole = sample(tmp_path, ckpt, *common)["arr_0"].astype(int)
    parts = sample(tmp_path, ckpt, *common, "--sampling_batch_size", "7", name="y")["arr_0"].astype(int)
    assert abs(parts - whole).max() <= 1  # rounding
    assert len(np.unique(whole, axis=0)) == 33


@pytest.mark.parametrize("num, ranks", [(33, 2), (2, 3)])
def test_samples_and_trajectory_do_not_depend_on_ranks(checkpoints, tmp_path, num, ranks):
    """The shares differ, and one of three ranks has none of two samples. An SDE draws noise at each step."""
    ckpt = checkpoints / "digits" / "last.pt"
    common = ["--num", num, "--sampler", "euler_maruyama", "--guidance_scale", "1.5", "--trajectory", "True"]
    one = sample(tmp_path, ckpt, *common, name="one")["arr_0"].astype(int)
    more = sample(tmp_path, ckpt, *common, name="more", ranks=ranks)["arr_0"].astype(int)
    assert abs(more - one).max() <= 1  # rounding
    a, b = (np.stack(frames(tmp_path / f"{name}.gif")).astype(int) for name in ("one", "more"))
    assert a.shape == b.shape and (abs(a - b) > 50).mean() < 0.01


def test_every_option_matters(checkpoints, tmp_path):
    ckpt = checkpoints / "digits" / "last.pt"
    options = ["", "--weights raw", "--sampler euler", "--sampling_steps 6", "--guidance_scale 3", "--seed 1",
               "--labels 4", "--grid edm", "--guidance_scale 3 --guidance_t_max 0.5", "--sampler stochastic_heun",
               "--sampler stochastic_heun --sde_diffusion sin2", "--bf16 True",
               "--guidance_scale 3 --clip_x0 static", "--guidance_scale 3 --clip_x0 dynamic"]
    drawn = [sample(tmp_path, ckpt, "--num", "10", "--sampling_steps", "5", *o.split())["arr_0"] for o in options]
    for i in range(len(drawn)):
        for j in range(i):
            assert not np.array_equal(drawn[i], drawn[j]), (options[i], options[j])


def test_many_samples_are_drawn_compiled_if_one_likes(checkpoints, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(torch, "compile", lambda net: made.append(net) or net)
    monkeypatch.setattr("build.SAMPLING_STEPS", 20)
    common = ["--num", "40", "--sampling_batch_size", "4", "--sampling_steps", "2"]
    all_at_once = "--compile True --sampling_batch_size 40"
    for words, compiled in (("", 0), ("--compile False", 0), ("--compile True", 1), (all_at_once, 0)):
        sample(tmp_path, checkpoints / "digits" / "last.pt", *common, *words.split())
        assert len(made) == capsys.readouterr().out.count("compiling the network") == compiled
        made.clear()


def test_autoguidance(checkpoints, tmp_path, capfd):
    """A run of fewer steps guides. The network itself as guide changes nothing; it can guide without labels too."""
    ckpt, worse = checkpoints / "digits" / "last.pt", checkpoints / "worse" / "last.pt"
    plain, same, guided = (sample(tmp_path, ckpt, "--num", "10", *words)["arr_0"].astype(int) for words in (
        [], ["--guidance_scale", "2", "--guide", ckpt], ["--guidance_scale", "2", "--guide", worse]))
    assert abs(same - plain).max() <= 1 and abs(guided - plain).max() > 10
    points = checkpoints / "points" / "last.pt"
    strong = ["--guidance_scale", "2"]
    assert np.isfinite(sample(tmp_path, points, "--num", "10", *strong, "--guide", points)["arr_0"]).all()
    for words, error in (
        (["--guide", worse], "does nothing"),
        (["--guide", points, *strong], "differs in its data"),
        (["--guide", checkpoints / "other" / "last.pt", *strong], "differs in process, model_type: expected"),
    ):
        assert error in fails(capfd, "--ckpt", ckpt, "--num", "2", "--out", tmp_path / "x.npz", *words)


def test_a_guide_shares_what_the_process_reads(checkpoints, tmp_path, monkeypatch):
    """Each parameter of the process, also of one that a project adds; and no setting that it does not read."""
    class Own(PROCESSES["rf"]):
        def __init__(self, min_snr_gamma=5.0):
            pass

    monkeypatch.setitem(PROCESSES, "own", Own)
    state = saving.load(str(checkpoints / "points" / "last.pt"))

    def guide(config, **changes):
        saving.save(str(tmp_path), {**state, "config": {**state["config"], "process": config.process, **changes}})
        return load_guide(str(tmp_path / "last.pt"), config, spec, CPU)

    loaded = Loaded(Options(ckpt=str(checkpoints / "points" / "last.pt")), CPU)
    config, spec = loaded.config, loaded.spec
    for process, read in (("linear_vp", ["beta_min"]), ("edm", ["sigma_max", "rho"]), ("own", ["min_snr_gamma"]),
                          ("rf", ["sigma_data"])):
        config.process = process
        assert guide(config, base_lr=1.0, loss_weighting="edm") is not None
        for name in read:
            with pytest.raises(UserError, match=f"differs in {name}: expected"):
                guide(config, **{name: 1.5})
        for name in {"beta_min", "sigma_max", "rho", "min_snr_gamma"} - set(read):
            assert guide(config, **{name: 1.5}) is not None


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
        (["--ckpt", digits, "--labels", "3", "11"], ["labels {11} are unknown", "0 to 9"]),
        (["--ckpt", points, "--labels", "3"], ["the network takes none"]),
        (["--ckpt", points, "--guidance_scale", "2"], ["--guidance_scale 1"]),
        (["--ckpt", digits, "--sampler", "dopri"], ["euler_maruyama"]),
        (["--ckpt", digits, "--num", "0"], ["num is 0"]),
        (["--ckpt", digits, "--guidance_t_min", "1.5"], ["guidance_t_min 1.5 is above guidance_t_max 1.0"]),
        (["--ckpt", digits, "--num", "2", "--out", tmp_path / "no" / "x.npz"], ["a folder that is there"]),
        (["--ckpt", digits, "--seed", "-1"], ["seed is -1"]),
        (["--ckpt", digits, "--guidance_scale", "nan"], ["finite"]),
        (["--ckpt", digits, "--sampler", "none"], ["error: invalid choice 'none'"]),
        (["--ckpt", "README.md"], ["README.md cannot be read"]),
        ([], ["error: Missing", "--ckpt"]),
    ]:
        error = fails(capfd, *arguments)
        for word in words:
            assert word in error, error


# ---- Trajectories


def frames(path) -> list[np.ndarray]:
    image = Image.open(path)
    found = []
    for i in range(image.n_frames):
        image.seek(i)
        found.append(np.asarray(image.convert("RGB")))
    return found


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "flow_map"])  # see test_flow_maps.py
def test_a_trajectory_goes_from_noise_to_the_samples(checkpoints, sampler):
    run = Loaded(Options(ckpt=str(checkpoints / "points" / "last.pt"), sampler=sampler, sampling_steps=10), CPU)
    states = trajectory(run, Cases(40))
    assert states.shape == (11, 40, 2) and torch.equal(states[-1], run.draw(Cases(40))[0])
    noise = run.spec.encode(states[0])
    assert torch.equal(noise, run.spec.encode(trajectory(run, Cases(40))[0])) and abs(noise.std() - 1) < 0.2


def test_the_states_of_a_trajectory_are_those_of_the_sampler(checkpoints, monkeypatch):
    """At every third time of the grid, for at most five; by Heun's method, two of whose calls are at one time."""
    monkeypatch.setattr("sample.FRAMES", 5)
    ckpt = str(checkpoints / "points" / "last.pt")
    run = Loaded(Options(ckpt=ckpt, sampler="heun", sampling_steps=12, grid="quadratic"), CPU)
    run.net = GaussianMixture(run.process, "velocity", torch.full((1, 2), 0.7), 0.25)
    states = run.spec.encode(trajectory(run, Cases(30)).flatten(0, 1)).reshape(-1, 30, 2)
    times = make_grid(12, run.config.T_min, run.config.T_max, "quadratic")
    field, x, expected = Field(run.net, run.process, "velocity"), states[0], []
    for t, t_next in zip(times, times[1:]):
        expected.append(x)
        x = heun_step(field, x, t, t_next)
    torch.testing.assert_close(states[:-1], torch.stack(expected[::3]))


def test_a_trajectory_of_more_samples_than_memory_has_room_for(checkpoints):
    """The sampler itself goes back to smaller batches, which would mix up the states."""
    run = Loaded(Options(ckpt=str(checkpoints / "points" / "last.pt"), sampling_steps=2), CPU)
    net = run.net

    def short_of_memory(xt, t, label, cond=None):
        if len(xt) > 10:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return net(xt, t, label)

    run.net = short_of_memory
    assert len(trajectory(run, Cases(10))) == 3 and len(run.draw(Cases(40))[0]) == 40
    with pytest.raises(UserError, match="too little memory to draw 40 samples of a trajectory"):
        trajectory(run, Cases(40))


def test_noise_of_a_large_sigma_stays_in_the_picture(checkpoints, tmp_path):
    state = saving.load(str(checkpoints / "points" / "last.pt"))
    saving.save(str(tmp_path), {**state, "config": {**state["config"], "process": "ve_linear"}})
    run = Loaded(Options(ckpt=str(tmp_path / "last.pt"), sampling_steps=5), CPU)
    assert abs(run.spec.encode(trajectory(run, Cases(100))[0]).std() - 1) < 0.2


@pytest.mark.parametrize("name, num, kilobytes", [("digits", 100, 150), ("points", 2000, 150)])
def test_the_gif(checkpoints, tmp_path, name, num, kilobytes):
    """A frame for each step and the samples, at which it pauses; the files of samples stay as they are."""
    ckpt, common = checkpoints / name / "last.pt", ["--num", num, "--sampling_steps", "50", "--seed", "3"]
    gif = ["--trajectory", "True"]
    plain, with_gif = (dict(sample(tmp_path, ckpt, *common, *words)) for words in ([], gif))
    assert plain.keys() == with_gif.keys() and all(np.array_equal(plain[key], with_gif[key]) for key in plain)
    image = Image.open(tmp_path / "x.gif")
    assert image.n_frames == 51 and 250 <= image.width <= 350 and image.info["loop"] == 0
    image.seek(0)
    assert image.info["duration"] < 200
    image.seek(50)
    assert image.info["duration"] == 2000
    assert (tmp_path / "x.gif").stat().st_size < 1000 * kilobytes


# ---- As a user calls it


def test_the_script(checkpoints, tmp_path):
    ckpt = checkpoints / "points" / "last.pt"
    for name in ("x.npz", "x_0.5"):
        result = run("python", "sample.py", "--ckpt", ckpt, "--num", "3", "--out", tmp_path / name)
        assert result.returncode == 0 and "3 samples of ema weights at step" in result.stdout
        stem = tmp_path / name.removesuffix(".npz")
        assert f"{stem}.npz and {stem}.png" in result.stdout and os.path.exists(f"{stem}.npz")
    assert_one_line_error(run("python", "sample.py", "--ckpt", "README.md"), "README.md cannot be read")
