"""Agreement with independent implementations, each skipped where it is not installed. To have them all:

    pip install flow_matching==1.0.10 diffusers==0.42.1 && pip install --no-deps torchcfm==1.0.7
"""

import math

import numpy as np
import pytest
import torch

from check import mixture
from couplings import COUPLINGS
from likelihood import log_likelihood
from prediction import target
from processes import PROCESSES, FromFunctions
from sampling import Field, ddim, dpmpp_2m, euler, make_grid, midpoint


def need(package):
    return pytest.importorskip(package, reason=f"{package} is not installed: see the top of tests/test_peers.py")


def pairs(n=20):
    t = torch.linspace(0.01, 0.99, n, dtype=torch.float64)
    return t, *torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# ---- flow_matching, whose time runs from noise to data


@pytest.mark.parametrize("name, process, arguments", [
    ("CondOTScheduler", PROCESSES["rf"](), []),
    ("CosineScheduler", PROCESSES["cosine"](), []),
    ("VPScheduler", PROCESSES["linear_vp"](), []),
    ("PolynomialConvexScheduler", FromFunctions(lambda t: (1 - t) ** 3, lambda t: 1 - (1 - t) ** 3), [3]),
    ("LinearVPScheduler", FromFunctions(lambda t: 1 - t, lambda t: (1 - (1 - t) ** 2).sqrt()), []),
])
def test_flow_matching_schedulers(name, process, arguments):
    scheduler = getattr(need("flow_matching.path.scheduler"), name)(*arguments)
    t = pairs()[0]
    out, c = scheduler(1 - t), process.coefs(t)
    for a, b in ((out.alpha_t, c.alpha), (out.sigma_t, c.sigma), (-out.d_alpha_t, c.alpha_dot),
                 (-out.d_sigma_t, c.sigma_dot)):
        torch.testing.assert_close(a.expand(20), b, rtol=1e-9, atol=1e-12)
    times = scheduler.snr_inverse((c.log_snr / 2).exp())
    torch.testing.assert_close(times, 1 - process.time(c.log_snr), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["rf", "cosine"])
def test_flow_matching_likelihood_and_samples(name):
    solver = need("flow_matching.solver")
    process = PROCESSES[name]()
    data = mixture(process)

    def velocity(x, t, **extras):
        return -data(x, (1 - t).expand(len(x)))

    peer, field = solver.ODESolver(velocity_model=velocity), Field(data, process, "velocity")
    x0, times = data.sample(32, torch.Generator().manual_seed(0))[0], torch.tensor([1.0, 0.0], dtype=torch.float64)
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    settings = dict(method="dopri5", atol=1e-7, rtol=1e-7, time_grid=times, exact_divergence=True)
    _, log_p = peer.compute_likelihood(x0.clone(), lambda x: normal.log_prob(x).sum(1), None, **settings)
    own_log_p = log_likelihood(field, x0, 0.0, 1.0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(own_log_p, log_p.detach(), rtol=0, atol=1e-5)
    x1 = torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for method, sampler in (("euler", euler), ("midpoint", midpoint)):
        out = peer.sample(x1, step_size=0.05, method=method, time_grid=times.flip(0))
        torch.testing.assert_close(sampler(field, x1, make_grid(20, 0.0, 1.0)), out, rtol=1e-6, atol=1e-6)


# ---- torchcfm, whose time runs from noise to data


@pytest.mark.parametrize("name, process", [("ConditionalFlowMatcher", PROCESSES["rf"]()),
                                           ("VariancePreservingConditionalFlowMatcher", PROCESSES["cosine"]())])
def test_torchcfm_interpolants(name, process):
    matcher = getattr(need("torchcfm.conditional_flow_matching"), name)(sigma=0.0)
    t, x0, x1 = pairs()
    _, xt, ut = matcher.sample_location_and_conditional_flow(x1, x0, 1 - t)
    c = process.coefs(t, 2)
    torch.testing.assert_close(c.alpha * x0 + c.sigma * x1, xt)
    torch.testing.assert_close(target("velocity", c, x0, x1), -ut)


def test_torchcfm_optimal_transport():
    plan = need("torchcfm.optimal_transport").OTPlanSampler("exact")
    _, x0, x1 = pairs(64)
    order = COUPLINGS["ot"](x0, x1, None)
    weights = torch.as_tensor(plan.get_map(x0, x1))
    torch.testing.assert_close(weights, torch.nn.functional.one_hot(order, 64).double() / 64, rtol=0, atol=1e-12)


# ---- diffusers, on one model of the noise


def discrete(scheduler):
    """The scheduler's 1,000 levels as a process: level k is t = (k + 1) / 1000, and t = 0 is without noise."""
    all_levels = torch.cat([torch.ones(1), scheduler.alphas_cumprod]).double()

    def alpha_squared(t):
        return all_levels[(1000 * t).round().long()]

    return FromFunctions(lambda t: alpha_squared(t).sqrt(), lambda t: (1 - alpha_squared(t)).sqrt())


def noise(x, level):
    """A model of the noise in x at level k, neither linear nor exact."""
    return torch.tanh(x * (1 + level / 500)) + 0.1 * x.roll(1, -1)


@pytest.mark.parametrize("name, sampler, settings", [
    ("DDIMScheduler", ddim, dict(clip_sample=False)),
    ("DPMSolverMultistepScheduler", dpmpp_2m, dict(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
                                                   final_sigmas_type="zero")),
])
def test_diffusers_samplers(name, sampler, settings):
    scheduler = getattr(need("diffusers"), name)(beta_schedule="linear", timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(20)
    x = start = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in scheduler.timesteps:
        x = scheduler.step(noise(x, k.item()), k, x).prev_sample
    process = discrete(scheduler)
    field = Field(lambda x, t, label, cond: noise(x, 1000 * t[0].item() - 1), process, "x1")
    assert [round(1000 * t) - 1 for t in make_grid(20, 0.0, 1.0)[:-1]] == scheduler.timesteps.tolist()
    # to 1e-4, since the tables of diffusers are in float32
    torch.testing.assert_close(sampler(field, start, make_grid(20, 0.0, 1.0)), x, rtol=1e-4, atol=1e-4)


def test_diffusers_flow_match_euler():
    scheduler = need("diffusers").FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.05, 20))
    x = start = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(noise(x, t.item()), t, x).prev_sample
    field = Field(lambda x, t, label, cond: noise(x, 1000 * t[0].item()), PROCESSES["rf"](), "velocity")
    ts = make_grid(20, 0.0, 1.0, "shifted", grid_shift=3.0)
    assert ts[:-1] == pytest.approx([t / 1000 for t in scheduler.timesteps.tolist()], rel=1e-6)
    assert math.isclose(ts[1], 0.95 * 3 / 2.9)
    torch.testing.assert_close(euler(field, start, ts), x, rtol=1e-4, atol=1e-4)
