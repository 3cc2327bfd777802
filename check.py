"""Is the mathematics right? `python check.py` compares it with what is exact, and prints a table.

Every check is a function of a process that returns one number, an error, and CHECKS says how large that may be. The
tests hold the same numbers to the same bounds. The data are a mixture of three Gaussians in the plane.

`GaussianMixture` is data of which every prediction, density and likelihood is known exactly at any (x, t): if x0 is
N(m, C), then xt = alpha x0 + sigma x1 is N(alpha m, alpha^2 C + sigma^2 I), and the expectations of x0 and x1 given xt
are linear in xt. A mixture averages them by the probability of each component given xt. It is called as a network is.
So conversions, samplers, guidance and likelihood run on it, and can be compared with what is exact.

To add a check, write such a function and give it a row in CHECKS; for a new sampler add a row to ORDERS or STEPS.
"""

import math
import sys
from functools import partial

import torch
from torch import Tensor

from likelihood import PROBES, flow, log_likelihood
from prediction import PREDICTIONS, convert, row, without_mean
from processes import PROCESSES, FromFunctions, make_process
from sampling import DIFFUSIONS, FROM_A_POINT, SAMPLERS, WITH_GAMMA, Field, dopri5, flow_map, make_grid
from utils import append_dims

T_MIN, T_MAX = 1e-4, 0.9999
TIMES = torch.linspace(T_MIN, T_MAX, 999, dtype=torch.float64)
ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4, "ddim": 1, "dpmpp_2m": 2}  # of samplers of the ODE
STEPS = {"euler_maruyama": 200, "stochastic_heun": 50, "predictor_corrector": 100, "ancestral": 200, "edm_churn": 50}


# ---- Exact data


class GaussianMixture:
    """x0 from N(means[k], covariances[k]) with probability weights[k].

    Called as net(xt, t, label, cond), it predicts `kind`. `means` (K, ...) have the shape of the data; `covariances`
    are (K, D, D), with D numbers in an item, or one variance for all. `t` is (B,), or one time for all. `label` (B,)
    int64 is the component; K, or no label, stands for any of them. All is computed in float64.

    x1 is from N(source_means[k], I). With a gamma, E[z | xt] comes after the prediction: (B, 2C, ...).
    """

    def __init__(self, process, kind, means, covariances, weights=None, source_means=0.0):
        self.process = process
        self.kind = kind
        self.shape = means.shape[1:]
        self.means = means.double().flatten(1)  # (K, D)
        self.source_means = torch.zeros_like(self.means) + source_means
        if not isinstance(covariances, Tensor):
            covariances = covariances * torch.ones_like(self.means).diag_embed()
        self.covariances = covariances.double()
        values, self.vectors = torch.linalg.eigh(self.covariances)  # (K, D), (K, D, D)
        self.values = values.clamp(min=0)  # rounding makes a 0 negative
        self.weights = torch.ones_like(self.means[:, 0]) / len(means) if weights is None else weights.double()
        # (K + 1, K), the log weights of each label
        self.log_weights = torch.vstack([torch.ones_like(self.weights).diag(), self.weights]).log()

    def components(self, xt, t, label=None):
        """The coefficients; xt less the mean, and the variances, in each component's eigenbasis (B, K, D); log weight x
        density (B, K)."""
        t = torch.as_tensor(t, dtype=torch.float64, device=xt.device)
        c = self.process.coefs(t.clamp(max=self.process.last), 3)
        mean = c.alpha * self.means + c.sigma * self.source_means
        y = torch.einsum("bkd,kde->bke", xt.double().flatten(1)[:, None] - mean, self.vectors)
        variance = c.alpha**2 * self.values + c.sigma**2 + (0 if c.gamma is None else c.gamma**2)
        log_p = -0.5 * (y**2 / variance + (2 * math.pi * variance).log()).sum(2)
        log_w = self.log_weights[-1 if label is None else label.clamp(max=len(self.weights))]
        return c, y, variance, log_w + log_p

    def __call__(self, xt, t, label=None, cond=None, s=None):
        """The prediction at xt (B, ...), in the type of xt. With s (B,), that of one Gaussian's flow map from t to s.

        `cond` (B, D + 1) holds m, the mean of the base, on which x0 does not depend, and ones; None: m is 0. A flow map
        takes the shift for linear in t.
        """
        if cond is not None:
            m = cond[:, :-1]
            c = self.process.coefs(torch.as_tensor(t, dtype=torch.float64), 2)
            return without_mean(self(xt - c.shift * m, t, label, s=s), c, self.kind, -m).to(xt.dtype)
        if s is not None:
            return (self.flow(xt, t, s) - xt) / append_dims(s - t, xt.ndim)
        c, y, variance, log_p = self.components(xt, t, label)
        p, q = row(self.kind, c)

        def rotated(factor):
            return torch.einsum("bke,kde->bkd", factor * y / variance, self.vectors)

        # of a component: E[x0 | xt] = mean + alpha values y / variance, E[x1 | xt] = its mean + sigma y / variance, and
        # E[z | xt] = gamma y / variance
        each = p * self.means + q * self.source_means + rotated(p * c.alpha * self.values + q * c.sigma)
        if self.process.gamma:
            each = torch.cat([each, rotated(c.gamma)], dim=2)
        return torch.einsum("bk,bkd->bd", log_p.softmax(1), each).reshape(len(xt), -1, *xt.shape[2:]).to(xt.dtype)

    def log_prob(self, xt, t, label=None):
        """log p_t(xt), (B,), in nats, float64."""
        return self.components(xt, t, label)[3].logsumexp(1)

    def sample(self, n, generator=None, t=0.0):
        """n draws of xt (n, ...) at one time (0: of the data), float64, and their components (n,) int64."""
        label = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        x0, x1 = self.means.new_empty(2, n, self.means.shape[1]).normal_(generator=generator)
        x0 = self.means[label] + torch.einsum("be,bde->bd", self.values[label].sqrt() * x0, self.vectors[label])
        c = self.process.at(t)
        xt = c.alpha * x0 + c.sigma * (self.source_means[label] + x1) if t else x0
        if self.process.gamma:
            xt = xt + c.gamma * torch.empty_like(xt).normal_(generator=generator)
        return xt.reshape(n, *self.shape), label

    def flow(self, x, t_from, t_to):
        """The exact solution of the ODE from x (B, ...) at one time to another, for one Gaussian.

        It keeps the coordinates in the eigenbasis, in units of their standard deviations.
        """
        assert len(self.weights) == 1
        (_, y, v_from, _), (c, _, v_to, _) = (self.components(x, t) for t in (t_from, t_to))
        there = c.alpha * self.means + torch.einsum("bke,kde->bkd", (v_to / v_from).sqrt() * y, self.vectors)
        return there.reshape(x.shape).to(x.dtype)


M = torch.tensor([[0.3, -0.4]], dtype=torch.float64)  # the mean of the base, in all checks
COND = torch.cat([M, torch.ones(1, 1)], dim=1)  # what the network gets of it, the same for all rows


def mixture(process, kind="velocity") -> GaussianMixture:
    """Three Gaussians in the plane, of weights 0.5, 0.3 and 0.2; with a gamma, x1 is of three others, one for each."""
    generator = torch.Generator().manual_seed(1)
    means, root = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (3, 2, 2)))
    covariances = 0.15 * root @ root.mT + 0.05 * torch.eye(2)
    return GaussianMixture(process, kind, means, covariances, torch.tensor([0.5, 0.3, 0.2]),
                           -2 * means if process.gamma else 0.0)


def given(data):
    """The exact field of these data around the mean M: its network gets xt and the condition."""
    return Field(data, data.process, data.kind, **{} if data.process.gamma else {"cond": COND, "m": M})


def start(data, n, high, low):
    """The exact field of these data, n exact states (n, 2), the time of the states, and the time to sample down to.

    At the two times sigma / alpha is `high` and `low`: processes are compared between the same noise levels.
    """
    high, low = (data.process.time(torch.tensor(-2 * math.log(ratio))).item() for ratio in (high, low))
    return given(data), data.sample(n, t=high)[0], high, low


def worst(pairs, floor=None):
    """The greatest relative error of pairs (value, exact value); NaN if one of them is not a number.

    Exact values smaller than `floor`, by default their root mean square, count as that.
    """
    errors = []
    for value, exact in pairs:
        size = exact.abs().clamp(min=floor or exact.square().mean().sqrt().item())
        errors.append(((value - exact).abs() / size).max())
    return torch.stack(errors).max().item()


# ---- Processes


def coefficient_error(process, dtype):
    """Every coefficient in this type against float64 with derivatives by automatic differentiation, relative."""
    t = TIMES.float().double()  # times that float32 has, too
    c, exact = process.coefs(t.to(dtype)), FromFunctions(process.alpha, process.sigma).coefs(t)
    return worst(((getattr(c, name), getattr(exact, name)) for name in (
        "alpha", "sigma", "alpha_dot", "sigma_dot", "delta", "f", "g")), floor=1e-300)


def time_error(process):
    """`time` against the times whose log-SNR it gets, float64, relative."""
    return worst([(process.time(process.log_snr(TIMES)), TIMES)], floor=1e-300)


# ---- Predictions


def conversion_error(process):
    """Every exact prediction given a condition as every other kind, so also there and back, float64, relative.

    The exact score is the gradient of the log-density.
    """
    t, data = torch.linspace(0.02, 0.98, 64, dtype=torch.float64), mixture(process)
    x0, _ = data.sample(64)
    c = process.coefs(t, 2)
    z = (c.alpha * x0 + c.sigma * torch.randn_like(x0)).requires_grad_()
    y = {kind: without_mean(mixture(process, kind)(z + c.shift * M, t, None, COND), c, kind, M)
         for kind in PREDICTIONS}
    exact = y | {"score": torch.autograd.grad(data.log_prob(z, t).sum(), z)[0]}
    return worst((convert(y[kind], z, c, kind, to), exact[to]) for kind in y for to in y)


# ---- Samplers


def order_error(process, sampler):
    """The slope of log error against log steps less the sampler's order.

    The error is the mean one of 64 and of 256 steps from sigma / alpha = 4 down to 0.15, in float64, against dopri5
    with a tolerance of 1e-12.
    """
    field, x, high, low = start(mixture(process), 16, 4.0, 0.15)
    exact = dopri5(field, x, [high, low], rtol=1e-12, atol=1e-12)
    few, many = ((SAMPLERS[sampler](field, x, make_grid(n, low, high)) - exact).abs().mean() for n in (64, 256))
    return abs(math.log(few / many, 4) - ORDERS[sampler])


def flow_error(process, solve):
    """A sampler's three steps against the exact flow of one Gaussian, from sigma / alpha = 4 to 0.15, relative."""
    data = mixture(process)
    one = GaussianMixture(process, "velocity", data.means[:1], data.covariances[:1])
    field, x, high, low = start(one, 64, 4.0, 0.15)
    return worst([(solve(field, x, make_grid(3, low, high)), one.flow(x, high, low))])


def sde_error(process, sampler, n=4000):
    """The worst of mean, covariance and weights of n samples, in standard errors of n exact samples.

    They take STEPS steps on EDM's grid, from exact states at sigma / alpha = 20 down to 0.02, with the worst of the
    diffusion coefficients if the sampler has one. A weight is the mean probability of a component given the sample.
    From the base that is a point, samplers that can leave it take equal steps.
    """
    data = mixture(process)
    means = []
    field, x, high, low = start(data, n, 20.0, 0.02)
    ts = make_grid(STEPS[sampler], low, high, "edm", process=process, rho=7.0)
    if process.at(1.0).sigma == 0 and sampler in FROM_A_POINT:
        ts = make_grid(STEPS[sampler], low, 1.0)
        x = torch.zeros_like(x)
        field = given(mixture(process, "drift"))

    def statistics(x):
        return torch.cat([x, x[:, :1] * x, x[:, 1:] ** 2, data.components(x, low)[3].softmax(1)], dim=1)

    exact = statistics(data.sample(50_000, t=low)[0])
    for field.sde_diffusion in ["delta"] if sampler in ("ancestral", "edm_churn") else DIFFUSIONS:
        means.append(statistics(SAMPLERS[sampler](field, x, ts)).mean(0))
    return ((torch.stack(means) - exact.mean(0)) / exact.std(0) * n**0.5).abs().max().item()


# ---- Likelihood


def likelihood_error(process):
    """log p of 64 data against the exact value, in nats: the greatest error with the exact trace, there and back."""
    data = mixture(process)
    field = given(data)
    x0, x1 = (data.sample(64, t=t)[0] for t in (T_MIN, T_MAX))
    there = log_likelihood(field, x0, T_MIN, T_MAX, log_prior=lambda x: data.log_prob(x, T_MAX), rtol=1e-6, atol=1e-6)
    back, change = flow(field, x1, T_MAX, T_MIN, rtol=1e-6, atol=1e-6)
    errors = there - data.log_prob(x0, T_MIN), data.log_prob(x1, T_MAX) + change - data.log_prob(back, T_MIN)
    return torch.cat(errors).abs().max().item()


def hutchinson_error(process, probe):
    """The mean of 2,000 estimates of one log p less the exact value, in standard errors of that mean."""
    data = mixture(process)
    field = given(data)
    x0 = data.sample(1, t=T_MIN)[0].expand(2000, 2)
    e = PROBES[probe](lambda: torch.randn_like(x0))
    log_p = log_likelihood(field, x0, T_MIN, T_MAX, e, lambda x: data.log_prob(x, T_MAX))
    return abs((log_p.mean() - data.log_prob(x0, T_MIN)[0]) / (log_p.std() / 2000**0.5)).item()


# ---- The table

# What is checked, the error below which it is right, and arguments of the check
CHECKS = {
    "coefficients in float64 against autograd, relative error": (coefficient_error, 1e-10, torch.float64),
    "coefficients in float32 against the same, relative error": (coefficient_error, 1e-4, torch.float32),
    "times of a log-SNR, there and back, float64, relative error": (time_error, 1e-9),
    "every conversion, there and back, against the exact prediction, relative error": (conversion_error, 1e-9),
    **{f"{name}: distance of its order from {n}": (order_error, 0.2, name) for name, n in ORDERS.items()},
    "dopri5, tolerance 1e-8, against the exact flow, relative error":
        (flow_error, 1e-6, partial(dopri5, rtol=1e-8, atol=1e-8)),
    "flow_map, 3 steps of the exact map, against the exact flow, relative error": (flow_error, 1e-9, flow_map),
    **{f"{name}, {n} steps: mean, covariance, weights, standard errors": (sde_error, 4.0, name)
       for name, n in STEPS.items()},
    "log-likelihood, exact trace, there and back, nats": (likelihood_error, 1e-3),
    **{f"log-likelihood, {name} probe: bias, standard errors": (hutchinson_error, 4.0, name)
       for name in PROBES if name != "exact"},
}


# The processes, one of them with a base around the condition, and one between two data sets
COLUMNS = PROCESSES | {"rf, base condition": lambda: make_process("rf", base="condition", base_std=0.5),
                       "rf, gamma brownian": lambda: make_process("rf", gamma="brownian", gamma_scale=0.5)}


NOISE_ALONE = {conversion_error, flow_error, *SAMPLERS.keys() - WITH_GAMMA}  # what is not for data as x1


def applies(process, *check):
    """Whether a check, a function and its arguments, is for this process."""
    return not process.gamma or NOISE_ALONE.isdisjoint(check)


def main():
    wrong = []
    print("| check | right |", " | ".join(COLUMNS), "|")
    print("| --- " * (2 + len(COLUMNS)) + "|")
    for name, (check, bound, *arguments) in CHECKS.items():
        print(f"| {name} | < {bound:g}", end=" |")
        for key, process in COLUMNS.items():
            torch.manual_seed(0)
            if not applies(process(), check, *arguments):
                print(end="  |")
                continue
            error = check(process(), *arguments)
            print(f" {error:.2g}", end=" |", flush=True)
            if not error < bound:
                wrong.append(f"{name}, {key}: {error}, expected < {bound:g}")
        print()
    if wrong:
        sys.exit("error: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
