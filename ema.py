"""Keeps an exponential moving average of the weights, which draws better samples than the weights themselves.

`decay` is the decay of one step. It has a warm-up, so that the first, bad weights are forgotten: after n updates the
decay is min(decay, (1 + n) / (10 + n)), as in tf.train.ExponentialMovingAverage. Parameters are averaged, in float32;
buffers are copied. For another warm-up or average, change `update`.
"""

import copy

import torch


class EMA:
    """`EMA(net, decay).net` is an averaged copy of `net`. Call `update(n)` after each step, with n steps before it."""

    def __init__(self, net, decay):
        self.decay = decay
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.averages = list(self.net.parameters())
        self.parameters = list(net.parameters())
        self.buffers = list(zip(self.net.buffers(), net.buffers()))

    @torch.no_grad()
    def update(self, n):
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        for copied, buffer in self.buffers:
            copied.copy_(buffer)
