"""From noise to data: ODE and SDE samplers, the grids of times, classifier-free guidance and autoguidance.

A sampler is a flat function `sampler(field, x, ts) -> x` of a field, a state x at ts[0] and a grid ts that falls from ts[0] to
ts[-1]; one of the SDE also takes `noise`. n steps take a grid of n + 1 times, and x ends at ts[-1]. Time runs backwards, so every
step has dt < 0:

    ODE:  dx = velocity dt                                     (Song et al. 2021, eq. 13)
    SDE:  dx = (velocity - eps score) dt + sqrt(2 eps) dW      (Ma et al. 2024, "SiT", section 2)

both with the same marginals, for any eps(t) >= 0; eps = delta is the exact reversal of the forward SDE (Anderson 1982).
To add a sampler, write such a function and give it a row in ODE_SAMPLERS or SDE_SAMPLERS; its further arguments may name settings
of config.py. A new eps is a row of DIFFUSIONS, a new grid one of GRIDS.
"""

import math

import torch
from torch import Tensor

from prediction import convert, error_factor
from processes import Process
from utils import RowNoise, UserError, call, choose, find, in_batches, parameters_of

FOG, CLEAR = 1000.0, 20.0  # see Field

# eps of the SDE at coefficients c and time t: those of SiT's code, whose paper writes w for 2 eps (Ma et al. 2024)
DIFFUSIONS = {
    "delta": lambda c: c.delta,
    "sigma": lambda c: c.sigma,
    "constant": lambda t: 1.0,
    "sin2": lambda t: math.sin(math.pi * t) ** 2,
}


class Field:
    """A network read as any kind of prediction, for given labels and guidance: `field(x, time, "velocity")`.

    `net(xt, t, label)` predicts `model_type`; `label` is (B,) int64 or None. `guidance_scale` s mixes its prediction c and that of a
    guide, u, as u + s (c - u). The guide is the network without labels (Ho & Salimans 2022, eq. 6, with s = 1 + w), or `guide`, a worse
    network of the same call and kind (autoguidance: Karras et al. 2024, eq. 3). It acts at times in [guidance_t_min, guidance_t_max]
    (Kynkaanniemi et al. 2024, section 3); elsewhere, and for s = 1, it is not called. Every conversion is affine in the prediction, so
    it does not matter in which kind the two are mixed. `calls` counts the network calls, those of the guide too.

    Where alpha falls to 0 at t = 1, x0 from a prediction of x1 or the score is the network's error divided by alpha. So if that would
    be more than FOG times the error, the network is never called later than at `latest`, where sigma / alpha is CLEAR: x0 is then
    predicted there, from x scaled to the noise of that time. It costs what x holds of x0 at `latest`, one part in CLEAR.
    """

    def __init__(self, net, process: Process, model_type: str, label: Tensor | None = None, guidance_scale: float = 1.0, guide=None,
                 guidance_t_min: float = 0.0, guidance_t_max: float = 1.0, sde_diffusion: str = "delta", sde_scale: float = 1.0):
        self.net, self.process, self.model_type, self.label = net, process, model_type, label
        self.guide = guide or (lambda x, t, label: net(x, t, None))
        self.guided = guidance_scale != 1 and (guide is not None or label is not None)
        self.guidance_scale, self.guidance_t_min, self.guidance_t_max = guidance_scale, guidance_t_min, guidance_t_max
        self.sde_diffusion, self.sde_scale, self.calls = sde_diffusion, sde_scale, 0
        end = process.at(1.0)
        foggy = end.sigma * error_factor(end, model_type) > FOG
        self.latest = process.time(torch.tensor(-2 * math.log(CLEAR))).item() if foggy else math.inf

    def predict(self, x: Tensor, time: float, guided_at: float | None = None) -> Tensor:
        """The prediction of model_type at x (B, ...) and one time, guided as at that time or another, in the type of x."""
        t = torch.full((x.shape[0],), time, device=x.device, dtype=x.dtype)
        out = self.net(x, t, self.label).to(x.dtype)
        self.calls += 1
        guided_at = min(time if guided_at is None else guided_at, 1.0)  # edm_churn may step over 1
        if self.guided and self.guidance_t_min <= guided_at <= self.guidance_t_max:
            guide = self.guide(x, t, self.label).to(x.dtype)
            self.calls += 1
            out = guide + self.guidance_scale * (out - guide)
        return out

    def __call__(self, x: Tensor, time: float, *kinds: str):
        """The prediction at x (B, ...) and one time as this kind, or as each of these kinds, by one network call."""
        own, c = self.model_type, self.process.at(time)
        if time <= self.latest:
            out = self.predict(x, time)
        else:
            own, then = "x0", self.process.at(self.latest)
            y = then.sigma / c.sigma * x
            out = convert(self.predict(y, self.latest, time), y, then, self.model_type, own)
        converted = [convert(out, x, c, own, kind) for kind in kinds]
        return converted[0] if len(kinds) == 1 else converted

    def velocity(self, x: Tensor, time: float) -> Tensor:
        """The velocity of the ODE at x (B, ...) and one time."""
        return self(x, time, "velocity")

    def drift(self, x: Tensor, time: float, eps: float) -> Tensor:
        """The drift velocity - eps score of the SDE at x (B, ...) and one time."""
        velocity, score = self(x, time, "velocity", "score")
        return velocity - eps * score

    def eps(self, t: float, t_next: float) -> float:
        """eps on the step from t to t_next: its value in the middle, but no step adds more noise than there is at its end.

        Any eps keeps the marginals; one with 2 eps |dt| > sigma(t_next)^2 would overshoot, as `constant` does near the data and `delta`
        near the noise.
        """
        middle = (t + t_next) / 2
        eps = choose(DIFFUSIONS, self.sde_diffusion, c=self.process.at(middle), t=middle)
        return min(self.sde_scale * float(eps), self.process.at(t_next).sigma.item() ** 2 / (2 * abs(t_next - t)))


# ---- Grids: each gives the times at u in [0, 1], from T_min at u = 0 to T_max at u = 1


def uniform(u: Tensor, T_min: float, T_max: float) -> Tensor:
    """Equal steps of t."""
    return T_min + (T_max - T_min) * u


def quadratic(u: Tensor, T_min: float, T_max: float) -> Tensor:
    """Equal steps of sqrt(t): shorter ones near the data (Song et al. 2020, "DDIM", appendix D.2)."""
    return (T_min**0.5 + (T_max**0.5 - T_min**0.5) * u) ** 2


def shifted(u: Tensor, T_min: float, T_max: float, grid_shift: float) -> Tensor:
    """Shorter steps near the noise for a shift above 1, as large images need (Esser et al. 2024, "Scaling Rectified Flow", eq. 23)."""
    return uniform(grid_shift * u / (1 + (grid_shift - 1) * u), T_min, T_max)


def log_snr(u: Tensor, T_min: float, T_max: float, process: Process) -> Tensor:
    """Equal steps of the log-SNR (Lu et al. 2022, "DPM-Solver", section 3.3)."""
    return process.time(uniform(u, process.at(T_min).log_snr, process.at(T_max).log_snr))


def edm(u: Tensor, T_min: float, T_max: float, process: Process, rho: float) -> Tensor:
    """Equal steps of (sigma / alpha)^(1 / rho): EDM's noise levels, on any process (Karras et al. 2022, eq. 5)."""
    low, high = ((process.at(time).log_snr / (-2 * rho)).exp() for time in (T_min, T_max))
    return process.time(-2 * rho * uniform(u, low, high).log())


GRIDS = {"uniform": uniform, "quadratic": quadratic, "shifted": shifted, "log_snr": log_snr, "edm": edm}
LEVELS = ("log_snr", "edm")  # grids that go to T_min by noise levels; the others jump to it, as to 0


def make_grid(n: int, T_min: float, T_max: float, grid: str = "uniform", **settings) -> list[float]:
    """The n + 1 times of n steps from T_max down to T_min; both ends are exact. Raises UserError if some are not finite, or do not fall."""
    u = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    ts = [T_max, *choose(GRIDS, grid, u=u, T_min=T_min, T_max=T_max, **settings).tolist()[1:-1], T_min]
    if not all(a > b for a, b in zip(ts, ts[1:])):
        raise UserError(f"grid {grid} of {n} steps from {T_max} to {T_min} does not fall from time to time: use --grid uniform, "
                        "fewer --sampling_steps, or a run with --T_min 1e-4 --T_max 0.9999")
    return ts


# ---- Samplers of the ODE


@torch.no_grad()
def euler(field, x: Tensor, ts: list[float]) -> Tensor:
    """Euler's method: order 1, n network calls."""
    for t, t_next in zip(ts[:-1], ts[1:]):
        x = x + (t_next - t) * field.velocity(x, t)
    return x


def heun_step(field, x: Tensor, t: float, t_next: float) -> Tensor:
    velocity = field.velocity(x, t)
    velocity_next = field.velocity(x + (t_next - t) * velocity, t_next)
    return x + (t_next - t) * (velocity + velocity_next) / 2


@torch.no_grad()
def heun(field, x: Tensor, ts: list[float], denoise: bool = False) -> Tensor:
    """Heun's method: order 2, 2n - 1 network calls; the last step is Euler's. With `denoise` that is one more step, to the predicted
    x0, and there are 2n + 1 calls (Karras et al. 2022, algorithm 1)."""
    return edm_churn(field, x, ts, churn=0.0, denoise=denoise)


@torch.no_grad()
def midpoint(field, x: Tensor, ts: list[float]) -> Tensor:
    """The midpoint rule: order 2, 2n network calls."""
    for t, t_next in zip(ts[:-1], ts[1:]):
        middle = x + (t_next - t) / 2 * field.velocity(x, t)
        x = x + (t_next - t) * field.velocity(middle, (t + t_next) / 2)
    return x


@torch.no_grad()
def rk4(field, x: Tensor, ts: list[float]) -> Tensor:
    """The classical Runge-Kutta method: order 4, 4n network calls. It calls the network at ts[-1] too."""
    for t, t_next in zip(ts[:-1], ts[1:]):
        h, middle = t_next - t, (t + t_next) / 2
        k1 = field.velocity(x, t)
        k2 = field.velocity(x + h / 2 * k1, middle)
        k3 = field.velocity(x + h / 2 * k2, middle)
        k4 = field.velocity(x + h * k3, t_next)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def solve_adaptively(slope, state, t_from: float, t_to: float, rtol: float, atol: float):
    """The solution at t_to of d state / dt = slope(t, state), state a tensor or a tuple of them, by torchdiffeq's dopri5.

    Raises UserError where no step is small enough.
    """
    from torchdiffeq import odeint

    times = torch.tensor([t_from, t_to], dtype=torch.float64, device=(state if isinstance(state, Tensor) else state[0]).device)
    try:  # step_t: it would step over t_to and interpolate, but some processes end there
        solution = odeint(lambda t, state: slope(t.item(), state), state, times, rtol=rtol, atol=atol, method="dopri5",
                          options={"step_t": times[1:]})
    except AssertionError as error:
        raise UserError(f"dopri5 found no step from t = {t_from} to {t_to} ({error}): the network's output is not finite, or the "
                        "tolerances are too small; use --rtol 1e-4 --atol 1e-4, or another --sampler") from error
    return solution[-1] if isinstance(state, Tensor) else [part[-1] for part in solution]


@torch.no_grad()
def dopri5(field, x: Tensor, ts: list[float], rtol: float = 1e-5, atol: float = 1e-5) -> Tensor:
    """The adaptive method of Dormand & Prince, order 5, from ts[0] to ts[-1]: `rtol` and `atol` choose the steps, not the grid.

    The steps are chosen for the batch as a whole: a sample depends on the others to within the tolerance.
    """
    return solve_adaptively(lambda t, x: field.velocity(x, t), x, ts[0], ts[-1], rtol, atol)


@torch.no_grad()
def ddim(field, x: Tensor, ts: list[float]) -> Tensor:
    """DDIM without noise: the exponential integrator of order 1, exact for a constant x0 (Song et al. 2020, eq. 12). n network calls."""
    for t, t_next in zip(ts[:-1], ts[1:]):
        x0, x1 = field(x, t, "x0", "x1")
        c = field.process.at(t_next)
        x = c.alpha * x0 + c.sigma * x1
    return x


@torch.no_grad()
def dpmpp_2m(field, x: Tensor, ts: list[float]) -> Tensor:
    """DPM-Solver++(2M): order 2 by the x0 of the step before, n network calls (Lu et al. 2022, "DPM-Solver++", algorithm 2).

    The first step and the last are of order 1: there is no step before, and none that would mend an extrapolation.
    """
    x0_before = h_before = None
    for t, t_next in zip(ts[:-1], ts[1:]):
        now, then = field.process.at(t), field.process.at(t_next)
        x0 = field(x, t, "x0")
        decay = now.alpha * then.sigma / (now.sigma * then.alpha)  # exp(-h), with h the step of log(alpha / sigma)
        h = -decay.log()
        extrapolate = x0_before is not None and t_next != ts[-1]
        x0_middle = x0 + (x0 - x0_before) * (h / h_before / 2) if extrapolate else x0
        x = then.sigma / now.sigma * x + then.alpha * (1 - decay) * x0_middle
        x0_before, h_before = x0, h
    return x


# ---- Samplers of the SDE. `noise()` draws as x; without it, torch's generator does. The last step is one of the ODE: no noise is
# added that nothing could remove.


def euler_maruyama_step(field, x: Tensor, t: float, t_next: float, noise) -> Tensor:
    eps, dt = field.eps(t, t_next), t_next - t
    return x + dt * field.drift(x, t, eps) + (2 * eps * -dt) ** 0.5 * noise()


@torch.no_grad()
def euler_maruyama(field, x: Tensor, ts: list[float], noise=None) -> Tensor:
    """The Euler-Maruyama method: n network calls."""
    noise = noise or (lambda: torch.randn_like(x))
    for t, t_next in zip(ts[:-2], ts[1:-1]):
        x = euler_maruyama_step(field, x, t, t_next, noise)
    return euler(field, x, ts[-2:])


@torch.no_grad()
def stochastic_heun(field, x: Tensor, ts: list[float], noise=None) -> Tensor:
    """Heun's method, of weak order 2 since the noise does not depend on x: 2n - 1 network calls (Kloeden & Platen 1992, chapter 15)."""
    noise = noise or (lambda: torch.randn_like(x))
    for t, t_next in zip(ts[:-2], ts[1:-1]):
        eps, dt = field.eps(t, t_next), t_next - t
        dw = (2 * eps * -dt) ** 0.5 * noise()
        drift = field.drift(x, t, eps)
        drift_next = field.drift(x + dt * drift + dw, t_next, eps)
        x = x + dt * (drift + drift_next) / 2 + dw
    return euler(field, x, ts[-2:])


@torch.no_grad()
def predictor_corrector(field, x: Tensor, ts: list[float], noise=None, corrector_snr: float = 0.16) -> Tensor:
    """An Euler-Maruyama step and then one of Langevin's at the new time: 2n - 1 network calls (Song et al. 2021, algorithms 2 to 5).

    Langevin's step is 2 (corrector_snr sigma)^2. Song et al. take |noise| / |score| over the batch for sigma; far from the data they
    are equal, near them the score is the smaller, and their step the longer.
    """
    noise = noise or (lambda: torch.randn_like(x))
    for t, t_next in zip(ts[:-2], ts[1:-1]):
        x = euler_maruyama_step(field, x, t, t_next, noise)
        step = 2 * (corrector_snr * field.process.at(t_next).sigma) ** 2
        x = x + step * field(x, t_next, "score") + (2 * step).sqrt() * noise()
    return euler(field, x, ts[-2:])


@torch.no_grad()
def ancestral(field, x: Tensor, ts: list[float], noise=None) -> Tensor:
    """DDPM's sampler, x_s from q(x_s | x_t, x0) at the predicted x0: n network calls (Ho et al. 2020, eqs. 6 and 7; for any alpha and
    sigma: Kingma et al. 2021, "Variational Diffusion Models", appendix A.2)."""
    noise = noise or (lambda: torch.randn_like(x))
    for t, t_next in zip(ts[:-2], ts[1:-1]):
        now, then = field.process.at(t), field.process.at(t_next)
        ratio = now.alpha / then.alpha
        added = now.sigma**2 - (ratio * then.sigma) ** 2  # variance of x_t given x_s
        mean = (ratio * then.sigma**2 * x + then.alpha * added * field(x, t, "x0")) / now.sigma**2
        x = mean + added.sqrt() * then.sigma / now.sigma * noise()
    return ddim(field, x, ts[-2:])


@torch.no_grad()
def edm_churn(field, x: Tensor, ts: list[float], noise=None, churn: float = 30.0, churn_min: float = 0.01, churn_max: float = 1.0,
              churn_noise: float = 1.0, denoise: bool = False) -> Tensor:
    """`heun`, each step of which first goes back to more noise: as many network calls (Karras et al. 2022, algorithm 2, for any alpha
    and sigma).

    While r = sigma / alpha is in [churn_min, churn_max], it is raised by a factor 1 + min(churn / n, sqrt(2) - 1), n the number of
    steps, by noise of standard deviation churn_noise; also beyond t = 1, where the process goes on.
    """
    noise = noise or (lambda: torch.randn_like(x))
    ends = ts[1:] + [None] * denoise  # of the steps; None: x0
    for t, t_next in zip(ts, ends):
        now = field.process.at(t)
        if churn > 0 and churn_min <= now.sigma / now.alpha <= churn_max:
            raised = 1 + min(churn / len(ends), 2**0.5 - 1)
            t = max(t, field.process.inverse(now.log_snr - 2 * math.log(raised)).item())
            then = field.process.at(t)
            ratio = then.alpha / now.alpha
            x = ratio * x + (then.sigma**2 - (ratio * now.sigma) ** 2).clamp(min=0).sqrt() * churn_noise * noise()
        if t_next is None:
            x = field(x, t, "x0")
        else:
            x = heun_step(field, x, t, t_next) if t_next != ends[-1] else euler(field, x, [t, t_next])
    return x


ODE_SAMPLERS = {"euler": euler, "heun": heun, "midpoint": midpoint, "rk4": rk4, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "dopri5": dopri5}
SDE_SAMPLERS = {
    "euler_maruyama": euler_maruyama, "stochastic_heun": stochastic_heun, "predictor_corrector": predictor_corrector,
    "ancestral": ancestral, "edm_churn": edm_churn,
}
SAMPLERS = ODE_SAMPLERS | SDE_SAMPLERS


def draw(net, process: Process, *, rows: range, shape: tuple[int, ...], device, seed: int, sampler: str, sampling_steps: int, T_min: float,
         T_max: float, grid: str = "uniform", denoise: bool = False, labels: Tensor | None = None, batch_size: int | None = None,
         whole_batches: bool = False, **settings):
    """Yields the samples `rows`, in order, in batches (B, *shape) of float32 on `device`, each with the network calls that it took.

    Sample i is a function of (seed, i), to rounding (dopri5: to its tolerance): it does not depend on `batch_size`, which is halved where
    there is too little memory, or on how samples are shared among processes. With `whole_batches` the network sees one batch size
    only: further samples fill the last batch, and are dropped. `labels` (N,) holds a label for every sample from 0 on, of which `rows`
    are used. `T_max` is where x starts, as sigma(T_max) times noise, and `T_min` is where it ends; `denoise` then takes the predicted
    x0, as a step of the sampler if it has one, the grid leads there by noise levels, and the network's prediction, as of x0, does not
    lose x1 there. `settings` are arguments of `Field`, as model_type, of the grid and of the sampler; others are ignored. Raises
    UserError for an unknown sampler or grid.
    """
    settings = {**settings, "process": process}
    ts = make_grid(sampling_steps, T_min, T_max, grid, **settings)
    last = process.at(T_min)
    own_step = (denoise and grid in LEVELS and "denoise" in parameters_of(find(SAMPLERS, sampler))
                and last.alpha * error_factor(last, settings["model_type"]) < FOG)

    def drawn(batch: range, size: int) -> tuple[Tensor, int]:
        whole = range(batch.start, batch.start + size) if whole_batches else batch
        noise = RowNoise(whole, shape, device, seed, "sample")
        label = None if labels is None else labels[torch.tensor(whole) % len(labels)].to(device)
        field = call(Field, **{**settings, "net": net, "label": label})
        given = {"field": field, "x": process.at(T_max).sigma * noise(), "ts": ts, "noise": noise, "denoise": own_step}
        x = choose(SAMPLERS, sampler, **{**settings, **given})
        with torch.no_grad():
            x = field(x, T_min, "x0") if denoise and not own_step else x
        return x[: len(batch)], field.calls

    yield from in_batches(drawn, rows, min(batch_size or len(rows), len(rows)))
