"""`DiffusionTrainer` trains a network: batch, loss, gradient, step, EMA, and what happens every so many steps.

A new project overrides `prepare_batch`, which says what is random in a step, or `loss`. What is random in step s is
drawn for the whole global batch as a function of (seed, s), and each rank takes its rows. So losses do not depend on
the number of ranks or on accumulation, except through dropout, and a run that resumes needs no random state.
"""

import contextlib
import dataclasses
import math
import os
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import saving
from build import COMPILING, TRAINING_STEPS, autocast, build, compiles, draw_all, formatted, make_time_sampler
from command_line import Stopped, deferred_signals, signal_name, stop_requested
from config import Config, marks
from couplings import COUPLINGS
from data_utils import Batches, Dataset, examples, spread_labels
from distributed import StopAgreement, gather_rows, on_rank0, print0, rank, share, world_size
from ema import EMA
from logging_utils import Logger, picture_of
from optimizers import learning_rate, load_moments, make_optimizer, take_step
from prediction import convert, loss_weight, target
from utils import RowNoise, UserError, append_dims, call_with_settings, make_seed, mean_flat, seed_torch, warn

RETRY_SECONDS = (1, 2, 4, 8)  # between attempts to write the last checkpoint


class Batch(NamedTuple):
    """What a training step needs; `importance` is the weight of each loss in the mean, 1 without importance weights."""

    x0: Tensor  # (B, ...) data
    x1: Tensor  # (B, ...) noise
    t: Tensor  # (B,)
    importance: Tensor  # (B,)
    label: Tensor | None  # (B,) int64

    def rows(self, rows: slice) -> "Batch":
        return Batch(*(None if x is None else x[rows] for x in self))

    def split(self, parts: int) -> list["Batch"]:
        """The batch in parts along its rows, equal in length up to one row."""
        return [Batch(*part) for part in zip(*([None] * parts if x is None else x.tensor_split(parts) for x in self))]


def means(rows: Tensor) -> dict[str, float]:
    """Mean loss, also by quarter of t, and gradient norm, from a `window`, without steps that are not finite.

    The sums are exact, so that they do not depend on the order of the rows, and thus not on the number of ranks.
    """
    norm, t, loss, importance = rows[rows[:, 0].isfinite()].T
    quarter = (4 * t).long().clamp(0, 3)
    parts = {"loss": importance * loss, "grad_norm": norm}
    parts |= {f"loss_t_{i / 4:.2f}_{(i + 1) / 4:.2f}": loss[quarter == i] for i in range(4)}
    return {name: math.fsum(values.tolist()) / len(values) for name, values in parts.items() if len(values)}


class DiffusionTrainer:
    """Trains, watches and saves one run. Every rank makes one and calls `train`."""

    draw = staticmethod(draw_all)  # samples of a network, also for sample.py and evaluate.py

    def __init__(self, config: Config, dataset: Dataset, device: torch.device):
        """What a batch and its loss need. `open_run` adds what training needs."""
        self.config, self.dataset, self.spec, self.device = config, dataset, dataset.spec, device
        self.process, self.net = build(config, self.spec, device)
        # The network as it is trained, wrapped; self.net stays plain, for checkpoints, EMA and sampling.
        self.ddp = self.forward = self.net
        self.time_sampler = make_time_sampler(config, self.process)
        self.batches = Batches(dataset, config.batch_size, config.seed)
        self.own_rows = share(config.batch_size)  # of the global batch
        self.folder = None  # of the run, once it is open

    def open_run(self) -> None:
        """Opens the folder of the run, and resumes it if there is a checkpoint. All ranks must call it."""
        config, device, self.folder = self.config, self.device, os.path.join(self.config.ckpt_dir, self.config.run_name)
        self.optimizer = make_optimizer(self.net, config.weight_decay)
        self.ema = EMA(self.net, config.ema_decay)
        self.step = 0  # steps taken
        # Gradient norm, t, loss and importance of this rank's rows since the last line of metrics; norms not yet seen
        self.window, self.norms = [torch.zeros(0, 4, device=device)], []
        self.skipped = 0  # steps in a row until now that were not finite
        self.saved_step, self.save_failed = None, False  # of the last checkpoint
        self.evaluator = self.logger = None  # the first is made when it is needed, the second on rank 0 alone

        parameters = sum(p.numel() for p in self.net.parameters())
        print0(f"{len(self.dataset.data):,} items of shape {self.spec.shape}, {config.network} of {parameters:,} "
               "parameters")
        may_change = {name for name, found in marks(Config).items() if "may change" in found}
        if path := on_rank0(lambda: saving.open_run(self.folder, vars(config), vars(Config()), may_change)):
            self.restore(path)
        on_rank0(self.start_logger)
        if world_size() > 1:
            device_ids = [device.index] if device.type == "cuda" else None
            self.ddp = self.forward = DistributedDataParallel(self.net, device_ids, gradient_as_bucket_view=True)
        if compiles(config, device, math.inf if config.compile else config.num_training_steps, TRAINING_STEPS):
            print0(COMPILING)
            self.forward = torch.compile(self.ddp, mode=config.compile_mode)

    def start_logger(self) -> None:
        c = self.config
        self.logger = Logger(self.folder, vars(c), c.wandb, c.wandb_project, self.step, c.num_training_steps)

    # ---- The two methods that a new project overrides

    def prepare_batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of `step`, everything random in them a function of (seed, step)."""
        config = self.config
        coupling = COUPLINGS[config.coupling]  # needs all rows
        rows = range(config.batch_size) if coupling else self.own_rows
        rows_of = slice(rows.start, rows.stop)
        data, label = self.batches(self.data_step(step), rows_of)
        x0 = self.spec.encode(self.to_device(data))
        label = self.to_device(label) if config.class_conditional else None
        generator = torch.Generator(self.device).manual_seed(make_seed(config.seed, "step", step))

        def uniform():  # numbers for the global batch, of which the rows are taken
            return torch.rand(config.batch_size, device=self.device, generator=generator)[rows_of]

        t = self.time_sampler(config.batch_size, self.device, generator)[rows_of]
        if self.spec.is_image and config.random_flip:
            x0 = torch.where(append_dims(uniform() < 0.5, x0.ndim), x0.flip(-1), x0)
        x1 = RowNoise(rows, self.spec.shape, self.device, config.seed, "noise", step)()
        if coupling:
            x1 = x1[coupling(x0, x1, label)]
        if config.class_conditional:
            label = label.masked_fill(uniform() < config.label_dropout, self.spec.num_classes)
        importance = self.time_sampler.importance(t) if config.importance_weights else torch.ones_like(t)
        batch = Batch(x0, x1, t, importance, label)
        return batch.rows(slice(self.own_rows.start, self.own_rows.stop)) if coupling else batch

    def loss(self, batch: Batch) -> Tensor:
        """The weighted squared error of each prediction, read as target_type, mean over pixels: (B,) float32."""
        config = self.config
        c = self.process.coefs(batch.t, batch.x0.ndim)
        xt = c.alpha * batch.x0 + c.sigma * batch.x1
        with autocast(config, self.device):
            out = self.forward(formatted(config, xt), batch.t, batch.label)
        prediction = convert(out.float(), xt, c, config.model_type, config.target_type)
        weight = call_with_settings(loss_weight, vars(config), c=c).flatten()
        return weight * mean_flat((prediction - target(config.target_type, c, batch.x0, batch.x1)) ** 2)

    # ---- Training

    def train(self) -> None:
        """Trains up to num_training_steps. After a signal it writes a checkpoint and raises Stopped."""
        if not self.folder:
            self.open_run()
        config, folder = self.config, self.folder
        if self.step >= config.num_training_steps:
            print0(f"{folder} is trained already, to step {self.step}: raise --num_training_steps, or choose another "
                   "--run_name")
        elif self.step == 0 and self.spec.is_image:  # a scatter plot of samples shows the data already
            with self.failures_reported():
                on_rank0(self.show_data)
        with deferred_signals():
            # what a kill prevented after the last checkpoint
            if self.step and self.due(config.sample_every) and not on_rank0(self.has_pictures):
                self.sample()
            if self.step and self.evaluation_is_due() and not on_rank0(lambda: self.logger.evaluated(self.step)):
                self.evaluate()
            number = self.loop(config.num_training_steps)
            self.save_for_good()
            on_rank0(self.logger.finish if self.logger else None)
        if number:
            raise Stopped(f"{signal_name(number)} at step {self.step}, with a checkpoint")
        print0(f"samples     {self.picture_path('ema', config.sampler)}\ncheckpoint  {folder}/{saving.LAST}\n"
               f"log         {folder}/metrics.jsonl, and curves.png beside it")

    def loop(self, until: int) -> int:
        """The training loop, up to step `until`. Returns the number of the signal that stopped it, or 0."""
        config, agreement, stop = self.config, StopAgreement(), 0
        self.net.train()
        self.restart_clock()
        while self.step < until:
            # batch and rate, both functions of the step
            batch = self.prepare_batch(self.step)
            seed_torch(make_seed(config.seed, "dropout", self.step, rank()), self.device)
            rate = self.learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate

            # gradient, in parts; ranks exchange it once, in the last part
            parts, losses = batch.split(config.accumulation_steps), []
            for i, part in enumerate(parts):
                exchange = world_size() == 1 or i == len(parts) - 1
                with contextlib.nullcontext() if exchange else self.ddp.no_sync():
                    part_losses = self.loss(part)
                    # DDP takes the mean over ranks; a loss that is not finite spoils the gradient of all of them
                    loss = (part.importance * part_losses).sum() * world_size() / config.batch_size
                    loss.backward(torch.where(loss.isfinite(), 1.0, math.nan))
                losses.append(part_losses.detach())

            # step, unless the gradient is not finite
            grad_norm = take_step(self.optimizer, config.grad_clip_norm)
            self.optimizer.zero_grad()
            self.ema.update()
            rows = grad_norm.expand_as(batch.t), batch.t, torch.cat(losses), batch.importance
            self.window.append(torch.stack(rows, dim=1))
            self.norms.append(grad_norm)
            self.step += 1
            if self.device.type == "cpu" or self.due(config.log_every):  # a GPU would have to be waited for
                self.check_norms()

            # what happens every so many steps
            if rank() == 0:
                self.logger.bar.update()
            if self.due(config.log_every):
                self.log(rate)
            if self.due(config.save_every) or self.due(config.milestone_every) or (
                    self.save_failed and self.due(config.log_every)):
                self.save()
            if self.due(config.sample_every):
                self.sample()
            if self.evaluation_is_due():
                self.evaluate()
            if stop := agreement(now=self.due(config.sample_every) or self.evaluation_is_due()):
                break
        return agreement(now=True) or stop  # once more: a signal may have interrupted the last grids

    def due(self, every: int) -> bool:
        """Whether something is due after this step, every so many steps (0: never) and at the end."""
        return self.step == self.config.num_training_steps or (every > 0 and self.step % every == 0)

    def evaluation_is_due(self) -> bool:
        return self.config.evaluate_every > 0 and self.due(self.config.evaluate_every)

    def learning_rate(self, step: int) -> float:
        return call_with_settings(learning_rate, vars(self.config), step=step)

    def data_step(self, step: int) -> int:
        """The step whose items `step` takes."""
        return 0 if self.config.overfit_one_batch else step

    def to_device(self, x: Tensor) -> Tensor:
        """Copies without waiting for a GPU."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    # ---- Watching

    @contextlib.contextmanager
    def failures_reported(self, what: str = ""):
        """Reports a UserError within, which all ranks meet, and lets training continue."""
        try:
            yield
        except UserError as error:
            if rank() == 0 and not (what and stop_requested()):  # a signal stops drawing, and training reports it
                warn(f"{f'no {what} at step {self.step}: ' if what else ''}{error}")

    def check_norms(self) -> None:
        """Looks at the gradient norms since the last call, which waits for the device, and reports skipped steps.

        Raises UserError after max_skipped_steps in a row. The norms are of the whole batch: all ranks see the same.
        """
        norms, self.norms = torch.stack(self.norms).tolist() if self.norms else [], []
        for step, norm in enumerate(norms, self.step - len(norms)):
            self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
            if self.skipped:
                self.report_skipped(step, norm)
            if self.skipped == self.config.max_skipped_steps:
                raise UserError(f"{self.skipped} steps in a row had a loss or gradient that is not finite, up to step "
                                f"{step}: {self.folder}/skipped holds their batches, and the last checkpoint is good; "
                                "lower --base_lr, or look at the data")

    def report_skipped(self, step: int, norm: float) -> None:
        """Prints rate, times and gradient norm of a skipped step, and saves them with the indices of its batch."""
        t = gather_rows(self.prepare_batch(step).t)
        facts = {"learning_rate": self.learning_rate(step), "t_min": t.min().item(), "t_max": t.max().item(),
                 "grad_norm": norm}

        def report():
            warn(f"step {step} has a loss or gradient that is not finite, and is skipped: "
                 + ", ".join(f"{name} {value:.4g}" for name, value in facts.items()))
            content = {"step": step, **facts, "indices": self.batches.indices(self.data_step(step)).tolist()}
            saving.write_json(os.path.join(self.folder, "skipped", f"step_{step:07d}.json"), content)

        with self.failures_reported():
            on_rank0(report)

    def restart_clock(self) -> None:
        self.clock, self.clock_step = time.perf_counter(), self.step

    def log(self, rate: float) -> None:
        """One line of metrics: means over the steps since the last one. Waits for the device, then reads the clock."""
        rows, self.window = gather_rows(torch.cat(self.window)), self.window[:1]
        items = (self.step - self.clock_step) * self.config.batch_size
        values = {**means(rows), "learning_rate": rate, "images_per_second": items / (time.perf_counter() - self.clock),
                  "epoch": self.step * self.config.batch_size / len(self.dataset.data)}
        with self.failures_reported():
            on_rank0(lambda: self.logger.log(self.step, values))
        self.restart_clock()

    def picture(self, items: Tensor):
        """A picture of samples or data: a grid of images, by class if these are few, or a scatter plot of points."""
        few = self.config.class_conditional and self.spec.num_classes <= 16
        columns = self.spec.num_classes if few else max(1, round(len(items) ** 0.5))
        return picture_of(items, self.dataset.data[:2000], columns)

    def show_data(self) -> None:
        """Saves a picture of real data, laid out as the samples; with overfit_one_batch, of that batch."""
        n = self.config.num_samples
        rows = np.resize(self.batches.indices(0), n) if self.config.overfit_one_batch else examples(self.dataset, n)
        images = torch.from_numpy(self.dataset.data[rows])
        images[rows < 0] = 0
        self.logger.picture(self.step, "real", self.picture(images), os.path.join(self.folder, "real.png"))

    def grids(self) -> list[tuple[str, str]]:
        """Weights and sampler of each grid."""
        samplers = dict.fromkeys(filter(None, (self.config.sampler, self.config.sde_sampler)))
        return [(weights, sampler) for weights in ("raw", "ema") for sampler in samplers]

    def picture_path(self, weights: str, sampler: str) -> str:
        return os.path.join(self.folder, "samples", f"{weights}_{sampler}_{self.step:07d}.png")

    def has_pictures(self) -> bool:
        return all(os.path.exists(self.picture_path(*grid)) for grid in self.grids())

    def samples(self, weights: str, sampler: str, num: int, labels: Tensor | None) -> Tensor:
        net = self.net if weights == "raw" else self.ema.net
        return self.draw(self.config, self.spec, self.process, net, self.device, rows=range(num), labels=labels,
                         sampler=sampler, together=True)[0]

    def sample(self) -> None:
        """Grids by both samplers, of raw and EMA weights, with the same noise and labels in all grids of a run.

        Each rank draws its share of the rows. A signal stops the drawing.
        """
        config = self.config
        labels = torch.arange(config.num_samples) % self.spec.num_classes if config.class_conditional else None
        self.net.eval()
        for weights, sampler in self.grids():
            with self.failures_reported(f"grid of {weights} weights by {sampler}"):
                samples = self.samples(weights, sampler, config.num_samples, labels)
                on_rank0(lambda grid=(weights, sampler), samples=samples: self.logger.picture(
                    self.step, "_".join(grid), self.picture(samples), self.picture_path(*grid)))
        self.draw_curves()
        self.net.train()
        self.restart_clock()

    def evaluate(self) -> None:
        """A line of metrics of samples of the EMA weights against the training split. A signal stops it."""
        from metrics import Evaluator

        config = self.config
        labels = spread_labels(self.dataset.labels, config.evaluation_samples) if config.class_conditional else None
        with self.failures_reported("evaluation"):
            self.evaluator = self.evaluator or Evaluator(self.dataset, {"train": self.dataset}, self.device)
            values = self.evaluator(self.samples("ema", config.sampler, config.evaluation_samples, labels), labels)
            on_rank0(lambda: self.logger.log(self.step, values, kind="evaluation"))
        self.draw_curves()
        self.restart_clock()

    def draw_curves(self) -> None:
        with self.failures_reported():
            on_rank0(lambda: self.logger.curves())

    # ---- Saving

    def state(self) -> dict:
        """Everything that a run needs to resume, in plain containers."""
        return {
            "step": self.step,
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "window": gather_rows(torch.cat(self.window)),
            "skipped": self.skipped,
            "config": saving.plain(vars(self.config)),
            "data": saving.plain(dataclasses.asdict(self.spec)),
        }

    def save(self) -> bool:
        """Writes a checkpoint on rank 0, unless this step has one. Returns whether it is there."""
        self.check_norms()
        if self.saved_step != self.step:
            state, self.save_failed = self.state(), True

            def write():
                self.logger.write_lines(sync=True)  # no checkpoint without the metrics up to it
                saving.save(self.folder, state, self.config.keep_checkpoints, self.config.milestone_every)

            with self.failures_reported():
                on_rank0(write)
                self.save_failed, self.saved_step = False, self.step
            self.restart_clock()
        return not self.save_failed

    def save_for_good(self) -> None:
        """Writes the last checkpoint of this part of the run, in several attempts. Raises UserError if all fail."""
        for seconds in (*RETRY_SECONDS, 0):
            if self.save():
                return
            time.sleep(seconds)
        raise UserError(f"the checkpoint of step {self.step} cannot be written; make room, and the same command "
                        f"resumes from that of step {self.saved_step}, or from the start if there is none")

    def restore(self, path: str) -> None:
        """Resumes the run from a checkpoint."""
        state = saving.load(path)
        saving.check_data(path, state["data"], dataclasses.asdict(self.spec))
        saving.restore(self.net, state["net"], path)
        self.ema.load_state_dict(state["ema"])
        load_moments(self.optimizer, state["optimizer"])
        self.step = self.saved_step = state["step"]
        self.skipped = state["skipped"]
        if rank() == 0:  # old checkpoints have none
            self.window.append(state.get("window", self.window[0]).to(self.device))
        print0(f"resuming {self.folder} from step {self.step}")


# What the setting `trainer` can name; training, sampling, evaluation and benchmark take the class from here.
TRAINERS = {"diffusion": DiffusionTrainer}
