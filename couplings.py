"""Which noise goes with which data: `coupling(x0, x1, label) -> order`, and x1[order] goes with x0, in a batch (B, ...).

Training on pairs that are close makes the paths of a flow cross less, so that fewer steps follow them (Pooladian et al. 2023,
"Multisample Flow Matching"; Tong et al. 2023, "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal
Transport"). x1 is then no longer independent of x0, so score = -x1 / sigma does not hold: sample by the ODE, with a velocity.
Every process looks at the whole batch, and orders it alike. To add a coupling, write such a function and give it a row in COUPLINGS.
"""

import torch
from torch import Tensor


def optimal_transport(x0: Tensor, x1: Tensor, label: Tensor | None) -> Tensor:
    """The order with the least sum of squared distances, exact. Labels are ignored: with class-conditional data each class then trains
    on noise of its own, which sampling does not give it."""
    from scipy.optimize import linear_sum_assignment

    cost = -(x0.flatten(1).double() @ x1.flatten(1).double().T)  # |x0 - x1|^2 / 2, but for terms that no order changes
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=x0.device)


def optimal_transport_within_class(x0: Tensor, x1: Tensor, label: Tensor | None) -> Tensor:
    """The least among orders that leave each class its noise, so that noise and label stay independent. `label` (B,) int64."""
    order = torch.arange(len(x0), device=x0.device)
    for k in label.unique():
        members = (label == k).nonzero().flatten()
        order[members] = members[optimal_transport(x0[members], x1[members], None)]
    return order


COUPLINGS = {"independent": None, "ot": optimal_transport, "ot_within_class": optimal_transport_within_class}
