"""A U-Net for images: `net(xt, t, label, cond, s)` maps xt (B, C, H, W) to an output of the same shape.

t is (B,), and label is (B,) int64 or None. The label `num_classes` means "no label", as None does. s is (B,) for a
network of two times: see flow_maps.py. cond is an image (B, C', h, w), enlarged and given to the first layer beside xt,
or attributes (B, C'), which enter where the label does; its last channel is 1. All zeros mean "no condition", as None
does. This is the network of Ho et al. 2020 (DDPM) with the residual blocks of Dhariwal & Nichol 2021 (ADM). Time and
label scale and shift the output of the second norm of each block. There is self-attention in the middle, and at chosen
resolutions. The last layers of each block, of each attention and of the network start at zero.

To use another network, write a class with the same call, and give it a row in NETWORKS of build.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from utils import UserError, enlarged, zero


def largest_divisor(n, most):
    """The largest divisor of n that is at most `most`; 1 for a `most` of 0."""
    return next(d for d in range(max(most, 1), 0, -1) if n % d == 0)


def conv3x3(channels_in, channels, stride=1):
    return nn.Conv2d(channels_in, channels, 3, stride, padding=1)


class GroupNorm(nn.GroupNorm):
    """Group norm in float32, as autocast has it on a GPU. The number of groups divides the channels: 32 at most.

    A group has at least 4 channels, unless the network has fewer.
    """

    def __init__(self, channels):
        super().__init__(largest_divisor(channels, min(32, channels // 4)), channels)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def time_features(t, dim, fastest=1000):
    """(B,) -> (B, dim): cosines and sines of t at geometric frequencies, from `fastest` down to nearly 1e-4 of it.

    (Vaswani et al. 2017, section 3.5.)
    """
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = fastest * t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Conditioning(nn.Module):
    """t (B,), label (B,) or None and attributes (B, A) or None -> one vector (B, dim) that every block reads.

    A network of two times also gets s (B,), as t - s. It is differentiated in both, so that their features are slower.
    A condition that is an image has `channels`, and `joined` puts it beside xt. `cond_shape` is (A,), (C, h, w) or ().
    """

    def __init__(self, features, dim, num_classes, cond_shape, second_time):
        super().__init__()
        self.features = features
        self.fastest = 10 if second_time else 1000
        self.mlp = nn.Sequential(nn.Linear((1 + second_time) * features, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes + 1, dim) if num_classes else None  # the last row: no label
        self.channels = cond_shape[0] if len(cond_shape) == 3 else 0
        self.attributes = nn.Linear(*cond_shape, dim, bias=False) if len(cond_shape) == 1 else None

    def forward(self, t, label, attributes, s=None):
        times = [t] if s is None else [t, t - s]
        emb = self.mlp(torch.cat([time_features(time, self.features, self.fastest) for time in times], dim=1))
        if self.label:
            emb = emb + (self.label.weight[-1] if label is None else self.label(label))
        if self.attributes and attributes is not None:
            emb = emb + self.attributes(attributes)
        return F.silu(emb)

    def joined(self, xt, cond):
        """xt (B, C, H, W), and the condition at its size, or zeros, as further channels."""
        if not self.channels:
            return xt
        given = xt.new_zeros(len(xt), self.channels, 1, 1) if cond is None else cond
        return torch.cat([xt, enlarged(given, xt.shape[2:])], dim=1)


class Dropout(nn.Dropout):
    """nn.Dropout, made faster on a CPU, where drawing random numbers takes long, since torch draws them one by one.

    One 64-bit number decides about four elements, by 16 bits each. This rounds p to a multiple of 2^-16, on a CPU.
    """

    def forward(self, x):
        if x.device.type != "cpu" or self.p == 0 or not self.training or torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        dropped = round(2**16 * self.p)  # of the 2^16 values of an int16, which begin at -2^15
        keep = bits.as_strided(x.shape, torch.empty_like(x).stride()) >= dropped - 2**15
        return x * keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))


class ResBlock(nn.Module):
    def __init__(self, channels_in, channels, emb_dim, dropout):
        super().__init__()
        self.norm1 = GroupNorm(channels_in)
        self.conv1 = conv3x3(channels_in, channels)
        self.scale_shift = nn.Linear(emb_dim, 2 * channels)
        self.norm2 = GroupNorm(channels)
        self.dropout = Dropout(dropout)
        self.conv2 = zero(conv3x3(channels, channels))
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v, all (B, heads, N, d)."""
    # here torch's own kernel takes three times as long
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 1024:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Self-attention over the pixels, in heads of 64 channels or the next larger divisor; one head may be smaller."""

    def __init__(self, channels):
        super().__init__()
        self.heads = largest_divisor(channels, channels // 64)
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        # a view, if x is in channels_last
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(B, H * W, 3, self.heads, C // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, heads, H * W, C / heads)
        h = attend(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        return x + self.out(h.permute(0, 3, 1, 2))


class Layers(nn.ModuleList):
    """Layers that are called one after the other; residual blocks get the conditioning vector too."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """The U-Net. `data_shape` is (C, H, W), with H and W divisible by 2^(number of channel_mults - 1).

    Each channel_mult is one resolution: its blocks have channel_mult * model_channels channels, and the next resolution
    has half the height and width. `attention_resolutions` are heights in pixels. A network with `num_classes` 0 ignores
    labels, and one without `cond_shape`, the shape of a condition as the network gets it, ignores conditions. Raises
    UserError for data that are no images, sides that do not divide, and heights that do not occur.
    """

    def __init__(self, data_shape, num_classes=0, model_channels=128, channel_mults=(1, 2, 2, 2), num_res_blocks=2,
                 attention_resolutions=(16,), dropout=0.0, cond_shape=(), second_time=False):
        super().__init__()
        if len(data_shape) != 3:
            raise UserError(f"unet takes images, not data of shape {tuple(data_shape)}: use --network mlp")
        C, H, W = data_shape
        halvings = 2 ** (len(channel_mults) - 1)
        if H % halvings or W % halvings:
            raise UserError(f"unet halves {H} x {W} images {len(channel_mults) - 1} times: use fewer --channel_mults, "
                            f"or sides divisible by {halvings}")
        sides = [H // 2**level for level in range(len(channel_mults))]
        if not set(attention_resolutions) <= set(sides):
            raise UserError(
                f"attention_resolutions {' '.join(map(str, attention_resolutions))}: unet has {H} x {W} images "
                f"at heights {' '.join(map(str, sides))}: choose from these, or none for attention in the middle only")
        emb_dim = 4 * model_channels
        self.conditioning = Conditioning(2 * (model_channels // 2), emb_dim, num_classes, cond_shape, second_time)

        def block(channels_in, channels, level):
            attention = [Attention(channels)] if sides[level] in attention_resolutions else []
            return Layers([ResBlock(channels_in, channels, emb_dim, dropout), *attention])

        channels = model_channels
        widths = [mult * model_channels for mult in channel_mults]
        self.input = conv3x3(C + self.conditioning.channels, channels)
        self.down = nn.ModuleList()
        skips = [channels]
        for level, width in enumerate(widths):
            if level > 0:
                self.down.append(Layers([conv3x3(channels, channels, stride=2)]))
                skips.append(channels)
            for _ in range(num_res_blocks):
                self.down.append(block(channels, width, level))
                channels = width
                skips.append(channels)

        self.middle = Layers([ResBlock(channels, channels, emb_dim, dropout), Attention(channels),
                              ResBlock(channels, channels, emb_dim, dropout)])

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                self.up.append(block(channels + skips.pop(), width, level))
                channels = width
            if level > 0:
                self.up[-1].extend([nn.Upsample(scale_factor=2.0), conv3x3(channels, channels)])

        self.norm_out = GroupNorm(channels)
        self.out = zero(conv3x3(channels, C))

    def forward(self, xt, t, label=None, cond=None, s=None):
        emb = self.conditioning(t, label, cond, s)  # (B, emb_dim)
        h = self.input(self.conditioning.joined(xt, cond))
        skips = [h]
        for layers in self.down:
            h = layers(h, emb)
            skips.append(h)
        h = self.middle(h, emb)
        for layers in self.up:
            h = layers(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(F.silu(self.norm_out(h)))
