"""What evaluate.py measures of a checkpoint: distances over seeds, likelihood, loss by t, neighbours, and quality against cost.

All processes make an `Evaluation` and call its methods; each takes its share of the samples, and rank 0 writes. What is random is a
function of the seed and of the item's number. To add a part, write a method that returns what the card is to hold, and call it
in `run`.
"""

import csv
import dataclasses
import io
import json
import math
import os
import time

import numpy as np
import torch
from torch import Tensor

from build import check_settings
from cards import git_commit, in_words, lines_of, sha, summary
from couplings import COUPLINGS
from data_utils import Dataset, load_dataset, spread_labels
from extractors import EXTRACTORS, content
from likelihood import bits_per_dim, log_likelihoods
from logging_utils import close_wandb, image_grid, log_plot, picture_of, start_wandb
from metrics import Judge, nearest
from sample import Drawing, load, load_net
from sampling import ODE_SAMPLERS, SDE_SAMPLERS, draw
from trainer import TRAINERS
from utils import (
    Progress,
    UserError,
    all_or_none,
    choose,
    complain,
    find,
    first_line,
    gather_rows,
    in_batches,
    on_rank0,
    print0,
    rank0_first,
    share,
    world_size,
    write_atomically,
)

BINS = 20  # of t, in the curve of the loss
SHOWN, NEIGHBOURS = 20, 3  # samples in the picture of neighbours, and neighbours beside each
BATCH = 100  # items at once where gradients or losses are taken


def shuffled(n: int, key: int) -> np.ndarray:
    """The numbers 0 to n - 1 in an order that depends on n and `key` alone."""
    return np.random.default_rng(key).permutation(n)


def steps_for(sampler: str, calls: int, /, **settings) -> int:
    """The most steps in which `sampler` makes at most so many network calls; 0 if one step makes more. Guidance makes two of one.

    `settings` are arguments of `draw`; `guide` tells only whether there is one.
    """
    def net(xt, t, label):
        return torch.zeros_like(xt)

    def count(n):
        changes = dict(sampler=sampler, sampling_steps=n, guide=settings.get("guide") and net, rows=range(1), shape=(1,), device="cpu")
        return next(draw(net, **{**settings, **changes}))[1]

    one, two = count(1), count(2)
    return 0 if one > calls else 1 + (calls - one) // (two - one)


class Evaluation:
    """A checkpoint and its data; `run` measures all and writes the card."""

    def __init__(self, options, device: torch.device):
        self.options, self.device = options, device
        self.state, self.config, self.spec, self.process, self.net, self.guide = load(options, device)
        self.trainer, gpu = find(TRAINERS, self.config.trainer), device.type == "cuda"
        self.num = options.num or (5000 if not self.spec.is_image else 50_000 if gpu else 1000)
        self.likelihood_num = (10_000 if gpu else 300) if options.likelihood_num is None else options.likelihood_num
        self.loss_num = (10_000 if gpu else 2000) if options.loss_num is None else options.loss_num
        self.drawing = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(Drawing)
                        if hasattr(self.config, f.name) and f.name not in ("batch_size", "device")}
        self.drawing |= {"guide": options.guide, "seed": options.seed}
        self.data, self.pictures, self.seconds = {"train": self.read("train")}, {}, {}
        try:
            self.data["test"] = all_or_none(lambda: self.read("test"))
        except UserError as error:
            if options.reference != "train":
                raise
            print0(f"without a test split, and what needs it: {error}")
        self.judge, self.of_real = self.make_judge(), {}  # the metrics of real data
        self.measured_by = on_rank0(self.protocol)  # it reads all data
        elsewhere = ("ckpt", "out", "wandb", "device", "batch_size", "data_dir")
        asked = {name: value for name, value in vars(options).items() if name not in elsewhere}
        key = sha([asked, self.drawing, self.measured_by])[:6]
        name = f"{self.state['step']:07d}_{options.weights}_{self.config.sampler}_{key}"
        self.folder = options.out or os.path.join(os.path.dirname(options.ckpt) or ".", "evaluation", name)
        on_rank0(self.make_folder)

    def make_folder(self) -> None:
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder} ({error.strerror}): choose another --out") from error

    def read(self, split: str) -> Dataset:
        """A split of the run's data. Raises UserError if it is missing, or of another shape."""
        c, spec = self.config, self.spec
        data = rank0_first(lambda first: load_dataset(c.dataset, c.data_dir, c.image_size, first, split))
        if data.spec.shape != spec.shape or c.class_conditional and not 0 < data.spec.num_classes <= spec.num_classes:
            raise UserError(f"{self.options.ckpt} is of items of shape {spec.shape} and {spec.num_classes} classes, and the {split} split "
                            f"here of {data.spec.shape} and {data.spec.num_classes}: set --data_dir to that of the run")
        return data

    def timed(self, name: str, work):
        """The result of `work()`; the card tells how long it took."""
        clock = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - clock, 2)
        return result

    # ---- Distances

    def make_judge(self) -> Judge:
        """The judge of the reference splits. With extractor auto, by the classifier if Inception's weights cannot be had."""
        o, (channels, *sides) = self.options, self.spec.shape
        if o.extractor != "auto" and not self.spec.is_image or o.extractor == "classifier" and o.inception_weights:
            raise UserError(f"extractor {o.extractor} and inception_weights {o.inception_weights}: the first is for images, the second for "
                            "Inception; leave one or both out")
        references = {split: self.data[split] for split in (["train", "test"] if o.reference == "both" else [o.reference])}
        auto, kind, extractor = o.extractor == "auto" and not o.inception_weights, o.extractor, None  # who gives a file wants Inception
        if kind == "auto":
            kind = "inception" if o.inception_weights or self.spec.is_image and channels >= 3 and min(sides) >= 32 else "classifier"
        if kind != "classifier" and self.spec.is_image:
            try:
                extractor = choose(EXTRACTORS, kind, train=self.data["train"], device=self.device, inception_weights=o.inception_weights)
            except UserError as error:
                if not auto:
                    raise
                print0(f"{error}; taking the classifier now")
        return Judge(self.data["train"], references, self.device, extractor)

    def draw(self, seed: int, sampler: str, **changes) -> tuple[Tensor, Tensor | None, float]:
        """`num` samples of this seed, their labels, which are as frequent as in the training split, and network calls a sample."""
        config = dataclasses.replace(self.config, seed=seed, sampler=sampler, **changes)
        check_settings(config)
        labels = spread_labels(self.data["train"].labels, self.num) if config.class_conditional else None
        samples, nfe = self.trainer.draw(config, self.spec, self.process, self.net, self.device, rows=range(self.num), labels=labels,
                                         sampler=sampler, guide=self.guide, together=True)
        return samples, labels, nfe

    def real(self, split: str, other: Dataset | None, n: int) -> tuple[dict, str]:
        """The metrics of n real items against a reference split, and what they are.

        They are of the other split; where there is no test split, one half of the training split stands against the other.
        """
        judge, what = self.judge, "of the test split" if split == "train" else "of the training split"
        if other is None:
            train, what = self.data["train"], "of one half of the training split, against the other"
            half, other = (Dataset(train.data[k::2], None if train.labels is None else train.labels[k::2], self.spec) for k in (0, 1))
            judge = Judge(train, {"train": half}, self.device, judge.extractor)
        rows = np.sort(shuffled(len(other.data), 2)[:n])
        labels = torch.from_numpy(other.labels[rows]) if self.config.class_conditional and other is self.data.get("test") else None
        return judge(torch.from_numpy(other.data[rows]), labels, [split]), f"{n:,} items {what}"  # the classifier learned the others

    def metrics(self) -> dict:
        """Over the seeds; of real data; of as many samples as there are real items, if these are fewer; and what the card tells of them."""
        values, fewer, calls, seconds, whats = {}, {}, [], [], []
        others = {split: self.data.get("test" if split == "train" else "train") for split in self.judge.references}  # real data are of
        n = min([self.num, *(len(data.data) if data else len(self.data["train"].data) // 2 for data in others.values())])
        for split, other in others.items():
            found, what = self.real(split, other, n)
            self.of_real = {**found, **self.of_real}
            whats.append(what)
        for k in range(self.options.seeds):
            clock = time.perf_counter()
            samples, labels, nfe = self.draw(self.options.seed + k, self.config.sampler)
            calls.append(nfe)
            seconds.append(time.perf_counter() - clock)
            parts = [(values, self.num)] + ([(fewer, n)] if n < self.num else [])
            for table, count in parts:
                for name, value in self.judge(samples[:count], None if labels is None else labels[:count]).items():
                    table.setdefault(name, []).append(value)
            if k == 0:
                self.samples = samples[: max(2000, self.options.neighbours_num)].clone()
        self.seconds["sampling, one seed"] = round(float(np.mean(seconds)), 2)
        self.picture("samples", picture_of(self.samples, self.data["train"].data[: len(self.samples)]))
        real = {"items": n, "what": whats}
        if fewer:
            real["metrics"] = summary(fewer, self.of_real)
        return {"nfe": float(np.mean(calls)), "metrics": summary(values, {} if fewer else self.of_real), "real": real}

    def protocol(self) -> dict:
        """What must be the same before two figures are compared."""
        extractor, classifier = self.judge.extractor, self.judge.classifier
        return {
            "samples": self.num,
            "labels": "as frequent as in the training split" if self.config.class_conditional else None,
            "reference": {split: {"items": len(data.data), "sha256": content(data.data), "note": data.note}
                          for split in self.judge.references for data in [self.data[split]]},
            "extractor": {"name": extractor.name, "sha256": extractor.sha256} if extractor else None,
            "classifier": classifier.sha256 if classifier else None,
        }

    # ---- Likelihood

    def likelihood(self) -> dict | None:
        """Bits per dimension of test images, or nats of test vectors in the data's own units: mean and standard error."""
        test, config = self.data.get("test"), self.config
        if not self.likelihood_num or test is None:
            return None
        rows = shuffled(len(test.data), 3)[: self.likelihood_num]
        x0 = self.spec.encode(torch.from_numpy(test.data[rows]))
        labels = torch.from_numpy(test.labels[rows]) if config.class_conditional else None
        probe = "exact" if math.prod(self.spec.shape) <= 16 else "rademacher"
        bin_width = 1 / self.spec.std[0] if self.spec.is_image else 0.0
        settings = {**vars(config), "net": self.net, "process": self.process, "data": x0, "labels": labels, "device": self.device,
                    "guidance_scale": 1.0, "seed": self.options.seed, "probe": probe, "bin_width": bin_width,
                    "batch_size": min(BATCH, self.options.batch_size)}
        mine, parts = share(len(rows)), [torch.empty(0)]
        with Progress("likelihood", len(mine), "item") as progress:
            for log_p in log_likelihoods(rows=mine, **settings):
                parts.append(log_p.cpu())
                progress.update(len(log_p))
        log_p = gather_rows(torch.cat(parts)).double()
        if self.spec.is_image:
            name, values = "bits_per_dim", bits_per_dim(log_p, math.prod(self.spec.shape), bin_width)
        else:
            name, values = "nats", np.log(self.spec.std).sum() - log_p
        return {name: values.mean().item(), "standard_error": values.std().item() / math.sqrt(len(rows)), "items": len(rows),
                "split": "test", "probe": probe, "rtol": config.rtol, "atol": config.atol, "conditional": config.class_conditional}

    # ---- Loss by t

    def loss(self) -> dict | None:
        """The mean loss of raw and EMA weights on both splits; and a curve of it, with standard errors, over BINS parts of [T_min, T_max].

        The batches and their loss are the trainer's, without flips and label dropout; they are the same for both weights.
        """
        from scipy.stats import binned_statistic

        if not self.loss_num:
            return None
        edges = np.linspace(self.config.T_min, self.config.T_max, BINS + 1)
        columns, lines, means = {"t_min": edges[:-1], "t_max": edges[1:]}, {}, {}
        for weights in ("raw", "ema"):
            process, net = load_net(self.options.ckpt, self.state, self.config, self.spec, self.device, weights)
            for split, data in self.data.items():
                t, losses = self.losses(process, net, data)
                mean, std, count = (binned_statistic(t.clip(edges[0], edges[-1]), losses, what, edges).statistic
                                    for what in ("mean", "std", "count"))
                name, error = f"{weights}_{split}", std / np.where(count > 1, count - 1, math.nan) ** 0.5
                columns |= {name: mean, f"{name}_error": error}
                lines[f"{weights} weights, {split}"] = (edges[:-1] + edges[1:]) / 2, mean, error
                means[name] = float(losses.mean())
        self.write_csv("loss_by_t", [dict(zip(columns, values)) for values in zip(*columns.values())])
        self.picture("loss_by_t", log_plot(lines, "t", "loss"))
        return {"draws": len(losses), **means}

    def losses(self, process, net, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Times, evenly spread in each batch, and losses, (N,), of whole batches of this data, loss_num draws or more.

        The data are scaled as those of the run's training split.
        """
        c = dataclasses.replace(self.config, batch_size=max(self.config.batch_size, world_size()), time_sampler="stratified",
                                importance_weights=False, random_flip=False, label_dropout=0.0, overfit_one_batch=False)
        scorer = self.trainer.only_loss(c, dataclasses.replace(data, spec=self.spec), self.device, process, net)
        times, found, steps = [], [], -(-self.loss_num // c.batch_size)
        with Progress("loss by t", steps, "batch") as progress, torch.no_grad():
            for step in range(steps):
                batch = scorer.prepare_batch(step)
                found += in_batches(lambda rows, size, batch=batch: scorer.loss(batch.rows(slice(rows.start, rows.stop))).cpu(),
                                    range(len(batch.t)), min(BATCH, self.options.batch_size))
                times.append(batch.t.cpu())
                progress.update()
        return tuple(gather_rows(torch.cat(values)).double().numpy() for values in (times, found))

    # ---- Neighbours

    def neighbours(self) -> dict | None:
        """The share of samples that are nearly copies of a training image, and of test images; and a picture of the nearest pairs.

        A near-copy is less than a third as far from its nearest training image as from the second nearest, in pixels (Yoon et al.
        2023, "Diffusion Probabilistic Models Generalize when They Fail to Memorize", section 3).
        """
        if not self.options.neighbours_num or not self.spec.is_image:
            return None
        train, n = self.data["train"].data, self.options.neighbours_num

        def look(images):
            distances, items = nearest(images, train, NEIGHBOURS, self.device)
            ratio = distances[:, 0] / distances[:, 1].clamp(min=1e-12)
            return ratio, items, {"items": len(images), "near_copies": (ratio < 1 / 3).double().mean().item(),
                                  "median_distance": distances[:, 0].median().item()}

        ratio, items, found = look(self.samples[:n])
        rows = [torch.cat([self.samples[i][None], torch.from_numpy(train[items[i].numpy()])]) for i in ratio.argsort()[:SHOWN]]
        self.picture("neighbours", image_grid(torch.cat(rows), 2 * (NEIGHBOURS + 1)))
        if test := self.data.get("test"):
            found["test"] = look(torch.from_numpy(test.data[np.sort(shuffled(len(test.data), 2)[:n])]))[2]
        return found

    # ---- Quality against cost

    def curve(self) -> dict | None:
        """The metrics of every sampler at the numbers of network calls of --curve, of one seed: a table, a picture, and the best.

        dopri5 gets the tolerances 0.1, 0.01, ... instead.
        """
        labels = torch.zeros(1, dtype=torch.int64) if self.config.class_conditional else None
        rows, settings = [], {**vars(self.config), "process": self.process, "labels": labels, "guide": self.guide}
        if not self.options.curve:
            return None
        samplers = {**ODE_SAMPLERS, **({} if COUPLINGS[self.config.coupling] else SDE_SAMPLERS)}
        for name in samplers:
            for k, calls in enumerate(sorted(self.options.curve)):
                if name == "dopri5":
                    changes = {"rtol": 10.0 ** -(k + 1), "atol": 10.0 ** -(k + 1)}
                else:
                    changes = {"sampling_steps": steps_for(name, calls, **settings)}
                if changes.get("sampling_steps") == 0:
                    continue
                clock = time.perf_counter()
                try:
                    samples, labels, nfe = self.draw(self.options.seed, name, **changes)
                    seconds = round(time.perf_counter() - clock, 2)
                    rows.append({"sampler": name, "steps": changes.get("sampling_steps", ""), "nfe": nfe, "seconds": seconds,
                                 **self.judge(samples, labels)})
                except UserError as error:
                    print0(f"{name} with {calls} network calls is left out: {error}")
                    continue
                self.write_csv("quality_against_cost", rows)  # so that a kill loses one point
        if not rows:
            return None
        metric = next(name for name in rows[0] if name not in ("sampler", "steps", "nfe", "seconds"))
        lines = {name: ([r["nfe"] for r in rows if r["sampler"] == name], [r[metric] for r in rows if r["sampler"] == name], None)
                 for name in samplers}
        self.picture("quality_against_cost", log_plot(lines, "network calls a sample", metric, log_x=True,
                                                           level=self.of_real.get(metric)))
        finite = [row for row in rows if math.isfinite(row[metric])]
        return {"points": len(rows), "metric": metric, "best": min(finite or rows, key=lambda row: row[metric])}

    # ---- What is written

    def write_csv(self, name: str, rows: list[dict]) -> None:
        """Writes rows of the same names as NAME.csv."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        on_rank0(lambda: write_atomically(os.path.join(self.folder, f"{name}.csv"), text.getvalue()))

    def picture(self, name: str, image) -> None:
        """Saves a PIL image as NAME.png, and keeps it for wandb."""
        self.pictures[name] = image
        on_rank0(lambda: write_atomically(os.path.join(self.folder, f"{name}.png"), lambda file: image.save(file, format="PNG")))

    def run(self) -> dict:
        """Measures everything, prints the main lines, and writes the card, which it returns."""
        o, c = self.options, self.config
        card = {
            "run": c.run_name, "step": self.state["step"], "weights": o.weights, "checkpoint": o.ckpt, "date": time.strftime("%Y-%m-%d"),
            "drawing": self.drawing, "protocol": self.measured_by, "seeds": [o.seed + k for k in range(o.seeds)],
            "config_sha256": sha(self.state["config"]), "git_commit": git_commit(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu", "processes": world_size(),
        }
        card |= self.timed("metrics", self.metrics)
        card["seconds"] = self.seconds
        path = os.path.join(self.folder, "card.json")

        def write():
            write_atomically(path, json.dumps(card, indent=2))

        on_rank0(write)
        print0("\n".join(lines_of(card)))
        for name in ("likelihood", "neighbours", "loss", "curve"):
            if found := self.timed(name, getattr(self, name)):
                card[name] = found
                on_rank0(write)  # what comes next may fail
                print0(in_words(name, found))
        on_rank0(write)
        on_rank0(lambda: self.to_wandb(card))
        print0(f"card        {path}, with its pictures beside it")
        return card

    def to_wandb(self, card: dict) -> None:
        """The card and the pictures as a wandb run of their own, in the run's project."""
        run = start_wandb(self.folder, card, self.options.wandb or self.config.wandb, self.config.wandb_project, new=True,
                          name=f"{self.config.run_name}_{os.path.basename(self.folder)}")
        if run is None:
            return
        try:
            import wandb

            values = {name: row["mean"] for name, row in card["metrics"].items()}
            values |= {name: card["likelihood"][name] for name in ("bits_per_dim", "nats") if name in card.get("likelihood", {})}
            run.log({"step": card["step"], **values, **{name: wandb.Image(image) for name, image in self.pictures.items()}})
        except Exception as error:  # whatever happens to wandb, the card is there
            complain(f"wandb: logging to it failed ({first_line(error)})")
        close_wandb(run)
