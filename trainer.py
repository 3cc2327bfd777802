"""`DiffusionTrainer` puts the parts together: data, process, time sampler, prediction, network, optimizer, EMA, samplers, logging.

A new project overrides `prepare_batch`, which says what is random in a step, or `loss`. Whatever is random in step s is drawn for
the whole global batch as a function of (seed, s), and each process takes its rows. So losses do not depend on the number of
processes or on accumulation, but for dropout, which also depends on these; and a run that goes on needs no random state.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import saving
import stopping
from build import COMPILING, TRAINING_STEPS, autocast, build, compiles, draw_all, formatted, make_time_sampler
from config import MAY_CHANGE, Config
from couplings import COUPLINGS
from data_utils import Batches, Dataset, spread_labels
from ema import EMA
from logging_utils import Logger, image_grid, scatter_plot
from metrics import Judge
from optimizers import learning_rate, load_moments, make_optimizer, take_step
from prediction import convert, loss_weight, target
from utils import (
    RowNoise,
    UserError,
    append_dims,
    call,
    complain,
    gather_rows,
    make_seed,
    mean_flat,
    on_rank0,
    print0,
    rank,
    seed_torch,
    share,
    world_size,
    write_atomically,
)

RETRY_SECONDS = (1, 2, 4, 8)  # between attempts to write the last checkpoint


class Batch(NamedTuple):
    """What a training step needs: x0 and x1 (B, ...), t (B,), weight (B,) of each loss in the mean, label (B,) int64 or None."""

    x0: Tensor
    x1: Tensor
    t: Tensor
    weight: Tensor
    label: Tensor | None

    def rows(self, mine: slice) -> "Batch":
        """Some of its rows."""
        return Batch(*(None if x is None else x[mine] for x in self))

    def split(self, parts: int) -> list["Batch"]:
        """The batch in parts along its rows, alike in length to one row."""
        if parts == 1:
            return [self]
        chunks = [[None] * parts if x is None else x.tensor_split(parts) for x in self]
        return [Batch(*part) for part in zip(*chunks)]


class DiffusionTrainer:
    """Trains, watches and saves one run. Every process of the run makes one and calls `train`."""

    draw = staticmethod(draw_all)  # samples of a network, also for sample.py and evaluate.py

    def __init__(self, config: Config, dataset: Dataset, device: torch.device):
        self.set_parts(config, dataset, device, *build(config, dataset.spec, device))
        settings = dataclasses.asdict(config)
        self.optimizer = make_optimizer(self.net, config.weight_decay)
        self.ema = EMA(self.net, config.ema_decay)
        self.step = 0  # steps taken
        self.sums = torch.zeros(11, device=device)  # since the last line of metrics, see `track`
        self.norms = []  # of the gradients, since they were last looked at
        self.skipped = 0  # steps in a row until now that were not finite
        self.saved = None  # step of the last checkpoint
        self.unsaved = False  # the last attempt to write one failed
        self.judge = None  # made when it is first needed

        self.folder = os.path.join(config.ckpt_dir, config.run_name)
        parameters = sum(p.numel() for p in self.net.parameters())
        print0(f"{len(dataset.data):,} items of shape {self.spec.shape}, {config.network} of {parameters:,} parameters")
        if on_rank0(lambda: saving.open_run(self.folder, settings, dataclasses.asdict(Config()), MAY_CHANGE)):
            self.restore()
        self.logger = None  # only rank 0 has one
        on_rank0(self.start_logger)
        if world_size() > 1:
            self.ddp = self.forward = DistributedDataParallel(
                self.net, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        if compiles(config, device, math.inf if config.compile else config.num_training_steps, TRAINING_STEPS):
            print0(COMPILING)
            self.forward = torch.compile(self.ddp, mode=config.compile_mode)

    def set_parts(self, config: Config, dataset: Dataset, device: torch.device, process, net) -> None:
        """What a batch and its loss need."""
        self.config, self.dataset, self.spec, self.device = config, dataset, dataset.spec, device
        self.process, self.net = process, net
        # The network as it is trained, wrapped; self.net stays plain, for checkpoints, EMA and sampling.
        self.ddp = self.forward = net
        self.time_sampler = make_time_sampler(config, process)
        self.batches = Batches(dataset, config.batch_size, config.seed)
        self.rows = share(config.batch_size)  # of the global batch

    @classmethod
    def only_loss(cls, *parts) -> "DiffusionTrainer":
        """One without a run, made by `set_parts`: `prepare_batch` and `loss` can be called. evaluate.py takes the loss of a checkpoint."""
        self = cls.__new__(cls)
        self.set_parts(*parts)
        return self

    def start_logger(self) -> None:
        c = self.config
        self.logger = Logger(self.folder, dataclasses.asdict(c), c.wandb, c.wandb_project, self.step, c.num_training_steps)

    # ---- The two methods that a new project overrides

    def prepare_batch(self, step: int) -> Batch:
        """This process's rows of the global batch of `step`, everything random in them a function of (seed, step)."""
        config = self.config
        coupling = COUPLINGS[config.coupling]  # if there is one, it looks at all rows
        rows = range(config.batch_size) if coupling else self.rows
        mine = slice(rows.start, rows.stop)
        data, label = self.batches(self.data_step(step), mine)
        x0, label = self.spec.encode(self.to_device(data)), self.to_device(label) if config.class_conditional else None
        generator = torch.Generator(self.device).manual_seed(make_seed(config.seed, "step", step))

        def uniform():  # for the global batch, of which the rows are taken
            return torch.rand(config.batch_size, device=self.device, generator=generator)[mine]

        t = self.time_sampler(config.batch_size, self.device, generator)[mine]
        if self.spec.is_image and config.random_flip:
            x0 = torch.where(append_dims(uniform() < 0.5, x0.ndim), x0.flip(-1), x0)
        x1 = RowNoise(rows, self.spec.shape, self.device, config.seed, "noise", step)()
        if coupling:
            x1 = x1[coupling(x0, x1, label)]
        if config.class_conditional:
            label = label.masked_fill(uniform() < config.label_dropout, self.spec.num_classes)
        weight = self.time_sampler.importance(t) if config.importance_weights else torch.ones_like(t)
        batch = Batch(x0, x1, t, weight, label)
        return batch.rows(slice(self.rows.start, self.rows.stop)) if coupling else batch

    def data_step(self, step: int) -> int:
        """The step whose items `step` takes."""
        return 0 if self.config.overfit_one_batch else step

    def loss(self, batch: Batch) -> Tensor:
        """The loss of each sample, (B,), float32: the squared error of the prediction, read as target_type, mean over pixels, weighted."""
        config = self.config
        c = self.process.coefs(batch.t, batch.x0.ndim)
        xt = c.alpha * batch.x0 + c.sigma * batch.x1
        with autocast(config, self.device):
            out = self.forward(formatted(config, xt), batch.t, batch.label)
        prediction = convert(out.float(), xt, c, config.model_type, config.target_type)
        weight = loss_weight(c=c, **vars(config)).flatten()
        return weight * mean_flat((prediction - target(config.target_type, c, batch.x0, batch.x1)) ** 2)

    # ---- Training

    def train(self) -> None:
        """Trains up to num_training_steps, from where the run stands. If a signal asks for it, writes a checkpoint and raises Stopped."""
        if self.step >= self.config.num_training_steps:
            print0(f"{self.folder} is trained already, to step {self.step}: raise --num_training_steps, or choose another --run_name")
        elif self.step == 0 and self.spec.is_image:  # a scatter plot of samples shows the data already
            self.attempt(self.show_data)
        with stopping.hold():
            if self.step and self.due(self.config.sample_every) and on_rank0(self.lacks_pictures):  # the run ended before they were drawn
                self.sample()
            if self.step and self.evaluation_is_due() and on_rank0(lambda: not self.logger.evaluated(self.step)):
                self.evaluate()
            stop = self.loop(self.config.num_training_steps)
            self.save_for_good()
            on_rank0(self.end)
        if stop:
            raise stopping.Stopped(f"{stopping.name(stop)} at step {self.step}, with a checkpoint")

    def loop(self, until: int) -> int:
        """The training loop, up to step `until`. The number of the signal that stopped it, or 0 at its end."""
        config, agreed, stop = self.config, stopping.Agreement(), 0
        self.net.train()
        self.restart_clock()
        while self.step < until:
            # batch and rate, both functions of the step
            batch = self.prepare_batch(self.step)
            seed_torch(make_seed(config.seed, "dropout", self.step, rank()), self.device)
            rate = self.learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate

            # gradient, in parts; processes exchange it once, in the last part
            parts, sums = batch.split(config.accumulation_steps), torch.zeros_like(self.sums)
            for i, part in enumerate(parts):
                with self.ddp.no_sync() if world_size() > 1 and i < len(parts) - 1 else contextlib.nullcontext():
                    losses = self.loss(part)
                    loss = (part.weight * losses).sum() * world_size() / config.batch_size  # of which DDP takes the mean over processes
                    loss.backward(torch.where(loss.isfinite(), 1.0, math.nan))  # so that all processes learn of one that is not
                self.track(sums, losses.detach(), part)

            # step, unless the gradient is not finite
            grad_norm = take_step(self.optimizer, config.grad_clip_norm)
            self.optimizer.zero_grad()
            self.ema.update()
            sums[:2] = torch.stack([grad_norm, torch.ones_like(grad_norm)])
            self.sums += torch.where(grad_norm.isfinite(), sums, 0.0)
            self.norms.append(grad_norm)
            self.step += 1
            if self.device.type == "cpu" or self.due(config.log_every):  # a GPU would be waited for
                self.check_norms()

            # what happens every so many steps
            if rank() == 0:
                self.logger.bar.update()
            if self.due(config.log_every):
                self.log(rate)
            if self.due(config.save_every) or self.due(config.milestone_every) or (self.unsaved and self.due(config.log_every)):
                self.save()
            if self.due(config.sample_every):
                self.sample()
            if self.evaluation_is_due():
                self.evaluate()
            if stop := agreed(now=self.due(config.sample_every) or self.evaluation_is_due()):
                break
        return agreed(now=True) or stop  # once more: the last grids may have been broken off

    def due(self, every: int) -> bool:
        """Whether something is due after this step, every so many steps (0: never) and at the end."""
        return self.step == self.config.num_training_steps or (every > 0 and self.step % every == 0)

    def learning_rate(self, step: int) -> float:
        return call(learning_rate, step=step, **vars(self.config))

    def end(self) -> None:
        """What rank 0 does at the end of the run, or of this part of it."""
        self.logger.finish()
        if self.step >= self.config.num_training_steps:
            print0(f"samples     {self.picture_path('ema', self.config.sampler)}")
            print0(f"checkpoint  {os.path.join(self.folder, saving.LAST)}")
            print0(f"log         {self.logger.metrics}, and curves.png beside it")

    def to_device(self, x: Tensor) -> Tensor:
        """Copies without waiting for a GPU."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    # ---- Watching

    def track(self, sums: Tensor, losses: Tensor, batch: Batch) -> None:
        """Adds up, on the device, without waiting for it: gradient norm, steps, what is minimized, and loss and count by quarter of t."""
        quarter = (4 * batch.t).long().clamp(0, 3)
        sums[2] += (batch.weight * losses).sum()
        sums[3:7].scatter_add_(0, quarter, losses)
        sums[7:11].scatter_add_(0, quarter, torch.ones_like(losses))

    def check_norms(self) -> None:
        """Looks at the gradient norms since the last time, which waits for the device, and tells of the steps that were skipped.

        Raises UserError after max_skipped_steps in a row. The norms are of the whole batch, so that all processes see the same.
        """
        norms, self.norms = torch.stack(self.norms).tolist() if self.norms else [], []
        for step, norm in enumerate(norms, self.step - len(norms)):
            self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
            if self.skipped:
                self.tell_skipped(step, norm)
            if self.skipped == self.config.max_skipped_steps:
                raise UserError(f"{self.skipped} steps in a row had a loss or gradient that is not finite, up to step {step}: "
                                f"{self.folder}/skipped holds their batches, and the last checkpoint is good; lower --base_lr, or look at "
                                "the data")

    def tell_skipped(self, step: int, norm: float) -> None:
        """Prints rate, times and gradient norm of a skipped step, and saves them with the indices of its batch. All processes take part."""
        t = gather_rows(self.prepare_batch(step).t)
        facts = {"learning_rate": self.learning_rate(step), "t_min": t.min().item(), "t_max": t.max().item(), "grad_norm": norm}

        def tell():
            text = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
            complain(f"step {step} has a loss or gradient that is not finite, and is skipped: {text}")
            content = {"step": step, **facts, "indices": self.batches.indices(self.data_step(step)).tolist()}
            os.makedirs(os.path.join(self.folder, "skipped"), exist_ok=True)
            path = os.path.join(self.folder, "skipped", f"step_{step:07d}.json")
            write_atomically(path, json.dumps(content))

        self.attempt(tell)

    def attempt(self, work) -> bool:
        """Whether `work()` went well on rank 0; if not, it says why, and training goes on."""
        try:
            on_rank0(work)
        except UserError as error:
            if rank() == 0:
                complain(str(error))
            return False
        return True

    def restart_clock(self) -> None:
        self.clock, self.clock_step = time.perf_counter(), self.step

    def log(self, rate: float) -> None:
        """One line of metrics: means over the steps since the last one. Waits for the device, and then reads the clock."""
        sums = self.sums.clone()
        if world_size() > 1:
            dist.all_reduce(sums[2:])
        grad_norm, steps, loss, *by_quarter = sums.tolist()
        seconds = time.perf_counter() - self.clock
        images = (self.step - self.clock_step) * self.config.batch_size
        values = {"loss": loss / sum(by_quarter[4:]), "grad_norm": grad_norm / steps} if steps else {}  # all were skipped
        values |= {
            "learning_rate": rate,
            "images_per_second": images / seconds,
            "epoch": self.step * self.config.batch_size / len(self.dataset.data),
        }
        for i, (total, count) in enumerate(zip(by_quarter[:4], by_quarter[4:])):
            if count:
                values[f"loss_t_{i / 4:.2f}_{(i + 1) / 4:.2f}"] = total / count
        self.attempt(lambda: self.logger.log(self.step, values))
        self.sums.zero_()
        self.restart_clock()

    def picture(self, points: Tensor):
        """Samples or data, uint8 images or vectors -> a picture: a grid, by class if these are few, a class a column, or a scatter plot."""
        if not self.spec.is_image:
            return scatter_plot(points, self.dataset.data[:2000])
        few = self.config.class_conditional and self.spec.num_classes <= 16
        return image_grid(points, self.spec.num_classes if few else max(1, round(len(points) ** 0.5)))

    def show_data(self) -> None:
        """Saves a picture of real data, to lay beside the samples: the one batch to overfit, or the classes in turn, as in the grids."""
        data, classes = self.dataset.data, self.spec.num_classes
        by_class = [np.arange(len(data))]
        if self.config.overfit_one_batch:
            by_class = [self.batches.indices(0)]
        elif classes:
            by_class = [np.flatnonzero(self.dataset.labels == k) for k in range(min(classes, self.config.num_samples))]
        blank = np.zeros(self.spec.shape, data.dtype)  # for a label that no item has
        shown = [(by_class[i % len(by_class)], i // len(by_class)) for i in range(self.config.num_samples)]
        images = np.stack([data[of[n % len(of)]] if len(of) else blank for of, n in shown])
        self.logger.picture(self.step, "real", self.picture(torch.from_numpy(images)), os.path.join(self.folder, "real.png"))

    def grids(self) -> list[tuple[str, str]]:
        """Weights and sampler of each grid."""
        samplers = dict.fromkeys(filter(None, (self.config.sampler, self.config.sde_sampler)))
        return [(weights, sampler) for weights in ("raw", "ema") for sampler in samplers]

    def picture_path(self, weights: str, sampler: str) -> str:
        return os.path.join(self.folder, "samples", f"{weights}_{sampler}_{self.step:07d}.png")

    def lacks_pictures(self) -> bool:
        return not all(os.path.exists(self.picture_path(*grid)) for grid in self.grids())

    def sample(self) -> None:
        """Grids by the ODE and the SDE sampler, of raw and EMA weights; the same noise and labels in every grid of a run.

        All processes take part, each with its share of the rows. A grid that cannot be drawn is told of, and training goes on; a
        signal breaks off the drawing.
        """
        c = self.config
        labels = torch.arange(c.num_samples) % self.spec.num_classes if c.class_conditional else None
        self.net.eval()
        for weights, sampler in self.grids():
            net = self.net if weights == "raw" else self.ema.net
            try:
                samples, _ = self.draw(c, self.spec, self.process, net, self.device, rows=range(c.num_samples), labels=labels,
                                       sampler=sampler, together=True)
            except UserError as error:
                if rank() == 0 and not stopping.asked():
                    complain(f"no grid of {weights} weights by {sampler} at step {self.step}: {error}")
                continue
            self.attempt(lambda grid=(weights, sampler), samples=samples: self.logger.picture(
                self.step, "_".join(grid), self.picture(samples), self.picture_path(*grid)))
        self.attempt(lambda: self.logger.curves())
        self.net.train()
        self.restart_clock()

    def evaluation_is_due(self) -> bool:
        """Whether samples are to be judged after this step: every so many, and at the end, unless the settings say never."""
        return self.config.evaluate_every > 0 and self.due(self.config.evaluate_every)

    def evaluate(self) -> None:
        """A line of metrics of samples of the EMA weights against the training split. All processes take part.

        If it cannot be done, that is told of, and training goes on; a signal breaks it off.
        """
        c = self.config
        labels = spread_labels(self.dataset.labels, c.evaluation_samples) if c.class_conditional else None
        try:
            self.judge = self.judge or Judge(self.dataset, {"train": self.dataset}, self.device)
            samples, _ = self.draw(c, self.spec, self.process, self.ema.net, self.device, rows=range(c.evaluation_samples), labels=labels,
                                   sampler=c.sampler, together=True)
            values = self.judge(samples, labels)
            self.attempt(lambda: self.logger.log(self.step, values, kind="evaluation"))
            self.attempt(lambda: self.logger.curves())
        except UserError as error:
            if rank() == 0 and not stopping.asked():
                complain(f"no evaluation at step {self.step}: {error}")
        self.restart_clock()

    # ---- Saving

    def state(self) -> dict:
        """Everything that a run needs to go on, in plain containers."""
        return {
            "step": self.step,
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sums": gather_rows(self.sums[None]),  # (processes, 11)
            "skipped": self.skipped,
            "config": saving.plain(dataclasses.asdict(self.config)),
            "data": saving.plain(dataclasses.asdict(self.spec)),
        }

    def save(self) -> bool:
        """Writes a checkpoint, unless this step has one, on rank 0; whether it is there. If not, the next line of metrics tries again."""
        self.check_norms()
        if self.saved != self.step:
            state = self.state()

            def write():
                self.logger.write_lines(sync=True)  # no checkpoint without the metrics up to it
                saving.save(self.folder, state, self.config.keep_checkpoints, self.config.milestone_every)

            self.unsaved = not self.attempt(write)
            self.saved = self.saved if self.unsaved else self.step
            self.restart_clock()
        return not self.unsaved

    def save_for_good(self) -> None:
        """Writes the last checkpoint of this part of the run, in several attempts. Raises UserError if all fail."""
        for seconds in (*RETRY_SECONDS, None):
            if self.save():
                return
            if seconds:
                time.sleep(seconds)
        raise UserError(f"the checkpoint of step {self.step} cannot be written; make room, and the same command goes on from that of step "
                        f"{self.saved}, or from the start if there is none")

    def restore(self) -> None:
        """Takes up the run where its newest checkpoint left it; rank 0 says which one that is."""
        found = []
        path = on_rank0(lambda: found.append(saving.load_newest(self.folder)) or found[0][1])
        state = found[0][0] if found else saving.load(path)
        there, here = state["data"], saving.plain(dataclasses.asdict(self.spec))
        for name, mine in here.items():
            theirs = there[name]
            if np.shape(theirs) != np.shape(mine) or not np.allclose(theirs, mine, rtol=1e-5):  # other machines may round a mean otherwise
                raise UserError(f"{path} is of other data, {name} {theirs}, not {mine}: give it those, or another --run_name")
        saving.restore(self.net, state["net"], path)
        self.ema.load_state_dict(state["ema"])
        load_moments(self.optimizer, state["optimizer"])
        self.step = self.saved = state["step"]
        self.skipped, sums = state["skipped"], state["sums"]
        if len(sums) != world_size():  # another number of processes: what was added up goes to rank 0
            sums = torch.cat([sums[0, :2], sums[:, 2:].sum(0)]).expand(world_size(), -1).clone()
            sums[1:, 2:] = 0
        self.sums = sums[rank()].to(self.device)
        print0(f"going on with {self.folder} from step {self.step}")


# What the setting `trainer` can name; training, sampling, evaluation and benchmark take the class from here.
TRAINERS = {"diffusion": DiffusionTrainer}
