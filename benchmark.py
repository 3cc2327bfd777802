"""Measures how fast training and sampling are on this machine, and how fast they could be.

    python benchmark.py digits                          # a preset; any setting of config.py can be given after it
    python benchmark.py --parts training --bf16 True    # a part alone, here in bfloat16
    python benchmark.py --parts training --compile True --compile_mode max-autotune  # a mode of torch.compile
    python launch.py --nproc-per-node=2 benchmark.py    # on two ranks, which share the batch

It prints a table and writes it as JSON. What is compared runs alternately, and each ratio is the median of the ratios
of the rounds. So a machine whose speed changes slows both. Nothing is downloaded: CIFAR-10 is grey images. To add a
part, write a function like those of PARTS and give it a row there. tests/benchmark_peers.py times another library's
training step beside the trainer, tests/benchmark_fields.py training from a file, and tests/benchmark_start.py how long
a run takes to its first step.
"""

import contextlib
import io
import json
import math
import os
import resource
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from build import autocast, check_run, formatted, uses_bf16
from command_line import read_config, start
from config import Config, PositiveFloat, PositiveInt
from data_utils import Cases, load_dataset, make_dataset
from distributed import on_rank0, print0, set_up, world_size
from optimizers import take_step
from sampling import SAMPLERS
from trainer import TRAINERS
from utils import UserError, write_atomically

# ---- How it is measured


def clock(function, steps):
    """Seconds of each of the steps that `function(steps)` takes, to the end of what it starts on a GPU."""
    begin = timer()
    function(steps)
    return (timer() - begin) / steps


def repeated(work):
    """A function of n that calls `work()` n times."""
    return lambda n: [work() for _ in range(n)]


def time_alternately(functions, options):
    """Seconds of one step of each function, in each of `options.rounds`. `functions[name](n)` takes n steps.

    Two steps go before the rounds; the second decides how many steps take `options.seconds`.
    """
    steps = {}
    for name, function in functions.items():
        function(1)
        steps[name] = on_rank0(math.ceil, options.seconds / clock(function, 1))
    rounds = [[clock(function, steps[name]) for name, function in functions.items()] for _ in range(options.rounds)]
    return dict(zip(functions, np.array(rounds).T))


def flops_of(work):
    """Floating-point operations of the matrix products and convolutions in `work()`, those of attention included."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # some fused kernels are not counted
        work()
    return counter.get_total_flops()


# ---- The trainer, and the least that a step could cost


def make_trainer(options, device, folder, dataset=None):
    """A trainer that trains without end, and neither saves nor samples. The data are those of the options, or these."""
    config = replace(options, ckpt_dir=folder, run_name="benchmark", num_training_steps=10**9,
                     sample_every=0, save_every=0, milestone_every=0, evaluate_every=0)
    if dataset is None and options.dataset == "cifar10":  # which would be downloaded
        dataset = make_dataset(np.full((50_000, 3, 32, 32), 127, np.uint8), np.arange(50_000) % 10)
    dataset = dataset or load_dataset(options.dataset, **vars(options))
    trainer = TRAINERS[options.trainer](config, dataset, device)
    trainer.open_run()
    if trainer.logger:
        trainer.logger.bar.close()
    return trainer


def train(trainer, steps):
    """So many steps of the trainer, without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.loop(trainer.step + steps)


def bare_network(trainer):
    """A step of the network alone, on one batch that stays on the device: the backward pass, and the whole step.

    Only its time counts: it learns ones, whatever the trainer's process and target. A trainer that calls the network
    several times in a step, as for a flow map, takes that much longer.
    """
    batch = trainer.prepare_batch(0)
    x = formatted(trainer.config, batch.x1)

    def backward(forward=trainer.forward):
        with autocast(trainer.config, trainer.device):
            out = forward(x, batch.t, batch.label, batch.cond)
        (out.float() - 1).square().mean().backward()

    def step(exchange=True):
        with contextlib.nullcontext() if exchange else trainer.ddp.no_sync():
            backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.update_averages()

    return backward, step


def ceilings(trainer):
    """What this machine can do: a large matrix product, and, for a network with convolutions, one of 3 x 3.

    The convolution has the network's width, and is computed with both of its gradients, as in training. Returns
    functions by name.
    """
    config = trainer.config
    device = trainer.device
    width = config.model_channels

    def random(*shape):
        dtype = torch.bfloat16 if uses_bf16(config, device) else torch.float32
        return formatted(config, torch.randn(shape, device=device, dtype=dtype)).requires_grad_()

    side = 8192 if device.type == "cuda" else 2048
    a = random(side, side)
    functions = {"matrix product": lambda: a @ a}
    if trainer.spec.is_image and any(isinstance(module, torch.nn.Conv2d) for module in trainer.net.modules()):
        x = random(len(trainer.own_rows) // config.accumulation_steps, width, *trainer.spec.shape[1:])
        kernel = random(width, width, 3, 3)
        functions["3 x 3 convolution"] = lambda: torch.autograd.grad(F.conv2d(x, kernel, padding=1), [x, kernel], x)
    return functions


# ---- The parts. Each yields rows: what was measured, and by unit its value, or its values in all rounds.


def measure_training(trainer):
    """The trainer over the bare network, the bare network over the ceilings, what a step consists of, and memory."""
    config = trainer.config
    backward, step = bare_network(trainer)
    limits = ceilings(trainer)
    works = {"bare network": step, "batch of data, noise and times": lambda: trainer.prepare_batch(trainer.step),
             **limits}
    if world_size() > 1:
        works["no exchange"] = partial(step, exchange=False)
    functions = {"trainer": partial(train, trainer), **{name: repeated(work) for name, work in works.items()}}
    times = time_alternately(functions, config)
    peak = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024)
    flops = flops_of(lambda: backward(trainer.net))  # its gradients are for the updates of the next line
    times |= time_alternately({"clipping, optimizer and EMA": repeated(
        lambda: (take_step(trainer.optimizer, config.grad_clip_norm), trainer.update_averages()))}, config)

    whole, bare = times["trainer"], times["bare network"]
    yield "trainer", {"images_per_s": config.batch_size / whole, "of_bare_network": bare / whole}
    for name in ("batch of data, noise and times", "clipping, optimizer and EMA"):
        yield name, {"of_the_step": times[name] / whole}
    if world_size() > 1:
        yield "exchange of gradients, beside the backward pass", {
            "of_the_step": (1 - times["no exchange"] / bare).clip(0)}
    yield "bare network", {"images_per_s": config.batch_size / bare, "GFLOP_per_s_and_rank": flops / bare / 1e9}
    for name, limit in limits.items():
        most = flops_of(limit) / times[name]
        yield name, {"reached_by_the_bare_network": flops / bare / most, "GFLOP_per_s_and_rank": most / 1e9}
    if graphs := counters["stats"]["unique_graphs"]:
        yield "torch.compile", {"graphs": graphs, "graph_breaks": counters["graph_break"].total()}
    yield "peak memory of the benchmark, with the ceilings", {"GiB": peak / 2**30}


def measure_sampling(trainer):
    """Every sampler, with as many samples as a batch has items, over its network calls alone."""
    config = trainer.config
    batch = trainer.prepare_batch(0)

    @torch.no_grad()
    def call():
        with autocast(config, trainer.device):
            trainer.ema.net(formatted(config, batch.x1), batch.t, batch.label, batch.cond)

    for sampler in SAMPLERS:
        draw = partial(trainer.samples, "ema", sampler, Cases(config.batch_size, batch.label, batch.cond))
        try:
            calls = draw()[1]
            times = time_alternately({"call": repeated(call), "draw": repeated(draw)}, config)
            yield sampler, {"calls": calls, "images_per_s": config.batch_size / times["draw"],
                            "of_bare_calls": calls * times["call"] / times["draw"]}
        except UserError as error:  # the sampler does not go with the settings
            yield f"{sampler}: {error}", {}


# ---- The command line

# Sampling first, from the weights of the start: those that training here makes cost dopri5 hundreds of network calls
PARTS = {"sampling": measure_sampling, "training": measure_training}


@dataclass
class Options(Config):
    parts: tuple[Literal[tuple(PARTS)], ...] = tuple(PARTS)  # What to measure.
    out: str = "benchmark.json"  # File to write.
    rounds: PositiveInt = 5  # How often everything is measured.
    seconds: PositiveFloat = 1.0  # Least time of one measurement.


def main(arguments, options_class=Options):
    """The benchmark. `options_class` is Options, or a subclass with other defaults."""
    os.environ.setdefault("WANDB_MODE", "offline")
    options = read_config(arguments, options_class, f"{__doc__.splitlines()[0]} Usage: benchmark.py")
    report = {"settings": vars(options)}

    def save():
        on_rank0(write_atomically, options.out, json.dumps(report, indent=1))

    with set_up(**vars(options)) as device, tempfile.TemporaryDirectory() as folder:
        check_run(options, device)
        report["machine"] = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "threads": torch.get_num_threads(), "ranks": world_size(), "torch": torch.__version__,
            "bf16": uses_bf16(options, device)}
        save()  # an error in the name is found now
        print0(report["machine"])
        trainer = make_trainer(options, device, folder)
        for part in options.parts:
            print0(f"\n{part}")
            report[part] = {}
            for what, values in PARTS[part](trainer):
                medians = report[part][what] = {unit: float(np.median(value)) for unit, value in values.items()}
                print0(f"  {what:<60}", *(f"{value:9.4g} {unit}" for unit, value in medians.items()))
            save()
        if trainer.logger:
            trainer.logger.finish()
        print0(f"\n{options.out}")


if __name__ == "__main__":
    start(main)
