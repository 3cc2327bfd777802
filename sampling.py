"""Samplers take noise to data, by an ODE or an SDE. The grids of times and guidance are here too.

A sampler is a function `sampler(field, x, ts) -> x` of a `Field`, a state x (B, ...) at ts[0], and a grid ts, a list
of times that falls from ts[0] to ts[-1]. An SDE sampler also takes `noise`. A grid of n + 1 times makes n steps, and
the result is x (B, ...) at ts[-1]. A step takes the times t and t_next. Time runs backwards, so it has dt < 0:

    ODE:  dx = velocity dt                                     (Song et al. 2021, eq. 13)
    SDE:  dx = (velocity - eps score) dt + sqrt(2 eps) dW      (Ma et al. 2024, "SiT", section 2)

Both have the same marginals, for any eps(t) >= 0. With eps = delta, the SDE is the exact reversal of the forward SDE
(Anderson 1982). x is here what is not known of xt, z = xt - shift m, with m the mean of the base: the field adds
shift m for its network, and `draw` at the end. Without a condition m is 0, and x is xt.

To add a sampler, write such a function and give it a row in ODE_SAMPLERS or SDE_SAMPLERS. A further argument that has
the name of a setting of config.py gets that setting. A new eps is a row of DIFFUSIONS, a new grid a row of GRIDS.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from prediction import convert, convert_output, error_factor, without_mean
from processes import BASES, Process
from utils import UserError, append_dims, call_with_settings, in_batches, look_up, parameters_of, row_noise

MAX_ERROR_FACTOR, LATEST_RATIO = 1000.0, 20.0  # see Field
CLIP_SHARE = 0.995  # of the values of a sample, which `dynamic` does not clip

# eps of the SDE at coefficients c and time t, as in SiT's code; its paper writes w for 2 eps (Ma et al. 2024)
DIFFUSIONS = {
    "delta": lambda c: c.delta,
    "own": lambda c: c.own_eps,  # that of model_type drift
    "sigma": lambda c: c.sigma,
    "constant": lambda t: 1.0,
    "sin2": lambda t: math.sin(math.pi * t) ** 2,
}


def dynamic_clip(x0):
    """x0 (B, ...) within [-s, s], divided by s: the quantile CLIP_SHARE of a sample's |x0|, or 1 if that is larger.

    (Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models", section 2.3.)
    """
    s = append_dims(x0.abs().flatten(1).quantile(CLIP_SHARE, dim=1).clamp(min=1), x0.ndim)
    return x0.clamp(-s, s) / s


CLIPS = {"none": None, "static": lambda x0: x0.clamp(-1, 1), "dynamic": dynamic_clip}


@dataclass
class Field:
    """A network whose prediction can be read as any kind: `field(x, time, "velocity")`, for given labels and guidance.

    `net(xt, t, label, cond)` predicts the kind `model_type` at xt = x + shift m. `label` is (B,) int64 or None, `cond`
    (B, C, ...) or None, and `m` (B, ...) the mean of the base, or 0. All predictions are about x, without the part of m
    that is known. If the process has a gamma, E[z | xt] comes after the prediction, along the channels. `calls` counts
    the calls of the network and of the guide. `sde_diffusion` (a name in DIFFUSIONS) and the factor `sde_scale` give
    the eps of the SDE.

    Guidance: let c be the network's prediction, u that of a guide, and s = `guidance_scale`. Then u + s (c - u) is
    used. Every conversion is affine in the prediction, so the result is the same for every kind. The guide is the
    network without labels (classifier-free guidance: Ho & Salimans 2022, eq. 6, with s = 1 + w), and, if `cond_dropout`
    hid some in training, without condition, so that its m is 0. Or it is `guide`, a worse network with the same
    arguments and model_type (autoguidance: Karras et al. 2024, eq. 3). Either guide is called only at times in
    [guidance_t_min, guidance_t_max] (Kynkaanniemi et al. 2024, section 3), and never if s is 1.

    Near the noise: where alpha falls to 0 at t = 1, an x0 computed from a prediction of x1 or of the score has the
    network's error divided by alpha. If at t = 1 this error is more than MAX_ERROR_FACTOR times the network's, the
    network is never called later than the time `latest`, at which sigma / alpha is LATEST_RATIO. For a later time, x is
    scaled to the noise of `latest`, and the x0 that the network predicts there is used. The price: the network expects
    x0 in its input, and the scaled x has almost none.

    Clipping: `clip_x0` (a name in CLIPS) limits the predicted x0, and every other kind is computed from that. Where
    sigma is 0, x0 does not determine the other kinds, which are then those of the network.

    If the base is the point m, x is 0 at t = 1, and a conversion there is 0 / 0: its limit is used.
    """

    net: Callable
    process: Process
    model_type: str
    label: Tensor | None = None
    guidance_scale: float = 1.0
    guide: Callable | None = None
    guidance_t_min: float = 0.0
    guidance_t_max: float = 1.0
    sde_diffusion: str = "delta"
    sde_scale: float = 1.0
    cond: Tensor | None = None
    m: Tensor | float = 0.0
    cond_dropout: float = 0.0
    clip_x0: str = "none"

    def __post_init__(self):
        self.calls = 0
        self.given = (self.label, self.cond, self.m)
        hidden = (None, None, 0.0) if self.cond_dropout else (None, self.cond, self.m)
        self.guiding = (self.guide, *self.given) if self.guide else (self.net, *hidden)  # the guide, and what it gets
        can_hide = self.label is not None or self.cond is not None and self.cond_dropout
        self.guided = self.guidance_scale != 1 and (self.guide or can_hide)
        end = self.process.at(1.0)
        loses_x0 = end.sigma * error_factor(end, self.model_type) > MAX_ERROR_FACTOR
        self.latest = self.process.time(torch.tensor(-2 * math.log(LATEST_RATIO))).item() if loses_x0 else math.inf

    def predict(self, x, time, guided_at, *until):
        """The network's prediction, of kind model_type, at x (B, ...) and one time, in the type of x.

        Guidance acts as at the time `guided_at`. Of a flow map, it is the average velocity until a second time.
        """
        c = self.process.at(time)
        t, *s = (x.new_full((len(x),), each) for each in (time, *until))
        for end in until:
            c = c._replace(shift_dot=(self.process.at(end).shift - c.shift) / (end - time))

        def call(net, label, cond, m):
            self.calls += 1
            out = net(x + c.shift * m, t, label, cond, *s)
            return without_mean(out.to(x.dtype), c, self.model_type, m)

        out = call(self.net, *self.given)
        # edm_churn may go beyond t = 1
        if self.guided and self.guidance_t_min <= min(guided_at, 1.0) <= self.guidance_t_max:
            guide = call(*self.guiding)
            out = guide + self.guidance_scale * (out - guide)
        return out

    def __call__(self, x, time, *kinds):
        """The prediction at x (B, ...) and one time: one kind, or a list of several, by a single network call."""
        out_kind = self.model_type
        c = self.process.at(min(time, self.process.last))
        if time <= self.latest:
            out = self.predict(x, time, time)
        else:
            out_kind = "x0"
            c_latest = self.process.at(self.latest)
            scaled = c_latest.sigma / c.sigma * x
            out = convert(self.predict(scaled, self.latest, time), scaled, c_latest, self.model_type, out_kind)
        clip = CLIPS[self.clip_x0]
        if clip and (c.sigma > 0 or kinds == ("x0",)):
            out, out_kind = clip(convert(out, x, c, out_kind, "x0")), "x0"
        converted = [convert_output(out, x, c, out_kind, kind) for kind in kinds]
        return converted[0] if len(kinds) == 1 else converted

    def drift(self, x, time, eps):
        """The drift velocity - eps score of the SDE at x (B, ...) and one time."""
        velocity, score = self(x, time, "velocity", "score")
        return velocity - eps * score

    def eps(self, t, t_next):
        """eps for the step from t to t_next: its value in the middle of the step, at most sigma(t_next)^2 / (2 |dt|).

        So no step adds more noise than there is at its end. Every eps keeps the marginals, but in one step a larger one
        would overshoot, as `constant` would near the data and `delta` near the noise. Of gamma, it is that noise.
        """
        middle = (t + t_next) / 2
        eps = call_with_settings(look_up(DIFFUSIONS, self.sde_diffusion), {"c": self.process.at(middle), "t": middle})
        return min(self.sde_scale * float(eps), self.process.at(t_next).noise.item() ** 2 / (2 * abs(t_next - t)))


# ---- Grids. Each maps u (n + 1,) in [0, 1] to times (n + 1,), from T_min at u = 0 to T_max at u = 1, all float64


def uniform(u, T_min, T_max):
    """Equal steps of t."""
    return T_min + (T_max - T_min) * u


def quadratic(u, T_min, T_max):
    """Equal steps of sqrt(t), so that steps of t are shorter near the data (Song et al. 2020, "DDIM", appendix D.2)."""
    return uniform(u, T_min**0.5, T_max**0.5) ** 2


def shifted(u, T_min, T_max, grid_shift):
    """With grid_shift > 1, steps of t are shorter near the noise, as large images need.

    (Esser et al. 2024, "Scaling Rectified Flow", eq. 23.)
    """
    return uniform(grid_shift * u / (1 + (grid_shift - 1) * u), T_min, T_max)


def log_snr(u, T_min, T_max, process):
    """Equal steps of the log-SNR (Lu et al. 2022, "DPM-Solver", section 3.3)."""
    return process.time(uniform(u, process.at(T_min).log_snr, process.at(T_max).log_snr))


def edm(u, T_min, T_max, process, rho):
    """Equal steps of (sigma / alpha)^(1 / rho): EDM's noise levels, for any process (Karras et al. 2022, eq. 5)."""
    low, high = ((process.at(time).log_snr / (-2 * rho)).exp() for time in (T_min, T_max))
    return process.time(-2 * rho * uniform(u, low, high).log())


GRIDS = {"uniform": uniform, "quadratic": quadratic, "shifted": shifted, "log_snr": log_snr, "edm": edm}
# The grids with small steps of the noise level down to T_min. The last step of the others is a large one.
NOISE_LEVEL_GRIDS = ("log_snr", "edm")


def make_grid(sampling_steps, T_min, T_max, grid="uniform", **settings):
    """A list of the n + 1 times of n = `sampling_steps` steps, from T_max down to T_min; both ends are exact.

    `settings` may hold arguments of the grid; others are ignored. Raises UserError if the times are not finite or do
    not fall from one to the next, and for an unknown grid.
    """
    u = torch.linspace(1, 0, sampling_steps + 1, dtype=torch.float64)
    ts = call_with_settings(look_up(GRIDS, grid), settings, u=u, T_min=T_min, T_max=T_max)
    ts = [T_max, *ts.tolist()[1:-1], T_min]
    if not all(a > b for a, b in pairwise(ts)):
        raise UserError(f"grid {grid} of {sampling_steps} steps from {T_max} to {T_min} does not fall at every step: "
                        "use --grid uniform, fewer --sampling_steps, or a run with --T_min 1e-4 --T_max 0.9999")
    return ts


# ---- Samplers of the ODE


@torch.no_grad()
def euler(field, x, ts):
    """Euler's method: order 1, n network calls."""
    for t, t_next in pairwise(ts):
        x = x + (t_next - t) * field(x, t, "velocity")
    return x


def heun_step(field, x, t, t_next):
    """One step of Heun's method: two network calls."""
    velocity = field(x, t, "velocity")
    velocity_next = field(x + (t_next - t) * velocity, t_next, "velocity")
    return x + (t_next - t) * (velocity + velocity_next) / 2


def heun(field, x, ts, denoise=False):
    """Heun's method: order 2, 2n - 1 network calls; the last step is an Euler step.

    With `denoise`, every step of the grid is Heun's, and a last one goes to the predicted x0: 2n + 1 network calls
    (Karras et al. 2022, algorithm 1).
    """
    return edm_churn(field, x, ts, churn=0.0, denoise=denoise)


@torch.no_grad()
def midpoint(field, x, ts):
    """The midpoint rule: order 2, 2n network calls."""
    for t, t_next in pairwise(ts):
        middle = x + (t_next - t) / 2 * field(x, t, "velocity")
        x = x + (t_next - t) * field(middle, (t + t_next) / 2, "velocity")
    return x


@torch.no_grad()
def rk4(field, x, ts):
    """The classical Runge-Kutta method: order 4, 4n network calls. It also calls the network at ts[-1]."""
    for t, t_next in pairwise(ts):
        h, middle = t_next - t, (t + t_next) / 2
        k1 = field(x, t, "velocity")
        k2 = field(x + h / 2 * k1, middle, "velocity")
        k3 = field(x + h / 2 * k2, middle, "velocity")
        k4 = field(x + h * k3, t_next, "velocity")
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def solve_adaptively(slope, state, t_from, t_to, rtol, atol):
    """Solves d state / dt = slope(t, state) from t_from to t_to by torchdiffeq's dopri5, and returns the state at t_to.

    `state` is a tuple of tensors, and so is its slope. Raises UserError if no step is small enough for the tolerances.
    """
    from torchdiffeq import odeint

    times = state[0].new_tensor([t_from, t_to], dtype=torch.float64)
    try:  # without step_t, the solver steps beyond t_to and interpolates; but some processes end at t_to
        solution = odeint(lambda t, state: slope(t.item(), state), state, times, rtol=rtol, atol=atol, method="dopri5",
                          options={"step_t": times[1:]})
    except AssertionError as error:
        raise UserError(
            f"dopri5 found no step from t = {t_from} to {t_to} ({error}): the network's output is not finite, or the "
            "tolerances are too small; use --rtol 1e-4 --atol 1e-4, or another --sampler") from error
    return [part[-1] for part in solution]


@torch.no_grad()
def dopri5(field, x, ts, rtol=1e-5, atol=1e-5):
    """The adaptive method of Dormand & Prince: order 5, from ts[0] to ts[-1].

    Its steps follow from `rtol` and `atol`; it ignores the times of the grid in between. They are chosen for the batch
    as a whole, so within the tolerances a sample depends on the rest of its batch.
    """
    return solve_adaptively(lambda t, state: (field(state[0], t, "velocity"),), (x,), ts[0], ts[-1], rtol, atol)[0]


@torch.no_grad()
def ddim(field, x, ts):
    """DDIM without noise: order 1, n network calls (Song et al. 2020, eq. 12).

    This is an exponential integrator: it is exact if the predicted x0 is constant.
    """
    for t, t_next in pairwise(ts):
        x0, x1 = field(x, t, "x0", "x1")
        c_next = field.process.at(t_next)
        x = c_next.alpha * x0 + c_next.sigma * x1
    return x


@torch.no_grad()
def dpmpp_2m(field, x, ts):
    """DPM-Solver++(2M): order 2, n network calls (Lu et al. 2022, "DPM-Solver++", algorithm 2).

    Each step extrapolates x0 from its own prediction and that of the step before. The first and the last step are of
    order 1. The first has no step before it, and after the last no step could correct the error of an extrapolation.
    """
    x0_before = h_before = None
    for t, t_next in pairwise(ts):
        c, c_next = field.process.at(t), field.process.at(t_next)
        x0 = field(x, t, "x0")
        h = (c_next.log_snr - c.log_snr) / 2  # the step of log(alpha / sigma)
        x0_middle = x0
        if x0_before is not None and t_next != ts[-1]:
            x0_middle = x0 + (x0 - x0_before) * (h / h_before / 2)
        x1 = (x - c.alpha * x0_middle) / c.sigma
        x = c_next.alpha * x0_middle + c_next.sigma * x1
        x0_before, h_before = x0, h
    return x


@torch.no_grad()
def flow_map(field, x, ts):
    """Jumps of a flow map: n network calls. It is exact in any number of steps, if the network is: see flow_maps.py."""
    for t, t_next in pairwise(ts):
        x = x + (t_next - t) * field.predict(x, t, t, t_next)
    return x


# ---- Samplers of the SDE. `noise(x)` returns standard normal noise in the shape of x.
# The last step is one of the ODE (edm_churn first adds noise), since no later step could remove its noise.


def euler_maruyama_step(field, x, t, t_next, noise):
    """One step of the Euler-Maruyama method: one network call."""
    eps, dt = field.eps(t, t_next), t_next - t
    return x + dt * field.drift(x, t, eps) + (2 * eps * -dt) ** 0.5 * noise(x)


@torch.no_grad()
def euler_maruyama(field, x, ts, noise=torch.randn_like):
    """The Euler-Maruyama method: n network calls."""
    for t, t_next in pairwise(ts[:-1]):
        x = euler_maruyama_step(field, x, t, t_next, noise)
    return euler(field, x, ts[-2:])


@torch.no_grad()
def stochastic_heun(field, x, ts, noise=torch.randn_like):
    """Heun's method for the SDE: 2n - 1 network calls (Kloeden & Platen 1992, chapter 15).

    Its weak order is 2, since the size of the noise does not depend on x.
    """
    for t, t_next in pairwise(ts[:-1]):
        eps, dt = field.eps(t, t_next), t_next - t
        dw = (2 * eps * -dt) ** 0.5 * noise(x)
        drift = field.drift(x, t, eps)
        drift_next = field.drift(x + dt * drift + dw, t_next, eps)
        x = x + dt * (drift + drift_next) / 2 + dw
    return euler(field, x, ts[-2:])


@torch.no_grad()
def predictor_corrector(field, x, ts, noise=torch.randn_like, corrector_snr=0.16):
    """An Euler-Maruyama step and then a Langevin step at the new time, again and again: 2n - 1 network calls.

    (Song et al. 2021, algorithms 2 to 5.) The Langevin step has size 2 (corrector_snr sigma)^2. In place of sigma, Song
    et al. use |noise| / |score|, averaged over the batch. Far from the data the two are equal. Near the data |score| is
    smaller than |noise| / sigma, so that their step is longer.
    """
    for t, t_next in pairwise(ts[:-1]):
        x = euler_maruyama_step(field, x, t, t_next, noise)
        step = 2 * (corrector_snr * field.process.at(t_next).noise) ** 2
        x = x + step * field(x, t_next, "score") + (2 * step).sqrt() * noise(x)
    return euler(field, x, ts[-2:])


@torch.no_grad()
def ancestral(field, x, ts, noise=torch.randn_like):
    """DDPM's sampler: n network calls. x at t_next is drawn from q(x_{t_next} | x_t, x0), at the predicted x0.

    This is `ddim` with a part of the noise x1 replaced by new noise, so that sigma(t_next) is the same.

    (Ho et al. 2020, eqs. 6 and 7; for any alpha and sigma: Kingma et al. 2021, "Variational Diffusion Models", appendix
    A.2.)
    """
    for t, t_next in pairwise(ts[:-1]):
        c, c_next = field.process.at(t), field.process.at(t_next)
        x0, x1 = field(x, t, "x0", "x1")
        kept = c.alpha * c_next.sigma**2 / (c_next.alpha * c.sigma)  # of the noise in x
        x = c_next.alpha * x0 + kept * x1 + (c_next.sigma**2 - kept**2).sqrt() * noise(x)
    return ddim(field, x, ts[-2:])


@torch.no_grad()
def edm_churn(field, x, ts, noise=torch.randn_like, churn=30.0, churn_min=0.01, churn_max=1.0, churn_noise=1.0,
              denoise=False):
    """EDM's stochastic sampler: `heun`, with as many network calls, but each step first adds noise.

    (Karras et al. 2022, algorithm 2, here for any alpha and sigma.) Where sigma / alpha is in [churn_min, churn_max],
    noise of standard deviation `churn_noise` raises it by the factor 1 + min(churn / n, sqrt(2) - 1), with n the number
    of steps. The step then starts at the time of that noise level. This may be later than t = 1, where the formulas of
    a process hold too.
    """
    ends = ts[1:] + [None] * denoise  # where each step ends; None: at the predicted x0
    for t, t_next in zip(ts, ends):
        c = field.process.at(t)
        if churn > 0 and churn_min <= c.sigma / c.alpha <= churn_max:
            factor = 1 + min(churn / len(ends), 2**0.5 - 1)
            t = max(t, field.process.inverse(c.log_snr - 2 * math.log(factor)).item())
            c_raised = field.process.at(t)
            ratio = c_raised.alpha / c.alpha
            x = ratio * x + (c_raised.sigma**2 - (ratio * c.sigma) ** 2).clamp(min=0).sqrt() * churn_noise * noise(x)
        if t_next is None:
            x = field(x, t, "x0")
        else:
            x = heun_step(field, x, t, t_next) if t_next != ends[-1] else euler(field, x, [t, t_next])
    return x


ODE_SAMPLERS = {
    "euler": euler, "heun": heun, "midpoint": midpoint, "rk4": rk4, "ddim": ddim, "dpmpp_2m": dpmpp_2m,
    "dopri5": dopri5, "flow_map": flow_map,
}
SDE_SAMPLERS = {
    "euler_maruyama": euler_maruyama, "stochastic_heun": stochastic_heun, "predictor_corrector": predictor_corrector,
    "ancestral": ancestral, "edm_churn": edm_churn,
}
SAMPLERS = ODE_SAMPLERS | SDE_SAMPLERS
# The samplers that can start at a point, where sigma is 0 and xt says nothing about x0
FROM_A_POINT = ("euler_maruyama", "stochastic_heun", "predictor_corrector")
# The others know of no noise but x1, and so nothing of gamma
WITH_GAMMA = ("euler", "heun", "midpoint", "rk4", "dopri5", *FROM_A_POINT)


def field_of(rows, shape, device, labels=None, cond=None, base="noise", **settings):
    """The field of items of this shape for these `rows` of the labels (N,) and conditions (N, C, ...) of all.

    `base` (a name in BASES) makes the mean of the base of cond. `settings` may hold the other arguments of `Field`.
    """
    label, cond = (x if x is None else x[torch.tensor(rows) % len(x)].to(device) for x in (labels, cond))
    return call_with_settings(Field, settings, label=label, cond=cond, m=look_up(BASES, base)(cond, shape))


def draw(net, process, *, rows, shape, device, seed, sampler, sampling_steps, T_min, T_max,
         grid="uniform", denoise=False, sampling_batch_size=None, start=None, reverse=False, **settings):
    """Yields the samples `rows`, in order, as batches (B, *shape) in float32 on `device`, each with its network calls.

    `rows` is a range. xt starts at `T_max`, as the mean of the base plus sigma(T_max) times noise, and ends at `T_min`.
    Of a source, the points `start` (N, ...) take the place of this noise. With `reverse` they are data, at `T_min`, and
    the ODE leads from there to `T_max`.
    Sample i is a function of (seed, i), to rounding (dopri5: to its tolerance). It depends neither on
    `sampling_batch_size`, which is halved where memory does not suffice, nor on how the samples are shared among ranks.

    `denoise` returns the predicted x0 in place of xt at T_min. A sampler with an argument `denoise` does this as a step
    of its own, if the grid is one of NOISE_LEVEL_GRIDS, and if the error of x1, computed from the network's prediction
    at T_min, is less than MAX_ERROR_FACTOR times the network's. Else x0 is predicted after the sampler's last step.

    `settings` may hold arguments of `field_of`, such as `labels` and `cond` of every sample from 0 on, not only of
    `rows`; of `Field`, such as model_type; of the grid and of the sampler. Others are ignored. Raises UserError for an
    unknown sampler or grid.
    """
    settings = {**settings, "process": process}
    ts = make_grid(sampling_steps, T_min, T_max, grid, **settings)
    solve = look_up(SAMPLERS, sampler)
    if reverse:
        ts = ts[::-1]
        denoise = False
    c_start = process.at(ts[0])
    c_end = process.at(ts[-1])
    sampler_denoises = (denoise and grid in NOISE_LEVEL_GRIDS and "denoise" in parameters_of(solve)
                        and c_end.alpha * error_factor(c_end, settings["model_type"]) < MAX_ERROR_FACTOR)

    @torch.no_grad()
    def draw_batch(batch):
        noise = row_noise(batch, shape, device, seed, "sample")
        field = field_of(batch, shape, device, net=net, **settings)
        x = c_start.sigma * noise() if start is None else start[batch.start : batch.stop].to(device)
        if process.gamma:
            x = x + c_start.gamma * noise()
        x = call_with_settings(solve, {**settings, "noise": noise, "denoise": sampler_denoises}, field=field, x=x,
                               ts=ts)
        if denoise and not sampler_denoises:
            x = field(x, T_min, "x0")
        return x if denoise else x + c_end.shift * field.m, field.calls

    yield from in_batches(draw_batch, rows, sampling_batch_size or len(rows))
