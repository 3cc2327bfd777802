"""What a network predicts, and how to read one kind of prediction as another.

Every kind is a row (p, q): its target is y = p x0 + q x1. With xt = alpha x0 + sigma x1 that is a 2 x 2 linear system,

    x0 = (q xt - sigma y) / D,    x1 = (alpha y - p xt) / D,    D = alpha q - sigma p,

so one inversion turns any kind into any other, and training targets and conversions share one table. The same holds for the
expectations given xt, which is what a trained network outputs. To add a kind, add a row to PREDICTIONS.
(v: Salimans & Ho 2022, "Progressive Distillation", appendix D. Score: Song et al. 2021, eq. 7 with the Gaussian transition.)
"""

import torch
from torch import Tensor

from processes import Coefs
from utils import choose

PREDICTIONS = {
    "x0": lambda c: (torch.ones_like(c.alpha), torch.zeros_like(c.alpha)),
    "x1": lambda c: (torch.zeros_like(c.alpha), torch.ones_like(c.alpha)),
    "score": lambda c: (torch.zeros_like(c.alpha), -1 / c.sigma),
    "velocity": lambda c: (c.alpha_dot, c.sigma_dot),
    "v": lambda c: (-c.sigma, c.alpha),
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
    not finite: `sampling.check_times` finds such settings.
    """
    if kind == to:
        return y
    (p, q), (p_to, q_to) = choose(PREDICTIONS, kind, c=c), choose(PREDICTIONS, to, c=c)
    on_xt, on_y = p_to * q - q_to * p, c.alpha * q_to - c.sigma * p_to
    return (on_xt * xt + on_y * y) / (c.alpha * q - c.sigma * p)
