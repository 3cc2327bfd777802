"""Measures the trainer beside a training step of torchcfm: a part of benchmark.py that needs another library.

    python tests/benchmark_peers.py                     # CIFAR-10's network
    python tests/benchmark_peers.py --batch_size 32     # any setting of config.py and of benchmark.py can be given

The top of test_peers.py has the command that installs torchcfm. The row is printed, and written to benchmark.json.
"""

import copy
import functools
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark import PARTS, Options, main, repeated, time_alternately, train  # noqa: E402
from command_line import start  # noqa: E402
from distributed import print0, world_size  # noqa: E402
from utils import import_torchvision  # noqa: E402


def torchcfm_step(batch_size, device):
    """A training step of torchcfm's CIFAR-10 example (Tong et al. 2023), as a function."""
    import_torchvision()  # in a way that works beside a CPU build of torch; torchcfm imports it too
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.unet.unet import UNetModelWrapper

    net = UNetModelWrapper(dim=(3, 32, 32), num_res_blocks=2, num_channels=128, channel_mult=[1, 2, 2, 2],
                           num_head_channels=64, attention_resolutions="16", dropout=0.1).to(device)
    average, matcher = copy.deepcopy(net.state_dict()), ConditionalFlowMatcher(sigma=0.0)
    optimizer, images = torch.optim.Adam(net.parameters()), torch.randn(batch_size, 3, 32, 32, device=device)

    def step():
        optimizer.zero_grad()
        t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(images), images)
        torch.mean((net(t, xt) - ut) ** 2).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        for name, value in net.state_dict().items():
            average[name].copy_(average[name] * 0.9999 + value * 0.0001)

    return step


def measure_peers(trainer):
    """The trainer over torchcfm. Their networks are of the same size with the settings of preset cifar10."""
    config = trainer.config
    if trainer.spec.shape != (3, 32, 32) or not importlib.util.find_spec("torchcfm") or world_size() > 1:
        return print0("  only for images of 3 x 32 x 32, and where torchcfm is installed, on one rank")
    times = time_alternately({"peer": repeated(torchcfm_step(config.batch_size, trainer.device)),
                              "trainer": functools.partial(train, trainer)}, config)
    yield "torchcfm", {"images_per_s": config.batch_size / times["peer"],
                       "trainer_over_it": times["peer"] / times["trainer"]}


PARTS["peers"] = measure_peers


@dataclass
class PeerOptions(Options):
    parts: tuple[Literal["peers"], ...] = ("peers",)  # What to measure.


if __name__ == "__main__":
    start(functools.partial(main, options_class=PeerOptions))
