"""Measures how good a checkpoint is: `python evaluate.py --ckpt ckpts/digits/last.pt`.

On two GPUs: `python launch.py --nproc-per-node=2 evaluate.py --ckpt ...`. `python evaluate.py compare CARD.json ...`
prints results side by side, if they were measured in the same way.

Draws several sets of samples, compares them and data with a reference split, and writes a card: the numbers, and all
that must be the same before two numbers are compared. Then come, of points from a source, the energy of their paths,
bits per dimension of the test split, the training images nearest to samples, the loss by t, and, with --curve 5 10 20
40, distance against network calls for all samplers at so many steps. Everything goes to a folder in `evaluation/`
beside the checkpoint, and to wandb.

Each of PARTS is a function that adds to the card and the pictures of an `Evaluation`: to measure something else, write
such a function and add it there. All ranks call it, each takes its share of the samples, and rank 0 writes. What is
random is a function of the seed and of the item's number, so the number of ranks changes nothing but rounding.
"""

import json
import math
import os
import shlex
import statistics
import subprocess
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch

from build import read_data
from command_line import fail, parse, start
from conditions import CORRUPTIONS
from config import HERE, NonNegativeInt, PositiveInt, Within
from data_utils import cases, random_rows
from distributed import gather_rows, on_rank0, print0, set_up, share, world_size
from likelihood import bits_per_dim, log_likelihoods
from logging_utils import (
    Progress,
    close_wandb,
    image_grid,
    log_plot,
    log_to_wandb,
    picture_of,
    save_picture,
    start_wandb,
)
from metrics import EXTRACTORS, LEAST, Evaluator, content, fraction, nearest, root_mean_square, spectrum, wasserstein
from processes import first_channels
from sample import Drawing, Loaded, frame_times, trajectory
from sampling import SAMPLERS
from saving import digest
from trainer import TRAINERS
from utils import UserError, parameters_of, write_atomically

BINS = 20  # of t, in the curve of the loss
SHOWN, NEIGHBOURS = 20, 3  # samples in the picture of neighbours, and neighbours beside each


@dataclass(kw_only=True)
class Options(Drawing):
    # Samples of each seed, for `fid` 50000. None: 1,000 images or 5,000 vectors.
    num: Annotated[int | None, Within(f"[{LEAST}, inf)")] = None
    seeds: PositiveInt = 3  # Sets of samples, with seeds from `seed` on.
    reference: Literal["train", "test"] = "train"  # Split that the samples are compared with.
    # Features of images. None: inception for colour images of 32 pixels or more, else classifier.
    extractor: Literal[tuple(EXTRACTORS)] | None = None
    regression: str | None = None  # Checkpoint of a run with --trainer regression, to compare forecasts with.
    likelihood_num: NonNegativeInt = 300  # Test items for bits per dimension, 0 for none.
    loss_num: NonNegativeInt = 2000  # Draws for the loss by t, 0 for none.
    neighbours_num: NonNegativeInt = 1000  # Samples whose nearest training images are looked for, 0 for none.
    curve: tuple[int, ...] = ()  # Steps at which all samplers are compared, such as 5 10 20 40.
    out: str | None = None  # Folder of the results; None: one in evaluation/ beside the checkpoint.
    wandb: Literal["online", "offline", "disabled"] | None = None  # None: the run's own.


class Evaluation(Loaded):
    """A checkpoint, its data by split, the evaluator, and what the parts write: the card, and PIL pictures by name.

    Samples are drawn for `given`, labels or conditions of the split `held_out`. `samples` are those of the last seed,
    once they are drawn. Raises UserError if something of it cannot be had.
    """

    def __init__(self, options, device):
        super().__init__(options, device)
        config, spec = self.config, self.spec
        path = options.regression
        self.regression = run = Loaded(
            replace(options, ckpt=path, guide=None, source=None, weights="ema", ema_length=None, sampler=None),
            device) if path else None
        if run and (run.config.trainer != "regression" or run.spec != spec):
            raise UserError(f"{path} is no regression for these data: train one with the settings of this run and "
                            "--trainer regression")
        options.num = options.num or (1000 if spec.is_image else 5000)
        self.data = {"train": read_data(config, "train", spec)}
        try:
            self.data["test"] = read_data(config, "test", spec)
        except UserError as error:
            if options.reference == "test":
                raise
            print0(f"what needs a test split is left out: {error}")
        train, reference = self.data["train"], self.data[options.reference]
        self.held_out = self.data.get("test", train) if spec.cond_shape or train.source else train
        self.given = cases(self.held_out, options.num, config.samples_per_cond, config.class_conditional)
        options.num = self.given.num
        times = self.given.times
        if options.num < LEAST * times:
            raise UserError(f"{options.num} samples are those of {options.num // times} conditions: expected {LEAST} "
                            f"or more; use --num {LEAST * times}, or fewer --samples_per_cond")
        if spec.is_image:
            colour = spec.shape[0] >= 3 and min(spec.shape[1:]) >= 32
            options.extractor = options.extractor or ("inception" if colour else "classifier")
        elif options.extractor:
            raise UserError(f"extractor {options.extractor} is for images: leave it out")
        self.evaluator = Evaluator(train, reference, device, options.extractor,
                                   suffix="" if options.reference == "train" else "_test")
        self.card = {
            "step": self.state["step"], "options": vars(options), "config": vars(config),
            "protocol": {  # what must be the same before two figures are compared
                "samples": options.num, "labels": config.class_conditional,
                "samples_per_cond": times if spec.cond_shape else None,
                "reference": {"split": options.reference, "items": len(reference),
                              "sha256": on_rank0(content, reference.data)},
                "extractors": {type(network).__name__: network.sha256 for network in
                               (self.evaluator.extractor, self.evaluator.classifier) if network},
            },
            "metrics": {},
            "git_commit": git_commit(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        }
        what = f"{config.run_name}_{self.card['step']:07d}_{options.weights}_{config.sampler}"
        beside = os.path.dirname(options.ckpt) or "."
        self.folder = options.out or f"{beside}/evaluation/{what}_{digest(vars(options))[:6]}"
        self.pictures = {}

    def random_items(self, dataset, n):
        """n random items, or all if there are fewer, always the same, with their labels and conditions."""
        return dataset.cases(random_rows(dataset, min(n, len(dataset))))

    def save(self):
        """Writes the card and the pictures. All ranks must call it."""
        def write():
            for name, image in self.pictures.items():
                save_picture(image, f"{self.folder}/{name}.png")
            write_atomically(f"{self.folder}/card.json", json.dumps(self.card, indent=2))

        on_rank0(write)


def git_commit():
    """The commit of this code, with -dirty if files differ from it; unknown where there is no git."""
    failed, commit = subprocess.getstatusoutput(
        f"git -C {shlex.quote(HERE)} describe --always --dirty --abbrev=40 --exclude '*'")
    return "unknown" if failed else commit


def in_words(values):
    """Names and values, of those that are float."""
    return "  ".join(f"{name} {value:<8.4g}" for name, value in values.items() if isinstance(value, float)).rstrip()


def title(card):
    """One line that says what was measured."""
    config, options = card["config"], card["options"]
    return (f"{config['run_name']}, step {card['step']}, {options['weights']} weights: {options['seeds']} x "
            f"{options['num']:,} samples by {config['sampler']}, {card['nfe']:g} network calls, guidance "
            f"{config['guidance_scale']:g}")


# ---- Distances


def distances(e):
    """The metrics over the seeds, and those of real data, which show what a perfect model would get."""
    sets = []
    options = e.options
    for seed in range(options.seed, options.seed + options.seeds):
        e.samples, e.card["nfe"] = e.draw(e.given, seed=seed)
        sets.append(e.evaluator(e.samples, e.given.labels, e.given.truth))
    shown = e.samples[: 100 if len(e.spec.shape) == 3 else 2000]
    e.pictures["samples"] = picture_of(shown, data=e.data["train"].data, cases=e.given, spec=e.spec)
    e.card["real"] = real = real_data(e)
    print0(title(e.card))
    for name in sets[0]:
        values = [found[name] for found in sets]
        e.card["metrics"][name] = row = {
            "mean": statistics.fmean(values), "min": min(values), "max": max(values),
            "std": statistics.stdev(values) if len(values) > 1 else None, "values": values}
        if real["items"] == options.num:
            row["real"] = real["metrics"].get(name)
        print0(f"{name:27} {in_words(row)}")
    print0(f"real data   {in_words(real['metrics'])}, of {real['items']:,} items of {real['what']}")


def real_data(e):
    """The metrics of as many real items as there are samples, or of all, if there are fewer.

    They are of the other split; without a test split, of one half of the training split, against the other half.
    """
    train = e.data["train"]
    test = e.data.get("test")
    evaluator = e.evaluator
    what = "the other split"
    dataset = test if e.options.reference == "train" else train
    if test is None or len(test) < LEAST:
        dataset, reference = (replace(train, data=train.data[k::2]) for k in (0, 1))
        evaluator = Evaluator(train, reference, e.device, e.options.extractor)
        what = "one half of the training split, against the other"
    items = e.random_items(dataset, e.options.num)
    # of the training split, the classifier has learned the labels
    known = e.given.labels is not None and dataset is test
    return {"items": items.num, "what": what, "metrics": evaluator(items.truth, items.labels if known else None)}


# ---- Paths


def path_energy(e):
    """Of points from a source: E int |velocity|^2 dt along the ODE, by Euler's method, beside the least, W2^2.

    W2 is that of the source's points and the data; normalised is energy / W2^2 - 1 (Tong et al. 2023, section 6). All
    are in the data's own units.
    """
    if e.given.start is None or len(e.spec.shape) > 1 or e.config.source == e.config.dataset:
        return
    steps = trajectory(e, e.given, sampler="euler", denoise=False).diff(dim=0)
    lengths = -torch.tensor(frame_times(e, e.given)).diff()
    energy = (steps.square().sum(2).mean(1) / lengths).sum().item()
    least = wasserstein(e.spec.decode(e.given.start), e.random_items(e.held_out, e.given.num).truth) ** 2
    e.card["paths"] = found = {"path_energy": energy, "least": least, "normalised": energy / least - 1}
    print0(f"paths       {in_words(found)}")


# ---- Forecasts


def forecasts(e):
    """With a condition: the metrics of trivial forecasts on the same items, and pictures of samples and of spectra.

    The condition itself, enlarged (with --lag this is persistence), and the mean given the condition, by a network of
    the same size that was trained for that alone. `consistency` compares samples with their condition.
    """
    given, spec, config = e.given, e.spec, e.config
    if given.cond is None:
        return
    found = {}
    one = cases(e.held_out, len(given.truth), 1, config.class_conditional)  # one sample of each condition
    if spec.cond_has_channels:
        found["persistence" if config.lag else "condition"] = spec.decode(first_channels(one.cond, spec.shape))
    if e.regression:
        found["regression"] = e.regression.draw(one)[0]
    e.card["forecasts"] = {}
    for name, samples in {**found, "samples": e.samples}.items():
        values = {} if name == "samples" else e.evaluator(samples, one.labels, one.truth)
        if config.corruption and "uniform" not in parameters_of(CORRUPTIONS[config.corruption]):
            left = e.held_out.corruption(spec.encode(samples), uniform=None)
            values["consistency"] = root_mean_square(left - given.cond[:: given.num // len(samples), :-1])
        if values:
            e.card["forecasts"][name] = values
            print0(f"{name:11} {in_words(values)}")
    if spec.is_field:
        lines = {}
        e.card["spectra"] = {}
        for name, samples in {"truth": given.truth, "samples": e.samples, **found}.items():
            power = spectrum(samples).numpy()
            lines[name] = range(1, len(power) + 1), power
            e.card["spectra"][name] = power.tolist()
        e.pictures["spectrum"] = log_plot(lines, xlabel="wavenumber", ylabel="power", xscale="log")


# ---- Likelihood


def likelihood(e):
    """Bits per dimension of test images, or nats of test vectors in the data's own units: mean and standard error."""
    test = e.data.get("test")
    spec = e.spec
    known = e.config.trainer != "regression" and e.process.at(e.config.T_max).sigma > 0  # there is none at a point
    if e.config.source != "noise":
        return print0("likelihood is left out: the density of a source is not known; what is known is its change along "
                      "the ODE, by likelihood.flow")
    if not test or not known or not e.options.likelihood_num:
        return
    items = e.random_items(test, e.options.likelihood_num)
    dims = math.prod(spec.shape)
    rows = share(items.num)
    parts = [torch.empty(0)]
    bin_width = 1 / spec.std[0] if spec.is_image else 0.0
    settings = vars(e.config) | dict(
        process=e.process, rows=rows, device=e.device, bin_width=bin_width, guidance_scale=1.0,
        labels=items.labels if e.config.class_conditional else None, cond=items.cond,
        probe="exact" if dims <= 16 else "rademacher")
    with Progress("likelihood", rows, "item") as progress:
        for log_p in log_likelihoods(e.net, data=spec.encode(items.truth), **settings):
            parts.append(log_p.cpu())
            progress.update(len(log_p))
    log_p = gather_rows(torch.cat(parts)).double()
    name = "nats"
    values = np.log(spec.std).mean() * dims - log_p
    if spec.is_image:
        name, values = "bits_per_dim", bits_per_dim(log_p, dims, bin_width)
    e.card["likelihood"] = found = {"items": len(values), name: values.mean().item(),
                                    "standard_error": values.std().item() / len(values) ** 0.5}
    print0(f"likelihood  {in_words(found)}, of {len(values):,} test items")


# ---- Neighbours


def neighbours(e):
    """The share of samples that are nearly copies of a training image; a picture of the nearest.

    A near-copy is less than a third as far from its nearest training image as from the second nearest, in pixels (Yoon
    et al. 2023, "Diffusion Probabilistic Models Generalize when They Fail to Memorize", section 3).
    """
    train = e.data["train"].data
    n = e.options.neighbours_num
    if not n or not e.spec.is_image:
        return
    samples = e.samples[:n]
    distances, items = nearest(samples.numpy(), train, NEIGHBOURS, e.device)
    ratio = distances[:, 0] / distances[:, 1].clamp(min=1e-12)
    order = ratio.argsort()[:SHOWN]
    columns = [samples[order], *(torch.from_numpy(train[column.numpy()]) for column in items[order].T)]
    e.pictures["neighbours"] = image_grid(torch.stack(columns, dim=1).flatten(0, 1), 2 * len(columns))
    copies = fraction(ratio < 1 / 3)
    e.card["neighbours"] = {"items": len(samples), "near_copies": copies}
    print0(f"neighbours  {100 * copies:.2f}% of {len(samples):,} samples are near-copies of training images")


# ---- Loss by t


def loss_by_t(e):
    """The mean loss of both splits, and a curve of it over BINS of t."""
    from scipy.stats import binned_statistic

    if not e.options.loss_num:
        return
    lines = {}
    e.card["loss"] = {}
    for split, data in e.data.items():
        t, values = found = losses(e, data)
        lines[split] = binned_statistic(t, found, bins=BINS, range=(e.config.T_min, e.config.T_max)).statistic
        e.card["loss"] |= {"draws": len(t), split: values.mean(), f"{split}_by_t": lines[split].T.tolist()}
    e.pictures["loss_by_t"] = log_plot(lines, xlabel="t", ylabel="loss")
    print0(f"loss        {in_words(e.card['loss'])}")


def losses(e, data):
    """Times, evenly spread in each batch, and losses, (2, N), of whole batches of this data, loss_num draws or more.

    Batches and loss are those of the run's trainer, without flips and warm-up, and with all labels and conditions. The
    batches are the same for raw and for EMA weights.
    """
    c = replace(e.config, batch_size=max(e.config.batch_size, world_size()), time_sampler="stratified",
                importance_weights=False, random_flip=False, label_dropout=0.0, cond_dropout=0.0,
                overfit_one_batch=False, off_diagonal_warmup=0)
    trainer = TRAINERS[c.trainer](c, data, e.device)
    trainer.forward = e.net
    found = []
    with torch.no_grad():
        for step in Progress("loss by t", range(math.ceil(e.options.loss_num / c.batch_size)), "batch"):
            batch = trainer.prepare_batch(step)
            found.append(torch.stack([batch.t, trainer.loss(batch)], dim=1))
    return gather_rows(torch.cat(found)).double().T.numpy()


# ---- Quality against cost


def curve(e):
    """The metrics of every sampler at the steps of --curve, of one seed: a table and a picture.

    dopri5 gets the tolerances 0.1, 0.01, ... instead.
    """
    points = []
    lines = {}
    metric = next(iter(e.card["metrics"]))
    for name in SAMPLERS:
        for k, steps in enumerate(sorted(e.options.curve), 1):
            changes = {"rtol": 10.0**-k, "atol": 10.0**-k} if name == "dopri5" else {"sampling_steps": steps}
            try:
                samples, nfe = e.draw(e.given, sampler=name, **changes)
                values = e.evaluator(samples, e.given.labels, e.given.truth)
            except UserError as error:
                print0(f"{name} with {steps} steps or more is left out: {str(error).partition(':')[0]}")
                break
            points.append({"sampler": name, **changes, "nfe": nfe, **values})
            print0(f"{name:20} {steps:3} steps  {in_words(points[-1])}")
            x, y = lines.setdefault(name, ([], []))
            x.append(nfe)
            y.append(values[metric])
            e.card["curve"] = {"metric": metric, "points": points}
            e.save()  # so that a kill loses one point
    if points:
        e.pictures["quality_against_cost"] = log_plot(
            lines, e.card["metrics"][metric].get("real"), xlabel="network calls a sample", ylabel=metric, xscale="log")


PARTS = [distances, path_energy, forecasts, likelihood, neighbours, loss_by_t, curve]


# ---- The script


def evaluate(e):
    """Measures all parts and writes the card, which it returns."""
    e.save()  # or an `out` that cannot be written would fail after the first part
    for part in PARTS:
        part(e)
        e.save()  # the next part may fail
    on_rank0(show_on_wandb, e)
    print0(f"card        {e.folder}/card.json, with its pictures beside it")
    return e.card


def show_on_wandb(e):
    """The card and the pictures as a wandb run of their own, in the run's project."""
    run = start_wandb(e.folder, e.config, e.card, new=True)
    values = {name: row["mean"] for name, row in e.card["metrics"].items()} | e.card.get("likelihood", {})
    close_wandb(log_to_wandb(run, values | {"step": e.card["step"]}, **e.pictures))


def compare(paths):
    """Prints a line for each card. It ends in one line if they were not measured in the same way, or are no cards."""
    if not paths:
        fail("compare needs cards: give it files that evaluate.py wrote, as ckpts/*/evaluation/*/card.json")
    first = None
    for path in paths:
        try:
            with open(path) as file:
                card = json.load(file)
            numbers = in_words({name: row["mean"] for name, row in card["metrics"].items()})
            line, protocol = title(card), card["protocol"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            fail(f"cannot read {path} ({error!r}): expected a card that evaluate.py wrote, evaluation/*/card.json")
        first = first or protocol
        if names := [name for name in first | protocol if first.get(name) != protocol.get(name)]:
            fail(f"{paths[0]} and {path} cannot be compared: they differ in {', '.join(names)}; measure both in the "
                 "same way")
        print(f"{numbers}  {line}")


def main(arguments):
    if arguments[:1] == ["compare"]:
        return compare(arguments[1:])
    options = parse(Options, arguments, description="Measures how good a checkpoint is.")
    if options.curve and min(options.curve) < 1:
        fail(f"curve is {options.curve}: expected numbers of steps, such as --curve 5 10 20 40")
    if options.likelihood_num == 1:  # which has no standard error
        fail("likelihood_num is 1: expected 2 or more, or 0 for none")
    with set_up(options.device, tf32=False, timeout=60.0) as device:  # distances and likelihoods want exact products
        evaluate(Evaluation(options, device))


if __name__ == "__main__":
    start(main)
