"""Couplings pair the noise of a batch with its data: x1[order] goes with x0, where order = coupling(x0, x1, label).

x0 and x1 are (B, ...), label is (B,) int64 or None, and order is (B,) int64. With pairs that are close to each other,
the paths of a flow cross less, and a sampler needs fewer steps (Pooladian et al. 2023, "Multisample Flow Matching";
Tong et al. 2023, "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport"). But then
x1 depends on x0, so that score = -x1 / sigma does not hold: sample by the ODE, with a velocity. Every rank orders the
whole global batch, and all find the same order.

To add a coupling, write such a function and give it a row in COUPLINGS.
"""

import torch


def optimal_transport(x0, x1, label):
    """The order with the least sum of squared distances between x0 and x1[order], exact.

    It ignores the labels. With class-conditional data, each class then trains on noise with a distribution of its own,
    but sampling starts from N(0, I) for every class: use `optimal_transport_within_class`.
    """
    from scipy.optimize import linear_sum_assignment

    # |x0 - x1|^2 / 2 without the terms whose sum is the same for every order
    cost = -(x0.flatten(1).double() @ x1.flatten(1).double().T)
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=x0.device)


def optimal_transport_within_class(x0, x1, label):
    """As `optimal_transport`, but noise is exchanged within each class only, and so stays independent of the label."""
    order = torch.arange(len(x0), device=x0.device)
    for k in label.unique():
        members = (label == k).nonzero().flatten()
        order[members] = members[optimal_transport(x0[members], x1[members], None)]
    return order


COUPLINGS = {"independent": None, "ot": optimal_transport, "ot_within_class": optimal_transport_within_class}
