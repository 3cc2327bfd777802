"""Conditions that are made from data: `corruption(x0, ...)` returns what is left of a data point, for the network.

x0 is a batch (B, C, H, W) on the network's scale, and so is the result, (B, C', h, w). The network then learns what was
lost: super-resolution, in-painting, colours. Training and sampling apply the function to whole batches. Random parts
come from `uniform(*shape)`, numbers (B, *shape) in (0, 1), which are a function of the seed and of the step, or of the
sample's number.

To add a corruption, write such a function and give it a row in CORRUPTIONS. A further argument that has the name of a
setting of config.py gets that setting.
"""

import torch
import torch.nn.functional as F


def downsample(x0, downsample_factor):
    """Means over squares of downsample_factor x downsample_factor pixels."""
    return F.avg_pool2d(x0, downsample_factor)


def grey(x0):
    """The mean of the channels, as one channel."""
    return x0.mean(1, keepdim=True)


def with_mask(x0, visible):
    """x0 where `visible` (B, 1, H, W) is true and else 0, and one more channel: 1 where it is true, else 0."""
    return torch.cat([x0 * visible, visible.to(x0.dtype)], dim=1)


def mask_pixels(x0, uniform, mask_share):
    """Hides each pixel with the probability mask_share."""
    return with_mask(x0, uniform(1, *x0.shape[2:]) >= mask_share)


def mask_box(x0, uniform, mask_share):
    """Hides a box at a random place, with the proportions of the image and a share mask_share of its area."""
    inside = []
    for u, side in zip(uniform(2).T, x0.shape[2:]):
        length = round(mask_share**0.5 * side)
        first = (u[:, None] * (side - length + 1)).floor()
        place = torch.arange(side, device=x0.device) - first  # (B, side), counted from the box's first pixel
        inside.append((place >= 0) & (place < length))
    y, x = inside
    return with_mask(x0, ~(y[:, None, :, None] & x[:, None, None]))


CORRUPTIONS = {"downsample": downsample, "grey": grey, "mask_box": mask_box, "mask_pixels": mask_pixels}
