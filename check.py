"""Is the mathematics right? `python check.py` compares all of it with what is exact, prints the README's table, and draws check.png.

Every check is a function of a process that returns one number, an error or an order; the tests hold the same numbers to their bounds.
The data are a mixture of three Gaussians in the plane, of which `oracle.GaussianMixture` knows everything. To add a check, write such
a function and give it a row in CHECKS.
"""

import functools
import math
import sys

import torch

from likelihood import PROBES, flow, log_likelihood
from oracle import GaussianMixture
from prediction import PREDICTIONS, convert, target
from processes import PROCESSES, Process
from sampling import DIFFUSIONS, ODE_SAMPLERS, SDE_SAMPLERS, Field, dopri5, edm_churn, heun, make_grid
from utils import call, progress_bar

T_MIN, T_MAX = 1e-4, 0.9999
ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4, "ddim": 1, "dpmpp_2m": 2}
STEPS = {"euler_maruyama": 200, "stochastic_heun": 50, "predictor_corrector": 100, "ancestral": 200, "edm_churn": 50}


def mixture(process: Process, kind: str = "velocity") -> GaussianMixture:
    """Three Gaussians in the plane, of weights 0.5, 0.3 and 0.2."""
    means = torch.tensor([[1.2, 0.0], [-0.8, 0.9], [-0.6, -1.0]])
    covariances = torch.tensor([[[0.2, 0.1], [0.1, 0.1]], [[0.05, 0.0], [0.0, 0.2]], [[0.1, -0.05], [-0.05, 0.1]]])
    return GaussianMixture(process, kind, means, covariances, torch.tensor([0.5, 0.3, 0.2]))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def time_of(process: Process, ratio: float) -> float:
    """The time at which sigma / alpha is `ratio`, so that processes are compared between the same noise levels."""
    return process.time(torch.tensor(-2 * math.log(ratio))).item()


def greatest(values) -> float:
    """The greatest of these numbers; not a number if one of them is none, which Python's max may pass over."""
    return torch.tensor(list(values)).max().item()


def relative(mine: torch.Tensor, exact: torch.Tensor) -> float:
    """The greatest error, relative to the number itself or, where that is small, to their root mean square."""
    return ((mine - exact).abs() / exact.abs().clamp(min=exact.square().mean().sqrt().item())).max().item()


# ---- Processes


def derivative_error(process: Process) -> float:
    """alpha_dot, sigma_dot and delta against automatic differentiation, float64, relative."""
    t = torch.linspace(T_MIN, T_MAX, 999, dtype=torch.float64)
    c, exact = process.coefs(t), {}
    for name in ("alpha", "sigma"):
        exact[f"{name}_dot"] = torch.func.jvp(getattr(process, name), (t,), (torch.ones_like(t),))[1]
    exact["delta"] = c.sigma * exact["sigma_dot"] - exact["alpha_dot"] / c.alpha * c.sigma**2
    return greatest(((getattr(c, name) - y).abs() / y.abs().clamp(min=1e-300)).max() for name, y in exact.items())


def float32_error(process: Process) -> float:
    """Every coefficient in float32 against float64, from T_MIN to T_MAX, relative."""
    t = torch.linspace(T_MIN, T_MAX, 999)
    here, exact = process.coefs(t), process.coefs(t.double())
    names = ("alpha", "sigma", "alpha_dot", "sigma_dot", "delta", "f", "g")
    pairs = [(getattr(here, name), getattr(exact, name)) for name in names]
    return greatest(((a.double() - b).abs() / b.abs().clamp(min=1e-300)).max() for a, b in pairs)


def time_error(process: Process) -> float:
    """`time` against the times whose log-SNR it gets, float64, relative."""
    t = torch.linspace(T_MIN, T_MAX, 999, dtype=torch.float64)
    return greatest((process.time(process.log_snr(t)) - t).abs() / t)


# ---- Predictions


def round_trip_error(process: Process) -> float:
    """Every kind of prediction as every other and back, float64, relative."""
    t = torch.linspace(0.02, 0.98, 64, dtype=torch.float64)
    x0, x1 = torch.randn(2, 64, 3, dtype=torch.float64, generator=seeded())
    c, xt, errors = process.coefs(t, 2), process.interpolate(x0, x1, t), []
    for kind in PREDICTIONS:
        for to in PREDICTIONS:
            y, there = target(kind, c, x0, x1), target(to, c, x0, x1)
            errors += [relative(convert(y, xt, c, kind, to), there), relative(convert(there, xt, c, to, kind), y)]
    return greatest(errors)


def conversion_error(process: Process) -> float:
    """Every exact prediction as every other, against the other, float64, relative; the score is that of the log-density."""
    t = torch.linspace(0.02, 0.98, 64, dtype=torch.float64)
    x0, x1 = mixture(process).sample(64, seeded())[0], torch.randn(64, 2, dtype=torch.float64, generator=seeded(1))
    c, xt = process.coefs(t, 2), process.interpolate(x0, x1, t).requires_grad_()
    exact = {kind: mixture(process, kind)(xt, t).detach() for kind in PREDICTIONS}
    (exact["score"],) = torch.autograd.grad(mixture(process).log_prob(xt, t).sum(), xt)
    return greatest(relative(convert(mixture(process, kind)(xt, t), xt, c, kind, to).detach(), exact[to]) for kind in exact for to in exact)


# ---- Samplers


def order(process: Process, sampler: str) -> float:
    """The slope of log error against log steps, from sigma / alpha = 4 down to 0.15, float64."""
    few, many = ode_errors(process, sampler, (32, 128) if sampler == "rk4" else (64, 256))  # more would show rounding
    return math.log2(few / many) / 2


def ode_errors(process: Process, sampler: str, steps) -> list[float]:
    """The mean error of the ODE's solution by each of these numbers of steps, against dopri5 with a tolerance of 1e-12."""
    high, low = time_of(process, 4.0), time_of(process, 0.15)
    field, x = Field(mixture(process), process, "velocity"), mixture(process).sample(16, seeded(), high)[0]
    exact = dopri5(field, x, [high, low], rtol=1e-12, atol=1e-12)
    return [(ODE_SAMPLERS[sampler](field, x, make_grid(n, low, high)) - exact).abs().mean().item() for n in steps]


def dopri5_error(process: Process) -> float:
    """dopri5 with tolerance 1e-8 against the exact flow of one Gaussian, from sigma / alpha = 4 down to 0.15, relative."""
    one = mixture(process)
    one = GaussianMixture(process, "velocity", one.means[:1], one.covariances[:1])
    high, low = time_of(process, 4.0), time_of(process, 0.15)
    x = one.sample(64, seeded(), high)[0]
    return relative(dopri5(Field(one, process, "velocity"), x, [high, low], rtol=1e-8, atol=1e-8), one.flow(x, high, low))


def edm_error(process: Process) -> float:
    """`heun` and `edm_churn` against EDM's algorithms, by 18 levels and the step to x0, with the same noise at all levels.

    They are Karras et al. 2022, algorithms 1 (churn 0) and 2, for any s(t) = alpha and sigma(t) = sigma / alpha.
    """
    ts, errors = make_grid(17, time_of(process, 0.002), time_of(process, 80.0), "edm", process=process, rho=7.0), []
    field, start = Field(mixture(process), process, "velocity"), mixture(process).sample(64, seeded(), ts[0])[0]
    churned = edm_churn(field, start, ts, lambda: 0.5, churn=3.0, churn_min=0.0, churn_max=math.inf, denoise=True)
    for got, factor in ((heun(field, start, ts, denoise=True), 1.0), (churned, 1 + 3 / 18)):  # 1 + gamma
        x = start
        for t, t_next in zip(ts, [*ts[1:], None]):
            c, t = process.at(t), process.inverse(process.at(t).log_snr - 2 * math.log(factor)).item()
            x = process.at(t).alpha / c.alpha * (x + c.sigma * (factor**2 - 1) ** 0.5 * 0.5)
            if t_next is not None:
                d, dt = field.velocity(x, t), t_next - t
                x = x + dt / 2 * (d + field.velocity(x + dt * d, t_next))
        errors.append(relative(got, field(x, t, "x0")))
    return greatest(errors)


def sde_error(process: Process, sampler: str, n: int = 4000) -> float:
    """The worst of mean, covariance and weights of n samples at sigma / alpha = 0.02, in standard errors of n exact samples, for the worst
    of the diffusion coefficients, where the sampler has one.

    Started at sigma / alpha = 20 from the exact distribution, with STEPS steps on EDM's grid. A weight is the share of samples that lie
    nearest to a component, by its density.
    """
    high, low = time_of(process, 20.0), time_of(process, 0.02)
    data, generator, errors = mixture(process), seeded(1), []
    ts = make_grid(STEPS[sampler], low, high, "edm", process=process, rho=7.0)

    def statistics(x):
        d = x - data.moments(low)[0]
        nearest = data.components(x, torch.full((len(x),), low), None)[3].argmax(1)
        return torch.cat([d, d[:, :1] * d, d[:, 1:] ** 2, torch.nn.functional.one_hot(nearest, 3)], dim=1)

    noise = functools.partial(torch.randn, n, 2, dtype=torch.float64, generator=generator)
    exact = statistics(data.sample(200_000, seeded(2), low)[0])
    chooses = sampler in ("euler_maruyama", "stochastic_heun", "predictor_corrector")
    for diffusion in DIFFUSIONS if chooses else ["delta"]:
        field, x = Field(data, process, "velocity", sde_diffusion=diffusion), data.sample(n, generator, high)[0]
        got = statistics(SDE_SAMPLERS[sampler](field, x, ts, noise)).mean(0)
        errors.append(((got - exact.mean(0)) / exact.std(0) * n**0.5).abs().max())
    return greatest(errors)


# ---- Likelihood


def likelihood_error(process: Process) -> float:
    """log p of 64 data against the exact value, in nats: the greatest error with the exact trace, there and back."""
    data, times = mixture(process), [torch.full((64,), t, dtype=torch.float64) for t in (T_MIN, T_MAX)]
    field = Field(data, process, "velocity")
    x0, x1 = data.sample(64, seeded(), T_MIN)[0], data.sample(64, seeded(1), T_MAX)[0]
    there = log_likelihood(field, x0, T_MIN, T_MAX, log_prior=lambda x: data.log_prob(x, times[1]), rtol=1e-6, atol=1e-6)
    back, change = flow(field, x1, T_MAX, T_MIN, rtol=1e-6, atol=1e-6)
    errors = there - data.log_prob(x0, times[0]), data.log_prob(x1, times[1]) + change - data.log_prob(back, times[0])
    return greatest(error.abs().max() for error in errors)


def hutchinson_error(process: Process, probe: str) -> float:
    """The mean of 2,000 estimates of one log p less the exact value, in standard errors of that mean."""
    data, field, times = mixture(process), Field(mixture(process), process, "velocity"), (T_MIN, T_MAX)
    x0 = data.sample(1, seeded(), T_MIN)[0].expand(2000, 2)
    at = [torch.full((2000,), t, dtype=torch.float64) for t in times]
    e = call(PROBES[probe], noise=lambda: torch.randn(2000, 2, dtype=torch.float64, generator=seeded(4)))
    got = log_likelihood(field, x0, *times, probe=e, log_prior=lambda x: data.log_prob(x, at[1]))
    return abs((got.mean() - data.log_prob(x0, at[0])[0]) / (got.std() / 2000**0.5)).item()


# ---- The table

# What is checked: the check, and the least and the greatest value that is right.
CHECKS = {
    "derivatives against autograd, float64, relative error": (derivative_error, 0, 1e-10),
    "coefficients in float32 against float64, relative error": (float32_error, 0, 1e-4),
    "times of a log-SNR, there and back, float64, relative error": (time_error, 0, 1e-9),
    "every conversion there and back, float64, relative error": (round_trip_error, 0, 1e-9),
    "every conversion against the exact prediction, relative error": (conversion_error, 0, 1e-9),
    **{f"{name}: order": (functools.partial(order, sampler=name), n - 0.2, n + 0.2) for name, n in ORDERS.items()},
    "dopri5, tolerance 1e-8, against the exact flow, relative error": (dopri5_error, 0, 1e-6),
    "heun and edm_churn against EDM's algorithms 1 and 2, relative error": (edm_error, 0, 1e-9),
    **{f"{name}, {n} steps: mean, covariance, weights, standard errors": (functools.partial(sde_error, sampler=name), 0, 4)
       for name, n in STEPS.items()},
    "log-likelihood, exact trace, there and back, nats": (likelihood_error, 0, 1e-3),
    **{f"log-likelihood, {name} probe: bias, standard errors": (functools.partial(hutchinson_error, probe=name), 0, 4)
       for name in PROBES if name != "exact"},
}


def plot(path: str) -> None:
    """Error against network calls of the ODE samplers; samples of an SDE over the density; log p by the ODE against the exact one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    process = PROCESSES["cosine"]()
    for sampler in ORDERS:
        steps, calls = [8, 16, 32, 64, 128], {"midpoint": 2, "heun": 2, "rk4": 4}.get(sampler, 1)
        left.loglog([n * calls - (sampler == "heun") for n in steps], ode_errors(process, sampler, steps), "o-", label=sampler)
    left.set(xlabel="network calls", ylabel="mean error", title="ODE samplers, cosine")
    left.grid(alpha=0.3)
    left.legend()

    process = PROCESSES["rf"]()
    data = mixture(process)
    x = process.at(T_MAX).sigma * torch.randn(2000, 2, dtype=torch.float64, generator=seeded())
    torch.manual_seed(0)
    out = SDE_SAMPLERS["stochastic_heun"](Field(data, process, "velocity"), x, make_grid(50, T_MIN, T_MAX))
    axis = torch.linspace(-3, 3, 150, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    density = data.log_prob(points, torch.full((len(points),), T_MIN)).exp().reshape(150, 150).T
    middle.contour(axis, axis, density, 8, linewidths=0.8)
    middle.scatter(*out.T, s=2, alpha=0.4, color="black", linewidths=0)
    middle.set(title="samples by 50 steps of stochastic_heun, and the density", aspect="equal")

    x0 = data.sample(300, seeded(), T_MIN)[0]
    exact = data.log_prob(x0, torch.full((300,), T_MIN))
    right.plot(exact, log_likelihood(Field(data, process, "velocity"), x0, T_MIN, T_MAX), ".")
    right.axline((0, 0), slope=1, linewidth=0.8, color="black")
    right.set(xlabel="exact log p, nats", ylabel="by the probability-flow ODE", title="likelihood, rf")
    figure.savefig(path, dpi=80)


def main() -> None:
    wrong, rows = [], []
    with progress_bar(total=len(CHECKS) * len(PROCESSES), unit=" checks", leave=False) as bar:
        for name, (check, least, most) in CHECKS.items():
            cells = [f"{least:g} to {most:g}" if least else f"< {most:g}"]
            for key, process in PROCESSES.items():
                value = check(process())
                cells.append(f"{value:.2f}" if most > 1 else f"{value:.0e}")
                if not least <= value <= most:
                    wrong.append(f"{name}, {key}: {value}, expected {cells[0]}")
                bar.update()
            rows.append([name, *cells])
    print(f"| check | right | {' | '.join(PROCESSES)} |\n|---|---|{'---|' * len(PROCESSES)}")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    plot("check.png")
    print("picture: check.png", file=sys.stderr)
    if wrong:
        sys.exit("error: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
