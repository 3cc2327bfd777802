"""Measures how fast training and sampling are on this machine, and how fast they could be.

    python benchmark.py --preset digits                        # any setting of config.py can be given beside it
    python benchmark.py --parts training sampling --bf16 True  # the same in bfloat16
    python benchmark.py --parts training --compile True --compile_mode max-autotune  # a mode of torch.compile
    python launch.py --nproc-per-node=2 benchmark.py           # on two ranks, which share the batch

It prints a table and writes it as JSON. What is compared runs alternately, and each ratio is the median of the ratios
of the rounds. So a machine whose speed changes slows both. Nothing is downloaded: CIFAR-10 is random pixels. To add a
part, write a function like those of PARTS and give it a row there. To add another library, do so in PEERS.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import math
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from build import autocast, check_run, formatted, uses_bf16
from command_line import HERE, fail, parse, start
from config import PRESETS, Config, Positive, problems
from data_utils import load_dataset, make_dataset
from distributed import on_rank0, print0, set_up, world_size
from logging_utils import Progress
from optimizers import take_step
from prediction import target
from sampling import SAMPLERS
from trainer import TRAINERS
from utils import UserError, import_torchvision, keep_freed_memory, write_atomically

CPU = dict(batch_size=32, num_samples=16, sampling_steps=4)  # there a network of 128 channels takes seconds


# ---- How it is measured


def clock(work, *arguments) -> float:
    """Seconds that `work(*arguments)` takes, to the end of what it starts on a GPU."""
    begin = timer()
    work(*arguments)
    return timer() - begin


def repeated(work):
    """A function of n that calls `work()` n times."""
    return lambda n: [work() for _ in range(n)]


def time_alternately(functions: dict, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of one step of each function, in each round. `functions[name](n)` takes n steps.

    Two steps go before the rounds; the second decides how many steps take so many `seconds`. Every other round runs in
    reverse order.
    """
    steps, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        function(1)
        steps[name] = on_rank0(functools.partial(max, 1, round(seconds / clock(function, 1))))
    with Progress("measuring", rounds * len(functions), "measurement") as progress:
        for i in range(rounds):
            for name in list(functions)[:: 1 if i % 2 == 0 else -1]:
                times[name].append(clock(functions[name], steps[name]) / steps[name])
                progress.update()
    return times


def ratio(times: dict, name: str, to: str) -> float:
    """The median over the rounds of the seconds of one function over those of another."""
    return statistics.median(a / b for a, b in zip(times[name], times[to]))


def flops_of(work) -> int:
    """Floating-point operations of the matrix products and convolutions in `work()`, those of attention included."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # some fused kernels are not counted
        work()
    return counter.get_total_flops()


# ---- The trainer, and what it is compared with


def make_trainer(options, device, folder: str):
    """A trainer that trains without end, and neither saves nor samples."""
    config = dataclasses.replace(options, ckpt_dir=folder, run_name="benchmark", num_training_steps=10**9,
                                 sample_every=0, save_every=0, milestone_every=0, evaluate_every=0)
    if options.dataset == "cifar10":  # which would be downloaded
        images = np.random.default_rng(0).integers(256, size=(50_000, 3, 32, 32), dtype=np.uint8)
        dataset = make_dataset(images, np.arange(50_000) % 10)
    else:
        dataset = load_dataset(options.dataset, options.data_dir, options.image_size)
    trainer = TRAINERS[options.trainer](config, dataset, device)
    trainer.open_run()
    if trainer.logger:
        trainer.logger.bar.close()
    return trainer


def train(trainer, steps: int) -> None:
    """So many steps of the trainer, without its output."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.loop(trainer.step + steps)


def bare_network(trainer):
    """A step of the network alone, on one batch that stays on the device: the backward pass, and the whole step."""
    batch = trainer.prepare_batch(0)
    c = trainer.process.coefs(batch.t, batch.x0.ndim)
    xt = formatted(trainer.config, c.alpha * batch.x0 + c.sigma * batch.x1)
    y = target(trainer.config.model_type, c, batch.x0, batch.x1)

    def backward(forward=trainer.forward):
        with autocast(trainer.config, trainer.device):
            out = forward(xt, batch.t, batch.label)
        ((out.float() - y) ** 2).mean().backward()

    def step(exchange: bool = True):
        with contextlib.nullcontext() if exchange else trainer.ddp.no_sync():
            backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.ema.update()

    return backward, step


def ceilings(trainer) -> dict:
    """What this machine can do: a large matrix product, and a 3 x 3 convolution of the network's width.

    The convolution is computed with both of its gradients, as in training. Returns functions by name.
    """
    config, device, spec = trainer.config, trainer.device, trainer.spec
    kind = dict(device=device, dtype=torch.bfloat16 if uses_bf16(config, device) else torch.float32)
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, **kind)
    works = {"matrix product": lambda: a @ b}
    if spec.is_image:
        rows, width = len(trainer.own_rows) // config.accumulation_steps, config.model_channels
        x = formatted(config, torch.randn(rows, width, *spec.shape[1:], **kind)).requires_grad_()
        kernel = torch.randn(width, width, 3, 3, **kind, requires_grad=True)
        works["3 x 3 convolution"] = lambda: torch.autograd.grad(
            F.conv2d(x, kernel, padding=1), [x, kernel], x.detach())
    return works


# ---- The parts. Each yields rows: what was measured, and its values by unit.


def measure_training(trainer):
    """The trainer over the bare network, the bare network over the ceilings, what a step consists of, and memory."""
    config, (backward, step), works = trainer.config, bare_network(trainer), ceilings(trainer)
    first_call, graphs = clock(backward), counters["stats"]["unique_graphs"]
    functions = {"trainer": functools.partial(train, trainer), "bare network": repeated(step),
                 "batch of data, noise and times": repeated(lambda: trainer.prepare_batch(trainer.step))}
    if world_size() > 1:
        functions["no exchange"] = repeated(functools.partial(step, exchange=False))
    functions |= {name: repeated(work) for name, work in works.items()}
    times = time_alternately(functions, config.rounds, config.seconds)
    peak = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024)
    flops = flops_of(lambda: backward(trainer.net))  # its gradients are for the updates of the next line
    times["clipping, optimizer and EMA"] = [
        clock(lambda: (take_step(trainer.optimizer, config.grad_clip_norm), trainer.ema.update()))
        for _ in range(config.rounds)]

    seconds = {name: statistics.median(values) for name, values in times.items()}
    yield "trainer", {"images_per_s": config.batch_size / seconds["trainer"],
                      "of_bare_network": ratio(times, "bare network", "trainer")}
    for name in ("batch of data, noise and times", "clipping, optimizer and EMA"):
        yield name, {"of_the_step": seconds[name] / seconds["trainer"]}
    if world_size() > 1:
        share = max(0.0, 1 - ratio(times, "no exchange", "bare network"))
        yield "exchange of gradients, beside the backward pass", {"of_the_step": share}
    yield "bare network", {"images_per_s": config.batch_size / seconds["bare network"],
                           "GFLOP_per_s_and_rank": flops / seconds["bare network"] / 1e9}
    for name, work in works.items():
        most = flops_of(work)
        yield name, {"reached_by_the_bare_network": ratio(times, name, "bare network") * flops / most,
                     "GFLOP_per_s_and_rank": most / seconds[name] / 1e9}
    if graphs:
        yield "torch.compile", {"s_for_the_first_call": first_call, "graph_breaks": counters["graph_break"].total(),
                                "recompilations": counters["stats"]["unique_graphs"] - graphs}
    yield "peak memory", {"GiB": peak / 2**30}


def measure_sampling(trainer):
    """Every sampler as a run draws its grids, over the network calls of one such draw alone."""
    config, device, net, spec = trainer.config, trainer.device, trainer.ema.net, trainer.spec
    n = config.num_samples
    labels = torch.arange(n) % spec.num_classes if config.class_conditional else None
    for sampler in SAMPLERS:
        calls = []
        draw = functools.partial(trainer.draw, config, spec, trainer.process, net, device, rows=range(n), labels=labels,
                                 sampler=sampler)

        @torch.no_grad()
        def bare(calls=calls):
            with autocast(config, device):
                for inputs in calls:
                    net(*inputs)

        hook = net.register_forward_pre_hook(lambda net, inputs, calls=calls: calls.append(inputs))
        try:
            draw()
        except UserError as error:  # the sampler does not go with the settings
            yield f"{sampler}: {error}", {}
            continue
        finally:
            hook.remove()
        times = time_alternately({"bare": repeated(bare), "sampler": repeated(draw)}, config.rounds, config.seconds)
        yield sampler, {"calls": len(calls), "images_per_s": n / statistics.median(times["sampler"]),
                        "of_bare_calls": ratio(times, "bare", "sampler")}


def measure_start(trainer):
    """Seconds from a command to the first line of what it is for; not a number if that line does not come."""
    config = trainer.config

    def seconds_to(line: str, *command: str) -> float:
        begin, environment = timer(), os.environ | {"PYTHON": sys.executable, "MPLCONFIGDIR": config.ckpt_dir}
        with subprocess.Popen(command, cwd=HERE, env=environment, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL) as run:
            seconds = timer() - begin if any(printed.startswith(line) for printed in run.stdout) else math.nan
            run.terminate()
            run.communicate()
        return seconds

    first_step = [seconds_to("step 1/", "sh", "run.sh", "digits", "--log_every", "1", "--wandb", "offline", "--device",
                             config.device, "--ckpt_dir", config.ckpt_dir, "--run_name", f"start{i}")
                  for i in range(1 + config.rounds)]
    usage = [seconds_to("usage", sys.executable, "main.py", "--help") for _ in range(config.rounds)]
    yield "sh run.sh digits, to the first step, without matplotlib's cache of fonts", {"s": first_step[0]}
    yield "sh run.sh digits, to the first step, again", {"s": statistics.median(first_step[1:])}
    yield "python main.py --help", {"s": statistics.median(usage)}


# ---- Peers: the training steps of other libraries. Each is a function of images (B, 3, 32, 32) in [-1, 1]. It returns
# the network, its loss, and the update of its moving average. Both use Adam, and clip gradients at a norm of 1.


def torchcfm(images):
    """The network and the training step of torchcfm's CIFAR-10 example (Tong et al. 2023)."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.unet.unet import UNetModelWrapper

    net = UNetModelWrapper(dim=(3, 32, 32), num_res_blocks=2, num_channels=128, channel_mult=[1, 2, 2, 2], num_heads=4,
                           num_head_channels=64, attention_resolutions="16", dropout=0.1).to(images.device)
    average, matcher = copy.deepcopy(net).state_dict(), ConditionalFlowMatcher(sigma=0.0)

    def loss():
        t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(images), images)
        return torch.mean((net(t, xt) - ut) ** 2)

    def update_average():
        for name, value in net.state_dict().items():
            average[name].copy_(0.9999 * average[name] + (1 - 0.9999) * value)

    return net, loss, update_average


def denoising_diffusion_pytorch(images):
    """The network of denoising-diffusion-pytorch at the same width and depth, with the training step of its Trainer."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    net = GaussianDiffusion(Unet(dim=128, dim_mults=(1, 2, 2, 2)), image_size=32).to(images.device)
    return net, lambda: net((images + 1) / 2), EMA(net, beta=0.995, update_every=10).update


PEERS = {"torchcfm": torchcfm, "denoising_diffusion_pytorch": denoising_diffusion_pytorch}  # named as their packages


def serve(pipe, name: str, config, device, as_here: bool) -> None:
    """Runs a peer in a process of its own.

    It sends the operations of a step through the pipe, and then takes as many steps as each message says. With
    `as_here` it does as the trainer: freed memory is kept, images are channels_last, the type is that of the settings.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the benchmark ends it
    import_torchvision()  # in a way that works beside a CPU build of torch; a peer imports it too
    net, loss, update_average = PEERS[name](torch.rand(config.batch_size, 3, 32, 32, device=device) * 2 - 1)
    if as_here:
        keep_freed_memory()
        net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters())

    def backward():
        with autocast(config, device) if as_here else contextlib.nullcontext():
            value = loss()
        value.backward()

    def step():
        backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average()

    pipe.send(flops_of(backward))
    with contextlib.suppress(EOFError):  # the benchmark has ended
        while True:
            pipe.send(clock(repeated(step), pipe.recv()))


def measure_peers(trainer):
    """The trainer over each peer that is installed: the speed of training steps, per operation of the networks."""
    config, device, spawn = trainer.config, trainer.device, get_context("spawn")
    if trainer.spec.shape != (3, 32, 32):
        return print0("  only for images of 3 x 32 x 32")
    flops = flops_of(lambda: bare_network(trainer)[0](trainer.net))
    for name, as_here in [(name, way) for name in PEERS if importlib.util.find_spec(name) for way in (False, True)]:
        what = f"{name}, {'with memory, channels_last and type as here' if as_here else 'as it is'}"
        pipe, its_end = spawn.Pipe()
        process = spawn.Process(target=serve, args=(its_end, name, config, device, as_here), daemon=True)
        process.start()
        its_end.close()
        try:
            its_flops = pipe.recv()
            functions = {"trainer": functools.partial(train, trainer),
                         "peer": lambda n, pipe=pipe: pipe.send(n) or pipe.recv()}
            times = time_alternately(functions, config.rounds, config.seconds)
            yield what, {"images_per_s": config.batch_size / statistics.median(times["peer"]),
                         "trainer_over_it_per_operation": ratio(times, "peer", "trainer") * flops / its_flops}
        except (EOFError, OSError):
            yield f"{what}: its process ended, with the error above", {}
        finally:
            process.kill()
            process.join()


# ---- The command line

PARTS = {"training": measure_training, "sampling": measure_sampling, "start": measure_start,
         "peers": measure_peers}


@dataclass
class Options(Config):
    preset: Literal[tuple(PRESETS)] = "cifar10"  # Settings to start from; any other setting can be given beside it.
    parts: tuple[Literal[tuple(PARTS)], ...] = tuple(PARTS)  # What to measure; start and peers on one rank only.
    out: str = "benchmark.json"  # File to write.
    rounds: Positive[int] = 5  # How often everything is measured.
    seconds: Positive[float] = 1.0  # Least time of one measurement.
    wandb: Literal["online", "offline", "disabled"] = "offline"  # Where the trainer logs.


def main(arguments: list[str]) -> None:
    preset = re.findall(r"--preset[ =](\S+)", " ".join(["--preset cifar10", *arguments]))[-1]
    changes = PRESETS.get(preset, {})
    if not torch.cuda.is_available() and "model_channels" not in changes:
        changes = CPU | changes
    options = parse(Options, arguments, Options(**changes), __doc__.splitlines()[0])
    for problem in problems(options, world_size()):
        fail(problem)
    with (set_up(options.device, options.tf32, options.timeout, options.cudnn_benchmark) as device,
          tempfile.TemporaryDirectory() as folder):
        check_run(options, device)
        options.bf16 = uses_bf16(options, device)
        machine = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
                   "threads": torch.get_num_threads(), "ranks": world_size(), "torch": torch.__version__}
        report = {"machine": machine, "settings": dataclasses.asdict(options), "rows": []}
        on_rank0(lambda: write_atomically(options.out, json.dumps(report)))  # an error in the name is found now
        print0(f"{machine}, batch_size {options.batch_size}, bf16 {options.bf16}")
        trainer = make_trainer(options, device, on_rank0(lambda: folder))
        for part in options.parts:
            if world_size() > 1 and part in ("start", "peers"):
                continue
            print0(f"\n{part}")
            for what, values in PARTS[part](trainer):
                report["rows"].append({"part": part, "what": what, **values})
                print0(f"  {what:<60}", *(f"{value:9.4g} {unit}" for unit, value in values.items()))
            on_rank0(lambda: write_atomically(options.out, json.dumps(report, indent=1)))
        if trainer.logger:
            trainer.logger.finish()
        print0(f"\n{options.out}")


if __name__ == "__main__":
    start(main)
