"""Measures how good a checkpoint is: `python evaluate.py --ckpt ckpts/digits/last.pt`.

On two GPUs: `python launch.py --nproc-per-node=2 evaluate.py --ckpt ...`. `python evaluate.py compare CARD.json ...`
prints results side by side, if they were measured in the same way.

Draws several sets of samples, compares them and data with a reference split, and writes a card: the numbers, and all
that must be the same before two numbers are compared. Then come bits per dimension of the test split, the training
images nearest to samples, the loss by t, and, with --curve 5 10 20 40, distance against network calls for all samplers.
Everything goes to a folder in `evaluation/` beside the checkpoint, and to wandb.

Each of PARTS is a function of an `Evaluation` that returns what it adds to the card: to measure something else, write
such a function and give it a row there. All ranks call it, each takes its share of the samples, and rank 0 writes. What
is random is a function of the seed and of the item's number, so the number of ranks changes nothing but rounding.
"""

import bisect
import json
import math
import os
import shlex
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from command_line import HERE, fail, parse, start
from config import Config, NotNegative, OneOf, Positive, Within, marks
from couplings import COUPLINGS
from data_utils import Dataset, load_dataset, spread_labels
from distributed import all_or_none, gather_rows, on_rank0, print0, rank0_first, set_up, share, world_size
from likelihood import bits_per_dim, log_likelihoods
from logging_utils import Progress, close_wandb, image_grid, log_plot, picture_of, save_picture, start_wandb
from metrics import EXTRACTORS, Evaluator, content, nearest
from sample import Drawing, Loaded, load, load_net
from sampling import ODE_SAMPLERS, SAMPLERS
from saving import digest
from trainer import TRAINERS
from utils import UserError, first_line, in_batches, look_up, warn, write_atomically

BINS = 20  # of t, in the curve of the loss
SHOWN, NEIGHBOURS = 20, 3  # samples in the picture of neighbours, and neighbours beside each
BATCH = 100  # most items at once where gradients or losses are taken


@dataclass(kw_only=True)
class Options(Drawing):
    # Samples of each seed; None: 5,000 vectors; of images 50,000 on a GPU, 1,000 on a CPU.
    num: Annotated[int | None, Within("[2, inf)")] = None
    seeds: Positive[int] = 3  # Sets of samples, with seeds from `seed` on.
    reference: Literal["train", "test", "both"] = "train"  # Split that the samples are compared with.
    # Features of images; auto: inception for colour images of 32 pixels or more if its weights can be had.
    extractor: Annotated[str, OneOf("metrics.EXTRACTORS")] = "auto"
    inception_weights: str | None = None  # File of Inception's weights; None: downloaded once.
    data_dir: str | None = None  # Folder of the data; None: the run's own.
    # Test items for bits per dimension, 0 for none; None: 10,000 on a GPU, 300 on a CPU.
    likelihood_num: NotNegative[int | None] = None
    # Draws for the loss by t, 0 for none; None: 10,000 on a GPU, 2,000 on a CPU.
    loss_num: NotNegative[int | None] = None
    neighbours_num: NotNegative[int] = 1000  # Samples whose nearest training images are looked for, 0 for none.
    curve: tuple[int, ...] = ()  # Network calls at which all samplers are compared, such as 5 10 20 40.
    out: str | None = None  # Folder of the results; None: one in evaluation/ beside the checkpoint.
    wandb: Literal["online", "offline", "disabled"] | None = None  # None: the run's own.


@dataclass
class Evaluation(Loaded):
    """What all parts read, beside the checkpoint, and what they write: the card, and pictures and tables by name."""

    data: dict[str, Dataset]  # by split
    labels: Tensor | None  # of the samples of each seed
    evaluator: Evaluator
    folder: str
    card: dict
    pictures: dict  # PIL images
    tables: dict  # lines of numbers, the first of names
    samples: Tensor | None = None  # the first ones of the first seed, once they are drawn


# ---- What is measured, and against what


def prepare(options: Options, device) -> Evaluation:
    """Loads the checkpoint and its data, and makes the evaluator and the folder. Raises UserError if one fails."""
    run, gpu = load(options, device), device.type == "cuda"
    config, spec = run.config, run.spec
    options.num = options.num or (5000 if not spec.is_image else 50_000 if gpu else 1000)
    if options.likelihood_num is None:
        options.likelihood_num = 10_000 if gpu else 300
    if options.loss_num is None:
        options.loss_num = 10_000 if gpu else 2000

    data = {"train": read(run, "train")}
    try:
        data["test"] = all_or_none(lambda: read(run, "test"))
    except UserError as error:
        if options.reference != "train":
            raise
        print0(f"what needs a test split is left out: {error}")
    labels = spread_labels(data["train"].labels, options.num) if config.class_conditional else None

    extractor, weights = None, options.inception_weights
    if spec.is_image:
        extractor = EXTRACTORS[options.extractor](data["train"], device, weights)
    elif weights or options.extractor != "auto":
        raise UserError(f"extractor {options.extractor} and inception_weights {weights} are for images: leave them out")
    references = {split: data[split] for split in data if options.reference in (split, "both")}
    evaluator = Evaluator(data["train"], references, device, extractor)
    classifier = evaluator.classifier

    drawing = {name: getattr(config, name) for name, found in marks(Config).items() if "sampling" in found}
    card = {
        "run": config.run_name, "step": run.state["step"], "weights": options.weights, "checkpoint": options.ckpt,
        "date": time.strftime("%Y-%m-%d"), "drawing": {**drawing, "guide": options.guide, "seed": options.seed},
        "protocol": {  # what must be the same before two figures are compared
            "samples": options.num,
            "labels": "as frequent as in the training split" if config.class_conditional else None,
            "reference": {split: {"items": len(part.data), "sha256": on_rank0(lambda part=part: content(part.data)),
                                  "note": part.note} for split, part in references.items()},
            "extractor": extractor and {"name": extractor.name, "sha256": extractor.sha256},
            "classifier": classifier and classifier.sha256,
        },
        "seeds": [options.seed + k for k in range(options.seeds)],
        "config_sha256": digest(run.state["config"])[:12], "git_commit": git_commit(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if gpu else "cpu", "processes": world_size(), "seconds": {},
    }
    key = digest([vars(options), card["drawing"], card["protocol"]])[:6]
    name = f"{card['step']:07d}_{options.weights}_{config.sampler}_{key}"
    folder = options.out or f"{os.path.dirname(options.ckpt) or '.'}/evaluation/{name}"
    on_rank0(lambda: make_folder(folder))
    return Evaluation(**vars(run), data=data, labels=labels, evaluator=evaluator, folder=folder, card=card,
                      pictures={}, tables={})


def read(run: Loaded, split: str) -> Dataset:
    """A split of the run's data. Raises UserError if it is missing, or of another shape."""
    c, spec = run.config, run.spec
    data = rank0_first(lambda first: load_dataset(c.dataset, c.data_dir, c.image_size, first, split))
    if data.spec.shape != spec.shape or c.class_conditional and not 0 < data.spec.num_classes <= spec.num_classes:
        raise UserError(f"{run.options.ckpt} is of items of shape {spec.shape} and {spec.num_classes} classes, and the "
                        f"{split} split here of {data.spec.shape} and {data.spec.num_classes}: set --data_dir to that "
                        "of the run")
    return data


def git_commit() -> str:
    """The commit of this code, with -dirty if files differ from it; unknown where there is no git."""
    command = f"git -C {shlex.quote(HERE)} describe --always --dirty --abbrev=40 --exclude '*'"
    failed, commit = subprocess.getstatusoutput(command)
    return "unknown" if failed else commit


def make_folder(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another --out") from error


def random_items(e: Evaluation, dataset: Dataset, n: int, key: int) -> tuple[Tensor, Tensor | None]:
    """n random items, or all if there are fewer, as a function of `key`, and their labels, if the network takes them.
    """
    rows = np.random.default_rng(key).permutation(len(dataset.data))[:n]
    labels = torch.from_numpy(dataset.labels[rows]) if e.config.class_conditional else None
    return torch.from_numpy(dataset.data[rows]), labels


# ---- Distances


def distances(e: Evaluation):
    """The metrics over the seeds and of real data; and of as many samples as there are real items, if these are fewer.

    Real data show what a perfect model would get.
    """
    num, test = e.options.num, e.data.get("test")
    real, real_values, what = {split: real_data(e, split) for split in e.evaluator.references}, {}, []
    n = min(num, *(len(dataset.data) for dataset, _, _ in real.values()))
    for split, (dataset, reference, name) in real.items():
        items, labels = random_items(e, dataset, n, 2)
        known = labels if dataset is test else None  # the classifier has learned the labels of the training split
        real_values = e.evaluator(items, known, {split: reference}) | real_values
        what.append(f"{n:,} items of {name}")

    sets, calls = {num: [], n: []}, []  # metrics of the first so many samples of each seed
    for seed in e.card["seeds"]:
        clock = time.perf_counter()
        samples, nfe = e.draw(num, e.labels, together=True, seed=seed)
        e.card["seconds"]["sampling, one seed"] = round(time.perf_counter() - clock, 2)
        calls.append(nfe)
        for count, values in sets.items():
            values.append(e.evaluator(samples[:count], e.labels))
        if e.samples is None:
            e.samples = samples[: max(2000, e.options.neighbours_num)].clone()
    e.pictures["samples"] = picture_of(e.samples, e.data["train"].data[: len(e.samples)])

    found = {"nfe": statistics.fmean(calls), "real": {"items": n, "what": what}}
    found["metrics"] = summary(sets[num], real_values if n == num else {})
    if n < num:
        found["real"]["metrics"] = summary(sets[n], real_values)
    print_metrics(e.card | found)
    return found


def real_data(e: Evaluation, split: str) -> tuple:
    """The data that are compared with a reference split, this reference, and the name of the data.

    They are the other split; without a test split, one half of the training split, against the other half.
    """
    other, train = "test" if split == "train" else "train", e.data["train"]
    if other in e.data:
        return e.data[other], e.evaluator.references[split], f"the {other} split"
    halves = [replace(train, data=train.data[k::2]) for k in (0, 1)]
    return halves[0], e.evaluator.reference(halves[1]), "one half of the training split, against the other"


def summary(sets: list[dict], real: dict) -> dict[str, dict]:
    """Of each metric mean, least, greatest and standard deviation over sets of samples, and the value of real data."""
    values = {name: [found[name] for found in sets] for name in sets[0]}
    return {name: {"mean": statistics.fmean(v), "min": min(v), "max": max(v),
                   "std": statistics.stdev(v) if len(v) > 1 else None, "real": real.get(name), "values": v}
            for name, v in values.items()}


def title(card: dict) -> str:
    """One line that says what was measured."""
    drawing = card["drawing"]
    steps = f"{drawing['sampling_steps']} steps, " if drawing["sampler"] != "dopri5" else ""
    return (f"{card['run']}, step {card['step']}, {card['weights']} weights: {len(card['seeds'])} x "
            f"{card['protocol']['samples']:,} samples by {drawing['sampler']}, {steps}{card['nfe']:g} network calls, "
            f"guidance {drawing['guidance_scale']:g}")


def print_metrics(card: dict) -> None:
    real = card["real"]
    print0(title(card))
    for name in ("reference", "extractor"):
        print0(f"{name:11} {json.dumps(card['protocol'][name])}")
    print0(f"real        {'; '.join(real['what'])}")
    print_table(card["metrics"])
    if "metrics" in real:
        print0(f"the first {real['items']:,} samples of each set, as many as there are real items:")
        print_table(real["metrics"])


def print_table(metrics: dict[str, dict]) -> None:
    for name, row in metrics.items():
        numbers = [f"{key} {value:<12.4g}" for key, value in row.items() if isinstance(value, float)]
        print0(f"{name:27} {''.join(numbers)}")


# ---- Likelihood


def likelihood(e: Evaluation):
    """Bits per dimension of test images, or nats of test vectors in the data's own units: mean and standard error."""
    test, config, spec = e.data.get("test"), e.config, e.spec
    if not test or not e.options.likelihood_num:
        return {}
    items, labels = random_items(e, test, e.options.likelihood_num, 3)
    dims, rows, parts = math.prod(spec.shape), share(len(items)), [torch.empty(0)]
    probe, bin_width = "exact" if dims <= 16 else "rademacher", 1 / spec.std[0] if spec.is_image else 0.0
    settings = vars(config) | dict(
        net=e.net, process=e.process, data=spec.encode(items), rows=rows, device=e.device, probe=probe, labels=labels,
        bin_width=bin_width, batch_size=min(BATCH, e.options.batch_size), guidance_scale=1.0)
    with Progress("likelihood", len(rows), "item") as progress:
        for log_p in log_likelihoods(**settings):
            parts.append(log_p.cpu())
            progress.update(len(log_p))
    log_p = gather_rows(torch.cat(parts)).double()
    name, values = "nats", np.log(spec.std).sum() - log_p
    if spec.is_image:
        name, values = "bits_per_dim", bits_per_dim(log_p, dims, bin_width)
    mean, error = values.mean().item(), values.std().item() / math.sqrt(len(values))
    print0(f"likelihood  {name} {mean:.4f} +- {error:.4f}, of {len(values):,} test items")
    return {"likelihood": {name: mean, "standard_error": error, "items": len(values), "split": "test", "probe": probe,
                           "rtol": config.rtol, "atol": config.atol, "conditional": config.class_conditional}}


# ---- Neighbours


def neighbours(e: Evaluation):
    """The share of samples that are nearly copies of a training image, and of test images; a picture of the nearest.

    A near-copy is less than a third as far from its nearest training image as from the second nearest, in pixels (Yoon
    et al. 2023, "Diffusion Probabilistic Models Generalize when They Fail to Memorize", section 3).
    """
    train, test, n = e.data["train"].data, e.data.get("test"), e.options.neighbours_num
    if not n or not e.spec.is_image:
        return {}

    def compare(images):
        distances, items = nearest(images, train, NEIGHBOURS, e.device)
        ratio = distances[:, 0] / distances[:, 1].clamp(min=1e-12)
        return ratio, items, {"items": len(images), "near_copies": (ratio < 1 / 3).double().mean().item(),
                              "median_distance": distances[:, 0].median().item()}

    ratio, items, found = compare(e.samples[:n])
    rows = [torch.cat([e.samples[i][None], torch.from_numpy(train[items[i]])]) for i in ratio.argsort()[:SHOWN]]
    e.pictures["neighbours"] = image_grid(torch.cat(rows), 2 * (NEIGHBOURS + 1))
    line = f"{100 * found['near_copies']:.2f}% of {len(ratio):,} samples are near-copies of training images"
    if test:
        found["test"] = compare(random_items(e, test, n, 2)[0])[2]
        line += f"; of test images {100 * found['test']['near_copies']:.2f}%"
    print0(f"neighbours  {line}")
    return {"neighbours": found}


# ---- Loss by t


def loss_by_t(e: Evaluation):
    """The mean loss of raw and EMA weights on both splits; and a curve of it, with standard errors, over BINS of t."""
    from scipy.stats import binned_statistic, sem

    if not e.options.loss_num:
        return {}
    edges = np.linspace(e.config.T_min, e.config.T_max, BINS + 1)
    columns, lines, means = {"t_min": edges[:-1], "t_max": edges[1:]}, {}, {}
    for weights in ("raw", "ema"):
        _, net = load_net(e.options.ckpt, e.state, e.config, e.spec, e.device, weights)
        for split, data in e.data.items():
            t, values = losses(e, net, data)
            mean, error = (binned_statistic(t, values, what, edges).statistic
                           for what in ("mean", lambda x: sem(x) if len(x) > 1 else math.nan))
            name = f"{weights}_{split}"
            columns |= {name: mean, f"{name}_error": error}
            lines[name], means[name] = ((edges[:-1] + edges[1:]) / 2, mean, error), values.mean()
    e.tables["loss_by_t"] = [columns, *zip(*columns.values())]
    e.pictures["loss_by_t"] = log_plot(lines, "t", "loss")
    print0(f"loss        {'; '.join(f'{name} {value:.4g}' for name, value in means.items())}")
    return {"loss": {"draws": len(t), **means}}


def losses(e: Evaluation, net, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Times, evenly spread in each batch, and losses, (N,), of whole batches of this data, loss_num draws or more.

    Batches and loss are those of the run's trainer, without flips and label dropout, the same for any weights. The data
    are scaled as those of the run's training split.
    """
    c = replace(e.config, batch_size=max(e.config.batch_size, world_size()), time_sampler="stratified",
                importance_weights=False, random_flip=False, label_dropout=0.0, overfit_one_batch=False)
    trainer = look_up(TRAINERS, c.trainer)(c, replace(data, spec=e.spec), e.device)
    trainer.forward = net
    times, found, steps = [], [], math.ceil(e.options.loss_num / c.batch_size)
    with Progress("loss by t", steps, "batch") as progress, torch.no_grad():
        for step in range(steps):
            batch = trainer.prepare_batch(step)
            found += in_batches(
                lambda rows, size, batch=batch: trainer.loss(batch.rows(slice(rows.start, rows.stop))).cpu(),
                range(len(batch.t)), min(BATCH, e.options.batch_size))
            times.append(batch.t.cpu())
            progress.update()
    return tuple(gather_rows(torch.cat(values)).double().numpy() for values in (times, found))


# ---- Quality against cost


def steps_for(e: Evaluation, sampler: str, calls: int) -> int:
    """The most steps in which `sampler` makes at most so many network calls, guidance included; 0 if one makes more."""
    def zero(xt, t, label):
        return torch.zeros_like(xt)

    def calls_of(steps):
        return free.draw(1, e.labels, sampler=sampler, sampling_steps=steps, compile=False)[1]

    free = replace(e, net=zero, guide=e.guide and zero)
    return bisect.bisect(range(1, calls + 1), calls, key=calls_of)


def curve(e: Evaluation):
    """The metrics of every sampler at the network calls of --curve, of one seed: a table, a picture, and the best.

    dopri5 gets the tolerances 0.1, 0.01, ... instead.
    """
    rows, lines, metric = [], {}, next(iter(e.card["metrics"]))
    for name in ODE_SAMPLERS if COUPLINGS[e.config.coupling] else SAMPLERS:
        for k, calls in enumerate(sorted(e.options.curve), 1):
            clock = time.perf_counter()
            try:
                steps = "" if name == "dopri5" else steps_for(e, name, calls)
                if steps == 0:
                    continue
                changes = {"sampling_steps": steps} if steps else {"rtol": 10.0**-k, "atol": 10.0**-k}
                samples, nfe = e.draw(e.options.num, e.labels, together=True, sampler=name, **changes)
                seconds = round(time.perf_counter() - clock, 2)
                values = e.evaluator(samples, e.labels)
            except UserError as error:
                print0(f"{name} with {calls} network calls is left out: {error}")
                continue
            rows.append({"sampler": name, "steps": steps, "nfe": nfe, "seconds": seconds, **values})
            x, y, _ = lines.setdefault(name, ([], [], None))
            x.append(nfe)
            y.append(values[metric])
            e.tables["quality_against_cost"] = [rows[0], *(row.values() for row in rows)]
            save(e)  # so that a kill loses one point
    if not rows:
        return {}
    e.pictures["quality_against_cost"] = log_plot(lines, "network calls a sample", metric, log_x=True,
                                                  level=e.card["metrics"][metric]["real"])
    best = min(rows, key=lambda row: (math.isnan(row[metric]), row[metric]))
    print0(f"curve       {len(rows)} points, the best {best['sampler']} with {best['nfe']:g} calls: "
           f"{metric} {best[metric]:.4g}")
    return {"curve": {"points": len(rows), "metric": metric, "best": best}}


PARTS = {"metrics": distances, "likelihood": likelihood, "neighbours": neighbours, "loss": loss_by_t, "curve": curve}


# ---- The card


def evaluate(e: Evaluation) -> dict:
    """Measures all parts and writes the card, which it returns."""
    for name, part in PARTS.items():
        clock = time.perf_counter()
        e.card |= part(e)
        e.card["seconds"][name] = round(time.perf_counter() - clock, 2)
        save(e)  # the next part may fail
    on_rank0(lambda: log_to_wandb(e))
    print0(f"card        {e.folder}/card.json, with its pictures beside it")
    return e.card


def save(e: Evaluation) -> None:
    """Writes the card and what lies beside it. All ranks must call it."""
    def write():
        for name, image in e.pictures.items():
            save_picture(image, f"{e.folder}/{name}.png")
        for name, lines in e.tables.items():
            write_atomically(f"{e.folder}/{name}.csv", "\n".join(",".join(map(str, line)) for line in lines))
        write_atomically(f"{e.folder}/card.json", json.dumps(e.card, indent=2))

    on_rank0(write)


def log_to_wandb(e: Evaluation) -> None:
    """The card and the pictures as a wandb run of their own, in the run's project."""
    run = start_wandb(e.folder, e.card, e.config.wandb, e.config.wandb_project, new=True,
                      name=f"{e.config.run_name}_{os.path.basename(e.folder)}")
    if run is None:
        return
    try:
        import wandb

        values = {name: row["mean"] for name, row in e.card["metrics"].items()} | e.card.get("likelihood", {})
        run.log(values | {name: wandb.Image(image) for name, image in e.pictures.items()} | {"step": e.card["step"]})
    except Exception as error:  # whatever happens to wandb, the card is there
        warn(f"wandb: logging to it failed ({first_line(error)})")
    close_wandb(run)


def read_card(path: str) -> dict:
    try:
        with open(path) as file:
            card = json.load(file)
        card["protocol"], card["metrics"], card["drawing"]
        return card
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        why = getattr(error, "strerror", None) or "it is no card"
        fail(f"cannot read {path} ({why}): expected a card that evaluate.py wrote, evaluation/*/card.json")


def compare(paths: list[str]) -> None:
    """Prints a table of cards. Ends in one line if they were not measured in the same way, or are no cards."""
    if not paths:
        fail("compare needs cards: give it files that evaluate.py wrote, as ckpts/*/evaluation/*/card.json")
    cards = [read_card(path) for path in paths]
    for path, card in zip(paths, cards):
        a, b = cards[0]["protocol"], card["protocol"]
        if names := [name for name in a | b if a.get(name) != b.get(name)]:
            fail(f"{paths[0]} and {path} cannot be compared: they differ in {', '.join(names)}; measure both in the "
                 "same way")
    names = [name for name in cards[0]["metrics"] if all(name in card["metrics"] for card in cards)]
    widths = {name: max(len(name), 10) + 2 for name in names}
    print("".join(name.ljust(width) for name, width in widths.items()) + "of")
    for card in cards:
        means = [f"{card['metrics'][name]['mean']:<{width}.4g}" for name, width in widths.items()]
        print("".join(means) + title(card))


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["compare"]:
        return compare(arguments[1:])
    options = parse(Options, arguments, description="Measures how good a checkpoint is.")
    if options.curve and min(options.curve) < 1:
        fail(f"curve is {options.curve}: expected numbers of network calls, such as --curve 5 10 20 40")
    with set_up(options.device, tf32=False, timeout=60.0) as device:  # distances and likelihoods want exact products
        evaluate(prepare(options, device))


if __name__ == "__main__":
    start(main)
