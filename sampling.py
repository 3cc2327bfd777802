"""From noise to data: ODE and SDE samplers, the grid of times, and classifier-free guidance.

A sampler is a flat function `sampler(field, x, ts, noise) -> x` of a field, a state x at ts[0] and a grid ts that falls from
ts[0] to ts[-1]. n steps take a grid of n + 1 times, and x ends at ts[-1]. Time runs backwards, so every step has dt < 0:

    ODE:  dx = velocity dt                                     (Song et al. 2021, eq. 13)
    SDE:  dx = (velocity - eps score) dt + sqrt(2 eps) dW      (Ma et al. 2024, "SiT", section 2)

both with the same marginals, for any eps(t) >= 0; eps = delta is the exact reversal of the forward SDE (Anderson 1982).
To add a sampler, write such a function and give it a row in SAMPLERS; a new eps is a row of DIFFUSIONS.
"""

import torch
from torch import Tensor

from prediction import convert, target
from processes import Process
from utils import RowNoise, UserError, choose

DIFFUSIONS = {
    "delta": lambda process, t: process.delta(t),
    "sigma": lambda process, t: process.sigma(t),
}


class Field:
    """A network read as velocity and score, for given labels and guidance.

    `net(xt, t, label)` predicts `model_type`; `label` is (B,) int64 or None. `guidance_scale` s mixes the conditional and the
    unconditional prediction as u + s (c - u) (Ho & Salimans 2022, eq. 6, with s = 1 + w); s = 1 takes one network call.
    Every conversion is affine in the prediction, so it does not matter in which kind the two are mixed.
    """

    def __init__(self, net, process: Process, model_type: str, label: Tensor | None = None, guidance_scale: float = 1.0,
                 sde_diffusion: str = "delta"):
        self.net, self.process, self.model_type, self.label = net, process, model_type, label
        self.guidance_scale, self.sde_diffusion = guidance_scale, sde_diffusion

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided prediction at x (B, ...) and t (B,), in float32 or wider."""
        out = self.net(x, t, self.label).to(x.dtype)
        if self.guidance_scale != 1 and self.label is not None:
            unconditional = self.net(x, t, None).to(x.dtype)
            out = unconditional + self.guidance_scale * (out - unconditional)
        return out

    def velocity(self, x: Tensor, time: float) -> Tensor:
        """The velocity of the ODE at x (B, ...) and one time."""
        t = torch.full((x.shape[0],), time, device=x.device, dtype=x.dtype)
        return convert(self.predict(x, t), x, self.process.coefs(t, x.ndim), self.model_type, "velocity")

    def reverse_sde(self, x: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """Drift velocity - eps score, shape (B, ...), and g = sqrt(2 eps), a scalar, of the SDE at x and one time."""
        t = torch.full((x.shape[0],), time, device=x.device, dtype=x.dtype)
        c, out = self.process.coefs(t, x.ndim), self.predict(x, t)
        eps = choose(DIFFUSIONS, self.sde_diffusion, process=self.process, t=t)[0]
        velocity, score = (convert(out, x, c, self.model_type, kind) for kind in ("velocity", "score"))
        return velocity - eps * score, (2 * eps).sqrt()


def uniform_grid(n: int, T_min: float, T_max: float) -> list[float]:
    """The n + 1 times of n equal steps from T_max down to T_min; both ends are exact."""
    return [T_max + (T_min - T_max) * i / n for i in range(n)] + [T_min]


def check_times(process: Process, model_type: str, target_type: str, sde_diffusion: str, T_min: float, T_max: float) -> None:
    """Raises UserError if what training or sampling computes from a network's output is not finite at T_min or T_max."""
    one = torch.ones(1, 1)
    field = Field(lambda x, t, label: one, process, model_type, sde_diffusion=sde_diffusion)
    for name, time, fix in (("T_min", T_min, "--T_min 1e-4"), ("T_max", T_max, "--T_max 0.9999")):
        c = process.coefs(torch.tensor([time]), ndim=2)
        values = {
            f"the target {target_type}": target(target_type, c, one, one),
            f"{target_type} from a network that predicts {model_type}": convert(one, 2 * one, c, model_type, target_type),
            f"the velocity from a network that predicts {model_type}": field.velocity(2 * one, time),
        }
        if name == "T_max":  # the SDE does not come to T_min, its last step is the ODE's
            values[f"the SDE with sde_diffusion {sde_diffusion}"] = sum(field.reverse_sde(2 * one, time))
        for what, value in values.items():
            if not value.isfinite().all():
                raise UserError(f"{name} {time}: {what} is not finite there; use {fix}")


@torch.no_grad()
def euler(field, x: Tensor, ts: list[float], noise=None) -> Tensor:
    """Euler's method for the ODE: order 1, n network calls."""
    for t, t_next in zip(ts[:-1], ts[1:]):
        x = x + (t_next - t) * field.velocity(x, t)
    return x


@torch.no_grad()
def heun(field, x: Tensor, ts: list[float], noise=None) -> Tensor:
    """Heun's method for the ODE: order 2, 2n - 1 network calls. The last step is Euler's (Karras et al. 2022, algorithm 1)."""
    for t, t_next in zip(ts[:-2], ts[1:-1]):
        velocity = field.velocity(x, t)
        velocity_next = field.velocity(x + (t_next - t) * velocity, t_next)
        x = x + (t_next - t) * (velocity + velocity_next) / 2
    return euler(field, x, ts[-2:])


@torch.no_grad()
def euler_maruyama(field, x: Tensor, ts: list[float], noise=None) -> Tensor:
    """The Euler-Maruyama method for the SDE: n network calls. `noise()` draws as x; without it, torch's generator does.

    The last step is Euler's for the ODE: no noise is added that nothing could remove.
    """
    noise = noise or (lambda: torch.randn_like(x))
    for t, t_next in zip(ts[:-2], ts[1:-1]):
        drift, g = field.reverse_sde(x, t)
        x = x + (t_next - t) * drift + g * (t - t_next) ** 0.5 * noise()
    return euler(field, x, ts[-2:])


SAMPLERS = {"euler": euler, "heun": heun, "euler_maruyama": euler_maruyama}


def draw(net, process: Process, *, rows: range, shape: tuple[int, ...], device, seed: int, model_type: str, sampler: str,
         sampling_steps: int, T_min: float, T_max: float, labels: Tensor | None = None, guidance_scale: float = 1.0,
         sde_diffusion: str = "delta", batch_size: int | None = None):
    """Yields the samples `rows`, in order, in batches (B, *shape) of float32 on `device`.

    Sample i is a function of (seed, i), to rounding: it does not depend on `batch_size` or on how samples are shared among
    processes. `labels` (N,) holds a label for every sample from 0 on, of which `rows` are used. `T_max` is where x starts,
    as sigma(T_max) times noise, and `T_min` is where it ends. Raises UserError for an unknown sampler.
    """
    ts = uniform_grid(sampling_steps, T_min, T_max)
    batch_size = batch_size or max(len(rows), 1)
    for start in range(rows.start, rows.stop, batch_size):
        batch = range(start, min(start + batch_size, rows.stop))
        noise = RowNoise(batch, shape, device, seed, "sample")
        label = None if labels is None else labels[batch.start : batch.stop].to(device)
        field = Field(net, process, model_type, label, guidance_scale, sde_diffusion)
        x = process.sigma(torch.tensor(T_max)).item() * noise()
        yield choose(SAMPLERS, sampler, field=field, x=x, ts=ts, noise=noise)
