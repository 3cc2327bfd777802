"""Is the mathematics right? `python check.py` compares it with what is exact, prints a table, and draws check.png.

Every check is a function of a process that returns one number, an error, and CHECKS says how large that may be. The
tests hold the same numbers to the same bounds. The data are a mixture of three Gaussians in the plane, see oracle.py.
To add a check, write such a function and give it a row in CHECKS; for a new sampler add a row to ORDERS or STEPS.
"""

import functools
import math
import sys

import torch
from torch import Tensor

from likelihood import PROBES, flow, log_likelihood
from logging_utils import Progress
from oracle import GaussianMixture
from prediction import PREDICTIONS, convert
from processes import PROCESSES, Coefs, Process
from sampling import DIFFUSIONS, ODE_SAMPLERS, SDE_SAMPLERS, Field, dopri5, edm_churn, heun, make_grid
from utils import call_with_settings

T_MIN, T_MAX = 1e-4, 0.9999
ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4, "ddim": 1, "dpmpp_2m": 2}  # of samplers of the ODE
STEPS = {"euler_maruyama": 200, "stochastic_heun": 50, "predictor_corrector": 100, "ancestral": 200, "edm_churn": 50}


def mixture(process: Process, kind: str = "velocity") -> GaussianMixture:
    """Three Gaussians in the plane, of weights 0.5, 0.3 and 0.2."""
    means = torch.tensor([[1.2, 0.0], [-0.8, 0.9], [-0.6, -1.0]])
    covariances = torch.tensor([[[0.2, 0.1], [0.1, 0.1]], [[0.05, 0.0], [0.0, 0.2]], [[0.1, -0.05], [-0.05, 0.1]]])
    return GaussianMixture(process, kind, means, covariances, torch.tensor([0.5, 0.3, 0.2]))


def start(data: GaussianMixture, n: int, high: float, low: float) -> tuple[Field, Tensor, float, float]:
    """The exact field of these data, n exact states (n, 2), the time of the states, and the time to sample down to.

    At the two times sigma / alpha is `high` and `low`: processes are compared between the same noise levels.
    """
    high, low = (data.process.time(torch.tensor(-2 * math.log(ratio))).item() for ratio in (high, low))
    return Field(data, data.process, data.kind), data.sample(n, t=high)[0], high, low


def times(low: float = T_MIN, high: float = T_MAX, n: int = 999) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def worst(pairs, floor: float | None = None) -> float:
    """The greatest relative error of pairs (value, exact value); NaN if one of them is not a number.

    Exact values smaller than `floor`, by default their root mean square, count as that.
    """
    errors = []
    for value, exact in pairs:
        size = exact.abs().clamp(min=floor or exact.square().mean().sqrt().item())
        errors.append(((value - exact).abs() / size).max())
    return torch.stack(errors).max().item()


# ---- Processes


def coefficient_error(process: Process, dtype: torch.dtype) -> float:
    """Every coefficient in this type against float64 with derivatives by automatic differentiation, relative."""
    t = times().float().double()  # times that float32 has, too
    slopes = (torch.func.jvp(function, (t,), (torch.ones_like(t),))[1] for function in (process.alpha, process.sigma))
    c, exact = process.coefs(t.to(dtype)), Coefs(process.alpha(t), process.sigma(t), *slopes)
    names = ("alpha", "sigma", "alpha_dot", "sigma_dot", "delta", "f", "g")
    return worst(((getattr(c, name), getattr(exact, name)) for name in names), floor=1e-300)


def time_error(process: Process) -> float:
    """`time` against the times whose log-SNR it gets, float64, relative."""
    return worst([(process.time(process.log_snr(times())), times())], floor=1e-300)


# ---- Predictions


def conversion_error(process: Process) -> float:
    """Every exact prediction as every other kind, so also there and back, float64, relative.

    The exact score is the gradient of the log-density.
    """
    t, data = times(0.02, 0.98, 64), mixture(process)
    x0, _ = data.sample(64)
    c, xt = process.coefs(t, 2), process.interpolate(x0, torch.randn_like(x0), t).requires_grad_()
    y = {kind: mixture(process, kind)(xt, t) for kind in PREDICTIONS}
    exact = y | {"score": torch.autograd.grad(data.log_prob(xt, t).sum(), xt)[0]}
    return worst((convert(y[kind], xt, c, kind, to), exact[to]) for kind in y for to in y)


# ---- Samplers


def ode_errors(process: Process, sampler: str, steps) -> dict[int, float]:
    """The mean error of so many steps, from sigma / alpha = 4 down to 0.15, by the number of network calls.

    float64, against dopri5 with a tolerance of 1e-12.
    """
    field, x, high, low = start(mixture(process), 16, 4.0, 0.15)
    exact, errors = dopri5(field, x, [high, low], rtol=1e-12, atol=1e-12), {}
    for n in steps:
        field.calls = 0
        error = ODE_SAMPLERS[sampler](field, x, make_grid(n, low, high)) - exact
        errors[field.calls] = error.abs().mean().item()
    return errors


def order_error(process: Process, sampler: str) -> float:
    """The slope of log error against log steps less the sampler's order."""
    few, many = ode_errors(process, sampler, (64, 256)).values()
    return abs(math.log(few / many, 4) - ORDERS[sampler])


def dopri5_error(process: Process) -> float:
    """dopri5 with tolerance 1e-8 against the exact flow of one Gaussian, from sigma / alpha = 4 to 0.15, relative."""
    data = mixture(process)
    one = GaussianMixture(process, "velocity", data.means[:1], data.covariances[:1])
    field, x, high, low = start(one, 64, 4.0, 0.15)
    return worst([(dopri5(field, x, [high, low], rtol=1e-8, atol=1e-8), one.flow(x, high, low))])


def edm_error(process: Process) -> float:
    """`heun` and `edm_churn` against EDM's algorithms, by 18 levels and the step to x0, relative.

    They are Karras et al. 2022, algorithms 1 (churn 0) and 2, for any s(t) = alpha and sigma(t) = sigma / alpha. Here
    all levels add the same noise.
    """
    field, x_start, high, low = start(mixture(process), 64, 80.0, 0.002)
    ts, pairs = make_grid(17, low, high, "edm", process=process, rho=7.0), []
    churned = edm_churn(field, x_start, ts, lambda: 0.5, churn=3.0, churn_min=0.0, churn_max=math.inf, denoise=True)
    for value, factor in ((heun(field, x_start, ts, denoise=True), 1.0), (churned, 1 + 3 / 18)):  # 1 + gamma
        x = x_start
        for t, t_next in zip(ts, [*ts[1:], None]):
            c = process.at(t)
            t = process.inverse(c.log_snr - 2 * math.log(factor)).item()
            x = process.at(t).alpha / c.alpha * (x + c.sigma * (factor**2 - 1) ** 0.5 * 0.5)
            if t_next is not None:
                d, dt = field.velocity(x, t), t_next - t
                x = x + dt / 2 * (d + field.velocity(x + dt * d, t_next))
        pairs.append((value, field(x, t, "x0")))
    return worst(pairs)


def sde_error(process: Process, sampler: str, n: int = 4000) -> float:
    """The worst of mean, covariance and weights of n samples, in standard errors of n exact samples.

    They take STEPS steps on EDM's grid, from exact states at sigma / alpha = 20 down to 0.02, with the worst of the
    diffusion coefficients if the sampler has one. A weight is the mean probability of a component given the sample.
    """
    field, x, high, low = start(mixture(process), n, 20.0, 0.02)
    ts, errors = make_grid(STEPS[sampler], low, high, "edm", process=process, rho=7.0), []

    def statistics(x):
        return torch.cat([x, x[:, :1] * x, x[:, 1:] ** 2, field.net.components(x, low)[3].softmax(1)], dim=1)

    exact = statistics(field.net.sample(50_000, t=low)[0])
    for field.sde_diffusion in ["delta"] if sampler in ("ancestral", "edm_churn") else DIFFUSIONS:
        mean = statistics(SDE_SAMPLERS[sampler](field, x, ts)).mean(0)
        errors.append(((mean - exact.mean(0)) / exact.std(0) * n**0.5).abs().max())
    return torch.stack(errors).max().item()


# ---- Likelihood


def likelihood_error(process: Process) -> float:
    """log p of 64 data against the exact value, in nats: the greatest error with the exact trace, there and back."""
    data, field = mixture(process), Field(mixture(process), process, "velocity")
    x0, x1 = (data.sample(64, t=t)[0] for t in (T_MIN, T_MAX))
    log_prior = functools.partial(data.log_prob, t=T_MAX)
    there = log_likelihood(field, x0, T_MIN, T_MAX, log_prior=log_prior, rtol=1e-6, atol=1e-6)
    back, change = flow(field, x1, T_MAX, T_MIN, rtol=1e-6, atol=1e-6)
    errors = there - data.log_prob(x0, T_MIN), log_prior(x1) + change - data.log_prob(back, T_MIN)
    return torch.cat(errors).abs().max().item()


def hutchinson_error(process: Process, probe: str) -> float:
    """The mean of 2,000 estimates of one log p less the exact value, in standard errors of that mean."""
    data, field = mixture(process), Field(mixture(process), process, "velocity")
    x0 = data.sample(1, t=T_MIN)[0].expand(2000, 2)
    e = call_with_settings(PROBES[probe], {"noise": functools.partial(torch.randn_like, x0)})
    log_p = log_likelihood(field, x0, T_MIN, T_MAX, e, functools.partial(data.log_prob, t=T_MAX))
    return abs((log_p.mean() - data.log_prob(x0, T_MIN)[0]) / (log_p.std() / 2000**0.5)).item()


# ---- The table

# What is checked, and the error below which it is right
CHECKS = {
    "coefficients in float64 against autograd, relative error": (
        functools.partial(coefficient_error, dtype=torch.float64), 1e-10),
    "coefficients in float32 against the same, relative error": (
        functools.partial(coefficient_error, dtype=torch.float32), 1e-4),
    "times of a log-SNR, there and back, float64, relative error": (time_error, 1e-9),
    "every conversion, there and back, against the exact prediction, relative error": (conversion_error, 1e-9),
    **{f"{name}: distance of its order from {n}": (functools.partial(order_error, sampler=name), 0.2)
       for name, n in ORDERS.items()},
    "dopri5, tolerance 1e-8, against the exact flow, relative error": (dopri5_error, 1e-6),
    "heun and edm_churn against EDM's algorithms 1 and 2, relative error": (edm_error, 1e-9),
    **{f"{name}, {n} steps: mean, covariance, weights, standard errors": (
        functools.partial(sde_error, sampler=name), 4.0) for name, n in STEPS.items()},
    "log-likelihood, exact trace, there and back, nats": (likelihood_error, 1e-3),
    **{f"log-likelihood, {name} probe: bias, standard errors": (functools.partial(hutchinson_error, probe=name), 4.0)
       for name in PROBES if name != "exact"},
}


def plot(path: str) -> None:
    """Draws the error of the ODE samplers against their network calls."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for sampler in ORDERS:
        errors = ode_errors(PROCESSES["cosine"](), sampler, (8, 16, 32, 64, 128))
        axes.loglog(errors.keys(), errors.values(), "o-", label=sampler)
    axes.set(xlabel="network calls", ylabel="mean error", title="ODE samplers, process cosine")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    rows, wrong = [["check", "right", *PROCESSES], ["---"] * (2 + len(PROCESSES))], []
    with Progress("checking", len(CHECKS) * len(PROCESSES), "check") as progress:
        for name, (check, bound) in CHECKS.items():
            rows.append([name, f"< {bound:g}"])
            for key, process in PROCESSES.items():
                torch.manual_seed(0)
                error = check(process())
                rows[-1].append(f"{error:.2g}")
                if not error < bound:
                    wrong.append(f"{name}, {key}: {error}, expected {rows[-1][1]}")
                progress.update()
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    plot("check.png")
    print("picture: check.png", file=sys.stderr)
    if wrong:
        sys.exit("error: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
