"""What a network predicts, how to read one kind of prediction as another, and how the loss weighs the times.

Every kind is a row (p, q): its target is y = p x0 + q x1. With xt = alpha x0 + sigma x1 that is a 2 x 2 linear system,

    x0 = (q xt - sigma y) / D,    x1 = (alpha y - p xt) / D,    D = alpha q - sigma p,

so one inversion turns any kind into any other, and training targets and conversions share one table. The same holds for the
expectations given xt, which is what a trained network outputs. To add a kind, add a row to PREDICTIONS; to add a weighting, one to
LOSS_WEIGHTINGS. (v: Salimans & Ho 2022, "Progressive Distillation", appendix D. Score: Song et al. 2021, eq. 7 with the Gaussian
transition. edm: F of Karras et al. 2022, eq. 7, where x0 = c_skip xt + c_out F.)
"""

import torch
from torch import Tensor, nn

from processes import Coefs, Process
from utils import append_dims, choose

PREDICTIONS = {
    "x0": lambda c: (torch.ones_like(c.alpha), torch.zeros_like(c.alpha)),
    "x1": lambda c: (torch.zeros_like(c.alpha), torch.ones_like(c.alpha)),
    "score": lambda c: (torch.zeros_like(c.alpha), -1 / c.sigma),
    "velocity": lambda c: (c.alpha_dot, c.sigma_dot),
    "v": lambda c: (-c.sigma, c.alpha),
    "edm": lambda c: (c.sigma / c.sigma_data / c.variance.sqrt(), -c.alpha * c.sigma_data / c.variance.sqrt()),
}


def target(kind: str, c: Coefs, x0: Tensor, x1: Tensor) -> Tensor:
    """The training target of this kind, p x0 + q x1, for x0 and x1 (B, ...) and `c` of their times.

    Raises UserError for an unknown kind.
    """
    p, q = choose(PREDICTIONS, kind, c=c)
    return p * x0 + q * x1


def convert(y: Tensor, xt: Tensor, c: Coefs, kind: str, to: str) -> Tensor:
    """A prediction `y` of one kind at `xt`, both (B, ...), as the kind `to`. The same kind returns `y` itself.

    Raises UserError for an unknown kind. Where `kind` says nothing about `to` (D = 0, such as x0 at sigma = 0), the result is
    not finite: `build.check_settings` finds such settings.
    """
    if kind == to:
        return y
    (p, q), (p_to, q_to) = choose(PREDICTIONS, kind, c=c), choose(PREDICTIONS, to, c=c)
    on_xt, on_y = p_to * q - q_to * p, c.alpha * q_to - c.sigma * p_to
    return (on_xt * xt + on_y * y) / (c.alpha * q - c.sigma * p)


def error_factor(c: Coefs, kind: str) -> Tensor:
    """(|p| + |q|) / |D|. If a prediction of this kind is off by a share e of its size, the x0 made of it is off by e sigma times this
    factor, and the x1 by e alpha times this."""
    p, q = choose(PREDICTIONS, kind, c=c)
    return (p.abs() + q.abs()) / (c.alpha * q - c.sigma * p).abs()


class Preconditioned(nn.Module):
    """A network that sees its input at unit variance, c_in xt, and c_noise = log(sigma / alpha) / 4 in place of t.

    (Karras et al. 2022, table 1 and eq. 7, for any alpha and sigma.) With the prediction `edm`, whose row holds c_skip and c_out,
    this is EDM's whole preconditioning. It is called as the network is: (xt, t, label).
    """

    def __init__(self, net: nn.Module, process: Process):
        super().__init__()
        self.net, self.process = net, process

    def forward(self, xt: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        c = self.process.coefs(t)
        return self.net(append_dims(c.variance.rsqrt(), xt.ndim) * xt, -c.log_snr / 8, label)


def likelihood_weight(c: Coefs, x0_error) -> Tensor:
    """g^2 / 2 for the error of the score: the integrand of the bound on the likelihood (Song et al. 2021, "Maximum Likelihood Training",
    theorem 1)."""
    return x0_error() * c.delta * (c.alpha / c.sigma**2) ** 2


# The weight of a time in the loss, for the squared error of x0, which is `x0_error()` times that of the target.
LOSS_WEIGHTINGS = {
    # the squared error of the target, as it is
    "none": lambda c: torch.ones_like(c.sigma),
    # min(SNR, gamma) (Hang et al. 2023, "Min-SNR Weighting", section 3.4)
    "min_snr": lambda c, x0_error, min_snr_gamma: x0_error() * c.log_snr.exp().clamp(max=min_snr_gamma),
    # lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, with sigma / alpha for sigma (Karras et al. 2022, table 1)
    "edm": lambda c, x0_error: x0_error() * c.variance / (c.sigma * c.sigma_data) ** 2,
    "likelihood": likelihood_weight,
    # the same with a factor sigmoid(bias - log SNR) (Kingma & Gao 2023, "Understanding Diffusion Objectives", section 5)
    "sigmoid": lambda c, x0_error, sigmoid_bias: likelihood_weight(c, x0_error) * torch.sigmoid(sigmoid_bias - c.log_snr),
}


def loss_weight(c: Coefs, loss_weighting: str, target_type: str, **settings) -> Tensor:
    """The factor of the squared error of a target of this kind, in the shape of `c`.

    But for `none`, the loss does not depend on `target_type`: its error is read as an error of x0, which D and sigma give.
    `settings` are arguments of the weighting; others are passed over. Raises UserError for an unknown name.
    """

    def x0_error():
        p, q = choose(PREDICTIONS, target_type, c=c)
        return (c.sigma / (c.alpha * q - c.sigma * p)) ** 2

    return choose(LOSS_WEIGHTINGS, loss_weighting, c=c, x0_error=x0_error, **settings)
