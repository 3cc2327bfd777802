"""The networks and training steps of other libraries, where they are installed, each in a process of its own beside this trainer.

A peer is a function of images (B, 3, 32, 32) in [-1, 1] that gives its network, its loss, and what follows the backward pass. It runs
as its own users run it, and also with what the scripts here do: memory that is kept, channels_last, bfloat16. To add one, write such
a function, named as its package, and give it a row in PEERS.
"""

import copy
import dataclasses
import importlib.util
import itertools
import signal
import statistics
from multiprocessing import get_context

import torch

from measuring import Bare, clock, flops_of, in_turns, kinds, name_of, ratio, repeated, train
from utils import UserError, first_line, import_torchvision, keep_freed_memory, print0


def torchcfm(images):
    """The network and the training step of torchcfm's CIFAR-10 example (Tong et al. 2023): Adam, clipping, an EMA of the state dict."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.unet.unet import UNetModelWrapper

    net = UNetModelWrapper(dim=(3, 32, 32), num_res_blocks=2, num_channels=128, channel_mult=[1, 2, 2, 2], num_heads=4,
                           num_head_channels=64, attention_resolutions="16", dropout=0.1).to(images.device)
    average, optimizer, matcher = copy.deepcopy(net), torch.optim.Adam(net.parameters(), lr=2e-4), ConditionalFlowMatcher(sigma=0.0)

    def loss():
        t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(images), images)
        return torch.mean((net(t, xt) - ut) ** 2)

    def update():
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        mine, theirs = average.state_dict(), net.state_dict()
        for name in mine:
            mine[name].copy_(0.9999 * mine[name] + (1 - 0.9999) * theirs[name])
        optimizer.zero_grad()

    return net, loss, update


def denoising_diffusion_pytorch(images):
    """The network of denoising-diffusion-pytorch at the same width and depth, with the training step of its Trainer."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    net = GaussianDiffusion(Unet(dim=128, dim_mults=(1, 2, 2, 2)), image_size=32).to(images.device)
    optimizer, average = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.99)), EMA(net, beta=0.995, update_every=10)

    def update():
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    return net, lambda: net((images + 1) / 2), update


PEERS = {"torchcfm": torchcfm, "denoising_diffusion_pytorch": denoising_diffusion_pytorch}
# How a peer is run: in bfloat16, with channels_last, and on a CPU with the memory kept that is freed, as the scripts here do
WAYS = {"as it is": (False, False, False), "with freed memory kept": (False, False, True),
        "with freed memory kept, channels_last, bfloat16": (True, True, True)}


def serve(pipe, *arguments) -> None:
    """`serve_peer` in a process of its own: what ends it goes to the one that asked, and Ctrl-C is left to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        serve_peer(pipe, *arguments)
    except EOFError:  # the other end is closed
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {first_line(error)}")


def serve_peer(pipe, name: str, way: str, batch_size: int, device, threads: int) -> None:
    """Sends the operations of one image through the pipe, and then the seconds of as many steps as it is asked for, until that is 0."""
    import_torchvision()  # in a way that works beside a CPU build of torch; a peer imports it too
    bf16, channels_last, keep = WAYS[way]
    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()
    images = torch.rand(batch_size, 3, 32, 32, device=device) * 2 - 1
    net, loss, update = PEERS[name](images)
    if channels_last:
        net.to(memory_format=torch.channels_last)

    def step(update=update):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        update()

    pipe.send(flops_of(lambda: step(lambda: None)) / batch_size)
    while steps := pipe.recv():
        pipe.send(repeated(step, device)(steps))


def answer(pipe) -> float:
    """The number that comes through the pipe. Raises UserError if the peer's process failed."""
    try:
        number = pipe.recv()
    except EOFError:
        number = "its process was ended"
    if isinstance(number, str):
        raise UserError(number)
    return number


def measure_peers(table, options, trainer) -> None:
    """Each peer's training step in turns with the trainer, in float32 and bfloat16, per floating-point operation of the network."""
    own_config, flops = trainer.config, Bare(trainer, False).flops()

    def own(bf16: bool):
        def steps(n: int) -> float:
            trainer.config = dataclasses.replace(own_config, bf16=bf16)
            return clock(lambda: train(trainer, n), trainer.device)

        return steps

    part = f"training steps of others, batch {options.batch_size}; per floating-point operation, this trainer's speed over theirs"
    missing = [name for name in PEERS if not importlib.util.find_spec(name)]
    if missing:
        print0(f"\nnot installed, and not measured: {', '.join(missing)}")
    ways = [way for way, (bf16, *_) in WAYS.items() if bf16 in kinds(options, trainer.device)]
    for name, way in itertools.product([name for name in PEERS if name not in missing], ways):
        pipe, there = get_context("spawn").Pipe()
        arguments = (there, name, way, options.batch_size, trainer.device, torch.get_num_threads())
        process = get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        process.start()
        there.close()
        try:
            count = answer(pipe)
            works = {name_of(kind): own(kind) for kind in kinds(options, trainer.device)}
            works["peer"] = lambda n, pipe=pipe: pipe.send(n) or answer(pipe)
            times = in_turns(works, options.rounds, options.seconds)
        except UserError as error:
            print0(f"\n{name}, {way}, cannot be measured ({error})")
            continue
        pipe.send(0)
        process.join()
        speed = options.batch_size / statistics.median(times["peer"])
        over = {f"by_{kind}": ratio(times, "peer", kind) * flops / count for kind in works if kind != "peer"}
        table.add(part, f"{name}, {way}", images_per_s=speed, GFLOP_per_s=speed * count / 1e9, **over)
    trainer.config = own_config


