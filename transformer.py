"""A diffusion transformer for images: `net(xt, t, label, cond, s)` maps xt (B, C, H, W) to an output of the same shape.

t, label, cond and s are those of unet.py, and enter as they do there. The image is cut into N patches of `patch_size` x
`patch_size` pixels, and each is a token. This is the network of Peebles & Xie 2023 (DiT), which SiT and JiT take too:
tokens get sines and cosines of their place; time, label and attributes scale and shift the output of each norm, and
scale what a block adds, by factors that start at zero (adaLN-zero, section 3.2). So each block starts as the identity,
and the output at zero. The rest is what later papers found better, without settings for it:

- q and k are normalised (Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", section 2), so
  that the logits of attention stay bounded at large learning rates.
- the MLP is a SwiGLU (Shazeer 2020, eq. 6), as in JiT: better than one with GELU that has as many parameters.
- linear layers of a block have no bias: the shifts serve as such. All norms are LayerNorm, which is one fused function
  in torch also on a CPU, where RMSNorm is many.

The README has the sizes S, B, L and XL.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from unet import Conditioning, Dropout, attend, time_features
from utils import UserError, zero


def modulated(x, shift, scale):
    """LayerNorm of each token of x (B, N, dim), scaled by 1 + scale, and shifted; both are (B, 1, dim)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class Block(nn.Module):
    """Attention over the tokens, and an MLP of each token: x (B, N, dim) -> (B, N, dim), given emb (B, dim)."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads = heads
        width = dim // 3 * 8  # the parameters of an MLP of width 4 dim
        self.modulation = zero(nn.Linear(dim, 6 * dim))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // heads, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.mlp_in = nn.Linear(dim, 2 * width, bias=False)
        self.dropout = Dropout(dropout)
        self.mlp_out = nn.Linear(width, dim, bias=False)

    def forward(self, x, emb):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, -1)  # each (B, 1, dim)
        qkv = self.qkv(modulated(x, shift1, scale1)).unflatten(-1, (3 * self.heads, -1))  # (B, N, 3 heads, dim / heads)
        q, k, v = qkv.transpose(1, 2).chunk(3, 1)  # each (B, heads, N, dim / heads)
        h = attend(self.norm(q), self.norm(k), v).transpose(1, 2).flatten(2)  # (B, N, dim)
        x = x + gate1 * self.attention_out(h)
        gate, h = self.mlp_in(modulated(x, shift2, scale2)).chunk(2, -1)  # each (B, N, width)
        return x + gate2 * self.mlp_out(self.dropout(F.silu(gate) * h))


class Transformer(nn.Module):
    """The transformer. `data_shape` is (C, H, W), with H and W divisible by `patch_size`.

    `depth` is the number of blocks, and `hidden_dim` the width of a token, divisible by 4 x `heads`. With
    `checkpointing` a block keeps its input alone, and is computed again in the backward pass: about a third more time,
    and much less memory. A network with `num_classes` 0 ignores labels, and one without `cond_shape`, the shape of a
    condition as the network gets it, ignores conditions. Raises UserError for data that are no images, and for sizes
    that do not divide.
    """

    def __init__(self, data_shape, num_classes=0, patch_size=2, depth=12, heads=4, hidden_dim=256, dropout=0.0,
                 checkpointing=False, cond_shape=(), second_time=False):
        super().__init__()
        if len(data_shape) != 3:
            raise UserError(f"transformer takes images, not data of shape {tuple(data_shape)}: use --network mlp")
        C, H, W = data_shape
        if H % patch_size or W % patch_size:
            raise UserError(f"transformer cuts {H} x {W} images into patches of {patch_size} x {patch_size}: use a "
                            "--patch_size that divides both sides, such as 1")
        if hidden_dim % (4 * heads):
            raise UserError(f"hidden_dim {hidden_dim} is not divisible by 4 x heads, {4 * heads}: use a --hidden_dim "
                            f"such as {64 * heads}, or fewer --heads")
        self.patch_size, self.checkpointing = patch_size, checkpointing
        self.conditioning = Conditioning(256, hidden_dim, num_classes, cond_shape, second_time)
        places = torch.cartesian_prod(torch.arange(H // patch_size), torch.arange(W // patch_size))  # (N, 2)
        positions = time_features(places.flatten(), hidden_dim // 2, 1).reshape(-1, hidden_dim)
        self.register_buffer("positions", positions, persistent=False)  # of rows, and of columns
        self.input = nn.Linear((C + self.conditioning.channels) * patch_size**2, hidden_dim)
        self.blocks = nn.ModuleList(Block(hidden_dim, heads, dropout) for _ in range(depth))
        self.modulation = zero(nn.Linear(hidden_dim, 2 * hidden_dim))
        self.out = zero(nn.Linear(hidden_dim, C * patch_size**2))

    def forward(self, xt, t, label=None, cond=None, s=None):
        emb = self.conditioning(t, label, cond, s)  # (B, hidden_dim)
        patches = F.pixel_unshuffle(self.conditioning.joined(xt, cond), self.patch_size)  # (B, C p^2, H / p, W / p)
        h = self.input(patches.flatten(2).mT) + self.positions  # (B, N, hidden_dim)
        for block in self.blocks:
            h = checkpoint(block, h, emb, use_reentrant=False) if self.checkpointing else block(h, emb)
        h = self.out(modulated(h, *self.modulation(emb)[:, None].chunk(2, -1)))  # (B, N, C p^2)
        return F.pixel_shuffle(h.mT.unflatten(2, patches.shape[2:]), self.patch_size)
