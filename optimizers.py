"""Makes the optimizer, computes the learning rate of each step, and takes a step with gradient clipping.

The learning rate is a pure function of the step s (from 0), and is set before that step is taken. During warm-up it is
base_lr (s + 1) / warmup_steps; then it follows a schedule. To add a schedule, write a function that returns a number
from 0 (min_lr) to 1 (base_lr), and give it a row in SCHEDULES. Its arguments are `step`, the `progress` after warm-up,
in [0, 1], or settings of config.py. To add an optimizer, write a function of the network and the weight decay, and give
it a row in OPTIMIZERS.
"""

import math

import torch
from torch import nn

from utils import UserError, call_with_settings, look_up

SCHEDULES = {
    "constant": lambda: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    # Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", eq. 67
    "inverse_sqrt": lambda step, warmup_steps, lr_decay_start: max(step / max(lr_decay_start, warmup_steps), 1) ** -0.5,
    # warm-up, stable, decay (Hu et al. 2024, "MiniCPM", section 4), here with a linear decay
    "wsd": lambda progress, lr_decay_share: min((1 - progress) / lr_decay_share, 1),
}


def learning_rate(step, *, base_lr, min_lr, warmup_steps, num_training_steps, lr_schedule, **settings):
    """The learning rate of step `step` (from 0): a linear warm-up to `base_lr`, and then the schedule.

    `constant` stays at `base_lr`. `cosine` falls to `min_lr`, which it reaches at step `num_training_steps`. `wsd`
    stays at `base_lr`, and falls to `min_lr` linearly in the last `lr_decay_share` of the steps after warm-up.
    `inverse_sqrt` falls towards `min_lr` as 1 / sqrt(step) from step `lr_decay_start` on, or from the end of a longer
    warm-up, whatever the length of the run.
    `settings` may hold arguments of the schedule; others are ignored. Raises UserError for an unknown schedule.
    """
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(num_training_steps - warmup_steps, 1), 1.0)
    return min_lr + (base_lr - min_lr) * call_with_settings(look_up(SCHEDULES, lr_schedule), settings | locals())


def adamw(net, weight_decay, without=()):
    """AdamW, fused into one kernel, with weight decay on matrices and convolution kernels, not on biases and norms.

    It leaves out the parameters in the set `without`.
    """
    parameters = [p for p in net.parameters() if p not in without]
    return torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ], lr=0.0, fused=True)


class Both:
    """Two optimizers as one. `step`, `zero_grad`, `state_dict` and `load_state_dict` call that method of each, with the
    items of the arguments, and return a list.
    """

    _step_supports_amp_scaling = False  # see take_step

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def __getattr__(self, method):
        return lambda *given: [getattr(optimizer, method)(*own) for optimizer, *own in zip(self.optimizers, *given)]


def muon(net, weight_decay):
    """Muon for the matrices of hidden layers, and `adamw` for all other parameters.

    (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".) A hidden layer is one anywhere in
    an nn.ModuleList, where networks keep their blocks, but no embedding; its matrices are its parameters with two
    dimensions. An update of a matrix is as large as AdamW's, so that base_lr means the same (Liu et al. 2025, "Muon is
    Scalable for LLM Training", section 2.2). Raises UserError if there is no such matrix.
    """
    hidden = {p: None for blocks in net.modules() if isinstance(blocks, nn.ModuleList)
              for layer in blocks.modules() if not isinstance(layer, nn.Embedding)
              for p in layer.parameters(recurse=False) if p.ndim == 2}  # each once, in order
    if not hidden:
        raise UserError("optimizer muon is for matrices of layers in an nn.ModuleList, and this network has none: put "
                        "its blocks there, or use --optimizer adamw")
    return Both(torch.optim.Muon(hidden, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
                adamw(net, weight_decay, hidden))


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def take_step(optimizer, max_norm):
    """Takes a step of the optimizer, with gradients scaled down to the norm `max_norm` if theirs is larger (0: never).

    Returns the norm of all gradients before scaling, a scalar on their device. If it is not finite, weights and moments
    do not change. A fused optimizer gets the scale, and whether the norm is finite, as tensors on the device, in the
    attributes that torch.amp.GradScaler uses. Its kernel scales the gradients as it reads them. So the CPU does not
    wait for the GPU; with `muon` it does.
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
