"""Keeps moving averages of the weights, which draw better samples than the weights themselves.

A `decay` is that of one step. It has a warm-up, so that the first, bad weights are forgotten: after n updates the decay
is min(decay, (1 + n) / (10 + n)), as in tf.train.ExponentialMovingAverage. Parameters are averaged, in float32; buffers
are copied.

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


def power(length):
    """The decay, a function of n, of the average of this length: (1 - 1/t)^(gamma + 1) at step t = n + 1 (eq. 127)."""
    gamma = exponent(length)
    return lambda n: (n / (n + 1)) ** (gamma + 1)


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
    t, gamma = np.array([(own_step, exponent(own)) for own_step in steps for own in LENGTHS]).T
    products = inner_product(t[:, None], gamma[:, None], t, gamma)
    factors = np.linalg.solve(products, inner_product(t, gamma, step, exponent(length)))
    return (factors / factors.sum()).reshape(-1, len(LENGTHS))


class EMA:
    """`EMA(net, decay).net` is an averaged copy of `net`. Call `update(n)` after each step, with n steps before it.

    `decay` is a number, or a function of n. For another warm-up or average, change `update`.
    """

    def __init__(self, net, decay):
        self.decay = decay
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.averages = list(self.net.parameters())
        self.parameters = list(net.parameters())
        self.buffers = list(zip(self.net.buffers(), net.buffers()))

    @torch.no_grad()
    def update(self, n):
        decay = self.decay(n) if callable(self.decay) else min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        for copied, buffer in self.buffers:
            copied.copy_(buffer)


def averages(net, decay, *others, lengths=()):
    """Averages of `net` by name: "ema"; "ema_0.999" for another decay; "ema_length_0.1" for one of this length."""
    return {"ema": EMA(net, decay)} | {f"ema_{other}": EMA(net, other) for other in others} | {
        f"ema_length_{length}": EMA(net, power(length)) for length in lengths}
