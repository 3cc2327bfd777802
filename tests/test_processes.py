"""Processes: derivatives against autograd, boundary values, the linear SDE they imply, and float32 near both ends."""

import math

import pytest
import torch

from processes import PROCESSES, LinearVP

T_MIN, T_MAX = 1e-4, 0.9999


def times(n=999):
    return torch.linspace(T_MIN, T_MAX, n, dtype=torch.float64)


@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_derivatives_equal_autograd(process, name):
    t = times().requires_grad_()
    (exact,) = torch.autograd.grad(getattr(process, name)(t).sum(), t)
    torch.testing.assert_close(getattr(process, name + "_dot")(t), exact, rtol=1e-10, atol=1e-12)


def test_ends_are_data_and_noise(process):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    alpha, sigma = process.alpha(ends), process.sigma(ends)
    assert alpha[0] == 1 and sigma[0] == 0
    assert alpha[1] < 0.01 and abs(sigma[1] - 1) < 1e-4
    assert (process.log_snr(times()).diff() < 0).all()


def test_variance_preserving():
    for name in ("cosine", "linear_vp"):
        process = PROCESSES[name]()
        torch.testing.assert_close(process.alpha(times()) ** 2 + process.sigma(times()) ** 2, torch.ones_like(times()))


def test_float32_agrees_with_float64(process):
    """Within 1e-4 relative on all of [T_min, T_max]; sigma of the VP process from 1 - alpha^2 would be 1.2% off at 1e-4."""
    t = times().float()
    for name in ("alpha", "sigma", "alpha_dot", "sigma_dot", "delta", "f", "g"):
        torch.testing.assert_close(getattr(process, name)(t).double(), getattr(process, name)(t.double()), rtol=1e-4, atol=0)


def test_linear_sde_has_the_marginals(process):
    """Mean and variance of dx = f x dt + g dW obey m' = f m and V' = 2 f V + g^2: alpha and sigma^2 must solve them."""
    t = times()
    torch.testing.assert_close(process.alpha_dot(t), process.f(t) * process.alpha(t), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        2 * process.sigma(t) * process.sigma_dot(t), 2 * process.f(t) * process.sigma(t) ** 2 + process.g(t) ** 2, rtol=1e-9, atol=1e-12
    )


def test_forward_drift_is_linear(process):
    """velocity + delta score = f xt for every x0 and x1."""
    t = times(50)
    c, (x0, x1) = process.coefs(t, 2), torch.randn(2, 50, 3, dtype=torch.float64)
    velocity, score = c.alpha_dot * x0 + c.sigma_dot * x1, -x1 / c.sigma
    f, delta = process.f(t)[:, None], process.delta(t)[:, None]
    torch.testing.assert_close(velocity + delta * score, f * process.interpolate(x0, x1, t), rtol=1e-8, atol=1e-8)


def test_known_values():
    t = torch.tensor([0.25], dtype=torch.float64)
    assert PROCESSES["rf"]().alpha(t).item() == 0.75 and PROCESSES["rf"]().sigma(t).item() == 0.25
    assert PROCESSES["cosine"]().alpha(t).item() == pytest.approx(math.cos(math.pi / 8), rel=1e-14)
    vp = LinearVP(beta_min=0.1, beta_max=20.0)
    assert vp.alpha(t).item() == pytest.approx(math.exp(-0.25 * 19.9 * 0.0625 - 0.5 * 0.1 * 0.25), rel=1e-14)
    torch.testing.assert_close(2 * vp.delta(t), vp.beta(t))  # g^2 = beta (Song et al. 2021, eq. 11)
    assert LinearVP(beta_min=0.3).beta(torch.zeros(1)).item() == pytest.approx(0.3)


def test_coefs_broadcast_over_any_data(process):
    t, x = torch.rand(5), torch.randn(5, 3, 4, 4)
    assert process.coefs(t, 4).alpha.shape == (5, 1, 1, 1)
    assert process.interpolate(x, x, t).shape == x.shape
