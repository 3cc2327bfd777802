"""Log-likelihood by the probability-flow ODE, and bits per dimension.

Along dx = velocity dt the log-density changes by d log p = -div velocity dt (Chen et al. 2018, "Neural Ordinary Differential
Equations", theorem 1; Song et al. 2021, eq. 39), so that

    log p(x at T_min) = log N(x at T_max; 0, sigma(T_max)^2 I) + int_{T_min}^{T_max} div velocity dt.

This is the exact density of what the ODE makes of that noise, given the network. The divergence is exact, by one gradient for each
dimension, or Hutchinson's unbiased estimate e^T (d velocity / dx) e (Grathwohl et al. 2018, "FFJORD", section 3.1), with one probe e for
each row, held along the whole trajectory: the integral is then of a smooth function, and an adaptive solver takes few steps.
To add a probe, add a row to PROBES.
"""

import math

import torch
from torch import Tensor

from processes import Process
from sampling import Field, solve_adaptively
from utils import RowNoise, call, choose, in_batches

# The vector e of Hutchinson's estimate, from standard normal noise; None is the exact trace.
PROBES = {
    "exact": lambda: None,
    "rademacher": lambda noise: torch.where(noise() < 0, -1.0, 1.0),
    "gaussian": lambda noise: noise(),
}


def divergence(velocity: Tensor, x: Tensor, probe: Tensor | None) -> Tensor:
    """div velocity (B,) at x (B, ...), which must be what velocity was computed from; exact without a probe."""
    if probe is not None:
        (gradient,) = torch.autograd.grad(velocity, x, probe)
        return (gradient * probe).flatten(1).sum(1)
    flat, total = velocity.flatten(1), torch.zeros_like(x.flatten(1)[:, 0])
    for i in range(flat.shape[1]):
        (gradient,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=i + 1 < flat.shape[1])
        total += gradient.flatten(1)[:, i]
    return total


def flow(field, x: Tensor, t_from: float, t_to: float, probe: Tensor | None = None, rtol: float = 1e-5, atol: float = 1e-5):
    """Carries x (B, ...) along the ODE from one time to another, either way: x there, and log p there - log p here, (B,), in nats.

    By torchdiffeq's dopri5, with these tolerances for both.
    """
    def slope(t, state):
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            velocity = field.velocity(y, t)
            return velocity.detach(), -divergence(velocity, y, probe)

    return solve_adaptively(slope, (x, torch.zeros(len(x), device=x.device, dtype=x.dtype)), t_from, t_to, rtol, atol)


def log_normal(x: Tensor, std: float) -> Tensor:
    """log N(x; 0, std^2 I), (B,), for x (B, ...)."""
    y = x.flatten(1)
    return -0.5 * (y / std).square().sum(1) - y.shape[1] * math.log(std * math.sqrt(2 * math.pi))


def log_likelihood(field, x0: Tensor, T_min: float, T_max: float, probe: Tensor | None = None, log_prior=None, rtol: float = 1e-5,
                   atol: float = 1e-5) -> Tensor:
    """log p(x0), (B,), in nats, of data x0 (B, ...) at T_min. `log_prior(x)` is the log-density at T_max, N(0, sigma^2 I) by default."""
    x1, change = flow(field, x0, T_min, T_max, probe, rtol, atol)
    return (log_prior(x1) if log_prior else log_normal(x1, field.process.at(T_max).sigma.item())) - change


def sample_with_log_likelihood(field, x1: Tensor, T_min: float, T_max: float, probe: Tensor | None = None, rtol: float = 1e-5,
                               atol: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Carries x1 (B, ...), drawn from N(0, sigma(T_max)^2 I), back to T_min: the sample, and its log-likelihood (B,) in nats."""
    x0, change = flow(field, x1, T_max, T_min, probe, rtol, atol)
    return x0, log_normal(x1, field.process.at(T_max).sigma.item()) + change


def bits_per_dim(log_p: Tensor, dims: int, bin_width: float = 1 / 127.5) -> Tensor:
    """Bits per dimension of whole-numbered pixels, from the log-density (nats) of dequantized data in which a bin is so wide.

    P(pixels) >= exp(E log p(x + bin_width (u - 1/2))) bin_width^dims for u uniform on [0, 1) (Theis et al. 2015, "A note on the
    evaluation of generative models", section 3.1). Pixels 0 ... 255 on [-1, 1] are 1 / 127.5 apart.
    """
    return -(log_p / dims + math.log(bin_width)) / math.log(2)


def log_likelihoods(net, process: Process, data: Tensor, *, rows: range, device, seed: int, T_min: float, T_max: float,
                    probe: str = "rademacher", bin_width: float = 0.0, labels: Tensor | None = None, batch_size: int = 100, **settings):
    """Yields log p, (B,) float32 in nats on `device`, of the items `rows` of `data` (N, ...), in order, in batches.

    `data` are as the network is trained on them. Pixels that lie `bin_width` apart are dequantized by uniform noise of that width, and
    `bits_per_dim` makes bits of the result. Probe and noise of item i are functions of (seed, i): neither `batch_size` nor the number
    of processes, each with its own rows, changes the result, to within the tolerances. `labels` (N,) go with `data`.
    `settings` are arguments of `Field`, as model_type, and of `flow`; others are ignored. Raises UserError for an unknown probe.
    """
    def of(batch: range, size: int) -> Tensor:
        noise = RowNoise(batch, data.shape[1:], device, seed, "likelihood")
        x0 = data[batch.start : batch.stop].to(device)
        if bin_width:
            x0 = x0 + bin_width * (torch.special.ndtr(noise()) - 0.5)
        label = None if labels is None else labels[batch.start : batch.stop].to(device)
        field = call(Field, **{**settings, "net": net, "process": process, "label": label})
        e = choose(PROBES, probe, noise=noise)
        return call(log_likelihood, **{**settings, "field": field, "x0": x0, "T_min": T_min, "T_max": T_max, "probe": e})

    yield from in_batches(of, rows, batch_size)
