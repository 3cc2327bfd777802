"""Time samplers draw the times of training: `sampler(batch_size, device, generator)` returns t (B,), float32.

All times lie in [T_min, T_max]. `sampler.density(t)` is their probability density. `sampler.importance(t)` are weights
with which the loss at these times estimates the mean loss of uniform times, without bias. `batch_size` is that of the
global batch, since a stratified sampler must see all of it: every rank draws all times and takes its rows.

To add a time sampler, write a class with `unit` and `unit_density` on [0, 1] and give it a row in TIME_SAMPLERS. A
field of a dataclass, or an argument of `__init__`, that has the name of a setting of config.py gets that setting; the
field `process` gets the process.
"""

from dataclasses import dataclass
from math import pi, sqrt

import torch

from processes import Process
from utils import UserError


@dataclass
class Uniform:
    """t uniform on [T_min, T_max]."""

    T_min: float = 0.0
    T_max: float = 1.0

    def unit(self, batch_size, **where):
        """Times (B,) in [0, 1], not yet scaled to [T_min, T_max]. A subclass overrides this and `unit_density`.

        `where` are the device and the generator, as functions of torch take them.
        """
        return torch.rand(batch_size, **where)

    def unit_density(self, u):
        """The probability density of the times of `unit` at u in [0, 1], in u's type or in float64."""
        return torch.ones_like(u)

    def times(self, batch_size, **where):
        """Times (B,) in [T_min, T_max], to rounding, of any type. `where` as in `unit`."""
        return self.T_min + (self.T_max - self.T_min) * self.unit(batch_size, **where)

    def __call__(self, batch_size, device=None, generator=None):
        t = self.times(batch_size, device=device, generator=generator)
        return t.float().clamp(self.T_min, self.T_max)  # rounding may go beyond an end by one unit in the last place

    def density(self, t):
        """Probability density at t (B,) in [T_min, T_max]."""
        length = self.T_max - self.T_min
        return self.unit_density(((t - self.T_min) / length).clamp(0, 1)).to(t.dtype) / length

    def importance(self, t):
        """Importance weight of t (B,): the density of uniform times over the density of this sampler.

        The mean of a loss with these weights estimates its mean over uniform times, without bias. The weights of
        logit_normal, and of beta with a or b of 2 or more, have infinite variance, and those of edm_log_normal a large
        one: times near an end are rare and have very large weights, with edm_log_normal on rf up to 7e12.
        """
        return 1 / ((self.T_max - self.T_min) * self.density(t))


class Stratified(Uniform):
    """One uniform time in each of B equal intervals, in random order.

    (Kingma et al. 2021, appendix I.1, instead shift a grid of times by one random number.)
    """

    def unit(self, batch_size, **where):
        return (torch.randperm(batch_size, **where) + torch.rand(batch_size, **where)) / batch_size


def normal_density(z):
    """The density of N(0, 1) at z."""
    return torch.exp(-0.5 * z**2) / sqrt(2 * pi)


def inside(u):
    """u in float64, at least 1e-8 away from 0 and 1, where a density may be infinite or 0 / 0."""
    return u.double().clamp(1e-8, 1 - 1e-8)


@dataclass
class LogitNormal(Uniform):
    """logit(t) ~ N(loc, scale^2) on [0, 1], and then scaled to [T_min, T_max].

    (Esser et al. 2024, "Scaling Rectified Flow", eq. 19.)
    """

    logit_normal_loc: float = 0.0
    logit_normal_scale: float = 1.0

    def unit(self, batch_size, **where):
        return torch.sigmoid(self.logit_normal_loc + self.logit_normal_scale * torch.randn(batch_size, **where))

    def unit_density(self, u):
        v = inside(u)
        scale = self.logit_normal_scale
        return normal_density((torch.logit(v) - self.logit_normal_loc) / scale) / (scale * v * (1 - v))


@dataclass
class Beta(Uniform):
    """t ~ Beta(a, b) on [0, 1], and then scaled to [T_min, T_max]; a = b = 1 is uniform, a > b means more noise."""

    time_beta_a: float = 1.0
    time_beta_b: float = 2.0

    def shapes(self, like):
        """a and b, in the shape of `like`, float64."""
        return (torch.full_like(like, shape, dtype=torch.float64) for shape in (self.time_beta_a, self.time_beta_b))

    def unit(self, batch_size, **where):
        # torch.distributions.Beta calls this function too, but accepts no generator
        x, y = (torch._standard_gamma(shape, where["generator"])
                for shape in self.shapes(torch.empty(batch_size, device=where["device"])))
        return x / (x + y)

    def unit_density(self, u):
        # its validation of arguments would wait for a GPU
        return torch.distributions.Beta(*self.shapes(u), validate_args=False).log_prob(inside(u)).exp()


@dataclass
class Mode(Uniform):
    """SD3's mode sampling with heavy tails: t = 1 - u - s (cos^2(pi u / 2) - 1 + u) for uniform u.

    (Esser et al. 2024, eq. 20.) s > 0 prefers times in the middle, s < 0 those near the ends. t is a monotone function
    of u for -1 <= s <= 2 / (pi - 2).
    """

    mode_scale: float = 1.29  # s

    def map(self, u):
        return 1 - u - self.mode_scale * (torch.cos(0.5 * pi * u) ** 2 - 1 + u)

    def unit(self, batch_size, **where):
        return self.map(torch.rand(batch_size, **where, dtype=torch.float64))

    def slope(self, u):
        return 1 + self.mode_scale * (1 - 0.5 * pi * torch.sin(pi * u))  # -map'(u)

    def unit_density(self, u):
        """1 / |map'(v)| at the v with map(v) = u.

        v is found in a table that is finer at the ends, and then by two steps of Newton's method. This is faster than
        bisection.
        """
        table = torch.sin(0.5 * pi * torch.linspace(1, 0, 4097, device=u.device, dtype=torch.float64)) ** 2
        after = torch.searchsorted(self.map(table), u.double()).clamp(1, 4096)
        v = (table.take(after - 1) + table.take(after)) / 2
        for _ in range(2):
            v = v + (self.map(v) - u) / self.slope(v)
        return 1 / self.slope(v)


class CosMap(Uniform):
    """The times at which rectified flow has the log-SNR of the cosine process at uniform times.

    (Esser et al. 2024, eq. 21.)
    """

    def unit(self, batch_size, **where):
        return 1 - 1 / (torch.tan(0.5 * pi * torch.rand(batch_size, **where)) + 1)

    def unit_density(self, u):
        return 2 / (pi * (1 - 2 * u + 2 * u**2))


@dataclass(kw_only=True)
class EDMLogNormal(Uniform):
    """log(sigma / alpha) ~ N(P_mean, P_std^2), truncated to [T_min, T_max].

    (Karras et al. 2022, table 1, here for any process.) Raises UserError if less than 0.1% of this distribution lies in
    [T_min, T_max].
    """

    process: Process
    edm_P_mean: float = -1.2
    edm_P_std: float = 1.2

    def __post_init__(self):
        self.low, high = (torch.special.ndtr(self.normal(self.process.at(t))).item() for t in (self.T_min, self.T_max))
        self.share = high - self.low  # of the distribution that lies in [T_min, T_max]
        if not self.share > 1e-3:
            raise UserError(f"edm_P_mean {self.edm_P_mean} and edm_P_std {self.edm_P_std} put fewer than one time in "
                            "1,000 between T_min and T_max: use values such as -1.2 and 1.2")

    def normal(self, c):
        """log(sigma / alpha), standardized: N(0, 1) before it is truncated."""
        return (-c.log_snr / 2 - self.edm_P_mean) / self.edm_P_std

    def times(self, batch_size, **where):
        u = self.low + self.share * torch.rand(batch_size, **where, dtype=torch.float64)
        return self.process.time(-2 * (self.edm_P_mean + self.edm_P_std * torch.special.ndtri(u)))

    def density(self, t):
        c = self.process.coefs(t.double())
        normal_dot = c.delta / c.sigma**2 / self.edm_P_std  # the derivative of `normal` in t
        return (normal_density(self.normal(c)) * normal_dot / self.share).to(t.dtype)


TIME_SAMPLERS = {
    "uniform": Uniform, "stratified": Stratified, "logit_normal": LogitNormal, "edm_log_normal": EDMLogNormal,
    "beta": Beta, "mode": Mode, "cosmap": CosMap,
}
