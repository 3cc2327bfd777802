"""Computes the log-likelihood of data by the probability-flow ODE, and from it bits per dimension.

Along dx = velocity dt the log-density changes by d log p = -div velocity dt (Chen et al. 2018, "Neural Ordinary
Differential Equations", theorem 1; Song et al. 2021, eq. 39), so that

    log p(x at T_min) = log N(x at T_max; 0, sigma(T_max)^2 I) + int_{T_min}^{T_max} div velocity dt.

This is the exact log-density of the samples that the ODE draws with this network. The divergence is computed exactly,
by one gradient for each dimension, or by Hutchinson's unbiased estimate e^T (d velocity / dx) e (Grathwohl et al. 2018,
"FFJORD", section 3.1). Each row has one probe e, the same at all times: the integrand is then smooth in t, so that an
adaptive solver needs few steps.

To add a probe, add a row to PROBES.
"""

import math

import torch

from sampling import field_of, solve_adaptively
from utils import call_with_settings, in_batches, look_up, row_noise

# The vector e of Hutchinson's estimate, made from standard normal noise. None: the exact divergence.
PROBES = {
    "exact": lambda noise: None,
    "rademacher": lambda noise: torch.where(noise() < 0, -1.0, 1.0),
    "gaussian": lambda noise: noise(),
}


def divergence(velocity, x, probe):
    """div velocity, (B,), at x (B, ...). `velocity` must be computed from this x, which must require gradients.

    With a probe e (B, ...) it is Hutchinson's estimate, e^T (d velocity / dx) e. Without one it is exact: the sum of
    these over all unit vectors e.
    """
    probes, total = [probe], 0.0
    if probe is None:
        probes = torch.eye(x[0].numel(), device=x.device, dtype=x.dtype).reshape(-1, *x.shape[1:])
    for e in probes:
        (gradient,) = torch.autograd.grad(velocity, x, e.expand_as(x), retain_graph=probe is None)
        total = total + (gradient * e).flatten(1).sum(1)
    return total


def flow(field, x, t_from, t_to, probe=None, rtol=1e-5, atol=1e-5):
    """Solves the ODE from x (B, ...) at t_from to t_to, which may be earlier or later.

    Returns x at t_to, and log p there minus log p at t_from, (B,), in nats. The solver is torchdiffeq's dopri5, with
    the tolerances `rtol` and `atol` for both.
    """
    def slope(t, state):
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            velocity = field(y, t, "velocity")
            return velocity.detach(), -divergence(velocity, y, probe)

    return solve_adaptively(slope, (x, x.new_zeros(len(x))), t_from, t_to, rtol, atol)


def log_likelihood(field, x0, T_min, T_max, probe=None, log_prior=None, rtol=1e-5, atol=1e-5):
    """log p(x0), (B,), in nats, of data x0 (B, ...) at T_min.

    `log_prior(x)` is the log-density (B,) at T_max, by default that of N(0, sigma(T_max)^2 I).
    """
    x1, change = flow(field, x0, T_min, T_max, probe, rtol, atol)
    base = torch.distributions.Normal(0.0, field.process.at(T_max).sigma, validate_args=False)
    return (log_prior(x1) if log_prior else base.log_prob(x1).flatten(1).sum(1)) - change


def bits_per_dim(log_p, dims, bin_width=1 / 127.5):
    """Bits per dimension (B,) of integer pixels, from the log-density `log_p` (B,), in nats, of dequantized pixels.

    `dims` is the number of values in an image. `bin_width` is the distance between neighbouring pixel values; scaled
    from 0 ... 255 to [-1, 1], they are 1 / 127.5 apart. The mean over u is an upper bound on the bits of the pixels:

        P(pixels) >= exp(E log p(x + bin_width (u - 1/2))) bin_width^dims,    u uniform on [0, 1)

    (Theis et al. 2015, "A note on the evaluation of generative models", section 3.1).
    """
    return -(log_p / dims + math.log(bin_width)) / math.log(2)


def log_likelihoods(net, process, data, *, rows, device, seed, T_min, T_max, probe="rademacher",
                    bin_width=0.0, batch_size=100, **settings):
    """Yields log p, (B,) float32 in nats on `device`, of the items `rows` of `data` (N, ...), in order, in batches.

    `rows` is a range. `data` are scaled as in training. If `bin_width` is not 0, uniform noise of this width
    dequantizes pixels whose values are `bin_width` apart; `bits_per_dim` converts the result to bits. The probe and the
    noise of item i are functions of (seed, i): within the tolerances, the result depends neither on `batch_size` nor on
    the number of ranks. `settings` may hold arguments of `field_of`, such as the items' `labels` and `cond`; of
    `Field`, such as model_type; and of `flow`. Others are ignored. Raises UserError for an unknown probe.
    """
    def log_p(batch):
        noise = row_noise(batch, data.shape[1:], device, seed, "likelihood")
        x0 = data[batch.start : batch.stop].to(device)
        if bin_width:
            x0 = x0 + bin_width * (torch.special.ndtr(noise()) - 0.5)
        settings["clip_x0"] = "none"  # what is clipped has no density
        field = field_of(batch, data.shape[1:], device, net=net, process=process, **settings)
        x0 = x0 - process.at(T_min).shift * field.m  # what is not known of xt at T_min
        e = look_up(PROBES, probe)(noise)
        return call_with_settings(log_likelihood, settings, field=field, x0=x0, T_min=T_min, T_max=T_max, probe=e)

    yield from in_batches(log_p, rows, batch_size)
