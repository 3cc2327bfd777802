"""A residual MLP for vectors: `net(xt, t, label, cond)` maps xt (B, D) to an output of the same shape.

t is (B,), and label is (B,) int64 or None. The label `num_classes` means "no label", as None does. cond is (B, C),
with 1 in its last column; zeros mean "no condition", as None does. The first layer is a sum: of a linear layer of xt
and cond, a linear layer of sines and cosines of t at geometric frequencies, and a learned vector of the label.

To use another network, write a class with the same call, and give it a row in NETWORKS of build.py.
"""

import math

import torch
from torch import nn

from utils import UserError, zero


class MLP(nn.Module):
    """The MLP. `data_shape` is (D,), and `cond_shape` (C,). With `num_classes` 0 it ignores labels.

    Raises UserError for data and conditions that are no vectors.
    """

    def __init__(self, data_shape, num_classes=0, hidden_dim=256, num_layers=4, dropout=0.0, cond_shape=()):
        super().__init__()
        for shape in data_shape, cond_shape or (1,):
            if len(shape) != 1:
                raise UserError(f"mlp takes vectors, also as conditions, not shape {tuple(shape)}: use --network unet")
        self.register_buffer("frequencies", math.pi * torch.logspace(-1, 6, 32, base=2.0), persistent=False)
        self.data = nn.Linear(data_shape[0] + sum(cond_shape), hidden_dim)
        self.time = nn.Linear(2 * len(self.frequencies), hidden_dim)
        self.label = nn.Embedding(num_classes + 1, hidden_dim) if num_classes else None  # the last row: no label
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), nn.Dropout(dropout),
                          nn.Linear(hidden_dim, hidden_dim))
            for _ in range(num_layers)
        )
        self.out = nn.Sequential(nn.LayerNorm(hidden_dim), nn.SiLU(), zero(nn.Linear(hidden_dim, data_shape[0])))

    def forward(self, xt, t, label=None, cond=None):
        angles = t[:, None] * self.frequencies  # (B, 32)
        if missing := self.data.in_features - xt.shape[1]:
            xt = torch.cat([xt, xt.new_zeros(len(xt), missing) if cond is None else cond], dim=1)
        h = self.data(xt) + self.time(torch.cat([angles.cos(), angles.sin()], dim=1))  # (B, hidden_dim)
        if self.label is not None:
            h = h + (self.label.weight[-1] if label is None else self.label(label))
        for layer in self.layers:
            h = h + layer(h)
        return self.out(h)
