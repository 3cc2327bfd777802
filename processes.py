"""Processes turn data into a base: xt = alpha(t) x0 + sigma(t) x1 + shift(t) m, with t from 0 (data) to 1 (the base).

x0 is a data point, x1 ~ N(0, I), and m the mean of the base, a known function of the condition. A process is two or
three functions of t, each in the shape of t: alpha, sigma and, if it is not 0, shift. Their derivatives in t come from
automatic differentiation, unless the class has formulas for them. `Coefs` derives everything else. The linear SDE
dz = f z dt + g dW has the marginals of z = xt - shift m when f = alpha_dot / alpha and g^2 = 2 delta, with
delta = sigma sigma_dot - f sigma^2 (Lu et al. 2022, "DPM-Solver", section 2.1). What holds without m holds for z.

The bases: `noise`, N(0, I), m = 0; and `condition`, N(m, base_std^2 I), where m is the condition itself (Albergo et al.
2023, "Stochastic Interpolants with Data-Dependent Couplings"). With the process `foellmer` it is the point m. If x1 is
a point of another data set, there may be noise z on the way, as a further term gamma(t) z.

To add a process, write a class with two formulas and give it a row in PROCESSES. A field of a dataclass, or an argument
of `__init__`, that has the name of a setting of config.py gets that setting.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from utils import UserError, append_dims, call_with_settings, enlarged, invert, look_up


class Coefs(NamedTuple):
    """alpha, sigma, shift and their derivatives at some times, and what follows from them.

    `sigma_data` is the standard deviation of the data.
    """

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor
    sigma_data: float
    half_g2: Tensor | None = None  # delta, where the process has a better formula for it than the general one
    shift: Tensor | float = 0.0
    shift_dot: Tensor | float = 0.0
    x1_drift: Tensor | None = None  # coefficient of x1 in `drift`, where the process has a better formula for it
    gamma: Tensor | None = None  # coefficient of the noise z, where x1 comes from a data set
    gamma_dot: Tensor | None = None

    @property
    def noise(self):
        """Standard deviation of the noise in xt: gamma, or sigma where x1 is the noise."""
        return self.sigma if self.gamma is None else self.gamma

    @property
    def f(self):
        """Coefficient f of the forward SDE dx = f x dt + g dW."""
        return self.alpha_dot / self.alpha

    @property
    def delta(self):
        """g^2 / 2. The forward SDE has the drift velocity + delta score, the reverse SDE velocity - delta score."""
        return self.half_g2 if self.half_g2 is not None else self.sigma * self.sigma_dot - self.f * self.sigma**2

    @property
    def g(self):
        """Diffusion coefficient of the forward SDE dx = f x dt + g dW."""
        return (2 * self.delta).sqrt()

    @property
    def drift(self):
        """Coefficient of x1 in the drift velocity - own_eps score of the process's own reverse SDE."""
        return self.x1_drift if self.x1_drift is not None else self.sigma_dot + self.delta / self.sigma

    @property
    def own_eps(self):
        """Half the squared noise of the process's own reverse SDE: delta, unless it has an `x1_drift`."""
        return self.sigma * (self.drift - self.sigma_dot)

    @property
    def log_snr(self):
        """log(alpha^2 / sigma^2); its derivative in t is -2 delta / sigma^2."""
        return 2 * (self.alpha.log() - self.sigma.log())

    @property
    def variance(self):
        """Variance of xt: alpha^2 sigma_data^2 + sigma^2."""
        return self.alpha**2 * self.sigma_data**2 + self.sigma**2


def derivative(function, t):
    """The derivative of a function of t, in the shape of t, by automatic differentiation."""
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]


class Process:
    """Base class: a subclass defines alpha(t) and sigma(t), and may define shift(t), all in the shape of t.

    It may also define their derivatives and `inverse`, to have them exact to the last digit, or faster. A class that
    changes the alpha or sigma of another process must redefine these and `half_g2` as well: else it inherits them.
    """

    sigma_data = 0.5  # standard deviation of the data, for EDM's preconditioning and weighting; `make_process` sets it
    half_g2 = None  # or a method of t that returns delta, for a process whose general formula gives 0 times infinity
    x1_drift = None  # or a method of t that returns the coefficient of x1 in the drift of the process's own SDE
    shift = None  # or a method of t
    gamma = None  # or a method of t: `make_process` sets it
    last = math.inf  # latest time at which predictions can be converted

    def alpha_dot(self, t):
        return derivative(self.alpha, t)

    def sigma_dot(self, t):
        return derivative(self.sigma, t)

    def shift_dot(self, t):
        return derivative(self.shift, t)

    def gamma_dot(self, t):
        return derivative(self.gamma, t)

    def coefs(self, t, ndim=1):
        """The `Coefs` at t (B,), shaped to multiply a batch of `ndim` dimensions."""
        found = {name: append_dims(getattr(self, name)(t), ndim) for name in Coefs._fields
                 if name != "sigma_data" and getattr(self, name.removesuffix("_dot"))}
        return Coefs(sigma_data=self.sigma_data, **found)

    def at(self, time):
        """The `Coefs` at one time: float64 scalars on the CPU. They multiply tensors of any type and device."""
        return self.coefs(torch.tensor(time, dtype=torch.float64), ndim=0)

    def log_snr(self, t):
        """log(alpha^2 / sigma^2), in the shape of t."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def time(self, log_snr):
        """The t in [0, 1] at which log(alpha^2 / sigma^2) has these values, in their shape, in float64.

        For a value that it does not take in [0, 1], this is the nearer end, 0 or 1.
        """
        return self.inverse(log_snr.double().clamp(-600, 600)).clamp(0, 1)  # exp(600) is finite in float64

    def inverse(self, log_snr):
        """The t at which log(alpha^2 / sigma^2) has these values, which are finite: by bisection.

        A class that has a formula overrides this. A formula may also give a t outside [0, 1].
        """
        return invert(self.log_snr, log_snr, 0.0, 1.0)


class FromFunctions(Process):
    """A process made of two functions of t, such as FromFunctions(lambda t: 1 - t**2, lambda t: t).

    Both take a tensor and return one of the same shape, by operations of torch.
    """

    def __init__(self, alpha, sigma):
        self.alpha, self.sigma = alpha, sigma


class RectifiedFlow(Process):
    """Straight lines, alpha = 1 - t and sigma = t.

    (Liu et al. 2022, "Flow Straight and Fast", eq. 1; Lipman et al. 2022, eq. 20 with sigma_min = 0.)
    """

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
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    (Nichol & Dhariwal 2021 with offset 0; Albergo & Vanden-Eijnden 2022, trigonometric.) cos(pi t / 2) is computed as
    sin(pi (1 - t) / 2). For t >= 1/2, 1 - t is exact in floating point, so alpha is precise where it is small.
    """

    def alpha(self, t):
        return self.sigma(1 - t)

    def sigma(self, t):
        return torch.sin(0.5 * math.pi * t)

    def alpha_dot(self, t):
        return -0.5 * math.pi * self.sigma(t)

    def sigma_dot(self, t):
        return 0.5 * math.pi * self.alpha(t)

    def inverse(self, log_snr):
        return torch.atan((-log_snr / 2).exp()) / (0.5 * math.pi)


@dataclass
class LinearVP(Process):
    """Variance preserving: alpha^2 + sigma^2 = 1, with a noise rate beta(t) that is linear in t.

    log alpha = -1/2 int_0^t beta (Song et al. 2021, "Score-Based Generative Modeling", eqs. 32 and 33). sigma^2 is
    computed as -expm1(2 log alpha). In float32, 1 - alpha^2 could be 1.2% off at t = 1e-4.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

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
        # solves slope t^2 / 4 + beta_min t / 2 = -log alpha, in the form that also holds where slope is 0
        slope = self.beta_max - self.beta_min
        return 4 * minus_log_alpha / (self.beta_min + (self.beta_min**2 + 4 * slope * minus_log_alpha).sqrt())


class SubVP(LinearVP):
    """alpha is that of linear_vp; sigma = 1 - alpha^2 is the square of its sigma (Song et al. 2021, section 3.4).

    So there is less noise at every t than in linear_vp.
    """

    half_g2 = None  # the general formula holds

    def sigma(self, t):
        return -torch.expm1(2 * self.log_alpha(t))

    def sigma_dot(self, t):
        return self.beta(t) * self.alpha(t) ** 2

    def inverse(self, log_snr):
        return self.inverse_log_alpha(torch.asinh((-log_snr / 2).exp() / 2))  # sigma / alpha = 2 sinh(-log alpha)


@dataclass
class VE(Process):
    """Variance exploding: xt = x0 + sigma x1, with sigma = sigma_min (sigma_max / sigma_min)^t.

    (Song et al. 2021, appendix C.) Raises UserError unless sigma_min > 0: geometric growth cannot start from 0.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self):
        if not self.sigma_min > 0:
            raise UserError(f"sigma_min {self.sigma_min}: process ve needs more than 0; use --sigma_min 0.002, or "
                            "--process ve_linear")
        self.rate = math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t):
        return torch.ones_like(t)

    def alpha_dot(self, t):
        return torch.zeros_like(t)

    def sigma(self, t):
        return self.sigma_min * torch.exp(self.rate * t)

    def sigma_dot(self, t):
        return self.rate * self.sigma(t)

    def inverse(self, log_snr):
        return (-log_snr / 2 - math.log(self.sigma_min)) / self.rate


@dataclass
class EDM(VE):
    """xt = x0 + sigma x1, with sigma^(1 / rho) linear in t: equal steps of t give EDM's noise levels.

    sigma is sigma_min at t = 0 and sigma_max at t = 1 (Karras et al. 2022, "Elucidating the Design Space", eq. 5, where
    i / (N - 1) = 1 - t). Each quarter of [0, 1] holds a quarter of EDM's levels. This suits training times, and
    curves of the loss over t. For sampling, `ve_linear` with `--grid edm` is better: that is EDM's own sampler, with
    the same levels at the same cost. The reason is that a sampler's steps are straight lines in t. The paths to the
    data are nearly straight as functions of sigma, but curved as functions of this t: with 18 levels, Heun's error is
    four times larger.
    """

    rho: float = 7.0

    def __post_init__(self):  # sigma_min may be 0 here
        self.low = self.sigma_min ** (1 / self.rho)  # sigma^(1 / rho) = low + slope t
        self.slope = self.sigma_max ** (1 / self.rho) - self.low

    def sigma(self, t):
        return (self.low + self.slope * t) ** self.rho

    def sigma_dot(self, t):
        return self.rho * self.slope * (self.low + self.slope * t) ** (self.rho - 1)

    def inverse(self, log_snr):
        return ((-log_snr / (2 * self.rho)).exp() - self.low) / self.slope


class LinearVE(EDM):
    """xt = x0 + sigma x1, with sigma linear in t, from sigma_min to sigma_max.

    This is EDM's own sigma(t) = t, rescaled to t in [0, 1] (Karras et al. 2022, table 1).
    """

    def __init__(self, sigma_min=0.002, sigma_max=80.0):
        super().__init__(sigma_min, sigma_max, rho=1.0)


@dataclass
class Foellmer(Process):
    """alpha = (1 - t)^p, shift = t, sigma = epsilon t sqrt(1 - t): from the point m, as a forecast from the last state.

    (Chen et al. 2024, "Probabilistic Forecasting with Stochastic Interpolants and Foellmer Processes", with our 1 - t
    for their time; p is 2 there, or 1.) Only an SDE can leave a point. The paper's has eps = epsilon^2 t^2 / 2, and a
    drift without singularity. `delta` is that of the Foellmer process, with singular coefficients at t = 1.
    """

    foellmer_epsilon: float = 1.0  # epsilon
    foellmer_power: float = 2.0  # p

    last = 1 - 1e-12  # at the point, the 2 x 2 system is 0 = 0; its solution has a limit

    def alpha(self, t):
        return (1 - t) ** self.foellmer_power

    def alpha_dot(self, t):
        return -self.foellmer_power * (1 - t) ** (self.foellmer_power - 1)

    def sigma(self, t):
        return self.foellmer_epsilon * t * (1 - t).sqrt()

    def sigma_dot(self, t):
        return self.foellmer_epsilon * (1 - 1.5 * t) / (1 - t).sqrt()

    def shift(self, t):
        return t

    def shift_dot(self, t):
        return torch.ones_like(t)

    def half_g2(self, t):
        return self.foellmer_epsilon**2 * (t + (self.foellmer_power - 1.5) * t**2)

    def x1_drift(self, t):
        return self.foellmer_epsilon * (1 - t).sqrt()


PROCESSES = {
    "rf": RectifiedFlow, "cosine": Cosine, "linear_vp": LinearVP, "sub_vp": SubVP, "ve": VE, "ve_linear": LinearVE,
    "edm": EDM, "foellmer": Foellmer,
}


# ---- Bases, and the noise gamma(t) z

# gamma at scale 1, 0 at both ends (Albergo, Boffi & Vanden-Eijnden 2023, "Stochastic Interpolants: A Unifying
# Framework for Flows and Diffusions")
GAMMAS = {
    "brownian": lambda t: (2 * t * (1 - t)).sqrt(),
    "bsquared": lambda t: t * (1 - t),
    "sin_squared": lambda t: torch.sin(math.pi * t) ** 2,
}


class AroundMean(Process):
    """`process` with the base N(m, base_std^2 I): sigma -> base_std sigma, and shift = sigma."""

    def __init__(self, process, base_std):
        self.alpha, self.alpha_dot = process.alpha, process.alpha_dot
        self.shift, self.shift_dot = process.sigma, process.sigma_dot
        self.sigma = lambda t: base_std * process.sigma(t)
        self.sigma_dot = lambda t: base_std * process.sigma_dot(t)
        self.inverse = lambda log_snr: process.inverse(log_snr + 2 * math.log(base_std))
        if process.half_g2:
            self.half_g2 = lambda t: base_std**2 * process.half_g2(t)


def first_channels(cond, shape):
    """The condition itself, (B, *shape): as many of its channels as the data have, enlarged to their size. 0 if hidden.
    """
    return 0.0 if cond is None else enlarged(cond[:, : shape[0]], shape[1:])


# The mean m of the base, of the condition (B, C, ...) as the network gets it, and the shape of an item
BASES = {"noise": lambda cond, shape: 0.0, "condition": first_channels}


def make_process(process, sigma_data=0.5, base="noise", base_std=1.0, gamma=None, gamma_scale=1.0,
                 **settings):
    """The process of this name, made with those of `settings` that it has arguments for; others are ignored.

    `gamma` (a name in GAMMAS) adds the noise gamma_scale gamma(t) z. Raises UserError for an unknown name, and for
    settings that the process refuses.
    """
    made = call_with_settings(look_up(PROCESSES, process), settings)
    if base == "condition" and not made.shift:
        if made.at(1.0).alpha > 0.1:
            raise UserError(f"process {process} keeps the data at t = 1, and does not reach the base condition: use a "
                            "process such as rf, or --base noise")
        made = AroundMean(made, base_std)
    if gamma:
        made.gamma = lambda t: gamma_scale * GAMMAS[gamma](t)
    made.sigma_data = sigma_data
    return made
