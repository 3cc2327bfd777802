"""Flow maps: networks that jump along the ODE from one time to another, for samples in one, two or four steps.

A network of two times, `u = net(xt, t, label, cond, s)`, predicts the average velocity from t to s. With v the velocity
of the ODE,

    X(xt, t, s) = xt + (s - t) u(xt, t, s)  is the ODE's solution at s,    u(xt, t, t) = v(xt, t),

if any of these hold for all t and s:

    Lagrangian    d/ds X(xt, t, s) = v(X, s)
    Eulerian      u = v + (s - t) du/dt, with d/dt along the ODE, at fixed s
    semigroup     X(xt, t, s) = X(X(xt, t, r), r, s)

Where s = t, the network learns v from the data, by flow matching. An objective holds one of these equations with the
network itself in the place of what is not known. Only `prediction` has a gradient, and not `target`. Training has
s <= t, so that jumps lead to data, not back. (Boffi, Albergo & Vanden-Eijnden 2025, "How to build a consistency model:
Learning flow maps via self-distillation".)

To add an objective, write such a function and give it a row in OBJECTIVES.
"""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils import append_dims, look_up


class FlowMap(nn.Module):
    """A network of two times: without s it is called at s = t, where it predicts the velocity.

    With `tangents`, vectors in the shapes of xt, t and s, the result is a pair: the average velocity, and its
    derivative in their direction. It is computed here, within the module: `torch.func.jvp` of a network that is wrapped
    in DistributedDataParallel would drop the exchange of gradients, without an error.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, xt, t, label=None, cond=None, s=None, tangents=None):
        def average(xt, t, s):
            return self.net(xt, t, label, cond, s)

        given = xt, t, t if s is None else s
        return derivative(average, given, tangents) if tangents else average(*given)


@torch.compiler.disable  # torch 2.13 does not compile the forward derivative of a layer norm
def derivative(function, given, tangents):
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivative
        return torch.func.jvp(function, given, tangents)


# ---- Objectives. Functions of u(x, t, s, tangents=None), states x (B, ...), times t and s (B,), and the velocity of
# the data's own path at t, (B, ...). They return a prediction and its target, (B, ...).


def lagrangian(u, x, t, s, velocity):
    """d/ds X = u + (s - t) du/ds, and the network's own velocity at X (Boffi et al. 2025, LSD)."""
    span = append_dims(s - t, x.ndim)
    average, slope = u(x, t, s, (torch.zeros_like(x), torch.zeros_like(t), torch.ones_like(s)))
    with torch.no_grad():
        there = u(x + span * average, s, s)
    return average + span * slope, there


def mean_flow(u, x, t, s, velocity):
    """The Eulerian equation, with the velocity of the data's own path, whose mean is v (Geng et al. 2025, "Mean Flows
    for One-step Generative Modeling", eqs. 9 to 11).
    """
    average, slope = u(x, t, s, (velocity, torch.ones_like(t), torch.zeros_like(s)))
    return average, velocity + append_dims(s - t, x.ndim) * slope


def eulerian(u, x, t, s, velocity):
    """The Eulerian equation, with the network's own velocity (Boffi et al. 2025, ESD)."""
    with torch.no_grad():
        own = u(x, t, t)
    return mean_flow(u, x, t, s, own)


def progressive(u, x, t, s, velocity):
    """The semigroup: one jump, and two jumps by way of the time in the middle (Boffi et al. 2025, PSD)."""
    middle = (t + s) / 2
    with torch.no_grad():
        first = u(x, t, middle).clone()  # in CUDA graphs the next call would overwrite it
        second = u(x + append_dims(middle - t, x.ndim) * first, middle, s)
    return u(x, t, s), (first + second) / 2


OBJECTIVES = {"lagrangian": lagrangian, "eulerian": eulerian, "progressive": progressive, "mean_flow": mean_flow}


def residual(objective, u, x, t, s, velocity):
    """Prediction less target, (B, ...): of the objective of this name, and of flow matching where s = t."""
    prediction, target = look_up(OBJECTIVES, objective)(u, x, t, s, velocity)
    return prediction - torch.where(append_dims(s == t, x.ndim), velocity, target.detach())
