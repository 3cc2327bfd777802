"""Keeps moving averages of the weights, which draw better samples than the weights themselves.

A `decay` is that of one step. It has a warm-up, so that the first, bad weights are forgotten: after n updates the decay
is min(decay, (1 + n) / (10 + n)), as in tf.train.ExponentialMovingAverage. Parameters are averaged, in float32; buffers
are copied. For another warm-up or average, change `update`.

A power-function average (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
section 3; equations and algorithms below are those of its appendix C) has a `length`: the standard deviation of its
weights over the steps, as a share of the training until then. At step t, the weight of step tau <= t is p(tau) =
(gamma + 1) tau^gamma / t^(gamma + 1) (eq. 121). Averages of two lengths, kept at several steps, span many such p. So
that of any length can be computed after training: `synthesis` says how to add them up.
"""

import copy

import numpy as np
import torch

LENGTHS = 0.05, 0.1  # of the averages that are kept for a synthesis


def exponent(length):
    """gamma > 0 of the power function of this length, in (0, 12^(-1/2)).

    It is the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / length^2 (eq. 123, algorithm 2).
    """
    return np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max()


def inner_product(t_a, gamma_a, t_b, gamma_b):
    """The integral over tau of p_a p_b, which end at the steps t_a and t_b (eq. 151). Arrays are broadcast."""
    ratio = t_a / t_b
    overlap = ratio ** np.where(ratio < 1, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * overlap / np.maximum(t_a, t_b)


def synthesis(steps, step, length):
    """The factors (N, 2), float64, of the averages of both LENGTHS at N different steps, to get that of `length`.

    Times these factors, which sum to 1, their functions p are nearly that of `length` at `step`, with the least mean
    squared error (algorithm 3).
    """
    t = np.repeat(steps, len(LENGTHS))
    gamma = np.tile([*map(exponent, LENGTHS)], len(steps))
    factors = np.linalg.solve(inner_product(t[:, None], gamma[:, None], t, gamma),
                              inner_product(t, gamma, step, exponent(length)))
    return (factors / factors.sum()).reshape(-1, len(LENGTHS))


class EMA:
    """`EMA(net, decay).net` is an averaged copy of `net`. Call `update(n)` after each step, with n steps before it.

    All averages are in `nets`, by name: "ema", which is `net`; "ema_0.999" for each further decay; and "ema_length_0.1"
    for each of the `lengths` of power functions.
    """

    def __init__(self, net, *decays, lengths=()):
        self.decays, self.exponents = decays, [*map(exponent, lengths)]
        names = ["ema", *map("ema_{}".format, decays[1:]), *map("ema_length_{}".format, lengths)]
        self.nets = {name: copy.deepcopy(net).eval().requires_grad_(False) for name in names}
        self.net = self.nets["ema"]
        self.averages = [list(average.parameters()) for average in self.nets.values()]
        self.parameters = list(net.parameters())
        self.buffers = [pair for average in self.nets.values() for pair in zip(average.buffers(), net.buffers())]

    def state_dict(self, names="ema"):
        """The averages whose names begin like this, by name."""
        return {name: average.state_dict() for name, average in self.nets.items() if name.startswith(names)}

    @torch.no_grad()
    def update(self, n):
        decays = [min(decay, (1 + n) / (10 + n)) for decay in self.decays]
        decays += [(1 - 1 / (n + 1)) ** (gamma + 1) for gamma in self.exponents]  # at step t = n + 1 (eq. 127)
        for average, decay in zip(self.averages, decays):
            torch._foreach_lerp_(average, self.parameters, 1 - decay)
        for copied, buffer in self.buffers:
            copied.copy_(buffer)
