"""`DiffusionTrainer` trains a network: batch, loss, gradient, step, EMA, and what happens every so many steps.

A new project overrides `prepare_batch`, which says what is random in a step, or `loss`. What is random in step s is
drawn for the whole global batch as a function of (seed, s), and each rank takes its rows. So losses do not depend on
the number of ranks or on accumulation, except through dropout, and a run that resumes needs no random state.
"""

import contextlib
import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import saving
from build import autocast, build, draw_all, formatted, make_time_sampler
from command_line import Stopped, deferred_signals, signal_name
from config import Config
from couplings import COUPLINGS
from data_utils import Batches, Dataset, uniform_rows
from distributed import agreed_stop, on_rank0, print0, rank, share, world_size
from flow_maps import residual
from optimizers import learning_rate, take_step
from prediction import convert, loss_weight, target, without_mean
from processes import BASES, RectifiedFlow
from runs import Run
from utils import UserError, append_dims, call_with_settings, make_seed, row_noise, seed_torch


class Batch(NamedTuple):
    """What a training step needs; `importance` is the weight of each loss in the mean, 1 without importance weights."""

    x0: Tensor  # (B, ...) data
    x1: Tensor  # (B, ...) noise, or points of the source
    t: Tensor  # (B,)
    importance: Tensor  # (B,)
    label: Tensor | None  # (B,) int64
    cond: Tensor | None  # (B, ...) what the network sees of the condition
    z: Tensor | None = None  # (B, ...) noise, where the process has a gamma
    s: Tensor | None = None  # (B,) the second time, of a flow map

    def rows(self, rows):
        return Batch(*(None if x is None else x[rows.start : rows.stop] for x in self))

    def split(self, parts):
        """The batch in parts along its rows, equal in length up to one row."""
        n = len(self.t)
        return [self.rows(range(n * i // parts, n * (i + 1) // parts)) for i in range(parts)]


class DiffusionTrainer(Run):
    """Trains one run. Every rank makes one and calls `train`. `Run` adds its folder, checkpoints and pictures."""

    draw = staticmethod(draw_all)  # samples of a network, also for sample.py and evaluate.py

    def __init__(self, config: Config, dataset: Dataset, device):
        """What a batch and its loss need. `open_run` adds what training needs."""
        self.config, self.dataset, self.spec, self.device = config, dataset, dataset.spec, device
        self.process, self.net = build(config, self.spec, device)
        # The network as it is trained, wrapped; self.net stays plain, for checkpoints, EMA and sampling.
        self.ddp = self.forward = self.net
        self.time_sampler = make_time_sampler(config, self.process)
        self.batches, self.source_batches = (
            data and call_with_settings(Batches, vars(config), dataset=data) for data in (dataset, dataset.source))
        self.own_rows = share(config.batch_size)  # of the global batch
        self.folder = None  # of the run, once it is open

    # ---- The two methods that a new project overrides

    def prepare_batch(self, step) -> Batch:
        """This rank's rows of the global batch of `step`, everything random in them a function of (seed, step)."""
        config = self.config
        coupling = COUPLINGS[config.coupling]  # needs all rows
        rows = range(config.batch_size) if coupling else self.own_rows
        rows_of = slice(rows.start, rows.stop)
        data, label, cond = self.batches(step, rows_of)
        x0 = self.spec.encode(self.to_device(data))
        cond = self.to_device(cond)
        x1 = self.source_batches and self.spec.encode(self.to_device(self.source_batches(step, rows_of)[0]))
        label = self.to_device(label) if config.class_conditional else None
        generator = torch.Generator(self.device).manual_seed(make_seed(config.seed, "step", step))

        def uniform():  # numbers for the global batch, of which the rows are taken
            return torch.rand(config.batch_size, device=self.device, generator=generator)[rows_of]

        t = self.time_sampler(config.batch_size, self.device, generator)[rows_of]
        if self.spec.is_image and config.random_flip:
            flipped = append_dims(uniform() < 0.5, x0.ndim)
            x0, x1, cond = (torch.where(flipped, x.flip(-1), x) if x is not None and x.ndim == 4 else x
                            for x in (x0, x1, cond))
        cond = self.dataset.condition(x0, cond, uniform_rows(rows, self.device, config.seed, "corruption", step))
        noise = partial(row_noise, rows, self.spec.shape, self.device, config.seed)
        if x1 is None:
            x1 = noise("noise", step)()
        z = noise("gamma", step)() if self.process.gamma else None
        if coupling:
            x1 = x1[call_with_settings(coupling, vars(config) | {"generator": generator}, x0=x0, x1=x1, label=label)]
        if config.class_conditional or config.cond_dropout:  # the same number: both are hidden together
            hidden = uniform()
        if config.class_conditional:
            label = label.masked_fill(hidden < config.label_dropout, self.spec.num_classes)
        if config.cond_dropout:
            cond = cond * append_dims(hidden >= config.cond_dropout, cond.ndim)
        weigh = self.time_sampler.importance if config.importance_weights else torch.ones_like
        importance, s = weigh(t), None
        if config.objective:
            share = config.off_diagonal * min(1, (step + 1) / max(config.off_diagonal_warmup, 1))
            chosen = uniform() < share
            other = self.time_sampler(config.batch_size, self.device, generator)[rows_of]
            importance = importance * torch.where(chosen, weigh(other), 1)
            other = torch.where(chosen, other, t)
            t, s = torch.maximum(t, other), torch.minimum(t, other)
        batch = Batch(x0, x1, t, importance, label, cond, z, s)
        return batch.rows(self.own_rows) if coupling else batch

    def loss(self, batch: Batch):
        """The weighted squared error of each prediction, read as target_type, mean over pixels: (B,) float32.

        With a gamma, plus the squared error of the predicted z (Albergo, Boffi & Vanden-Eijnden 2023, section 2).
        """
        config = self.config
        c, m = self.process.coefs(batch.t, batch.x0.ndim), BASES[config.base](batch.cond, self.spec.shape)
        weight = loss_weight(c, **vars(config)).flatten()
        known = c.alpha * batch.x0 + c.sigma * batch.x1  # xt without m and z
        xt = known + (c.shift * m if batch.z is None else c.gamma * batch.z)
        if config.objective:
            velocity = target("velocity", c, batch.x0, batch.x1) + c.shift_dot * m
            error = residual(config.objective, partial(self.call, batch), xt, batch.t, batch.s, velocity)
            return weight * error.square().flatten(1).mean(1)
        out, *eta = self.call(batch, xt, batch.t).float().split(self.spec.shape[0], dim=1)
        out = without_mean(out, c, config.model_type, m)
        prediction = convert(out, known, c, config.model_type, config.target_type)
        error = prediction - target(config.target_type, c, batch.x0, batch.x1)
        loss = weight * error.square().flatten(1).mean(1)
        return loss + (eta[0] - batch.z).square().flatten(1).mean(1) if eta else loss

    def call(self, batch: Batch, xt, t, *more):
        """The network's output for the labels and conditions of this batch; `more` is for flow_maps.FlowMap."""
        with autocast(self.config, self.device):
            return self.forward(formatted(self.config, xt), t, batch.label, batch.cond, *more)

    # ---- Training

    def train(self):
        """Trains up to num_training_steps. After a signal it writes a checkpoint and raises Stopped."""
        if not self.folder:
            self.open_run()
        config, folder = self.config, self.folder
        if self.step >= config.num_training_steps:
            print0(f"{folder} is trained already, to step {self.step}: raise --num_training_steps, or choose another "
                   "--run_name")
        elif self.step == 0 and len(self.spec.shape) == 3:  # a scatter plot of samples shows the data already
            with self.failures_reported():
                on_rank0(self.show_data)
        with deferred_signals():
            if self.step:
                self.sample_and_evaluate()  # what a kill prevented after the last checkpoint
            number = self.loop(config.num_training_steps)
            if not self.save():
                raise UserError(f"the checkpoint of step {self.step} cannot be written; make room, and the same "
                                "command resumes from the last one, or from the start without one")
            on_rank0(lambda: self.logger.finish())
        if number:
            raise Stopped(f"{signal_name(number)} at step {self.step}, with a checkpoint")
        print0(f"samples     {self.picture_path('ema', config.sampler)}\ncheckpoint  {folder}/{saving.LAST}\n"
               f"log         {folder}/metrics.jsonl, and curves.png beside it")

    def loop(self, until):
        """The training loop, up to step `until`. Returns the number of the signal that stopped it, or 0."""
        config = self.config
        self.net.train()
        self.restart_clock()
        while self.step < until and not agreed_stop():
            # batch and rate, both functions of the step
            batch = self.prepare_batch(self.step)
            seed_torch(make_seed(config.seed, "dropout", self.step, rank()), self.device)
            rate = call_with_settings(learning_rate, vars(config), step=self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate

            # gradient, in parts; ranks exchange it once, in the last part
            parts, losses = batch.split(config.accumulation_steps), []
            for i, part in enumerate(parts):
                waits = world_size() > 1 and i < len(parts) - 1
                with self.ddp.no_sync() if waits else contextlib.nullcontext():
                    part_losses = self.loss(part)
                    # DDP takes the mean over ranks; a loss that is not finite spoils the gradient of all of them
                    loss = (part.importance * part_losses).sum() * world_size() / config.batch_size
                    loss.backward(torch.where(loss.isfinite(), 1.0, math.nan))
                losses.append(part_losses.detach())

            # step, unless the gradient is not finite
            grad_norm = take_step(self.optimizer, config.grad_clip_norm)
            self.optimizer.zero_grad()
            self.update_averages()
            rows = grad_norm.expand_as(batch.t), batch.t, torch.cat(losses), batch.importance
            self.window.append(torch.stack(rows, dim=1))
            self.norms.append(grad_norm)
            self.step += 1
            if self.device.type == "cpu" or self.due(config.log_every):  # a GPU would have to be waited for
                self.check_norms()

            # what happens every so many steps
            if self.logger:
                self.logger.bar.update()
            if self.due(config.log_every):
                self.log(rate)
            self.save_snapshot()
            if self.due(config.save_every) or self.due(config.milestone_every) or (
                    self.save_failed and self.due(config.log_every)):
                self.save()
            self.sample_and_evaluate()
        return agreed_stop()

    def to_device(self, x):
        """Copies a tensor without waiting for a GPU. None stays None."""
        return x if x is None or self.device.type == "cpu" else x.pin_memory().to(self.device, non_blocking=True)


class Regression(DiffusionTrainer):
    """Learns the mean of the data given the condition, by the same network: the forecast that samples have to beat."""

    def loss(self, batch):
        """The squared error, mean over pixels: (B,) float32."""
        with autocast(self.config, self.device):
            mean = self.mean(self.forward, self.config, batch.x0, batch.t, batch.label, batch.cond)
        return (mean - batch.x0).square().flatten(1).mean(1)

    @staticmethod
    def mean(net, config, x, t, label, cond):
        """The predicted mean, in the shape of x (B, ...): the network gets zeros for x, and ones for t."""
        m = BASES[config.base](cond, x.shape[1:])
        return net(torch.zeros_like(x), torch.ones_like(t), label, cond).float() + m

    @classmethod
    def draw(cls, config, spec, process, net, device, cases, sampler, guide=None):
        """The mean for each case, as a network whose predicted x0 depends on nothing else: see build.draw_all."""
        chosen = replace(config, model_type="x0", sampling_steps=1, grid="uniform", denoise=True, compile=False)
        return draw_all(chosen, spec, RectifiedFlow(), partial(cls.mean, net, config), device, cases, "euler")


# What the setting `trainer` can name; training, sampling, evaluation and benchmark take the class from here.
TRAINERS = {"diffusion": DiffusionTrainer, "regression": Regression}
