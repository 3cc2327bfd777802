"""What a network can predict, how one kind of prediction is converted to another, and how the loss weighs each time.

Every kind is a row (p, q) of PREDICTIONS: its target is y = p x0 + q x1. Together with z = alpha x0 + sigma x1, this
is a 2 x 2 linear system. Its solution is

    x0 = (q z - sigma y) / D,    x1 = (alpha y - p z) / D,    D = alpha q - sigma p,

so one formula converts any kind to any other, and training targets and conversions share one table. The system is
linear, so it also holds for the expectations given z, which are what a trained network outputs.

The network gets xt = z + shift m. A row (p, q, r) says that it outputs p x0 + q x1 + r m. As m, the mean of the base,
is known, `without_mean` takes r m from the output, and everything else is about z.

To add a kind, add a row to PREDICTIONS; to add a weighting, one to LOSS_WEIGHTINGS. (v: Salimans & Ho 2022,
"Progressive Distillation", appendix D. score: Song et al. 2021, eq. 7 with the Gaussian transition. edm: F in
x0 = c_skip xt + c_out F, Karras et al. 2022, eq. 7.)
"""

import torch
from torch import nn

from processes import Coefs
from utils import append_dims, call_with_settings, look_up

PREDICTIONS = {
    "x0": lambda c: (1.0, 0.0),
    "x1": lambda c: (0.0, 1.0),
    "score": lambda c: (0.0, -1 / c.sigma),
    "velocity": lambda c: (c.alpha_dot, c.sigma_dot, c.shift_dot),
    "drift": lambda c: (c.alpha_dot, c.drift, c.shift_dot),  # velocity - own_eps score
    "v": lambda c: (-c.sigma, c.alpha),
    "edm": lambda c: (c.sigma / c.sigma_data / c.variance.sqrt(), -c.alpha * c.sigma_data / c.variance.sqrt()),
}


def row(kind, c: Coefs):
    """p and q of this kind at the coefficients `c`, tensors or numbers. Raises UserError for an unknown kind."""
    return look_up(PREDICTIONS, kind)(c)[:2]


def without_mean(y, c: Coefs, kind, m):
    """A network's output `y` of this kind, less its known part r m, for the mean of the base m (B, ...) or 0."""
    known = look_up(PREDICTIONS, kind)(c)[2:]
    return y - known[0] * m if known else y


def target(kind, c: Coefs, x0, x1):
    """The training target of this kind, p x0 + q x1, for x0 and x1 (B, ...) and the coefficients `c` at their times.

    Raises UserError for an unknown kind.
    """
    p, q = row(kind, c)
    return p * x0 + q * x1


def convert(y, z, c: Coefs, kind, to):
    """Converts a prediction `y` of one kind at `z`, both (B, ...), to the kind `to`. Equal kinds return `y` itself.

    Raises UserError for an unknown kind. The result is not finite where D = 0: `y` then does not determine `to`, as the
    kind x0 does not determine x1 at sigma = 0. `build.check_settings` refuses settings for which this happens.
    """
    if kind == to:
        return y
    (p, q), (p_to, q_to) = row(kind, c), row(to, c)
    z_factor, y_factor = p_to * q - q_to * p, c.alpha * q_to - c.sigma * p_to
    return (z_factor * z + y_factor * y) / (c.alpha * q - c.sigma * p)


def convert_output(out, xt, c: Coefs, kind, to):
    """Converts a network's whole output, also where xt = alpha x0 + sigma x1 + gamma z, to the kind `to`.

    With a gamma, `out` (B, 2C, ...) is a prediction y about x0 and x1, with xt - gamma eta in the place of z above, and
    eta = E[z | xt]. The score is -eta / gamma, and the velocity has a term gamma_dot eta (Albergo, Boffi &
    Vanden-Eijnden 2023, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions", section 2).
    """
    if c.gamma is None:
        return convert(out, xt, c, kind, to)
    y, eta = out.chunk(2, dim=1)
    if to == "score":
        return -eta / c.gamma
    y = convert(y, xt - c.gamma * eta, c, kind, to)
    return y + c.gamma_dot * eta if to == "velocity" else y


def error_factor(c: Coefs, kind):
    """How much a conversion of this kind enlarges the network's error: (|p| + |q|) / |D|, in the shape of `c`.

    If the prediction has the relative error e, the x0 computed from it has an error of e sigma times this factor, and
    the x1 one of e alpha times this factor.
    """
    p, q = row(kind, c)
    return (abs(p) + abs(q)) / abs(c.alpha * q - c.sigma * p)


class Preconditioned(nn.Module):
    """Calls the network with c_in xt, where c_in z has unit variance, and with c_noise = log(sigma / alpha) / 4 for t.

    (Karras et al. 2022, table 1 and eq. 7, for any alpha and sigma.) This and the prediction `edm`, whose row holds
    c_skip and c_out, are EDM's whole preconditioning. Its arguments are those of the network.
    """

    def __init__(self, net, process):
        super().__init__()
        self.net, self.process = net, process

    def forward(self, xt, t, label=None, cond=None):
        c = self.process.coefs(t)
        return self.net(append_dims(c.variance.rsqrt(), xt.ndim) * xt, -c.log_snr / 8, label, cond)


def likelihood_weight(c: Coefs, x0_error_factor):
    """The weight g^2 / 2 of the squared error of the score, which gives the bound on the likelihood.

    (Song et al. 2021, "Maximum Likelihood Training", theorem 1.) The squared error of the score is (alpha / sigma^2)^2
    times that of x0.
    """
    return x0_error_factor * c.delta * (c.alpha / c.sigma**2) ** 2


# The factor by which the loss multiplies the squared error of the target, at coefficients c. The papers weigh the
# squared error of x0: that is `x0_error_factor` times the squared error of the target.
LOSS_WEIGHTINGS = {
    "none": None,  # leaves the squared error of the target as it is
    # min(SNR, gamma) (Hang et al. 2023, "Min-SNR Weighting", section 3.4)
    "min_snr": lambda c, x0_error_factor, min_snr_gamma: x0_error_factor * c.log_snr.exp().clamp(max=min_snr_gamma),
    # lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, where EDM's sigma is sigma / alpha here (Karras
    # et al. 2022, table 1)
    "edm": lambda c, x0_error_factor: x0_error_factor * c.variance / (c.sigma * c.sigma_data) ** 2,
    "likelihood": likelihood_weight,
    # that of `likelihood` times sigmoid(bias - log SNR) (Kingma & Gao 2023, "Understanding Diffusion Objectives",
    # section 5)
    "sigmoid": lambda c, x0_error_factor, sigmoid_bias:
        likelihood_weight(c, x0_error_factor) * torch.sigmoid(sigmoid_bias - c.log_snr),
}


def loss_weight(c: Coefs, loss_weighting, target_type, **settings):
    """The factor by which the loss multiplies the squared error of a target of kind `target_type`, in the shape of `c`.

    `none` gives 1: the loss is the squared error of the target. Every other weighting is defined for the squared error
    of x0, which is (sigma / D)^2 times that of the target. So these losses do not depend on `target_type`. `settings`
    may hold arguments of the weighting, such as min_snr_gamma; others are ignored. Raises UserError for an unknown
    name.
    """
    weighting = look_up(LOSS_WEIGHTINGS, loss_weighting)
    if weighting is None:
        return torch.ones_like(c.sigma)
    p, q = row(target_type, c)
    x0_error_factor = (c.sigma / (c.alpha * q - c.sigma * p)) ** 2
    return call_with_settings(weighting, settings, c=c, x0_error_factor=x0_error_factor)
