"""Couplings pair the x1 of a batch, noise or a source, with its data: x1[order] goes with x0, in the order (B,) int64.

order = coupling(x0, x1, label), where x0 and x1 are (B, ...), and label is (B,) int64 or None. With pairs that are
close to each other, the paths of a flow cross less, and a sampler needs fewer steps (Pooladian et al. 2023,
"Multisample Flow Matching"; Tong et al. 2023, "Improving and Generalizing Flow-Based Generative Models with Minibatch
Optimal Transport"). But then x1 depends on x0, so that score = -x1 / sigma does not hold: sample by the ODE, with a
velocity; or add a gamma, whose noise does not depend on either. Every rank orders the whole global batch, and all find
the same order. `given` keeps pairs that are stored: item i of the source goes with item i of the data.

To add a coupling, write such a function and give it a row in COUPLINGS. A further argument that has the name of a
setting of config.py gets that setting, and `generator` is a random generator of the step.
"""

import torch


def squared_distances(x0, x1):
    """Of all pairs, (B, B), float64, on the CPU."""
    return torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()).square().cpu()


def optimal_transport(x0, x1, label):
    """The order with the least sum of squared distances between x0 and x1[order], exact.

    It ignores the labels. With class-conditional data, each class then trains on noise with a distribution of its own,
    but sampling starts from N(0, I) for every class: use `optimal_transport_within_class`.
    """
    import ot

    return ot.emd([], [], squared_distances(x0, x1), 10**7).argmax(1).to(x0.device)


def optimal_transport_within_class(x0, x1, label):
    """As `optimal_transport`, but noise is exchanged within each class only, and so stays independent of the label."""
    order = torch.arange(len(x0), device=x0.device)
    for k in label.unique():
        members = (label == k).nonzero().flatten()
        order[members] = members[optimal_transport(x0[members], x1[members], None)]
    return order


def schroedinger_bridge(x0, x1, label, gamma_scale, generator):
    """An x1 for each x0, drawn from the entropic plan of the batch, as in SB-CFM (Tong et al. 2023, section 5).

    With gamma = gamma_scale sqrt(2 t (1 - t)) the paths between the pairs are those of a Brownian bridge of variance
    s^2 t (1 - t), s^2 = 2 gamma_scale^2. The plan of regularisation 2 s^2 makes them the Schroedinger bridge.
    """
    import ot

    cost = squared_distances(x0, x1)
    reg = 4 * gamma_scale**2
    _, duals = ot.emd([], [], cost, 10**7, log=True)  # a start from which a few iterations suffice for any `reg`
    plan = ot.sinkhorn([], [], cost, reg, "sinkhorn_log", 10, 1e-4, warn=False,
                       warmstart=(duals["u"] / reg, duals["v"] / reg))
    return torch.multinomial(plan.to(x0.device), 1, generator=generator).flatten()


COUPLINGS = {
    "independent": None, "given": None, "ot": optimal_transport, "ot_within_class": optimal_transport_within_class,
    "sb": schroedinger_bridge,
}
