"""A residual MLP for vectors: `net(xt, t, label, cond, s)` maps xt (B, D) to an output of the same shape.

t is (B,), and label is (B,) int64 or None. The label `num_classes` means "no label", as None does. cond is (B, C),
with 1 in its last column; zeros mean "no condition", as None does. s is (B,) for a network of two times: see
flow_maps.py. The first layer is a sum: of a linear layer of xt and cond, a linear layer of sines and cosines of t (and
of t - s) at geometric frequencies, and a learned vector of the label.

`PlainMLP` is what papers on points in the plane use: a few linear layers of xt and t itself.

To use another network, write a class with the same call, and give it a row in NETWORKS of build.py.
"""

import math
from itertools import pairwise

import torch
from torch import nn

from utils import UserError, zero

ACTIVATIONS = {"silu": nn.SiLU, "selu": nn.SELU, "gelu": nn.GELU, "relu": nn.ReLU}


def check_vectors(*shapes):
    """Raises UserError for shapes that are not those of vectors."""
    for shape in shapes:
        if len(shape) > 1:
            raise UserError(f"mlp takes vectors, also as conditions, not shape {tuple(shape)}: use --network unet")


class MLP(nn.Module):
    """The MLP. `data_shape` is (D,), and `cond_shape` (C,). With `num_classes` 0 it ignores labels.

    Raises UserError for data and conditions that are no vectors.
    """

    def __init__(self, data_shape, num_classes=0, hidden_dim=256, num_layers=4, dropout=0.0, cond_shape=(),
                 activation="silu", second_time=False):
        super().__init__()
        check_vectors(data_shape, cond_shape)
        activation = ACTIVATIONS[activation]
        fastest = 2 if second_time else 6  # a network that is differentiated in time wants slow features
        self.register_buffer("frequencies", math.pi * torch.logspace(-1, fastest, 32, base=2.0), persistent=False)
        self.data = nn.Linear(data_shape[0] + sum(cond_shape), hidden_dim)
        self.time = nn.Linear((2 + 2 * second_time) * len(self.frequencies), hidden_dim)
        self.label = nn.Embedding(num_classes + 1, hidden_dim) if num_classes else None  # the last row: no label
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, hidden_dim), activation(),
                          nn.Dropout(dropout), nn.Linear(hidden_dim, hidden_dim))
            for _ in range(num_layers)
        )
        self.out = nn.Sequential(nn.LayerNorm(hidden_dim), activation(), zero(nn.Linear(hidden_dim, data_shape[0])))

    def forward(self, xt, t, label=None, cond=None, s=None):
        times = [t] if s is None else [t, t - s]
        angles = torch.cat([time[:, None] * self.frequencies for time in times], dim=1)  # (B, 32) or (B, 64)
        if missing := self.data.in_features - xt.shape[1]:
            xt = torch.cat([xt, xt.new_zeros(len(xt), missing) if cond is None else cond], dim=1)
        h = self.data(xt) + self.time(torch.cat([angles.cos(), angles.sin()], dim=1))  # (B, hidden_dim)
        if self.label is not None:
            h = h + (self.label.weight[-1] if label is None else self.label(label))
        for layer in self.layers:
            h = h + layer(h)
        return self.out(h)


class PlainMLP(nn.Module):
    """`num_layers` linear layers, each with an activation, of xt and t, and a last linear layer, without labels.

    Raises UserError for data that are no vectors.
    """

    def __init__(self, data_shape, hidden_dim=64, num_layers=3, activation="selu"):
        super().__init__()
        check_vectors(data_shape)
        widths = [data_shape[0] + 1, *num_layers * [hidden_dim]]
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), ACTIVATIONS[activation]())]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_dim, data_shape[0]))

    def forward(self, xt, t, label=None, cond=None):
        return self.layers(torch.cat([xt, t[:, None]], dim=1))
