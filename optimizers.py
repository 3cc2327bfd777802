"""Makes the optimizer, computes the learning rate of each step, and takes a step with gradient clipping.

The learning rate is a pure function of the step s (from 0), and is set before that step is taken. During warm-up it is
base_lr (s + 1) / warmup_steps; then it follows a schedule. To add a schedule, write a function of the progress after
warm-up, in [0, 1], that returns a number from 0 (min_lr) to 1 (base_lr), and give it a row in SCHEDULES.
"""

import math

import torch
from torch import nn

from utils import look_up

SCHEDULES = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


def learning_rate(step, *, base_lr, min_lr, warmup_steps, num_training_steps, lr_schedule):
    """The learning rate of step `step` (from 0): a linear warm-up to `base_lr`, and then the schedule.

    `constant` stays at `base_lr`. `cosine` falls to `min_lr`, which it reaches at step `num_training_steps`. Raises
    UserError for an unknown schedule.
    """
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(num_training_steps - warmup_steps, 1)
    return min_lr + (base_lr - min_lr) * look_up(SCHEDULES, lr_schedule)(min(progress, 1.0))


def make_optimizer(net, weight_decay):
    """AdamW, fused into one kernel, with weight decay on matrices and convolution kernels, not on biases and norms."""
    return torch.optim.AdamW([
        {"params": [p for p in net.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ], lr=0.0, fused=True)


def take_step(optimizer, max_norm):
    """Takes a step of the optimizer, with gradients scaled down to the norm `max_norm` if theirs is larger (0: never).

    Returns the norm of all gradients before scaling, a scalar on their device. If it is not finite, weights and moments
    do not change. A fused optimizer gets the scale, and whether the norm is finite, as tensors on the device, in the
    attributes that torch.amp.GradScaler uses. Its kernel scales the gradients as it reads them. So the CPU does not
    wait for the GPU.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = (norm / max_norm).clamp(min=1.0) if max_norm else None  # the gradients' divisor
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
    elif norm.isfinite():
        nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
        optimizer.step()
    return norm
