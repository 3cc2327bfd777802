"""Draws samples from a checkpoint: `python sample.py --ckpt ckpts/digits/last.pt --num 1000 --out samples`.

On two GPUs: `python launch.py --nproc-per-node=2 sample.py --ckpt ...`, or with `torchrun --nproc-per-node=2 --`.

Writes OUT.npz with `arr_0`, uint8 images (N, H, W, C), float32 fields (N, C, H, W) or vectors (N, D), and `arr_1`,
labels (N,) int64 if the network takes labels, as the evaluation files of Dhariwal & Nichol 2021 have them; and OUT.png,
a picture of the first samples. With a condition, samples are of the conditions in --cond FILE, or of test items, one
after the other, and --rollout 20 makes the samples the conditions of the next, 20 times: arr_0 is (N, 20, ...), and
OUT.gif shows it.
With `--trajectory True` also OUT.gif, an animation of the first samples on their way from noise to data: of points with
some of their paths and arrows of the velocity. With a source, samples start from its test split, and `--reverse True`
leads back to it. `--pairs True` writes OUT_source.npz, from what each sample started.
Sample i is a function of the seed and i, to rounding: neither the batch size nor the number of ranks changes it.
"""

import copy
import math
import os
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch

import saving
from build import build, check_condition, check_settings, read_data
from command_line import fail, optional_settings, parse, start
from config import Config, NonNegativeInt, PositiveInt, Seed, Within, problems
from data_utils import Cases, DataSpec, cases, load_dataset, random_rows
from distributed import gather_rows, on_rank0, print0, rank0_first, set_up
from ema import LENGTHS, synthesis
from logging_utils import coloured, drawn, image_grid, new_figure, picture_of, save_picture
from processes import PROCESSES, make_process
from sampling import SDE_SAMPLERS, field_of, make_grid
from trainer import TRAINERS
from utils import UserError, look_up, make_seed, parameters_of, row_noise, write_atomically

FRAMES = 50  # most frames of a trajectory, before the samples themselves
GRID = torch.cartesian_prod(*2 * [torch.linspace(-2.8, 2.8, 11)])  # the points (121, 2) of its arrows


@dataclass(kw_only=True)
class Drawing(optional_settings(Config, "sampling")):
    """What sample.py and evaluate.py share: a checkpoint, and new values for the run's own settings of sampling."""

    ckpt: str  # Checkpoint to draw from, such as ckpts/digits/last.pt.
    weights: str = "ema"  # Averaged weights; of another decay of the run, as ema_0.999; or raw, those of the last step.
    # Averaged weights of this length, a share of the training: made of the run's snapshots (--ema_snapshot_every).
    ema_length: Annotated[float | None, Within("[0.01, 0.28]")] = None
    # Autoguidance: checkpoint of a worse network for the same data. None: the network itself, without labels.
    guide: str | None = None
    seed: Seed = 0  # Seed of the samples.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one.


@dataclass(kw_only=True)
class Options(Drawing):
    num: PositiveInt = 1000  # Number of samples.
    out: str = "samples"  # Files to write: OUT.npz, and OUT.png.
    labels: tuple[int, ...] = ()  # Labels to draw, in turn, such as 3 5 7; none: all.
    cond: str | None = None  # File of conditions, .npy or .npz with arr_0, as data are stored. None: of test items.
    rollout: NonNegativeInt = 0  # Forecasts of forecasts, so many after each other, as OUT.gif; 0: none.
    reverse: bool = False  # From data of the test split to the source, by the ODE.
    pairs: bool = False  # Write OUT_source.npz, the x1 of each sample, to train on the pairs: --coupling given.
    trajectory: bool = False  # Write OUT.gif: the first 100 images or 2,000 points on their way from noise.


# ---- A checkpoint


def synthesize(net, path, step, length):
    """Loads the average of this length into `net`, made of those in the checkpoint at `path` and in its snapshots.

    Raises UserError if there are none.
    """
    snapshots = saving.numbered(os.path.dirname(path), "snapshot")
    files = {n: file for n, file in snapshots if n < step} | {step: path}
    if len(files) == 1:
        raise UserError(f"ema_length {length} needs snapshots, and none before step {step} are beside {path}: "
                        f"train with --ema_snapshot_every {max(step // 20, 1)}, or leave --ema_length out")
    weights = dict.fromkeys(dict(net.named_parameters()), 0.0)
    for file, factors in zip(files.values(), synthesis([*files], step, length).tolist()):
        averages = saving.load(file)
        try:
            for factor, own in zip(factors, LENGTHS):
                for name in weights:
                    weights[name] += factor * averages[f"ema_length_{own}"][name].double()
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{file} has no averages of this network, which ema_length needs: give --ckpt a checkpoint "
                            "in the folder of its own run, or leave --ema_length out") from error
    net.load_state_dict(weights, strict=False)  # without the buffers, which are the last ones


def load_net(path, weights, device, ema_length=None):
    """State, settings, data, process and network of a checkpoint. Raises UserError if they are not of this code."""
    state = saving.load(path)
    try:
        config, spec = Config(**state["config"]), DataSpec(**state["data"])
    except TypeError as error:
        raise UserError(f"{path} was made by another version of this code ({error}): use that version") from error
    process, net = build(config, spec, device)
    found = {"raw": state["net"], **{name: average for name, average in state.items() if name.startswith("ema")},
             f"ema_{np.ravel(config.ema_decay)[0]}": state["ema"]}
    saving.restore(net, look_up(found, weights), path)
    if ema_length:
        if weights != "ema":
            raise UserError(f"ema_length {ema_length} makes weights of its own: leave --weights {weights} out")
        synthesize(net, path, state["step"], ema_length)
    return state, config, spec, process, net.eval()


def load_guide(path, config, spec, device):
    """The averaged network at `path`, for autoguidance. Raises UserError if its data, process or prediction differ."""
    _, guide, guide_spec, _, net = load_net(path, "ema", device)
    shared = {"model_type", "source", "objective"} | parameters_of(make_process)
    shared |= parameters_of(PROCESSES[config.process])
    different = [name for name in vars(config) if name in shared and getattr(guide, name) != getattr(config, name)]
    if guide_spec != spec or different:
        raise UserError(f"guide {path} differs in {', '.join(different) or 'its data'}: expected a run with the same "
                        "data, process and model_type")
    if guide.class_conditional and not config.class_conditional and guide.label_dropout == 0:
        raise UserError(f"guide {path} always had labels in training, and there are none here: use one with "
                        "label_dropout above 0")
    return net


class Loaded:
    """A checkpoint, ready to draw from: `state` is what its file holds, `config` the run's settings and the options.

    Raises UserError if it is not of this code, or the options contradict it.
    """

    def __init__(self, options, device):
        self.options, self.device = options, device
        self.state, config, self.spec, self.process, self.net = load_net(
            options.ckpt, options.weights, device, options.ema_length)
        if options.ema_length:
            options.weights = f"ema_length_{options.ema_length}"  # on cards, and in what is printed
        chosen = {name: value for name, value in vars(options).items() if hasattr(config, name) and value is not None}
        self.config = config = replace(config, **chosen, sde_sampler=None)
        for problem in problems(config, guide=options.guide):
            raise UserError(problem)
        check_settings(config)
        check_condition(config, self.spec)
        self.guide = load_guide(options.guide, config, self.spec, device) if options.guide else None

    def draw(self, cases, **changes):
        """Samples for these cases, with `changes` of the settings, drawn by the run's trainer, and the mean network
        calls of one: see build.draw_all.
        """
        config = replace(self.config, **changes)
        return look_up(TRAINERS, config.trainer).draw(
            config, self.spec, self.process, self.net, self.device, cases, config.sampler, self.guide)


def conditions_of(path, run):
    """Conditions in a file, each for `samples_per_cond` samples. Raises UserError if they are not such as the run's."""
    if run.config.source != "noise":
        raise UserError(f"cond {path} comes without points of the source: leave it out, to draw for test items")
    data = rank0_first(lambda first: load_dataset(path, channels=run.config.channels if run.config.lag else ()))
    shape, times = run.spec.cond_shape, run.config.samples_per_cond
    if data.spec.shape != shape:
        raise UserError(f"{path} holds items of shape {data.spec.shape}, and the network takes "
                        f"{f'conditions of shape {shape}' if shape else 'no condition'}")
    cond = run.spec.condition(torch.from_numpy(data.data[:])).repeat_interleave(times, 0)
    return Cases(len(cond), cond=cond, times=times)


def rollout(run, given, steps):
    """Forecasts (N, steps, ...), decoded: each is drawn with the one before as its condition."""
    if run.spec.cond_shape != run.spec.shape or run.config.corruption or given.start is not None:
        raise UserError(f"rollout needs a condition like the data, such as that of --lag, and theirs are "
                        f"{run.spec.cond_shape} and {run.spec.shape}; and noise as --source")
    states = []
    for step in range(steps):
        seed = make_seed(run.options.seed, "rollout", step) % 2**32 if step else run.options.seed
        states.append(run.draw(given, seed=seed)[0])
        given = given._replace(cond=run.spec.condition(states[-1]))
    return torch.stack(states, dim=1)


# ---- From noise to data


def frame_times(run, given):
    """The times of the frames of a trajectory: at most FRAMES of the grid, and its end."""
    *times, last = make_grid(**vars(run.config) | {"process": run.process})[:: -1 if given.reverse else 1]
    return [*times[:: math.ceil(len(times) / FRAMES)], last]


def trajectory(run, given, **changes):
    """Samples on their way, decoded, (F, num, ...): at up to FRAMES times of the grid, and then the samples.

    The state at a time is what the network gets in the call at the nearest time; of several calls at one time, in the
    last. So it suits any sampler. Where sigma is above 1, the state is divided by it: noise of standard deviation 80
    would leave the picture. All ranks must call it.
    """
    states = {}
    recording = copy.copy(run)

    def recorded(xt, t, label, cond, *s):
        time = t[0].item()
        states[time] = run.spec.decode(xt / run.process.at(time).sigma.clamp(min=1)).cpu()
        return run.net(xt, t, label, cond, *s)

    recording.net = recorded
    samples, _ = recording.draw(given, compile=False, sampling_batch_size=given.num, **changes)
    states = states or {0.0: samples[:0]}  # of a rank that has no share
    calls = [min(states, key=lambda call: abs(call - time)) for time in frame_times(run, given)[:-1]]
    frames = [*(gather_rows(states[call]) for call in calls), samples]
    if min(map(len, frames)) < given.num:
        raise UserError(f"too little memory to draw {given.num} samples of a trajectory at once: use a smaller --num")
    return torch.stack(frames)


@torch.no_grad()
def frames_of(run, given, states):
    """Yields pictures of points (F, N, D): their density, some paths until then, and arrows along the ODE's paths.

    Of more than two coordinates the first and the last are drawn. Arrows are as long as the velocity where it is small,
    and at most 1. There are none if the velocity depends on more than the point, or `trajectory` changes the scale.
    """
    spec = run.spec
    points = spec.encode(states.flatten(0, 1)).reshape(states.shape)[..., [0, -1]].movedim(2, 0)  # (2, F, N)
    field = field_of(range(len(GRID)), spec.shape, **vars(run.config) | vars(run))  # with its process, net and guide
    depends = run.config.class_conditional or given.cond is not None or run.process.at(1.0).sigma > 1
    times = [] if depends or spec.shape != (2,) else frame_times(run, given)
    for k in range(len(states)):
        axes = new_figure(3, 3).subplots()
        axes.hist2d(*points[:, k], 80, range=2 * [[-3, 3]], cmap="Greys", vmax=8)
        axes.plot(*points[:, : k + 1, :25], color="tab:red", linewidth=0.5)
        if times:
            velocity = field(GRID.to(run.device), times[k], "velocity").cpu() * (1 if given.reverse else -1)
            arrows = velocity / (1 + velocity.norm(dim=1, keepdim=True))
            axes.quiver(*GRID.T, *arrows.T, color="tab:blue", width=0.004, scale=14)
        axes.axis("off")
        yield drawn(axes.figure).quantize(12)


def save_trajectory(run, given, states, path):
    """Writes the states of `trajectory` as an animated GIF, which pauses at its end.

    Images and fields come in a grid. There are few colours, so that the file is small.
    """
    if run.spec.is_field:
        states = coloured(states.flatten(0, 1), states.numel()).unflatten(0, states.shape[:2])  # on one scale
    first, *others = frames_of(run, given, states) if states.ndim == 3 else [
        image_grid(state // 36 * 36, min(10, len(state)), width=320) for state in states]
    save_picture(first, path, save_all=True, append_images=others, duration=[80] * len(others) + [2000], loop=0)


# ---- The script


def main(arguments):
    options = parse(Options, arguments, description="Draws samples from a checkpoint.")
    out = options.out.removesuffix(".npz")
    if not os.access(os.path.dirname(out) or ".", os.W_OK):
        fail(f"cannot write {out}.npz: expected a file in a folder that is there and can be written")
    with set_up(options.device, timeout=60.0) as device:
        run = Loaded(options, device)
        config, spec, given = run.config, run.spec, Cases(options.num)
        classes = range(spec.num_classes if config.class_conditional else 0)
        if unknown := set(options.labels).difference(classes):
            raise UserError(f"labels {unknown} are unknown: the network takes "
                            f"{f'0 to {classes[-1]}' if classes else 'none'}")
        if options.reverse and (config.source == "noise" or config.sampler in (*SDE_SAMPLERS, "flow_map")):
            raise UserError("reverse leads to the source by the ODE: it needs a run with a source, and --sampler heun")
        if options.pairs and spec.cond_shape:
            raise UserError("pairs are those of samples without a condition, and these have one: leave --pairs out")
        if options.cond:
            given = conditions_of(options.cond, run)
        elif spec.cond_shape or config.source != "noise":
            test = read_data(config, "test", spec)
            given = cases(test, options.num, config.samples_per_cond, config.class_conditional)
            if options.reverse:  # from items of the test split
                given = test.cases(random_rows(test, options.num))
                given = given._replace(start=spec.encode(given.truth), reverse=True)
        if classes and (options.labels or given.labels is None):
            given = given._replace(labels=torch.tensor(np.resize(options.labels or classes, given.num)))
        if options.rollout:
            states = rollout(run, given, options.rollout)
            samples = states[:, 0]
        else:
            samples = states = run.draw(given)[0]
        arrays = [states.movedim(-3, -1) if spec.is_image else states] + [given.labels] * bool(classes)
        on_rank0(write_atomically, f"{out}.npz", lambda file: np.savez(file, *arrays))  # as arr_0 and arr_1
        shown = 100 if len(spec.shape) == 3 else None
        on_rank0(lambda: save_picture(picture_of(samples[:shown], cases=given, spec=spec), f"{out}.png"))
        if options.pairs:
            noise = row_noise(range(given.num), spec.shape, device, options.seed, "sample")  # as `draw` has it
            x1 = spec.decode(noise().cpu() if given.start is None else given.start, rounded=False)
            on_rank0(write_atomically, f"{out}_source.npz", lambda file: np.savez(file, x1))
        if options.trajectory or options.rollout:
            first = given._replace(num=min(given.num, shown or 2000))
            frames = states[: first.num].transpose(0, 1) if options.rollout else trajectory(run, first)
            on_rank0(save_trajectory, run, first, frames, f"{out}.gif")
        print0(f"{given.num} samples of {options.weights} weights at step {run.state['step']}, by "
               f"{config.sampler}: {out}.npz and {out}.png")


if __name__ == "__main__":
    start(main)
