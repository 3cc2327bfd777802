"""An exponential moving average of the weights, which draws better samples than the weights themselves.

`decay` is that of one step, with a warm-up: after n updates it is min(decay, (1 + n) / (10 + n)), so that the first, bad weights
are forgotten (as in tf.train.ExponentialMovingAverage). Parameters are averaged, in float32; buffers are copied.
"""

import copy

import torch
from torch import nn


class EMA:
    """Holds `net`, an averaged copy of the network that it is made with; `update` it after each optimizer step of that."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay, self.num_updates = decay, 0
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.averages, self.parameters = list(self.net.parameters()), list(net.parameters())
        self.buffers = list(zip(self.net.buffers(), net.buffers()))

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        for mine, theirs in self.buffers:
            mine.copy_(theirs)
        self.num_updates += 1

    def state_dict(self) -> dict:
        return {"net": self.net.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        self.num_updates = state["num_updates"]
