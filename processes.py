"""Processes that turn data into noise: xt = alpha(t) x0 + sigma(t) x1, with x0 data, x1 ~ N(0, I), and t from 0 (data) to 1 (noise).

A process is four formulas: alpha, sigma and their derivatives in t, each taking t of shape (B,) to (B,). All else follows in
`Process`. The linear SDE dx = f x dt + g dW has the marginals of xt when f = alpha_dot / alpha and g^2 = 2 delta with
delta = sigma sigma_dot - (alpha_dot / alpha) sigma^2 (Lu et al. 2022, "DPM-Solver", section 2.1).

To add a process, write a class of four formulas and give it a row in PROCESSES. Its `__init__` may name settings of config.py.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from utils import append_dims


class Coefs(NamedTuple):
    """alpha, sigma and their derivatives at the times of a batch, each (B, 1, ..., 1)."""

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor


class Process:
    """Base class: what follows from alpha, sigma, alpha_dot and sigma_dot."""

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha_dot(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma_dot(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def coefs(self, t: Tensor, ndim: int) -> Coefs:
        """The four at t (B,), shaped to multiply a batch of `ndim` dimensions."""
        return Coefs(*(append_dims(c(t), ndim) for c in (self.alpha, self.sigma, self.alpha_dot, self.sigma_dot)))

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """xt = alpha x0 + sigma x1, for x0 and x1 (B, ...) and t (B,)."""
        c = self.coefs(t, x0.ndim)
        return c.alpha * x0 + c.sigma * x1

    def f(self, t: Tensor) -> Tensor:
        """Drift of the forward SDE dx = f x dt + g dW."""
        return self.alpha_dot(t) / self.alpha(t)

    def delta(self, t: Tensor) -> Tensor:
        """g^2 / 2: the forward drift is velocity + delta score, the reverse drift velocity - delta score."""
        return self.sigma(t) * self.sigma_dot(t) - self.f(t) * self.sigma(t) ** 2

    def g(self, t: Tensor) -> Tensor:
        """Noise of the forward SDE dx = f x dt + g dW."""
        return (2 * self.delta(t)).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2)."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())


class RectifiedFlow(Process):
    """Straight lines (Liu et al. 2022, "Flow Straight and Fast", eq. 1; Lipman et al. 2022, eq. 20 with sigma_min = 0)."""

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def alpha_dot(self, t):
        return -torch.ones_like(t)

    def sigma_dot(self, t):
        return torch.ones_like(t)


class Cosine(Process):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Nichol & Dhariwal 2021 with offset 0; Albergo & Vanden-Eijnden 2022, trigonometric).

    cos(pi t / 2) is computed as sin(pi (1 - t) / 2): 1 - t is exact in floating point for t >= 1/2, so alpha is precise where it is small.
    """

    def alpha(self, t):
        return torch.sin(0.5 * math.pi * (1 - t))

    def sigma(self, t):
        return torch.sin(0.5 * math.pi * t)

    def alpha_dot(self, t):
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * t)

    def sigma_dot(self, t):
        return 0.5 * math.pi * torch.sin(0.5 * math.pi * (1 - t))


class LinearVP(Process):
    """Variance preserving, with noise rate beta(t) linear in t (Song et al. 2021, "Score-Based Generative Modeling", eqs. 32 and 33).

    log alpha = -1/2 int_0^t beta, and sigma^2 = 1 - alpha^2 = -expm1(2 log alpha): 1 - alpha^2 itself is 1.2% off in
    float32 at t = 1e-4.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def beta(self, t):
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def log_alpha(self, t):
        return -0.25 * (self.beta_max - self.beta_min) * t**2 - 0.5 * self.beta_min * t

    def alpha(self, t):
        return self.log_alpha(t).exp()

    def sigma(self, t):
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def alpha_dot(self, t):
        return -0.5 * self.beta(t) * self.alpha(t)

    def sigma_dot(self, t):
        return 0.5 * self.beta(t) * self.alpha(t) ** 2 / self.sigma(t)


PROCESSES = {"rf": RectifiedFlow, "cosine": Cosine, "linear_vp": LinearVP}
