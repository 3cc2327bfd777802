"""Tests of predictions, EDM's preconditioning and loss weightings, against the papers and closed forms.

test_check.py tests every conversion, there and back, and against exact predictions.
"""

import pytest
import torch

from prediction import LOSS_WEIGHTINGS, PREDICTIONS, Preconditioned, convert, loss_weight, target
from processes import PROCESSES, make_process
from utils import UserError

KINDS = list(PREDICTIONS)
SETTINGS = dict(min_snr_gamma=5.0, sigmoid_bias=2.0)


def batch(process, n=64, low=0.02, high=0.98):
    t = torch.linspace(low, high, n, dtype=torch.float64)
    x0, x1 = torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c = process.coefs(t, 2)
    return t, c, x0, x1, c.alpha * x0 + c.sigma * x1


def test_targets_are_their_definitions(process):
    _, c, x0, x1, xt = batch(process)
    sigma = c.sigma / c.alpha  # EDM's, whose data are xt / alpha
    c_skip = 0.25 / (sigma**2 + 0.25)  # Karras et al. 2022, table 1, with sigma_data = 0.5
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    definitions = {
        "x0": x0,
        "x1": x1,
        "score": -x1 / c.sigma,
        "velocity": c.alpha_dot * x0 + c.sigma_dot * x1,
        "drift": c.alpha_dot * x0 + c.sigma_dot * x1 + c.own_eps * x1 / c.sigma,
        "v": c.alpha * x1 - c.sigma * x0,
        "edm": (x0 - c_skip * xt / c.alpha) / c_out,
    }
    assert definitions.keys() == PREDICTIONS.keys()
    for kind, definition in definitions.items():
        torch.testing.assert_close(target(kind, c, x0, x1), definition, rtol=1e-11, atol=1e-11)


def test_edm_target_has_unit_variance(process):
    """This is the purpose of EDM's c_out: at every t, for data of standard deviation sigma_data."""
    process.sigma_data = 0.7
    c = process.coefs(torch.linspace(0.01, 0.99, 9, dtype=torch.float64))
    p, q = PREDICTIONS["edm"](c)
    torch.testing.assert_close(p**2 * 0.49 + q**2, torch.ones_like(p))


def test_preconditioned_network(process):
    """c_in and c_noise of Karras et al. 2022, table 1: inputs of unit variance, and log(sigma) / 4."""
    process.sigma_data = 0.7
    t, c, x0, x1, _ = batch(process)
    xt = c.alpha * 0.7 * x0 + c.sigma * x1
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x, noise, label, cond):
            seen.extend([x, noise, label])
            return 2 * x

    label = torch.zeros(64, dtype=torch.int64)
    out = Preconditioned(Net(), process)(xt, t, label)
    sigma = c.sigma / c.alpha
    c_in = 1 / (sigma**2 + 0.49).sqrt()
    torch.testing.assert_close(seen[0], c_in * xt / c.alpha)
    torch.testing.assert_close(seen[1], sigma.flatten().log() / 4)
    assert seen[2] is label and torch.equal(out, 2 * seen[0])


def test_same_kind_is_untouched_even_where_it_is_singular(process):
    c = process.coefs(torch.tensor([0.0, 1.0]), 2)
    y = torch.randn(2, 3)
    assert all(convert(y, y, c, kind, kind) is y for kind in KINDS)


def test_negative_determinant_has_the_right_sign(process):
    """The kind x0 has D = -sigma < 0. A guard such as D + 1e-8 would be wrong there, most of all near t = 0."""
    t = torch.tensor([1e-6], dtype=torch.float64)
    c, x0, x1 = process.coefs(t, 2), torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64)
    x1_again = convert(x0, c.alpha * x0 + c.sigma * x1, c, "x0", "x1")
    torch.testing.assert_close(x1_again, x1, rtol=1e-6, atol=0)


# ---- Loss weightings


def test_no_weighting_leaves_the_error_as_it_is(process):
    for kind in KINDS:
        assert (loss_weight(process.coefs(torch.rand(9)), "none", kind) == 1).all()


@pytest.mark.parametrize("weighting", [name for name in LOSS_WEIGHTINGS if name != "none"])
def test_a_weighted_loss_does_not_depend_on_the_target(process, weighting):
    """One and the same error of the network has the same loss, whichever kind of prediction it is converted to."""
    t, c, x0, x1, xt = batch(process)
    wrong_x0, losses = x0 + torch.randn(64, 3, dtype=torch.float64), []
    for kind in KINDS:
        error = convert(wrong_x0, xt, c, "x0", kind) - target(kind, c, x0, x1)
        losses.append((loss_weight(c, weighting, kind, **SETTINGS) * error**2).sum(1))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-9, atol=0)
    assert losses[0].isfinite().all() and (losses[0] > 0).all()


def test_weights_of_the_papers():
    c = PROCESSES["linear_vp"]().coefs(torch.linspace(0.01, 0.99, 50, dtype=torch.float64))
    snr = c.log_snr.exp()
    for gamma in (1.0, 5.0):  # Hang et al. 2023, section 3.4, for x0, noise and v
        for kind, divisor in (("x0", 1), ("x1", snr), ("v", snr + 1)):
            weight = loss_weight(c, "min_snr", kind, min_snr_gamma=gamma)
            torch.testing.assert_close(weight, snr.clamp(max=gamma) / divisor)
    edm = make_process("edm", sigma_data=0.6).coefs(torch.linspace(0, 1, 50, dtype=torch.float64))
    sigma = edm.sigma  # Karras et al. 2022, table 1; and lambda c_out^2 = 1 (section 5)
    torch.testing.assert_close(loss_weight(edm, "edm", "x0"), (sigma**2 + 0.36) / (0.6 * sigma) ** 2)
    torch.testing.assert_close(loss_weight(edm, "edm", "edm"), torch.ones_like(sigma))
    torch.testing.assert_close(loss_weight(c, "likelihood", "score"), c.g**2 / 2)
    for bias in (-1.0, 2.0):  # Kingma & Gao 2023: 1/2 w(lambda) -d lambda / dt for the noise
        expected = torch.sigmoid(bias - c.log_snr) * c.delta / c.sigma**2
        torch.testing.assert_close(loss_weight(c, "sigmoid", "x1", sigmoid_bias=bias), expected)


def test_likelihood_weighting_is_the_divergence(process):
    """KL(p || q) at T_min is KL(p || q) at T_max plus the integral over t of the weighted squared error of q's score.

    For two Gaussians p and q, all of these are known (Song et al. 2021, "Maximum Likelihood Training", theorem 1).
    """
    t = torch.linspace(0.05, 0.95, 2001, dtype=torch.float64)
    c = process.coefs(t)
    mean_p, mean_q = c.alpha * 0.7, c.alpha * -0.2  # of xt, for x0 from N(0.7, 0.5^2) and from N(-0.2, 0.8^2)
    var_p, var_q = c.alpha**2 * 0.25 + c.sigma**2, c.alpha**2 * 0.64 + c.sigma**2
    divergence = 0.5 * (var_p / var_q + (mean_p - mean_q) ** 2 / var_q - 1 - (var_p / var_q).log())
    # E_p (score of p - score of q)^2: the difference is linear in x
    error = (1 / var_q - 1 / var_p) ** 2 * var_p + ((mean_p - mean_q) / var_q) ** 2
    integral = torch.trapezoid(loss_weight(c, "likelihood", "score") * error, t)
    assert (divergence[0] - divergence[-1]).item() == pytest.approx(integral.item(), rel=1e-4)


def test_unknown_names_list_the_known():
    c = PROCESSES["rf"]().coefs(torch.rand(2), 2)
    with pytest.raises(UserError, match="'velocty' is not known here: expected one of x0, x1, score, velocity, drift"):
        target("velocty", c, torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(UserError, match="none, min_snr, edm, likelihood, sigmoid"):
        loss_weight(c, "snr", "x0")
