"""Tests of the samplers: exact equalities, papers' algorithms, grids, guidance, and rows that do not interact.

test_check.py tests the orders of convergence, and the distributions that SDE samplers reach.
"""

import math

import pytest
import torch
from conftest import gaussian

import check
from check import mixture
from config import PRESETS, Config
from likelihood import log_likelihood
from prediction import PREDICTIONS
from processes import PROCESSES, Foellmer, make_process
from sampling import DIFFUSIONS, GRIDS, ODE_SAMPLERS, SAMPLERS, SDE_SAMPLERS, Field, draw, make_grid
from utils import UserError, call_with_settings, row_noise

SETTINGS = dict(model_type="velocity", sampling_steps=4, T_min=1e-3, T_max=0.999)
GRID_SETTINGS = dict(grid_shift=3.0, rho=7.0)


def field(process, **settings):
    return Field(mixture(process), process, "velocity", **settings)


def drawn(net, process, **settings):
    """The samples of all batches of `draw`."""
    return torch.cat([samples for samples, _ in draw(net, process, **settings)])


def start(n=6):
    return torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# ---- Grids


@pytest.mark.parametrize("grid", list(GRIDS))
def test_grid_has_n_plus_1_falling_times_and_exact_ends(process, grid):
    for n in (1, 7, 50):
        ts = make_grid(n, 1e-4, 0.9999, grid, process=process, **GRID_SETTINGS)
        assert len(ts) == n + 1 and ts[0] == 0.9999 and ts[-1] == 1e-4
        assert all(a > b for a, b in zip(ts, ts[1:]))


def test_grids_are_those_of_the_papers(process):
    def steps(grid, scale, T_min=1e-3, T_max=0.99):
        """The steps of `scale(t)` from one time of the grid to the next."""
        ts = make_grid(10, T_min, T_max, grid, process=process, **GRID_SETTINGS)
        return torch.tensor([scale(t) for t in ts], dtype=torch.float64).diff()

    for grid, scale in (
        ("uniform", lambda t: t),
        ("quadratic", lambda t: t**0.5),
        ("log_snr", lambda t: process.at(t).log_snr),
        ("edm", lambda t: (process.at(t).sigma / process.at(t).alpha) ** (1 / 7)),
        # with s = (t - T_min) / (T_max - T_min), the u of s = 3 u / (1 + 2 u)
        ("shifted", lambda t: (t - 1e-3) / 0.989 / (3 - 2 * (t - 1e-3) / 0.989)),
    ):
        moved = steps(grid, scale)
        torch.testing.assert_close(moved, moved.mean().expand(10), rtol=1e-6, atol=0)
    if process.at(0.0).sigma > 0:  # EDM's levels (Karras et al. 2022, eq. 5)
        sigma = [process.at(t).sigma for t in make_grid(17, 0.0, 1.0, "edm", process=process, rho=7.0)]
        levels = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
        assert sigma == pytest.approx(levels, rel=1e-9)


def test_grid_errors():
    rf = PROCESSES["rf"]()
    with pytest.raises(UserError, match="grid log_snr of 5 steps from 0.9 to 0.0 does not fall.*--grid uniform"):
        make_grid(5, 0.0, 0.9, "log_snr", process=rf)
    with pytest.raises(UserError, match="uniform, quadratic, shifted, log_snr, edm"):
        make_grid(5, 0.0, 0.9, "karras", process=rf)


# ---- Samplers


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "ancestral"])
def test_every_kind_of_prediction_gives_the_same_samples(process, sampler):
    """The samplers use the network through conversions only. From t = 0.9 to 0.2, all kinds are well conditioned."""
    ts, x = make_grid(4, 0.2, 0.9), mixture(process).sample(6, torch.Generator().manual_seed(0), 0.9)[0]

    def samples(kind):
        settings, field = {"noise": torch.ones_like}, Field(mixture(process, kind), process, kind)
        return call_with_settings(SAMPLERS[sampler], settings, field=field, x=x, ts=ts)

    expected = samples("velocity")
    for kind in PREDICTIONS.keys() - {"velocity"}:
        torch.testing.assert_close(samples(kind), expected, rtol=1e-8, atol=1e-8, msg=kind)


CALLS = {"euler": 6, "heun": 11, "midpoint": 12, "rk4": 24, "ddim": 6, "dpmpp_2m": 6, "flow_map": 6,
         "euler_maruyama": 6, "stochastic_heun": 11, "predictor_corrector": 11, "ancestral": 6, "edm_churn": 11}


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "dopri5"])
def test_network_calls(sampler):
    times, net = [], mixture(PROCESSES["rf"]())

    def counted(x, t, label, cond=None, s=None):
        times.append(t[0].item())
        return net(x, t)

    ts = make_grid(6, 0.01, 0.9)
    SAMPLERS[sampler](Field(counted, net.process, "velocity"), start(), ts)
    assert len(times) == CALLS[sampler]
    assert sampler == "rk4" or min(times) > 0.01 + 1e-3  # only rk4 calls the network at the last time
    assert max(times) == (0.9 if sampler != "edm_churn" else pytest.approx(0.9))


@pytest.mark.parametrize("sampler", list(SDE_SAMPLERS))
def test_noise_in_every_step_but_the_last(sampler):
    process, calls, x = PROCESSES["rf"](), [], start()

    def noise(x=None):
        calls.append(1)
        return torch.ones_like(x)

    settings = {"churn_max": 100.0, "churn_min": 0.0} if sampler == "edm_churn" else {}
    SDE_SAMPLERS[sampler](field(process), x, make_grid(6, 0.01, 0.9), noise, **settings)
    assert len(calls) == {"predictor_corrector": 10, "edm_churn": 6}.get(sampler, 5)
    if sampler == "edm_churn":  # it adds noise before every step, also before the last
        return
    one = SDE_SAMPLERS[sampler](field(process), x, [0.5, 0.2], noise, **settings)
    last = ODE_SAMPLERS["ddim" if sampler == "ancestral" else "euler"](field(process), x, [0.5, 0.2])
    assert torch.equal(one, last) and len(calls) % 5 == 0


def test_without_noise_an_sde_is_the_ode(process):
    ts, x, without_noise = make_grid(4, 0.05, 0.9), start(), field(process, sde_scale=0.0)
    for sampler, ode, settings in (
        ("euler_maruyama", "euler", {}),
        ("stochastic_heun", "heun", {}),
        ("edm_churn", "heun", {"churn": 0.0}),
        ("edm_churn", "heun", {"churn_max": 0.0}),
        ("predictor_corrector", "euler", {"corrector_snr": 0.0}),
    ):
        expected = ODE_SAMPLERS[ode](field(process), x, ts)
        torch.testing.assert_close(SDE_SAMPLERS[sampler](without_noise, x, ts, **settings), expected)


def test_exponential_integrators_are_exact_for_a_constant_x0(process):
    """For data at one point, x0 is constant: any number of steps gives the exact x at the last time."""
    point = gaussian(process, dims=2, std=0.0)
    x = point.sample(5, torch.Generator().manual_seed(0), 0.95)[0]
    for name in ("ddim", "dpmpp_2m"):
        out = ODE_SAMPLERS[name](Field(point, process, "velocity"), x, make_grid(3, 0.05, 0.95))
        torch.testing.assert_close(out, point.flow(x, 0.95, 0.05), rtol=1e-8, atol=1e-10)


def test_ancestral_is_ddpm():
    """Ho et al. 2020, eq. 7, for one step from t to s, with abar = alpha^2 and a = abar_t / abar_s.

    The noise has the variance beta tilde.
    """
    process, t, s, x = PROCESSES["linear_vp"](), 0.5, 0.45, start()
    abar_t, abar_s = (process.at(time).alpha ** 2 for time in (t, s))
    a, ones = abar_t / abar_s, torch.ones_like(x)
    x0 = mixture(process, "x0")(x, torch.full((6,), t, dtype=torch.float64))
    mean = abar_s.sqrt() * (1 - a) / (1 - abar_t) * x0 + a.sqrt() * (1 - abar_s) / (1 - abar_t) * x
    expected = mean + ((1 - abar_s) / (1 - abar_t) * (1 - a)).sqrt() * ones
    seen = []

    def net(x, time, label, cond=None):
        seen.append(x)
        return mixture(process)(x, time)

    SDE_SAMPLERS["ancestral"](Field(net, process, "velocity"), x, [t, s, 0.4], lambda x: ones)
    torch.testing.assert_close(seen[1], expected, rtol=1e-9, atol=1e-9)


def test_churn_goes_back_to_the_noise_that_edm_says():
    """Karras et al. 2022, algorithm 2: sigma_hat = sigma (1 + min(churn / n, sqrt(2) - 1)).

    This holds in [churn_min, churn_max]; elsewhere no noise is added.
    """
    process = PROCESSES["edm"]()
    for churn, factor in ((0.4, 1.1), (30.0, 2**0.5)):
        times = []

        def net(x, t, label, cond=None, times=times):
            times.append(process.sigma(t)[0].item())
            return torch.zeros_like(x)

        ts = [process.time(torch.tensor(-2 * math.log(sigma))).item() for sigma in (5.0, 2.0, 1.0, 0.5, 0.1)]
        settings = dict(churn=churn, churn_min=0.6, churn_max=3.0)
        SDE_SAMPLERS["edm_churn"](Field(net, process, "velocity"), start(), ts, **settings)
        assert times[0::2] == pytest.approx([5, 2 * factor, factor, 0.5], rel=1e-6)


def test_heun_and_edm_churn_are_edms_algorithms(process):
    """By 18 levels and the step to x0.

    They are Karras et al. 2022, algorithms 1 (churn 0) and 2, for any s(t) = alpha and sigma(t) = sigma / alpha. Here
    all levels add the same noise.
    """
    field, x_start, high, low = check.start(mixture(process), 64, 80.0, 0.002)
    ts = make_grid(17, low, high, "edm", process=process, rho=7.0)
    churned = SDE_SAMPLERS["edm_churn"](field, x_start, ts, lambda x: 0.5, churn=3.0, churn_min=0.0, churn_max=math.inf,
                                        denoise=True)
    plain = ODE_SAMPLERS["heun"](field, x_start, ts, denoise=True)
    for value, factor in ((plain, 1.0), (churned, 1 + 3 / 18)):  # 1 + gamma
        x = x_start
        for t, t_next in zip(ts, [*ts[1:], None]):
            c = process.at(t)
            t = process.inverse(c.log_snr - 2 * math.log(factor)).item()
            x = process.at(t).alpha / c.alpha * (x + c.sigma * (factor**2 - 1) ** 0.5 * 0.5)
            if t_next is not None:
                d, dt = field(x, t, "velocity"), t_next - t
                x = x + dt / 2 * (d + field(x + dt * d, t_next, "velocity"))
        torch.testing.assert_close(value, field(x, t, "x0"), rtol=1e-9, atol=1e-9)


def edm_of_the_paper(D, x, noise, N=18, churn=0.0, churn_min=0.0, churn_max=math.inf, churn_noise=1.0):
    """Karras et al. 2022, algorithm 2 (algorithm 1 for churn 0), with sigma(t) = t and D(x; sigma), from 80 to 0."""
    t = [(80 ** (1 / 7) + i / (N - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(N)] + [0.0]
    for i in range(N):
        gamma = min(churn / N, 2**0.5 - 1) if churn_min <= t[i] <= churn_max else 0.0
        t_hat = t[i] + gamma * t[i]
        if gamma > 0:
            x = x + (t_hat**2 - t[i] ** 2) ** 0.5 * churn_noise * noise()
        d = (x - D(x, t_hat)) / t_hat
        x_next = x + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d + d_next) / 2
        x = x_next
    return x


@pytest.mark.parametrize("sampler, changes", [
    ("heun", {}),
    ("edm_churn", {}),  # in [0.01, 1], as for CIFAR-10 in the paper
    # in every step, also in the first, from sigma = 80 to a t above 1, and in the last
    ("edm_churn", dict(churn=40.0, churn_min=0.0, churn_max=1e9, churn_noise=1.003)),
    ("heun", dict(sigma_min=0.0, T_min=2.5e-5)),  # sigma = 80 t, so that the lowest level is 0.002
    ("heun", dict(sampling_steps=8)),
])
def test_the_preset_cifar10_edm_is_edms_sampler(sampler, changes):
    """With the same noise, it gives EDM's samples to 1e-5, by as many network calls: 35 for 18 levels."""
    settings = {**vars(Config(**PRESETS["cifar10_edm"])), **changes, "sampler": sampler}
    process, calls = make_process(**settings), []
    mixtures = {kind: mixture(process, kind) for kind in ("edm", "x0")}

    def net(x, t, label, cond=None):
        calls.append(t)
        return mixtures["edm"](x, t)

    def D(x, sigma):
        return mixtures["x0"](x, process.inverse(torch.full((64,), -2 * math.log(sigma), dtype=torch.float64)))

    settings |= dict(rows=range(64), shape=(2,), device="cpu", process=process)
    got = drawn(net, **settings)
    noise = row_noise(range(64), (2,), "cpu", 0, "sample")
    start, N = 80 * noise().double(), settings["sampling_steps"] + 1
    names = ("churn", "churn_min", "churn_max", "churn_noise") if sampler == "edm_churn" else ()
    churn = {name: settings[name] for name in names}
    torch.testing.assert_close(got.double(), edm_of_the_paper(D, start, noise, N, **churn), rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 * N - 1


def test_what_steps_in_a_warped_time_cost():
    """The errors of docs/mathematics.md with 18 levels, for data N(0, 0.25) and the times of two processes."""
    errors = {}
    for name in ("ve_linear", "edm"):
        process = PROCESSES[name]()
        net = gaussian(process, mean=0.0)
        got = drawn(net, process, rows=range(4000), shape=(1,), device="cpu", seed=0, sampler="heun", grid="edm",
                    rho=7.0, denoise=True, T_min=0.0, T_max=1.0, model_type="velocity", sampling_steps=17)
        x = net.flow(process.at(1.0).sigma * row_noise(range(4000), (1,), "cpu", 0, "sample")(), 1.0, 0.0)
        errors[name] = (got - Field(net, process, "velocity")(x, 0.0, "x0")).square().mean().sqrt().item()
    print(errors)
    assert errors["ve_linear"] == pytest.approx(0.028, abs=0.002) and errors["edm"] == pytest.approx(0.11, abs=0.01)


def test_dpmpp_2m_is_of_order_2_also_from_data_to_noise(process):
    """For one Gaussian, whose flow is known exactly."""
    data = gaussian(process, dims=2)
    x = data.sample(16, torch.Generator().manual_seed(0), 0.2)[0]

    def error(n):
        ts = make_grid(n, 0.2, 0.7)[::-1]
        out = ODE_SAMPLERS["dpmpp_2m"](Field(data, process, "velocity"), x, ts)
        return (out - data.flow(x, 0.2, 0.7)).abs().mean().item()

    assert 1.8 < math.log(error(32) / error(128)) / math.log(4) < 2.2


# ---- Predictions of x1 and of the score, from which no good x0 can be computed near the noise


@pytest.mark.parametrize("kind", ["x1", "score"])
@pytest.mark.parametrize("name", ["rf", "cosine"])
def test_an_error_of_x1_does_not_blow_up_at_the_start(name, kind):
    """A network has an error of 1% of x1, and alpha is 1e-4 at the start: samples and likelihoods are nearly exact."""
    process = PROCESSES[name]()
    exact, data = gaussian(process, dims=2), gaussian(process, kind, dims=2)

    def net(x, t, label, cond=None):
        error = 0.01 if kind == "x1" else -0.01 / process.coefs(t, 2).sigma
        return data(x, t) + error

    settings = dict(rows=range(200), shape=(2,), device="cpu", seed=0, T_min=1e-4, T_max=0.9999, sampling_steps=20)
    for sampler in ("heun", "dpmpp_2m", "euler_maruyama"):
        expected = drawn(exact, process, sampler=sampler, model_type="velocity", **settings)
        got = drawn(net, process, sampler=sampler, model_type=kind, **settings)
        assert (got - expected).abs().max() < 0.25, sampler
    x0 = exact.sample(50, torch.Generator().manual_seed(0))[0]
    nats = log_likelihood(Field(net, process, kind), x0, 1e-4, 0.9999)
    assert (nats - exact.log_prob(x0, torch.zeros(50))).abs().max() < 0.5


def test_the_network_is_not_called_where_it_loses_x0():
    """For a later time than that of sigma / alpha = 20, it is called at that time, with x scaled to its noise.

    Guidance still acts as at the later time.
    """
    process, calls = PROCESSES["rf"](), []

    def net(x, t, label, cond=None):
        calls.append((x, t[0].item(), label is None))
        return mixture(process, "x1")(x, t)

    label = torch.zeros(6, dtype=torch.int64)
    for T, seen, guided in ((0.9, 0.9, True), (0.99, 20 / 21, False), (1.0, 20 / 21, False)):
        limited = Field(net, process, "x1", label, 2.0, guidance_t_max=0.96)
        velocity, x0 = limited(start(), T, "velocity", "x0")
        assert {round(t, 6) for _, t, _ in calls} == {round(seen, 6)} and len(calls) == 1 + guided
        torch.testing.assert_close(calls[0][0], start() * seen / T)
        torch.testing.assert_close(velocity, (start() - (1 - T) * x0) / T - x0)
        calls.clear()
    for name, kind in (("rf", "velocity"), ("rf", "v"), ("cosine", "x0"), ("linear_vp", "x1"), ("ve_linear", "score"),
                       ("rf", "edm")):
        assert Field(net, PROCESSES[name](), kind).latest == math.inf, (name, kind)


def test_cost_in_width():
    """The ratios in docs/results.md: standard deviation of samples over that of data N(0, s^2), by an exact x1 network.

    By the linearity of the flow, that of one sample from noise 1 is enough.
    """
    found = {}
    for s in (0.5, 4.0, 14.0, 50.0):
        process = PROCESSES["rf"]()
        x = process.at(0.9999).sigma * torch.ones(1, 1, dtype=torch.float64)
        exact = Field(gaussian(process, "x1", mean=0.0, std=s), process, "x1")
        found[s] = [ODE_SAMPLERS["heun"](exact, x, make_grid(n, 1e-4, 0.9999)).item() / s for n in (20, 200)]
    print(found)
    for s, expected in ((0.5, (0.996, 1.0)), (4.0, (1.014, 1.019)), (14.0, (1.106, 1.137)), (50.0, (0.81, 0.876))):
        assert found[s] == pytest.approx(expected, abs=1e-3)


def test_denoise_is_a_step_of_heun_where_the_noise_levels_are_close_and_x1_is_known():
    """Else x0 is predicted after the last step, which is an Euler step.

    A Heun step would correct it by an error after a long last step, or where x1 cannot be computed from the prediction.
    """
    def calls(**changes):
        process, settings = PROCESSES["rf"](), {"grid": "edm", "model_type": "velocity", "sampler": "heun", **changes}
        ((_, calls),) = draw(mixture(process, settings["model_type"]), process, rows=range(2), shape=(2,), device="cpu",
                             seed=0, T_min=1e-4, T_max=0.9999, sampling_steps=5, rho=7.0, denoise=True, **settings)
        return calls

    assert calls() == 11 and calls(grid="uniform") == calls(model_type="x0") == 10 and calls(sampler="euler") == 6


@pytest.mark.parametrize("diffusion", list(DIFFUSIONS))
def test_diffusion_coefficients(process, diffusion):
    t, t_next = 0.6, 0.599
    c = process.at(0.5995)
    expected = {"delta": c.sigma * c.sigma_dot - c.alpha_dot / c.alpha * c.sigma**2, "sigma": c.sigma, "constant": 1.0,
                "own": 0.5995**2 / 2 if isinstance(process, Foellmer) else c.delta,
                "sin2": math.sin(0.5995 * math.pi) ** 2}[diffusion]
    limit = float(process.at(t_next).sigma ** 2 / 0.002)  # 2 eps |dt| is no more than sigma^2
    for scale in (1.0, 0.5):
        eps = field(process, sde_diffusion=diffusion, sde_scale=scale).eps(t, t_next)
        assert eps == pytest.approx(min(scale * float(expected), limit), rel=1e-6) and eps > 0
    assert field(process, sde_diffusion=diffusion, sde_scale=1e9).eps(t, t_next) == pytest.approx(limit)


@pytest.mark.parametrize("sampler, diffusion", [
    *((sampler, diffusion) for sampler in ("euler_maruyama", "stochastic_heun") for diffusion in DIFFUSIONS),
    ("predictor_corrector", "delta"),  # it predicts by the step of euler_maruyama, and its corrector needs no diffusion
])
def test_few_steps_from_end_to_end_do_not_overshoot(process, sampler, diffusion):
    """Samples of data of standard deviation 0.02 lie within 0.2 of their mean, and are not all equal.

    The range and the grid are the usual ones: `constant` is stiff near the data there, and `delta` near the noise.
    Processes that do not reach the data have EDM's grid. An overshoot is one of all samples, so 200 are enough.
    """
    data, generator = gaussian(process, dims=2, std=0.02), torch.Generator().manual_seed(0)
    x = data.sample(200, generator, 0.9999)[0]
    grid = make_grid(50, 1e-4, 0.9999, "edm" if process.at(0.0).sigma > 0 else "uniform", process=process, rho=7.0)
    narrow = Field(data, process, "velocity", sde_diffusion=diffusion)
    out = SDE_SAMPLERS[sampler](narrow, x, grid, lambda x: torch.randn(200, 2, generator=generator))
    assert (out - 0.7).abs().max() < 0.2 and (out.std(0) > 0.005).all()


# ---- Guidance


@pytest.mark.parametrize("kind", list(PREDICTIONS))
def test_guidance_mixes_velocities(kind):
    """Guidance of any kind of prediction is guidance of the velocity.

    Scale 1 gives the velocity for the label, and scale 0 that without a label.
    """
    process = PROCESSES["cosine"]()
    net, x, label = mixture(process, kind), start(8), torch.arange(8) % 3
    c, u = (Field(net, process, kind, label_or_none)(x, 0.4, "velocity") for label_or_none in (label, None))
    assert not torch.allclose(c, u)
    for scale in (0.0, 1.0, 2.5):
        torch.testing.assert_close(Field(net, process, kind, label, scale)(x, 0.4, "velocity"), u + scale * (c - u))


def test_guidance_acts_inside_its_interval_only():
    calls, net = [], mixture(PROCESSES["rf"]())

    def counted(x, t, label, cond=None):
        calls.append((round(t[0].item(), 3), label is None))
        return net(x, t, label)

    label = torch.zeros(6, dtype=torch.int64)
    limited = Field(counted, net.process, "velocity", label, 3.0, guidance_t_min=0.3, guidance_t_max=0.6)
    outs = [limited(start(), t, "velocity") for t in (0.29, 0.3, 0.6, 0.61)]
    assert calls == [(0.29, False), (0.3, False), (0.3, True), (0.6, False), (0.6, True), (0.61, False)]
    calls.clear()
    Field(counted, net.process, "velocity", label, 3.0)(start(), 1.2, "velocity")  # edm_churn may go beyond t = 1
    assert calls == [(1.2, False), (1.2, True)]
    for out, t, scale in zip(outs, (0.29, 0.3, 0.6, 0.61), (1, 3, 3, 1)):
        torch.testing.assert_close(out, Field(net, net.process, "velocity", label, scale)(start(), t, "velocity"))


def test_autoguidance_leads_away_from_the_guide():
    """Karras et al. 2024, eq. 3: D_0 + w (D_1 - D_0). The network and the guide get the same labels, or both none."""
    process = PROCESSES["edm"]()
    net, worse = mixture(process), gaussian(process, dims=2)
    for label in (torch.arange(6) % 3, None):
        seen = []

        def guide(x, t, label, cond=None, seen=seen):
            seen.append(label)
            return worse(x, t)

        out = Field(net, process, "velocity", label, 2.0, guide)(start(), 0.4, "velocity")
        good = Field(net, process, "velocity", label)(start(), 0.4, "velocity")
        bad = Field(worse, process, "velocity")(start(), 0.4, "velocity")
        torch.testing.assert_close(out, bad + 2 * (good - bad))
        assert seen == [label]


def test_guidance_is_mixed_in_float32():
    """The outputs are bfloat16, as under autocast. Their difference would lose the little that the label changes."""
    def net(x, t, label, cond=None):
        return torch.full_like(x, 256.0 if label is None else 258.0, dtype=torch.bfloat16)

    mixed = Field(net, PROCESSES["rf"](), "velocity", torch.zeros(2, dtype=torch.int64), 1.25)
    assert mixed.predict(torch.zeros(2, 1), 0.5, 0.5).tolist() == [[258.5], [258.5]]


@pytest.mark.parametrize("label, scale", [(torch.zeros(2, dtype=torch.int64), 1.0), (None, 3.0)])
def test_one_call_without_guidance(label, scale):
    calls = []

    def net(x, t, label, cond=None):
        calls.append(label)
        return x

    Field(net, PROCESSES["rf"](), "velocity", label, scale)(torch.zeros(2, 1), 0.5, "velocity")
    assert len(calls) == 1


# ---- Drawing


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_rows_do_not_depend_on_the_batch(sampler):
    process = PROCESSES["rf"]()
    net = mixture(process) if sampler != "flow_map" else gaussian(process, dims=2)  # whose map is known
    settings = {**SETTINGS, "sampler": sampler, "shape": (2,), "device": "cpu", "churn_max": 10.0}

    def samples(rows, batch_size, seed=1):
        return drawn(net, process, rows=rows, seed=seed, sampling_batch_size=batch_size, **settings)

    whole, tolerance = samples(range(50), 50), 3e-3 if sampler == "dopri5" else 1e-5
    assert whole.shape == (50, 2) and whole.dtype == torch.float32
    torch.testing.assert_close(samples(range(50), 7), whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(samples(range(33, 50), 100), whole[33:], rtol=tolerance, atol=tolerance)
    assert len(whole.unique(dim=0)) == 50
    assert (samples(range(50), 50, seed=2) != whole).any(1).all()
    assert list(draw(net, process, rows=range(0), seed=1, **settings)) == []


def test_draw_passes_its_settings_on():
    """Each setting of the field, the grid and the sampler changes the samples."""
    process = PROCESSES["rf"]()

    def samples(**changes):
        settings = {**SETTINGS, "sampler": "edm_churn", "labels": torch.arange(8) % 3, "grid": "shifted",
                    "grid_shift": 3.0, "churn_max": 5.0, **changes}
        return drawn(mixture(process), process, rows=range(8), shape=(2,), device="cpu", seed=0, **settings)

    usual = samples()
    for changes in (dict(grid="uniform"), dict(grid_shift=2.0), dict(churn=1.0), dict(churn_max=0.1),
                    dict(churn_min=4.0), dict(churn_noise=1.1), dict(guidance_scale=2.0),
                    dict(sampler="predictor_corrector"), dict(labels=None), dict(denoise=True),
                    dict(guidance_scale=2.0, guide=gaussian(process, dims=2)), dict(T_max=0.9), dict(T_min=0.1),
                    dict(sampling_steps=5)):
        assert not torch.equal(samples(**changes), usual), changes
    guided = dict(sampler="heun", guidance_scale=2.0)
    for base, changes in ((dict(sampler="predictor_corrector"), dict(corrector_snr=0.3)),
                          (dict(sampler="stochastic_heun"), dict(sde_diffusion="sin2")),
                          (dict(sampler="stochastic_heun"), dict(sde_scale=0.3)),
                          (dict(sampler="dopri5"), dict(rtol=0.1)), (dict(sampler="dopri5"), dict(atol=0.1)),
                          (guided, dict(guidance_t_min=0.6)), (guided, dict(guidance_t_max=0.6))):
        assert not torch.equal(samples(**base, **changes), samples(**base)), changes


def test_denoise_takes_the_predicted_x0():
    process = PROCESSES["edm"]()
    settings = dict(rows=range(8), shape=(2,), device="cpu", seed=0, sampler="heun", **{**SETTINGS, "T_min": 0.3})
    noisy, clean = (drawn(mixture(process), process, denoise=denoise, **settings) for denoise in (False, True))
    torch.testing.assert_close(clean, mixture(process, "x0")(noisy, torch.full((8,), 0.3)), rtol=1e-4, atol=1e-4)


def test_dopri5_that_finds_no_step_raises_an_error_of_one_line():
    not_finite = Field(lambda x, t, label, cond: x / 0, PROCESSES["rf"](), "velocity")
    with pytest.raises(UserError, match="dopri5 found no step from t = 0.9 to 0.1.*--rtol 1e-4"):
        SAMPLERS["dopri5"](not_finite, start(), [0.9, 0.1])


def test_labels_go_with_their_rows():
    seen = []

    def net(x, t, label, cond=None):
        seen.append(label.tolist())
        return x

    settings = {**SETTINGS, "sampling_steps": 1, "labels": torch.arange(10), "sampling_batch_size": 3}
    list(draw(net, PROCESSES["rf"](), rows=range(2, 6), shape=(1,), device="cpu", seed=0, sampler="euler", **settings))
    assert seen == [[2, 3, 4], [5]]


def test_unknown_sampler():
    settings = {**SETTINGS, "shape": (1,), "device": "cpu", "seed": 0, "sampler": "dopri"}
    with pytest.raises(UserError, match="euler, heun, .*euler_maruyama"):
        list(draw(None, PROCESSES["rf"](), rows=range(2), **settings))


# ---- Memory, and one batch size


def test_too_little_memory_halves_the_batch(capfd):
    """The samples are the same, in smaller batches, with one line on stderr for each try.

    If not even one sample fits, the error has one line.
    """
    process, sizes, limit = PROCESSES["rf"](), [], [3]

    def net(x, t, label, cond=None):
        sizes.append(len(x))
        if len(x) > limit[0]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return mixture(process)(x, t)

    def samples(**changes):
        settings = {**SETTINGS, "shape": (2,), "device": "cpu", "seed": 0, "sampler": "euler", **changes}
        samples, calls = zip(*draw(net, process, rows=range(10), **settings))
        assert set(calls) == {4}  # without those of tries that failed
        return torch.cat(samples)

    few = samples(batch_size=12)
    assert [n for i, n in enumerate(sizes) if i == 0 or n != sizes[i - 1]] == [10, 5, 2] and len(sizes) == 2 + 5 * 4
    error = capfd.readouterr().err
    assert error.count("\n") == 2 and "out of memory for 10 items at once (CUDA out of memory" in error
    assert "--sampling_batch_size 2" in error
    limit[0] = 10
    torch.testing.assert_close(few, samples())
    limit[0] = 0
    with pytest.raises(UserError, match="out of memory for a single item"):
        samples()
