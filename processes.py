"""Processes that turn data into noise: xt = alpha(t) x0 + sigma(t) x1, with x0 data, x1 ~ N(0, I), and t from 0 (data) to 1 (noise).

A process is alpha and sigma, each taking t of any shape to the same shape, and their derivatives in t; a class that gives none
gets them by automatic differentiation. All else follows in `Coefs`. The linear SDE dx = f x dt + g dW has the marginals of xt when
f = alpha_dot / alpha and g^2 = 2 delta with delta = sigma sigma_dot - f sigma^2 (Lu et al. 2022, "DPM-Solver", section 2.1).

To add a process, write a class of two formulas and give it a row in PROCESSES. Its `__init__` may name settings of config.py.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from utils import UserError, append_dims, choose, invert


class Coefs(NamedTuple):
    """alpha, sigma and their derivatives at some times, and what follows from them; `sigma_data` is the data's standard deviation."""

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor
    half_g2: Tensor | None = None  # delta itself, of a process that knows it better than by its formula
    sigma_data: float = 0.5

    @property
    def f(self) -> Tensor:
        """Drift of the forward SDE dx = f x dt + g dW."""
        return self.alpha_dot / self.alpha

    @property
    def delta(self) -> Tensor:
        """g^2 / 2: the forward drift is velocity + delta score, the reverse drift velocity - delta score."""
        return self.half_g2 if self.half_g2 is not None else self.sigma * self.sigma_dot - self.f * self.sigma**2

    @property
    def g(self) -> Tensor:
        """Noise of the forward SDE dx = f x dt + g dW."""
        return (2 * self.delta).sqrt()

    @property
    def log_snr(self) -> Tensor:
        """log(alpha^2 / sigma^2); its derivative in t is -2 delta / sigma^2."""
        return 2 * (self.alpha.log() - self.sigma.log())

    @property
    def variance(self) -> Tensor:
        """Variance of xt: alpha^2 sigma_data^2 + sigma^2."""
        return self.alpha**2 * self.sigma_data**2 + self.sigma**2


class Process:
    """Base class. A subclass gives alpha and sigma, and the derivatives and the inverse if it wants them exact to the last digit, or fast.

    Who overrides alpha or sigma of another process overrides these as well.
    """

    sigma_data = 0.5  # standard deviation of the data, for EDM's preconditioning and weighting; `make_process` sets it
    half_g2 = None  # or a method of t that gives delta where its formula is 0 times infinity

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.func.jvp(self.alpha, (t,), (torch.ones_like(t),))[1]

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.func.jvp(self.sigma, (t,), (torch.ones_like(t),))[1]

    def coefs(self, t: Tensor, ndim: int = 1) -> Coefs:
        """The coefficients at t (B,), shaped to multiply a batch of `ndim` dimensions."""
        functions = self.alpha, self.sigma, self.alpha_dot, self.sigma_dot, self.half_g2
        return Coefs(*(c and append_dims(c(t), ndim) for c in functions), self.sigma_data)

    def at(self, time: float) -> Coefs:
        """The coefficients at one time: scalars in float64 on the CPU, which multiply a tensor of any type on any device."""
        return self.coefs(torch.tensor(time, dtype=torch.float64), ndim=0)

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), in the shape of t."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def time(self, log_snr: Tensor) -> Tensor:
        """The t in [0, 1] of these log(alpha^2 / sigma^2), in float64; the nearer end for those that no t has."""
        return self.inverse(log_snr.double().clamp(-600, 600)).clamp(0, 1)  # exp(600) is finite

    def inverse(self, log_snr: Tensor) -> Tensor:
        """The t of a finite log_snr, of any value where there is none in [0, 1]: by bisection, for a class that has no formula."""
        return invert(self.log_snr, log_snr, 0.0, 1.0)

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """xt = alpha x0 + sigma x1, for x0 and x1 (B, ...) and t (B,)."""
        c = self.coefs(t, x0.ndim)
        return c.alpha * x0 + c.sigma * x1


class FromFunctions(Process):
    """The process of any two functions of t: FromFunctions(lambda t: 1 - t**2, lambda t: t). They map tensors by torch's operations."""

    def __init__(self, alpha, sigma):
        self.alpha, self.sigma = alpha, sigma


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

    def inverse(self, log_snr):
        return torch.sigmoid(-log_snr / 2)


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

    def inverse(self, log_snr):
        return torch.atan((-log_snr / 2).exp()) / (0.5 * math.pi)


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

    def half_g2(self, t):
        return 0.5 * self.beta(t)  # also at t = 0, where sigma_dot is infinite

    def inverse(self, log_snr):
        return self.inverse_log_alpha(torch.log1p((-log_snr).exp()) / 2)  # (sigma / alpha)^2 = exp(-2 log alpha) - 1

    def inverse_log_alpha(self, minus_log_alpha):
        slope, constant = self.beta_max - self.beta_min, self.beta_min  # slope t^2 / 4 + constant t / 2 = -log alpha, where slope may be 0
        return 4 * minus_log_alpha / (constant + (constant**2 + 4 * slope * minus_log_alpha).sqrt())


class SubVP(LinearVP):
    """alpha of linear_vp, and sigma = 1 - alpha^2, the square of its sigma: less noise at every t (Song et al. 2021, section 3.4)."""

    half_g2 = None  # by the formula

    def sigma(self, t):
        return -torch.expm1(2 * self.log_alpha(t))

    def sigma_dot(self, t):
        return self.beta(t) * self.alpha(t) ** 2

    def inverse(self, log_snr):
        return self.inverse_log_alpha(torch.asinh((-log_snr / 2).exp() / 2))  # sigma / alpha = 2 sinh(-log alpha)


class VE(Process):
    """x0 + sigma x1: variance exploding, sigma geometric from sigma_min at t = 0 to sigma_max at t = 1 (Song et al. 2021, appendix C).

    Raises UserError for a sigma_min of 0, from which nothing grows geometrically.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        if not sigma_min > 0:
            raise UserError(f"sigma_min {sigma_min}: process ve needs more than 0; use --sigma_min 0.002, or --process ve_linear")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def alpha(self, t):
        return torch.ones_like(t)

    def alpha_dot(self, t):
        return torch.zeros_like(t)

    def sigma(self, t):
        return self.sigma_min * torch.exp(math.log(self.sigma_max / self.sigma_min) * t)

    def sigma_dot(self, t):
        return math.log(self.sigma_max / self.sigma_min) * self.sigma(t)

    def inverse(self, log_snr):
        return (-log_snr / 2 - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


class EDM(VE):
    """x0 + sigma x1, with sigma^(1 / rho) linear in t from sigma_min to sigma_max: equal steps of t are EDM's noise levels
    (Karras et al. 2022, "Elucidating the Design Space", eq. 5 with i / (N - 1) = 1 - t).

    Quarters of t then share the noise levels well, for training times and for curves of the loss. But a sampler steps along straight
    lines in t, and a warped t bends what is nearly straight in sigma: by 18 levels Heun's error is four times that of EDM's own
    sampler, which is `ve_linear` with `--grid edm`, of the same levels and the same cost.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def root(self, t):
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return low + (high - low) * t, high - low  # sigma^(1 / rho) and its derivative

    def sigma(self, t):
        return self.root(t)[0] ** self.rho

    def sigma_dot(self, t):
        root, slope = self.root(t)
        return self.rho * slope * root ** (self.rho - 1)

    def inverse(self, log_snr):
        low, slope = self.root(0.0)
        return ((-log_snr / (2 * self.rho)).exp() - low) / slope


class LinearVE(EDM):
    """x0 + sigma x1, with sigma linear in t from sigma_min to sigma_max: EDM's own sigma(t) = t, rescaled (Karras et al. 2022, table 1)."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        super().__init__(sigma_min, sigma_max, rho=1.0)


PROCESSES = {
    "rf": RectifiedFlow, "cosine": Cosine, "linear_vp": LinearVP, "sub_vp": SubVP, "ve": VE, "ve_linear": LinearVE, "edm": EDM,
}


def make_process(process: str, sigma_data: float = 0.5, **settings) -> Process:
    """The process of this name, from those of `settings` that it wants. Raises UserError for an unknown name."""
    made = choose(PROCESSES, process, **settings)
    made.sigma_data = sigma_data
    return made
