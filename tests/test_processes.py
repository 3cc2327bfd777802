"""Tests of the processes: boundary and known values, the linear SDE of each, derivatives, times of noise levels.

test_check.py compares derivatives with autograd and float32 with float64, for every process.
"""

import math

import pytest
import torch

from processes import EDM, PROCESSES, VE, Foellmer, FromFunctions, LinearVE, LinearVP, Process, make_process
from utils import UserError


def times(n=999):
    return torch.linspace(1e-4, 0.9999, n, dtype=torch.float64)


def test_ends_are_data_and_noise(process):
    c = process.coefs(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert c.alpha[0] == 1
    if isinstance(process, VE):
        torch.testing.assert_close(c.sigma, torch.tensor([0.002, 80.0], dtype=torch.float64), rtol=1e-12, atol=0)
        assert (process.alpha(times()) == 1).all()
    elif isinstance(process, Foellmer):
        assert c.alpha[1] == c.sigma[0] == c.sigma[1] == 0 and c.shift.tolist() == [0, 1]
    else:
        assert c.sigma[0] == 0 and c.alpha[1] < 0.01 and abs(c.sigma[1] - 1) < 1e-4
    assert (process.coefs(times()).log_snr.diff() < 0).all()


def test_variance_preserving():
    for name in ("cosine", "linear_vp"):
        c = PROCESSES[name]().coefs(times())
        torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones_like(times()))


def test_linear_sde_has_the_marginals(process):
    """Mean and variance of dx = f x dt + g dW obey m' = f m and V' = 2 f V + g^2: alpha and sigma^2 must solve them."""
    c = process.coefs(times())
    torch.testing.assert_close(c.alpha_dot, c.f * c.alpha, rtol=1e-10, atol=0)
    torch.testing.assert_close(2 * c.sigma * c.sigma_dot, 2 * c.f * c.sigma**2 + c.g**2, rtol=1e-9, atol=1e-12)


def test_forward_drift_is_linear(process):
    """velocity + delta score = f xt for every x0 and x1."""
    c, (x0, x1) = process.coefs(times(50), 2), torch.randn(2, 50, 3, dtype=torch.float64)
    velocity, score = c.alpha_dot * x0 + c.sigma_dot * x1, -x1 / c.sigma
    drift = c.f * (c.alpha * x0 + c.sigma * x1)
    torch.testing.assert_close(velocity + c.delta * score, drift, rtol=1e-8, atol=1e-8)


def test_slope_of_log_snr(process):
    t = times().requires_grad_()
    c = process.coefs(t)
    (slope,) = torch.autograd.grad(c.log_snr.sum(), t)
    torch.testing.assert_close(slope, -2 * c.delta / c.sigma**2, rtol=1e-9, atol=0)


def test_known_values():
    t = torch.tensor([0.25], dtype=torch.float64)

    def at(name, coefficient, **settings):
        return getattr(PROCESSES[name](**settings).coefs(t), coefficient).item()

    assert at("rf", "alpha") == 0.75 and at("rf", "sigma") == 0.25
    assert at("cosine", "alpha") == pytest.approx(math.cos(math.pi / 8), rel=1e-14)
    alpha = math.exp(-0.25 * 19.9 * 0.0625 - 0.5 * 0.1 * 0.25)
    assert at("linear_vp", "alpha") == pytest.approx(alpha, rel=1e-14)
    assert at("linear_vp", "g") ** 2 == pytest.approx(0.1 + 19.9 / 4)  # g^2 = beta (Song et al. 2021, eq. 11)
    assert LinearVP(beta_min=0.3).beta(torch.zeros(1)).item() == pytest.approx(0.3)
    assert at("sub_vp", "sigma") == pytest.approx(1 - alpha**2)
    assert at("sub_vp", "g") ** 2 == pytest.approx((0.1 + 19.9 / 4) * (1 - alpha**4))  # Song et al. 2021, eq. 12
    assert at("ve", "sigma", sigma_min=0.01, sigma_max=50.0) == pytest.approx(0.01 * 5000**0.25)
    g = 0.01 * 5000**0.25 * math.sqrt(2 * math.log(5000))
    assert at("ve", "g", sigma_min=0.01, sigma_max=50.0) == pytest.approx(g)
    assert at("ve_linear", "sigma") == pytest.approx(0.002 + 79.998 / 4)
    assert at("ve_linear", "sigma_dot") == pytest.approx(79.998)


def test_equal_steps_are_the_noise_levels_of_edm():
    """Karras et al. 2022, eq. 5, N = 18: sigma_i = (max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho."""
    levels = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    sigma = EDM().sigma(torch.linspace(1, 0, 18, dtype=torch.float64))
    torch.testing.assert_close(sigma, torch.tensor(levels, dtype=torch.float64), rtol=1e-12, atol=0)
    middle = ((0.002 ** (1 / 3) + 80 ** (1 / 3)) / 2) ** 3
    assert EDM(rho=3.0).sigma(torch.tensor(0.5)).item() == pytest.approx(middle, rel=1e-6)


def test_time_inverts_log_snr(process):
    t = times(200)
    torch.testing.assert_close(process.time(process.coefs(t).log_snr), t, rtol=1e-9, atol=1e-13)
    ends = torch.tensor([-math.inf, -1e9, 1e9, math.inf])
    assert process.time(ends).tolist() == pytest.approx([1, 1, 0, 0], abs=1e-12)
    log_snr = torch.linspace(-30, 30, 100)
    by_bisection = Process.inverse(process, log_snr.double())
    torch.testing.assert_close(process.time(log_snr), by_bisection, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("betas", [(0.0, 20.0), (1.0, 1.0)])
@pytest.mark.parametrize("name", ["linear_vp", "sub_vp"])
def test_time_inverts_log_snr_at_special_rates(name, betas):
    process, t = PROCESSES[name](*betas), times(200)[1:]
    torch.testing.assert_close(process.time(process.log_snr(t)), t, rtol=1e-9, atol=1e-12)
    assert process.time(torch.tensor([1e9])) == pytest.approx(0, abs=1e-12)


def test_derivatives_by_autograd_where_none_are_given():
    t = times()
    process = FromFunctions(lambda t: torch.cos(t), lambda t: t**3)
    torch.testing.assert_close(process.coefs(t).alpha_dot, -torch.sin(t), rtol=1e-12, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(process.coefs(t, 3).sigma_dot.flatten(), 3 * t**2, rtol=1e-12, atol=0)
    constant = FromFunctions(torch.ones_like, lambda t: t)
    assert constant.at(0.3).alpha_dot == 0 and constant.at(0.3).sigma_dot == 1

    class Named(Process):
        def alpha(self, t):
            return 1 - t

        def sigma(self, t):
            return t

    assert Named().at(0.3) == PROCESSES["rf"]().at(0.3)


def test_coefs_broadcast_over_any_data(process):
    t, x = torch.rand(5), torch.randn(5, 3, 4, 4)
    assert process.coefs(t, 4).alpha.shape == (5, 1, 1, 1)
    assert (process.coefs(t, 4).alpha * x).shape == x.shape
    assert (process.at(0.25).sigma * x).dtype == torch.float32
    sigma = process.sigma(torch.tensor([0.25], dtype=torch.float64))
    torch.testing.assert_close(process.at(0.25).sigma.expand(1), sigma)


def test_make_process():
    made = make_process("ve_linear", sigma_data=0.7, sigma_max=10.0, beta_min=3.0)
    assert isinstance(made, LinearVE) and made.sigma_max == 10
    assert made.at(0.5).sigma_data == 0.7 and PROCESSES["rf"]().sigma_data == 0.5
    assert made.at(1.0).variance.item() == pytest.approx(0.49 + 100)
    with pytest.raises(UserError, match="rf, cosine, linear_vp, sub_vp, ve, ve_linear, edm"):
        make_process("vp")


def test_delta_at_the_data():
    """g^2 / 2 at t = 0: beta_min / 2 for linear_vp, where sigma_dot is infinite, and 0 for sub_vp."""
    for time in (0.0, 1e-6, 0.5):
        assert PROCESSES["linear_vp"](0.3, 15.0).at(time).delta == pytest.approx(0.15 + 7.35 * time, rel=1e-12)
    assert PROCESSES["sub_vp"]().at(0.0).delta == 0


def test_a_sigma_min_of_0():
    for name in ("ve_linear", "edm"):
        process = PROCESSES[name](sigma_min=0.0)
        assert process.at(0.0).sigma == 0 and process.at(1.0).sigma == 80
        t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
        torch.testing.assert_close(process.time(process.log_snr(t)), t)
    with pytest.raises(UserError, match="sigma_min 0.0: process ve .*--process ve_linear"):
        PROCESSES["ve"](sigma_min=0.0)
