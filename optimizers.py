"""The optimizer, the learning rate as a pure function of the step, and a step with gradient clipping.

The rate of step s (from 0) is set before that step is taken: base_lr (s + 1) / warmup_steps during warm-up, then a schedule of
SCHEDULES. To add one, write a function of the progress after warm-up, in [0, 1], and give it a row.
"""

import math

import torch
from torch import Tensor, nn

from utils import choose

SCHEDULES = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


def learning_rate(step: int, *, base_lr: float, min_lr: float, warmup_steps: int, num_training_steps: int, lr_schedule: str) -> float:
    """The rate of step `step` (from 0): linear warm-up to `base_lr`, then the schedule, from `base_lr` down to `min_lr` if cosine.

    The cosine reaches `min_lr` at step `num_training_steps`. Raises UserError for an unknown schedule.
    """
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(num_training_steps - warmup_steps, 1)
    return min_lr + (base_lr - min_lr) * choose(SCHEDULES, lr_schedule, progress=min(progress, 1.0))


def make_optimizer(net: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, fused into one kernel; weight decay on matrices and kernels only, not on biases and norms."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, fused=parameters[0].device.type in ("cpu", "cuda"))


def load_moments(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The optimizer's load_state_dict, with the moments in the memory layout of their weights, which may have another than when they were
    saved: fused kernels walk both in the order of memory."""
    optimizer.load_state_dict(state)
    for p, moments in optimizer.state.items():
        moments.update({name: torch.empty_like(p).copy_(value) for name, value in moments.items() if value.shape == p.shape})


def take_step(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """The optimizer's step, with the gradients scaled down to `max_norm` where their norm is larger (0: never). Returns the norm before.

    If the norm is not finite, weights and moments stay as they are. A fused optimizer is told of both on the device, as
    torch.amp.GradScaler tells it: it scales where it reads, and nothing waits for a GPU.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = (norm / max_norm).clamp(min=1.0) if max_norm else None  # by which gradients are divided
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
    elif norm.isfinite():
        nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
        optimizer.step()
    return norm
