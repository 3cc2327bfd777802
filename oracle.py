"""A Gaussian mixture as data, of which every prediction, density and likelihood is known exactly at any (x, t).

If x0 is N(m, C), then xt = alpha x0 + sigma x1 is N(alpha m, alpha^2 C + sigma^2 I), and the expectations of x0 and x1
given xt are linear in xt. A mixture averages them by the probability of each component given xt. `GaussianMixture` is
called as a network is. So conversions, samplers, guidance and likelihood run on it, and can be compared with what is
exact.
"""

import math

import torch
from torch import Tensor

from prediction import PREDICTIONS
from processes import Process
from utils import look_up


class GaussianMixture:
    """x0 from N(means[k], covariances[k]) with probability weights[k]. Called as net(xt, t, label), it predicts `kind`.

    `means` (K, ...) have the shape of the data; `covariances` are (K, D, D), with D numbers in an item, or one variance
    for all. `t` is (B,), or one time for all. `label` (B,) int64 is the component; K, or no label, stands for any of
    them. All is computed in float64.
    """

    def __init__(self, process: Process, kind: str, means: Tensor, covariances: Tensor | float,
                 weights: Tensor | None = None):
        self.process, self.kind, self.shape = process, kind, means.shape[1:]
        self.means = means.double().flatten(1)  # (K, D)
        K, D = self.means.shape
        if not isinstance(covariances, Tensor):
            covariances = covariances * torch.eye(D, dtype=torch.float64, device=means.device).expand(K, D, D)
        self.covariances = covariances.double()
        values, self.vectors = torch.linalg.eigh(self.covariances)  # (K, D), (K, D, D)
        self.values = values.clamp(min=0)  # rounding makes a 0 negative
        self.weights = torch.ones_like(self.means[:, 0]) / K if weights is None else weights.double()

    def components(self, xt: Tensor, t: Tensor | float, label: Tensor | None = None):
        """The coefficients; xt less the mean, and the variances, in each component's eigenbasis (B, K, D); log weight x
        density (B, K)."""
        c = self.process.coefs(torch.as_tensor(t, dtype=torch.float64, device=xt.device), 3)
        y = torch.einsum("bkd,kde->bke", xt.double().flatten(1)[:, None] - c.alpha * self.means, self.vectors)
        variance = c.alpha**2 * self.values + c.sigma**2
        log_p = -0.5 * (y**2 / variance + (2 * math.pi * variance).log()).sum(2)
        log_w = self.weights.log().expand(len(xt), -1)
        if label is not None:
            K = len(self.weights)
            other = (label[:, None] < K) & (label[:, None] != torch.arange(K, device=label.device))
            log_w = log_w.masked_fill(other, -math.inf).log_softmax(1)
        return c, y, variance, log_w + log_p

    def __call__(self, xt: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """The prediction at xt (B, ...), in the type of xt."""
        c, y, variance, log_p = self.components(xt, t, label)
        p, q = look_up(PREDICTIONS, self.kind)(c)
        # of a component: E[x0 | xt] = mean + alpha values y / variance, and E[x1 | xt] = sigma y / variance
        rotated = (p * c.alpha * self.values + q * c.sigma) * y / variance
        each = p * self.means + torch.einsum("bke,kde->bkd", rotated, self.vectors)
        return torch.einsum("bk,bkd->bd", log_p.softmax(1), each).reshape(xt.shape).to(xt.dtype)

    def log_prob(self, xt: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """log p_t(xt), (B,), in nats, float64."""
        return self.components(xt, t, label)[3].logsumexp(1)

    def sample(self, n: int, generator: torch.Generator | None = None, t: float = 0.0) -> tuple[Tensor, Tensor]:
        """n draws of xt (n, ...) at one time (0: of the data), float64, and their components (n,) int64."""
        label = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        kind = dict(dtype=torch.float64, device=self.means.device)
        x0, x1 = torch.randn(2, n, self.means.shape[1], generator=generator, **kind)
        x0 = self.means[label] + torch.einsum("be,bde->bd", self.values[label].sqrt() * x0, self.vectors[label])
        xt = self.process.interpolate(x0, x1, torch.full_like(x0[:, 0], t)) if t else x0
        return xt.reshape(n, *self.shape), label

    def moments(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of xt at one time."""
        c, mean = self.process.at(t), self.weights @ self.means
        off = self.means - mean
        covariance = torch.einsum("k,kde->de", self.weights, self.covariances + off[:, :, None] * off[:, None])
        return c.alpha * mean, c.alpha**2 * covariance + c.sigma**2 * torch.ones_like(mean).diag()

    def flow(self, x: Tensor, t_from: float, t_to: float) -> Tensor:
        """The exact solution of the ODE from x (B, ...) at one time to another, for one Gaussian.

        It keeps the coordinates in the eigenbasis, in units of their standard deviations.
        """
        assert len(self.weights) == 1
        (_, y, v_from, _), (c, _, v_to, _) = (self.components(x, t) for t in (t_from, t_to))
        there = c.alpha * self.means + torch.einsum("bke,kde->bkd", (v_to / v_from).sqrt() * y, self.vectors)
        return there.reshape(x.shape).to(x.dtype)
