"""What benchmark.py measures of training, sampling and scaling; and how: in turns, with medians.

Two things that are compared are done in turns in one run, and their ratio is the median of the ratios of the rounds, so that this
machine's speed at the moment is in both. `clock` waits for what a work has started on a GPU.
"""

import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from build import NETWORKS, autocast, build, formatted
from config import Config
from data_utils import DataSpec, load_dataset, make_dataset
from main import HERE
from optimizers import take_step
from prediction import target
from sampling import SAMPLERS
from trainer import TRAINERS
from utils import Progress, UserError, native_bf16, on_rank0, parameters_of, progress_bar, share, world_size

SHAPES = {"cifar10": (50_000, 3, 32, 32), "mnist": (60_000, 1, 28, 28), "fashion_mnist": (60_000, 1, 28, 28)}
WIDTHS = {"model_channels", "hidden_dim"}  # settings that make a network wider


# ---- Measuring


def clock(work, device) -> float:
    """Seconds that `work()` takes, to the end of what it starts on a GPU."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def in_turns(works: dict, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of one step of each work, in each round. `works[name](n)` does n steps and gives its seconds.

    Two steps go before, and those of the second say how many make up `seconds`; every other round goes backwards.
    """
    steps, times = {}, {name: [] for name in works}
    for name, work in works.items():
        work(1)
        once = work(1)
        steps[name] = on_rank0(lambda once=once: max(1, round(seconds / once)))
    with Progress("measuring", rounds * len(works), "measurement") as progress:
        for i in range(rounds):
            for name in list(works)[:: 1 if i % 2 == 0 else -1]:
                times[name].append(works[name](steps[name]) / steps[name])
                progress.update()
    return times


def ratio(times: dict, of: str, to: str) -> float:
    """The median over the rounds of the seconds of one work over those of another."""
    return statistics.median(a / b for a, b in zip(times[of], times[to]))


def repeated(work, device):
    """`work()` as a function of the number of repetitions that gives the seconds."""
    return lambda n: clock(lambda: [work() for _ in range(n)], device)


def flops_of(work) -> int:
    """Floating-point operations of the matrix products and convolutions in `work()`. Attention is two products, and four backward."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of some fused kernels it knows nothing
        work()
    return counter.get_total_flops()


# ---- Training


def train(trainer, steps: int) -> None:
    """So many steps of the trainer; what it prints goes nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.loop(trainer.step + steps)


class Bare:
    """The network alone: called, it takes a step on one batch that stays on the device, with the trainer's network, optimizer and EMA."""

    def __init__(self, trainer, bf16: bool):
        self.trainer, self.config = trainer, dataclasses.replace(trainer.config, bf16=bf16)
        batch = trainer.prepare_batch(0)
        c = trainer.process.coefs(batch.t, batch.x0.ndim)
        self.inputs = (formatted(self.config, c.alpha * batch.x0 + c.sigma * batch.x1), batch.t, batch.label)
        self.target = target(trainer.config.model_type, c, batch.x0, batch.x1)

    def backward(self, forward=None, rows=slice(None)) -> None:
        xt, t, label = (x if x is None else x[rows] for x in self.inputs)
        forward = self.trainer.forward if forward is None else forward
        with autocast(self.config, self.trainer.device):
            out = forward(formatted(self.config, xt), t, label)
        ((out.float() - self.target[rows]) ** 2).mean().backward()

    def flops(self) -> float:
        """Floating-point operations for one image, forward and backward."""
        rows = min(2, len(self.target))
        count = flops_of(lambda: self.backward(self.trainer.net, slice(rows)))
        self.trainer.optimizer.zero_grad()
        return count / rows

    def update(self) -> None:
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self.trainer.ema.update()

    def __call__(self) -> None:
        self.backward()
        self.update()


def load(options):
    """The data set, or random pixels of its shape where it would be downloaded."""
    if options.dataset not in SHAPES:
        return load_dataset(options.dataset, options.data_dir, options.image_size)
    rng, shape = np.random.default_rng(0), SHAPES[options.dataset]
    return make_dataset(rng.integers(256, size=shape, dtype=np.uint8), rng.integers(10, size=shape[0]))


def make_trainer(options, dataset, device, folder: str):
    """A trainer that neither saves nor draws, and goes on for ever."""
    settings = {f.name: getattr(options, f.name) for f in dataclasses.fields(Config)}
    settings |= dict(ckpt_dir=folder, run_name="benchmark", num_training_steps=10**9, sample_every=0, save_every=0, milestone_every=0,
                     evaluate_every=0)
    trainer = TRAINERS[options.trainer](Config(**settings), dataset, device)
    if trainer.logger:
        trainer.logger.bar = progress_bar(disable=True)
    return trainer


def ceilings(trainer, bf16: bool) -> dict:
    """Works of one dtype that show what the machine can do, and their operations; the convolution forward and backward, as in training."""
    c, device, dtype = trainer.config, trainer.device, torch.bfloat16 if bf16 else torch.float32
    side = 8192 if device.type == "cuda" else 256 if bf16 and not native_bf16(device) else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    works = {"matrix product": (lambda: a @ b, 2 * side**3)}
    if trainer.spec.is_image and c.network == "unet":
        rows, width, (height, breadth) = len(trainer.rows) // c.accumulation_steps, c.model_channels, trainer.spec.shape[1:]
        memory = dict(device=device, dtype=dtype, memory_format=torch.channels_last if c.channels_last else torch.contiguous_format)
        x, gradient = (torch.randn(rows, width, height, breadth).to(**memory) for _ in range(2))
        kernel = torch.randn(width, width, 3, 3).to(**memory).requires_grad_()
        x.requires_grad_()
        works["3 x 3 convolution"] = (lambda: torch.autograd.grad(F.conv2d(x, kernel, padding=1), [x, kernel], gradient),
                                      3 * 2 * rows * height * breadth * width * width * 9)
    return works


def without_exchange(trainer, bare: Bare):
    """A step of the bare network in which processes do not exchange gradients."""

    def step():
        with trainer.ddp.no_sync():
            bare.backward()
        bare.update()

    return step


def name_of(bf16: bool) -> str:
    return "bfloat16" if bf16 else "float32"


def kinds(options, device) -> list[bool]:
    """Whether in bfloat16, of all that is measured: not where it is emulated, which takes minutes, unless it is asked for."""
    return [False, True] if options.bf16 or native_bf16(device) else [False]


def measure_training(table, options, trainer) -> None:
    """The trainer against the bare network, the bare network against the ceilings, and what a step consists of."""
    device, bf16 = trainer.device, options.bf16
    bares = {kind: Bare(trainer, kind) for kind in kinds(options, device)}
    images = options.batch_size
    flops = bares[False].flops()

    def update():
        take_step(trainer.optimizer, trainer.config.grad_clip_norm)
        trainer.ema.update()

    works = {"trainer": lambda n: clock(lambda: train(trainer, n), device),
             "data": repeated(lambda: trainer.prepare_batch(trainer.step), device)}
    works |= {f"bare network, {name_of(kind)}": repeated(bare, device) for kind, bare in bares.items()}
    if world_size() > 1:
        works["no exchange"] = repeated(without_exchange(trainer, bares[bf16]), device)
    operations = {}
    for kind in bares:
        for name, (work, count) in ceilings(trainer, kind).items():
            operations[f"{name}, {name_of(kind)}"] = count
            works[f"{name}, {name_of(kind)}"] = repeated(work, device)
    times = in_turns(works, options.rounds, options.seconds)
    bares[bf16].backward()
    update_time = statistics.median(clock(update, device) for _ in range(options.rounds))  # on gradients that are there

    own = f"bare network, {name_of(bf16)}"
    median = {name: statistics.median(values) for name, values in times.items()}
    part = f"training, batch {images} in {trainer.config.accumulation_steps} parts on {world_size()} processes, {name_of(bf16)}"
    table.add(part, "network, forward and backward", GFLOP_per_image=flops / 1e9)
    table.add(part, "trainer", images_per_s=images / median["trainer"], of_bare_network=ratio(times, own, "trainer"))
    table.add(part, "batch of data, noise and times", of_the_step=median["data"] / median["trainer"])
    table.add(part, "clipping, optimizer and EMA", of_the_step=update_time / median["trainer"])
    if world_size() > 1:
        table.add(part, "exchange of gradients, beside the backward pass", of_the_step=max(0.0, 1 - ratio(times, "no exchange", own)))
    for kind in bares:
        name = f"bare network, {name_of(kind)}"
        table.add(part, name, images_per_s=images / median[name], GFLOP_per_s=images * flops / median[name] / 1e9)
        for ceiling in [c for c in operations if c.endswith(name_of(kind))]:
            shares = [images * flops / world_size() / b / (operations[ceiling] / c) for b, c in zip(times[name], times[ceiling])]
            table.add(part, f"{ceiling}, one process", GFLOP_per_s=operations[ceiling] / median[ceiling] / 1e9,
                      reached_by_the_bare_network=statistics.median(shares))
    if device.type == "cuda":
        table.add(part, "peak memory", GiB=torch.cuda.max_memory_allocated(device) / 2**30)
        table.add(part, "largest batch that fits, network not compiled", images=largest_batch(trainer, bares[bf16]))
        table.add(part, "20 steps between two lines of metrics", waits_for_the_GPU=host_waits(trainer))
    else:
        table.add(part, "peak memory of the process", GiB=peak_memory() / 2**30)


def peak_memory() -> float:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def largest_batch(trainer, bare: Bare) -> int:
    """The largest batch of one process, to an eighth, with which a step of the bare network fits into the GPU's memory."""
    def fits(n: int) -> bool:
        try:
            bare.backward(trainer.net, torch.arange(n, device=trainer.device) % len(bare.target))
            bare.update()
            return True
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            trainer.optimizer.zero_grad()
            torch.cuda.empty_cache()

    n = len(bare.target)
    while fits(2 * n):
        n *= 2
    for step in (n // 2, n // 4, n // 8):
        n += step if step and fits(n + step) else 0
    return n


def host_waits(trainer) -> int:
    """How often the host waits for the GPU in 20 steps of training between two lines of metrics, by torch's profiler."""
    log_every, trainer.config.log_every = trainer.config.log_every, 10**9
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        train(trainer, 20)
    trainer.config.log_every = log_every
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize")  # the profiler itself waits by cudaDeviceSynchronize
    return sum(event.count for event in profiled.key_averages() if event.key in waits)


def measure_memory(table, options, trainer) -> None:
    """What memory grows by in training: the slope of a straight line through the second half of 40 readings."""

    def reading() -> float:
        if trainer.device.type == "cuda":
            return torch.cuda.memory_allocated(trainer.device)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    steps, readings = [], []
    for i in range(40):
        train(trainer, options.memory_steps * (i + 1) // 40 - options.memory_steps * i // 40)
        steps.append(trainer.step)
        readings.append(reading())
    slope = np.polyfit(steps[20:], readings[20:], 1)[0]
    part = f"memory over {options.memory_steps} steps"
    table.add(part, "at the end; growth by a line through the second half", MiB=readings[-1] / 2**20, bytes_per_step=slope)


def measure_modes(table, options, trainer) -> None:
    """The bare network compiled in each of torch.compile's modes, forward and backward, against eager."""
    bare, forwards = Bare(trainer, options.bf16), {"eager": trainer.net}
    for mode in ("default", "reduce-overhead", "max-autotune-no-cudagraphs"):
        forwards[mode] = torch.compile(trainer.net, mode=mode)
    torch._dynamo.reset()
    counters.clear()

    def step(forward):
        bare.backward(forward)
        trainer.optimizer.zero_grad(set_to_none=False)

    part = f"modes of torch.compile, forward and backward, batch {options.batch_size}, {name_of(options.bf16)}"
    for mode, forward in forwards.items():
        table.add(part, f"{mode}, the first call", s=clock(lambda forward=forward: step(forward), trainer.device))
    graphs = counters["stats"]["unique_graphs"]
    times = in_turns({mode: repeated(lambda forward=forward: step(forward), trainer.device) for mode, forward in forwards.items()},
                     options.rounds, options.seconds)
    for mode in forwards:
        table.add(part, mode, images_per_s=options.batch_size / statistics.median(times[mode]))
    table.add(part, "of all", graph_breaks=sum(counters["graph_break"].values()),
              recompilations_after_the_first_call=counters["stats"]["unique_graphs"] - graphs)


# ---- Sampling


def measure_sampling(table, options, trainer) -> None:
    """Every sampler as a run draws its grids, against as many bare calls of the network."""
    device, net, spec = trainer.device, trainer.ema.net, trainer.spec
    n = options.num_samples
    labels = torch.arange(n) % spec.num_classes if options.class_conditional else None
    mine = len(share(n))
    x = formatted(trainer.config, torch.randn(mine, *spec.shape, device=device))
    label = None if labels is None else labels[:mine].to(device)
    t = torch.full((mine,), 0.5, device=device)

    @torch.no_grad()
    def call():
        with autocast(trainer.config, device):
            net(x, t, label)

    call()
    budget = 2 * options.seconds / clock(call, device)  # calls of the network
    steps = min(options.sampling_steps, max(4, int(budget)))
    config = dataclasses.replace(trainer.config, sampling_steps=steps, sampling_batch_size=n)
    part = f"sampling, {n} at once on {world_size()} processes, {steps} steps, {name_of(options.bf16)}"
    for sampler in SAMPLERS:

        def draw(sampler=sampler):
            return trainer.draw(config, spec, trainer.process, net, device, rows=range(n), labels=labels, sampler=sampler)

        try:
            nfe = round(draw()[1])
        except UserError as error:  # it does not go with the settings
            table.add(part, f"{sampler}: {error}")
            continue
        times = in_turns({"bare": repeated(lambda nfe=nfe: [call() for _ in range(nfe)], device), "sampler": repeated(draw, device)},
                         options.rounds, options.seconds)
        seconds = statistics.median(times["sampler"])
        table.add(part, sampler, calls=nfe, images_per_s=n / seconds, evaluations_per_s=n * nfe / seconds,
                  of_bare_calls=ratio(times, "bare", "sampler"))


# ---- Scaling


def exponent(cost: dict[int, float]) -> float:
    """k of cost = constant * size^k, by least squares of the logarithms."""
    return np.polyfit(np.log(list(cost)), np.log(list(cost.values())), 1)[0]


def measure_scaling(table, options, trainer) -> None:
    """Cost of a step of the network, forward and backward, not compiled, against its size, with the exponent of a power law."""
    spec, few = trainer.spec, max(1, options.batch_size // 4)
    sizes = {"batch size": [({"batch_size": b}, spec.shape, b) for b in (few, 2 * few, 4 * few, 8 * few)]}
    for width in parameters_of(NETWORKS[options.network]) & WIDTHS:
        sizes[width] = [({width: w, "batch_size": few}, spec.shape, w) for w in (getattr(options, width) // f for f in (8, 4, 2, 1))]
    if spec.is_image:
        sides = [spec.shape[-1] * f // 2 for f in (1, 2, 4)]
        sizes["image side"] = [({"batch_size": few}, (spec.shape[0], side, side), side) for side in sides]
    for what, variants in sizes.items():
        seconds = {}
        for change, shape, size in variants:
            config = dataclasses.replace(trainer.config, accumulation_steps=1, **change)
            spot = DataSpec(shape, spec.num_classes, spec.mean, spec.std)
            try:
                seconds[size] = step_seconds(config, spot, trainer.device, options)
            except UserError:
                continue  # sides that the network cannot halve
        part = f"scaling with {what}" + (f", batch {few}" if what != "batch size" else "")
        for size, value in seconds.items():
            table.add(part, f"{what} {size}", s_per_step=value)
        if len(seconds) > 1:
            table.add(part, "power law", exponent=exponent(seconds))
    measure_processes(table, options, trainer.device)


def step_seconds(config: Config, spec: DataSpec, device, options) -> float:
    """Median seconds of forward and backward of a new network on random data."""
    net = build(config, spec, device)[1]
    xt = formatted(config, torch.randn(config.batch_size, *spec.shape, device=device))
    t = torch.rand(config.batch_size, device=device)

    def step():
        with autocast(config, device):
            out = net(xt, t, None)
        out.float().square().mean().backward()
        net.zero_grad()

    return statistics.median(in_turns({"step": repeated(step, device)}, options.rounds, options.seconds)["step"])


def measure_processes(table, options, device) -> None:
    """Images/s of the trainer on 1, 2, 4, ... processes, a GPU or one CPU thread each, the batch shared among them."""
    most, speed, n = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count(), {}, 1
    while n <= most:
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "benchmark.json")
            settings = [f"--{f.name}={getattr(options, f.name)}" for f in dataclasses.fields(Config)
                        if f.name in ("model_channels", "hidden_dim", "batch_size", "bf16", "device", "wandb", "channels_last", "compile")]
            command = [sys.executable, "launch.py", f"--nproc-per-node={n}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
                       "benchmark.py", f"--preset={options.preset}", f"--out={out}", f"--rounds={options.rounds}", *settings,
                       "--sampling=False", "--starting=False", "--peers=False"]
            subprocess.run(command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True)
            with open(out) as file:
                speed[n] = next(row["images_per_s"] for row in json.load(file)["rows"] if row["what"] == "trainer")
        n *= 2
    for n, value in speed.items():
        table.add("scaling with processes", f"{n} processes, a GPU or one CPU thread each", images_per_s=value)
    if len(speed) > 1:
        table.add("scaling with processes", "power law", exponent=exponent(speed))
