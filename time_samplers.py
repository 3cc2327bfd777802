"""How training times are drawn: `sampler(batch_size, device, generator) -> t`, shape (B,), float32, inside [T_min, T_max].

The batch is the global one, so that a stratified sampler sees it whole; every process draws it all and takes its rows.
To add one, write a class and give it a row in TIME_SAMPLERS. Its `__init__` may name settings of config.py.
"""

import torch
from torch import Tensor


class Uniform:
    """t uniform on [T_min, T_max]."""

    def __init__(self, T_min: float = 0.0, T_max: float = 1.0):
        self.T_min, self.T_max = T_min, T_max

    def unit(self, batch_size: int, device, generator) -> Tensor:
        """Times on [0, 1]: what a subclass changes."""
        return torch.rand(batch_size, device=device, generator=generator)

    def __call__(self, batch_size: int, device=None, generator: torch.Generator | None = None) -> Tensor:
        t = self.T_min + (self.T_max - self.T_min) * self.unit(batch_size, device, generator)
        return t.clamp(self.T_min, self.T_max)  # rounding may step over an end by one unit in the last place


class Stratified(Uniform):
    """Uniform, with one time in each of B equal intervals, in random order (Kingma et al. 2021, appendix I.1, who shift one grid)."""

    def unit(self, batch_size, device, generator):
        cell = torch.randperm(batch_size, device=device, generator=generator)
        return (cell + torch.rand(batch_size, device=device, generator=generator)) / batch_size


class LogitNormal(Uniform):
    """logit(t) ~ N(loc, scale^2), on [0, 1] and then scaled to [T_min, T_max] (Esser et al. 2024, "Scaling Rectified Flow", eq. 19)."""

    def __init__(self, T_min: float = 0.0, T_max: float = 1.0, logit_normal_loc: float = 0.0, logit_normal_scale: float = 1.0):
        super().__init__(T_min, T_max)
        self.loc, self.scale = logit_normal_loc, logit_normal_scale

    def unit(self, batch_size, device, generator):
        normal = torch.randn(batch_size, device=device, generator=generator)
        return torch.sigmoid(self.loc + self.scale * normal)


TIME_SAMPLERS = {"uniform": Uniform, "stratified": Stratified, "logit_normal": LogitNormal}
