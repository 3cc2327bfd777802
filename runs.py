"""What surrounds the training loop: a run's folder, its checkpoints, metrics, pictures and evaluations.

`Run` is the base class of the trainer, which has the settings, the process, the network and the loop. A UserError or an
error of the disk while the run is watched (no memory for a grid, no room) is reported, and training continues. What is
drawn or saved at a step is a function of the state at that step: a run that resumes makes up for what a kill prevented.
"""

import contextlib
import functools
import math
import os
import statistics
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import saving
from build import TRAINING_STEPS, compiles, read_data
from config import Config, marks
from data_utils import DataSpec, cases
from distributed import agreed_stop, gather_rows, on_rank0, print0, rank, world_size
from ema import LENGTHS, averages
from logging_utils import Logger, picture_of
from optimizers import OPTIMIZERS
from utils import UserError, warn


def means(rows):
    """Mean loss, also by quarter of t, and gradient norm, from a `window`, without steps that are not finite.

    The sums are exact, so that they do not depend on the order of the rows, and thus not on the number of ranks.
    """
    norm, t, loss, importance = rows[rows[:, 0].isfinite()].T
    quarter = (4 * t).long().clamp(0, 3)
    parts = {"loss": importance * loss, "grad_norm": norm}
    parts |= {f"loss_t_{i / 4:.2f}_{(i + 1) / 4:.2f}": loss[quarter == i] for i in range(4)}
    return {name: statistics.fmean(values.tolist()) for name, values in parts.items() if len(values)}


class Run:
    """Opens, watches, saves and resumes a run. All methods must be called by all ranks."""

    def open_run(self):
        """Opens the folder of the run, and resumes it if there is a checkpoint. All ranks must call it."""
        config = self.config
        self.folder = f"{self.config.ckpt_dir}/{self.config.run_name}"
        self.optimizer = OPTIMIZERS[config.optimizer](self.net, config.weight_decay)
        self.emas = averages(self.net, *np.ravel(config.ema_decay).tolist(),
                             lengths=LENGTHS * (config.ema_snapshot_every > 0))
        self.ema = self.emas["ema"]  # which is shown
        self.step = 0  # steps taken
        # Gradient norm, t, loss and importance of this rank's rows since the last line of metrics
        self.window = [torch.zeros(0, 4, device=self.device)]
        self.norms = []  # gradient norms that `check_norms` has not yet seen
        self.skipped = 0  # steps in a row until now that were not finite
        self.saved_step = None  # step of the last checkpoint
        self.save_failed = False  # whether the last try to write one failed
        self.evaluator = self.logger = None  # made when it is needed; made on rank 0 alone

        print0(f"{len(self.dataset):,} items of shape {self.spec.shape}, {config.network} of "
               f"{sum(p.numel() for p in self.net.parameters()):,} parameters")
        may_change = {name for name, found in marks(Config).items() if "may change" in found}
        if path := on_rank0(saving.open_run, self.folder, vars(config), vars(Config()), may_change):
            self.restore(path)
        on_rank0(lambda: setattr(self, "logger", Logger(self.folder, config, self.step)))
        if world_size() > 1:
            self.ddp = self.forward = DistributedDataParallel(self.net, gradient_as_bucket_view=True)
        if compiles(config, self.device, math.inf if config.compile else config.num_training_steps, TRAINING_STEPS):
            self.forward = torch.compile(self.ddp, mode=config.compile_mode)

    def due(self, every):
        """Whether something is due after this step, every so many steps (0: never) and at the end."""
        return self.step >= self.config.num_training_steps or (every > 0 and self.step % every == 0)

    # ---- Watching

    @contextlib.contextmanager
    def failures_reported(self, what=""):
        """Reports a UserError within, which all ranks meet, and lets training continue.

        The clock of images_per_second starts anew after it, since this is no training.
        """
        try:
            yield
        except UserError as error:
            stopped = what and agreed_stop()  # a signal stops drawing, and training reports it
            if rank() == 0 and not stopped:
                warn(f"{f'no {what} at step {self.step}: ' if what else ''}{error}")
        self.restart_clock()

    def check_norms(self):
        """Looks at the gradient norms since the last call, which waits for the device, and reports skipped steps.

        Raises UserError after max_skipped_steps in a row. The norms are of the whole batch: all ranks see the same.
        """
        norms, self.norms = [norm.item() for norm in self.norms], []
        for step, norm in enumerate(norms, self.step - len(norms)):
            self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
            if self.skipped and rank() == 0:
                warn(f"step {step} has a loss or gradient that is not finite (gradient norm {norm}), and is skipped; "
                     f"trainer.prepare_batch({step}) is its batch")
            if self.skipped >= self.config.max_skipped_steps:
                raise UserError(f"{self.skipped} steps in a row had a loss or gradient that is not finite, up to step "
                                f"{step}, and the last checkpoint is good: lower --base_lr, or look at the data")

    def restart_clock(self):
        self.clock, self.clock_step = time.perf_counter(), self.step

    def log(self, rate):
        """One line of metrics: means over the steps since the last one. Waits for the device, then reads the clock."""
        values = means(gather_rows(torch.cat(self.window)))
        del self.window[1:]
        items = (self.step - self.clock_step) * self.config.batch_size
        values |= {"learning_rate": rate, "images_per_second": items / (time.perf_counter() - self.clock),
                   "epoch": self.step * self.config.batch_size / len(self.dataset)}
        with self.failures_reported():
            on_rank0(lambda: self.logger.log(self.step, values))

    def show(self, name, path, items, drawn_for=None):
        """Saves a picture of samples or data: a grid of images, by class if these are few, or a scatter plot."""
        few = self.config.class_conditional and self.spec.num_classes <= 16
        columns = self.spec.num_classes if few else None
        picture = picture_of(items, columns, self.dataset.data, drawn_for, self.spec)
        self.logger.picture(self.step, name, picture, path)

    def show_data(self):
        """Saves a picture of the items of the first batch, repeated if there are more samples in a grid."""
        rows = np.resize(self.batches.indices(0), self.config.num_samples)
        self.show("real", f"{self.folder}/real.png", torch.from_numpy(self.dataset.data[rows]))

    def picture_path(self, weights, sampler):
        return f"{self.folder}/samples/{weights}_{sampler}_{self.step:07d}.png"

    @functools.cached_property
    def held_out(self):
        """The test split, for whose conditions or source there are samples; the training split, if there is none, or
        neither of these.
        """
        if self.spec.cond_shape or self.dataset.source:
            try:
                return read_data(self.config, "test", self.spec)
            except UserError as error:
                print0(f"starts and conditions of samples are those of the training split: {error}")
        return self.dataset

    def cases(self, num):
        """Labels and conditions of `num` samples."""
        return cases(self.held_out, num, self.config.samples_per_cond, self.config.class_conditional)

    def samples(self, weights, sampler, cases):
        """Decoded samples, of which each rank draws its share, and the mean network calls of one."""
        net = self.net if weights == "raw" else self.ema.net
        return self.draw(self.config, self.spec, self.process, net, self.device, cases, sampler)

    def sample_and_evaluate(self):
        """Draws grids and evaluates, if due after this step and not done yet. A signal breaks this off."""
        grids = self.due(self.config.sample_every)
        evaluation = self.config.evaluate_every > 0 and self.due(self.config.evaluate_every)
        if grids:
            self.sample()
        if evaluation and not on_rank0(lambda: self.logger.evaluated(self.step)):
            self.evaluate()
        if grids or evaluation:
            with self.failures_reported():
                on_rank0(lambda: self.logger.curves())

    def sample(self):
        """Grids by both samplers, of raw and EMA weights, with the same noise and labels in all grids of a run."""
        config = self.config
        samplers = sorted({config.sampler, config.sde_sampler} - {None})
        drawn_for = self.cases(config.num_samples)
        if config.class_conditional and drawn_for.cond is None and drawn_for.start is None:
            drawn_for = drawn_for._replace(labels=torch.arange(config.num_samples) % self.spec.num_classes)
        self.net.eval()
        for weights in "raw", "ema":
            for sampler in samplers:
                path = self.picture_path(weights, sampler)
                if on_rank0(os.path.exists, path):
                    continue
                with self.failures_reported(f"grid of {weights} weights by {sampler}"):
                    samples, _ = self.samples(weights, sampler, drawn_for)
                    on_rank0(self.show, f"{weights}_{sampler}", path, samples, drawn_for)
        self.net.train()

    def evaluate(self):
        """A line of metrics of samples of the EMA weights against the training split."""
        from metrics import Evaluator

        with self.failures_reported("evaluation"):
            self.evaluator = self.evaluator or Evaluator(self.dataset, self.dataset, self.device)
            drawn_for = self.cases(self.config.evaluation_samples)
            samples, _ = self.samples("ema", self.config.sampler, drawn_for)
            values = self.evaluator(samples, drawn_for.labels, drawn_for.truth)
            on_rank0(lambda: self.logger.log(self.step, values, kind="evaluation"))

    # ---- Saving

    def state(self):
        """Everything that a run needs to resume, in plain containers."""
        return {
            "step": self.step,
            "net": self.net.state_dict(),
            **{name: ema.net.state_dict() for name, ema in self.emas.items()},
            "optimizer": self.optimizer.state_dict(),
            "items": len(self.dataset),
            "window": gather_rows(torch.cat(self.window)),
            "skipped": self.skipped,
            "config": vars(self.config),
            "data": vars(self.spec),
        }

    def save(self):
        """Writes a checkpoint on rank 0, unless this step has one. Returns whether it is there."""
        self.check_norms()
        if self.saved_step != self.step:
            state = self.state()
            self.save_failed = True

            def write():
                self.logger.write_all()  # no checkpoint without the metrics up to it
                saving.save(self.folder, state, self.config.keep_checkpoints, self.config.milestone_every)

            with self.failures_reported():
                on_rank0(write)
                self.save_failed, self.saved_step = False, self.step
        return not self.save_failed

    def update_averages(self):
        for ema in self.emas.values():
            ema.update(self.step)

    def save_snapshot(self):
        """Writes the averages of powers, if due after this step: before its checkpoint, or a kill might lose them."""
        every = self.config.ema_snapshot_every
        if every and self.step % every == 0:
            with self.failures_reported():
                on_rank0(saving.write_state, f"{self.folder}/snapshot_{self.step:07d}.pt",
                         {name: ema.net.state_dict() for name, ema in self.emas.items() if "length" in name})

    def restore(self, path):
        """Resumes the run from a checkpoint."""
        state = saving.load(path)
        saving.check_data(path, vars(DataSpec(**state["data"])) | {"items": state["items"]},
                          vars(self.spec) | {"items": len(self.dataset)})
        saving.restore(self.net, state["net"], path)
        for name, ema in self.emas.items():
            ema.net.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = self.saved_step = state["step"]
        self.skipped = state["skipped"]
        if rank() == 0:  # which takes the rows of all ranks
            self.window.append(state["window"].to(self.device))
        print0(f"resuming {self.folder} from step {self.step}")
