"""How training times are drawn: `sampler(batch_size, device, generator) -> t`, shape (B,), float32, inside [T_min, T_max].

`sampler.density(t)` is their probability density, so that 1 / ((T_max - T_min) density) is the importance weight with which any of
them estimates the loss of uniform times without bias. The batch is the global one, so that a stratified sampler sees it whole;
every process draws it all and takes its rows. To add one, write a class with `unit` and `unit_density` on [0, 1], and give it a row
in TIME_SAMPLERS. Its `__init__` may name settings of config.py, and `process` for the process itself.
"""

import math

import torch
from torch import Tensor

from utils import UserError


class Uniform:
    """t uniform on [T_min, T_max]."""

    def __init__(self, T_min: float = 0.0, T_max: float = 1.0):
        self.T_min, self.T_max = T_min, T_max

    def unit(self, batch_size: int, device, generator) -> Tensor:
        """Times on [0, 1]: what a subclass changes."""
        return torch.rand(batch_size, device=device, generator=generator)

    def unit_density(self, u: Tensor) -> Tensor:
        """Their density at u in [0, 1]."""
        return torch.ones_like(u)

    def __call__(self, batch_size: int, device=None, generator: torch.Generator | None = None) -> Tensor:
        t = self.T_min + (self.T_max - self.T_min) * self.unit(batch_size, device, generator)
        return t.float().clamp(self.T_min, self.T_max)  # rounding may step over an end by one unit in the last place

    def density(self, t: Tensor) -> Tensor:
        """Probability density at t (B,) in [T_min, T_max]."""
        length = self.T_max - self.T_min
        return self.unit_density(((t - self.T_min) / length).clamp(0, 1)) / length

    def importance(self, t: Tensor) -> Tensor:
        """Density of uniform times over this one's: with these weights the mean loss is that of uniform times.

        Those of logit_normal, of edm_log_normal, and of beta with a or b of 2 or more, have no finite variance: a rare time near an
        end weighs much, with edm_log_normal on rf up to 7e12.
        """
        return 1 / ((self.T_max - self.T_min) * self.density(t))


class Stratified(Uniform):
    """Uniform, with one time in each of B equal intervals, in random order (Kingma et al. 2021, appendix I.1, who shift one grid)."""

    def unit(self, batch_size, device, generator):
        cell = torch.randperm(batch_size, device=device, generator=generator)
        return (cell + torch.rand(batch_size, device=device, generator=generator)) / batch_size


def normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def inside(u: Tensor) -> Tensor:
    """u moved off the ends of [0, 1] by what float32 cannot tell, where a density is infinite or 0 / 0."""
    return u.double().clamp(1e-8, 1 - 1e-8)


class LogitNormal(Uniform):
    """logit(t) ~ N(loc, scale^2), on [0, 1] and then scaled to [T_min, T_max] (Esser et al. 2024, "Scaling Rectified Flow", eq. 19)."""

    def __init__(self, T_min: float = 0.0, T_max: float = 1.0, logit_normal_loc: float = 0.0, logit_normal_scale: float = 1.0):
        super().__init__(T_min, T_max)
        self.loc, self.scale = logit_normal_loc, logit_normal_scale

    def unit(self, batch_size, device, generator):
        normal = torch.randn(batch_size, device=device, generator=generator)
        return torch.sigmoid(self.loc + self.scale * normal)

    def unit_density(self, u):
        v = inside(u)
        return (normal_density((torch.logit(v) - self.loc) / self.scale) / (self.scale * v * (1 - v))).to(u.dtype)


class Beta(Uniform):
    """t ~ Beta(a, b) on [0, 1], and then scaled to [T_min, T_max]; a = b = 1 is uniform, a > b means more noise."""

    def __init__(self, T_min: float = 0.0, T_max: float = 1.0, time_beta_a: float = 1.0, time_beta_b: float = 2.0):
        super().__init__(T_min, T_max)
        self.a, self.b = time_beta_a, time_beta_b

    def unit(self, batch_size, device, generator):
        # what torch.distributions calls, without a generator
        x, y = (torch._standard_gamma(shape, generator=generator) for shape in self.shapes(torch.empty(batch_size, device=device)))
        return x / (x + y)

    def shapes(self, like):
        """a and b, in the shape and on the device of `like`, float64, which copies nothing to a GPU."""
        return [torch.full_like(like, shape, dtype=torch.float64) for shape in (self.a, self.b)]

    def unit_density(self, u):
        density = torch.distributions.Beta(*self.shapes(u), validate_args=False)  # validating waits for a GPU
        return density.log_prob(inside(u)).exp().to(u.dtype)


class Mode(Uniform):
    """SD3's mode sampling with heavy tails, t = 1 - u - s (cos^2(pi u / 2) - 1 + u) for uniform u (Esser et al. 2024, eq. 20).

    s > 0 prefers the middle, s < 0 the ends; -1 <= s <= 2 / (pi - 2) keeps it monotone.
    """

    def __init__(self, T_min: float = 0.0, T_max: float = 1.0, mode_scale: float = 1.29):
        super().__init__(T_min, T_max)
        self.s = mode_scale

    def map(self, u):
        return 1 - u - self.s * (torch.cos(0.5 * math.pi * u) ** 2 - 1 + u)

    def unit(self, batch_size, device, generator):
        return self.map(torch.rand(batch_size, device=device, generator=generator, dtype=torch.float64))

    def slope(self, u):
        return 1 + self.s * (1 - 0.5 * math.pi * torch.sin(math.pi * u))  # -map'(u)

    def unit_density(self, u):
        """1 / |map'(v)| where map(v) = u: v from a table, finer at the ends, and two steps of Newton's; bisection takes longer."""
        table = torch.sin(0.5 * math.pi * torch.linspace(1, 0, 4097, device=u.device, dtype=torch.float64)) ** 2
        after = torch.searchsorted(self.map(table), u.double()).clamp(1, 4096)
        v = (table.take(after - 1) + table.take(after)) / 2
        for _ in range(2):
            v = v + (self.map(v) - u) / self.slope(v)
        return (1 / self.slope(v)).to(u.dtype)


class CosMap(Uniform):
    """Rectified-flow times with the log-SNR of the cosine process at uniform times (Esser et al. 2024, eq. 21)."""

    def unit(self, batch_size, device, generator):
        u = torch.rand(batch_size, device=device, generator=generator)
        return 1 - 1 / (torch.tan(0.5 * math.pi * u) + 1)

    def unit_density(self, u):
        return 2 / (math.pi * (1 - 2 * u + 2 * u**2))


class EDMLogNormal(Uniform):
    """log(sigma / alpha) ~ N(P_mean, P_std^2), cut to [T_min, T_max] (Karras et al. 2022, table 1, for any process).

    Raises UserError if nearly all of it lies outside.
    """

    def __init__(self, process, T_min: float = 0.0, T_max: float = 1.0, edm_P_mean: float = -1.2, edm_P_std: float = 1.2):
        super().__init__(T_min, T_max)
        self.process, self.mean, self.std = process, edm_P_mean, edm_P_std
        self.ends = torch.special.ndtr(torch.stack([self.normal(process.at(time)) for time in (T_min, T_max)])).tolist()
        if not self.ends[1] - self.ends[0] > 1e-3:
            raise UserError(f"edm_P_mean {edm_P_mean} and edm_P_std {edm_P_std} put fewer than one time in 1,000 between T_min and T_max: "
                            "use values such as -1.2 and 1.2")

    def normal(self, c):
        """What is N(0, 1) before the cut."""
        return (-c.log_snr / 2 - self.mean) / self.std

    def __call__(self, batch_size, device=None, generator=None):
        low, high = self.ends
        u = low + (high - low) * torch.rand(batch_size, device=device, generator=generator, dtype=torch.float64)
        t = self.process.time(-2 * (self.mean + self.std * torch.special.ndtri(u)))
        return t.float().clamp(self.T_min, self.T_max)

    def density(self, t):
        c = self.process.coefs(t.double())
        by_normal = c.delta / c.sigma**2 / self.std  # the derivative of `normal` in t
        return (normal_density(self.normal(c)) * by_normal / (self.ends[1] - self.ends[0])).to(t.dtype)


TIME_SAMPLERS = {
    "uniform": Uniform, "stratified": Stratified, "logit_normal": LogitNormal, "edm_log_normal": EDMLogNormal, "beta": Beta, "mode": Mode,
    "cosmap": CosMap,
}
