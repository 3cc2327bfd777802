"""Builds process, time sampler and network from the settings, checks them, and draws samples of a network on all ranks.

Training and sampling share what is here. `config` is a `Config`, and `spec` the `DataSpec` of the data. To add an
architecture, write a file such as mlp.py with a class that is called as net(xt, t, label, cond), and give it a row in
NETWORKS.
"""

from dataclasses import replace

import torch
from torch import nn

from command_line import signal_name, stop_requested
from config import Config
from couplings import COUPLINGS
from data_utils import load_dataset
from distributed import all_or_none, gather_rows, print0, rank0_first, share
from flow_maps import FlowMap
from logging_utils import Progress
from mlp import MLP, PlainMLP
from prediction import Preconditioned, convert, loss_weight, target
from processes import make_process
from sampling import FROM_A_POINT, SDE_SAMPLERS, WITH_GAMMA, Field, draw, make_grid
from time_samplers import TIME_SAMPLERS
from transformer import Transformer
from unet import UNet
from utils import UserError, call_with_settings, look_up, make_seed, parameters_of

NETWORKS = {"unet": UNet, "transformer": Transformer, "mlp": MLP, "plain_mlp": PlainMLP}


class WithNoise(nn.Module):
    """Gives a network a second output, E[z | xt], after the first one along the channels: (B, 2C, ...).

    Any network can have it, made for 2C channels: it gets xt twice. Its arguments are those of the network.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, xt, *given):
        return self.net(torch.cat([xt, xt], dim=1), *given)


# Steps of training, and of a sampler over all its batches, from which compiling the network pays on a GPU. It takes
# some 30 to 90 s there, and about halves the time of a call. These are estimates.
TRAINING_STEPS, SAMPLING_STEPS = 10_000, 500


def check_run(config, device):
    """All that can be checked before data are read. Raises UserError; prints which settings the network ignores."""
    check_settings(config)
    if config.coupling == "given" and config.source == "noise":
        raise UserError("coupling given needs a source, and there is none: use --coupling ot, or give it a --source")
    if config.bf16 and not uses_bf16(config, device):
        raise UserError(f"bf16 is set, but {torch.cuda.get_device_name(device)} has no bfloat16, which GPUs have from "
                        "capability 8.0 on (A100, RTX 30): use --bf16 False")
    others = set().union(*map(parameters_of, NETWORKS.values())) - parameters_of(NETWORKS[config.network])
    ignored = [name for name, value in vars(config).items() if name in others and value != getattr(Config, name)]
    if ignored:
        print0(f"note: network {config.network} does not read {', '.join(ignored)}")


def check_settings(config):
    """Raises UserError if training or sampling would divide by zero at T_min or T_max, or needs a score that the
    coupling does not give. It takes neither data nor network.
    """
    settings = vars(config)
    process = make_process(**settings)
    time_sampler = make_time_sampler(config, process)
    if config.source != "noise":
        check_source(config, process)
    check_sampler(config, process, config.sampler)
    if config.sde_sampler:
        check_sampler(config, process, config.sde_sampler, "sde_sampler", "None")
    one, model_type, target_type = torch.ones(1, 1), config.model_type, config.target_type
    field = Field(lambda x, t, label, cond: torch.ones(1, 2), process, model_type)
    for name, fix in (("T_min", "1e-4"), ("T_max", "0.9999")):
        end = settings[name]
        t = torch.tensor([end])
        c = process.coefs(t)
        values = {
            f"the target {target_type}": target(target_type, c, one, one),
            f"{target_type} from a network that predicts {model_type}":
                convert(one, 2 * one, c, model_type, target_type),
            f"the loss weighting {config.loss_weighting}": loss_weight(c, **settings),
            f"the velocity from a network that predicts {model_type}": field(2 * one, end, "velocity"),
        }
        if config.precondition:
            values["log(sigma / alpha), which precondition gives the network,"] = c.log_snr
        if config.importance_weights:  # may be infinite at an end that is never drawn, as for logit_normal
            values[f"the importance weight of {config.time_sampler}"] = time_sampler.importance(t).clamp(max=1)
        if name == "T_max":  # no sampler needs the score at T_min: the last step is the ODE's
            values[f"the score from a network that predicts {model_type}"] = field(2 * one, end, "score")
        for what, value in values.items():
            if not value.isfinite().all():
                raise UserError(f"{name} {end}: {what} is not finite there; use --{name} {fix}")
    make_grid(**settings | {"process": process})


def check_source(config, process):
    """Raises UserError for settings that do not go with a source."""
    base = process.at(1.0)
    if process.shift or not base.alpha < 0.1 < 0.9 < base.sigma < 1.1:
        raise UserError(f"process {config.process} with base {config.base} does not lead from a source, where alpha is "
                        "0 and sigma 1, to the data: use --process rf --base noise")
    kinds = "velocity", "x0", "v"
    for name, values in {"model_type": kinds, "target_type": kinds, "precondition": [False]}.items():
        if (value := vars(config)[name]) not in values:
            raise UserError(f"{name} {value} is for noise alone: with a source expected {', '.join(map(str, values))}")


def check_sampler(config, process, sampler, name="sampler", fix="heun"):
    """Raises UserError if this sampler, the setting `name`, needs what coupling, source or process do not give."""
    if sampler == "flow_map" and (not config.objective or config.clip_x0 != "none"):
        raise UserError(f"{name} flow_map needs a network that was trained as one, and predicts no x0 to clip: use "
                        f"--{name} {fix}, or train with --objective progressive, and draw with --clip_x0 none")
    if process.gamma and sampler not in WITH_GAMMA:
        raise UserError(f"{name} {sampler} knows nothing of the noise of gamma {config.gamma}: use --{name} {fix}")
    independent_noise = config.coupling == "independent" and config.source == "noise"
    if sampler in SDE_SAMPLERS and not (process.gamma or independent_noise):
        raise UserError(f"{name} {sampler} needs the score, which coupling {config.coupling} with source "
                        f"{config.source} does not give, since x1 is no noise that is independent of the data: use "
                        f"--{name} {fix}, or train with a --source and --gamma brownian")
    if process.at(config.T_max).sigma == 0 and sampler not in FROM_A_POINT:
        raise UserError(f"{name} {sampler} cannot leave a point, which the base of process {config.process} is at "
                        f"T_max {config.T_max}: use --{name} euler_maruyama, or a run with --T_max 0.9999")


def make_time_sampler(config, process):
    """The time sampler of the settings. Raises UserError if they make none."""
    return call_with_settings(look_up(TIME_SAMPLERS, config.time_sampler), {**vars(config), "process": process})


def build(config, spec, device):
    """The process and the network, with weights from the seed, on `device`.

    Raises UserError if the settings do not fit the data.
    """
    num_classes, network = spec.num_classes if config.class_conditional else 0, look_up(NETWORKS, config.network)
    if config.class_conditional and not num_classes:
        raise UserError(f"class_conditional is set, but {config.dataset} has no labels: use --class_conditional False, "
                        "or add labels as arr_1 of a .npz file")
    if num_classes and "num_classes" not in parameters_of(network):
        raise UserError(f"class_conditional is set, but network {config.network} takes no num_classes: let it take "
                        "labels, or use --class_conditional False")
    cond_shape = spec.cond_shape and (spec.cond_shape[0] + 1, *spec.cond_shape[1:])  # with the channel of ones
    if cond_shape and "cond_shape" not in parameters_of(network):
        raise UserError(f"the data have a condition, but network {config.network} takes no cond_shape: let it take "
                        "conditions, as unet.py does")
    if config.objective and "second_time" not in parameters_of(network):
        raise UserError(f"objective {config.objective} needs a network of two times, and {config.network} takes no "
                        "second_time: let it take s, as mlp.py does")
    check_condition(config, spec)
    torch.manual_seed(make_seed(config.seed, "weights"))
    process = make_process(**vars(config))
    C, *size = spec.shape
    settings = {**vars(config), "num_classes": num_classes, "cond_shape": cond_shape,
                "second_time": config.objective is not None}
    net = call_with_settings(network, settings, data_shape=(2 * C if process.gamma else C, *size))
    if process.gamma:
        net = WithNoise(net)
    if config.precondition:
        net = Preconditioned(net, process)
    if config.objective:
        net = FlowMap(net)
    # of the parameters, only those of convolutions have such a format
    return process, net.to(device, memory_format=memory_format(config))


def check_condition(config, spec):
    """Raises UserError for settings that need images or a condition, where the data have none."""
    shape, needs, C = spec.cond_shape, "use --lag 1, --corruption downsample, or data with conditions", spec.shape[0]
    if config.clip_x0 != "none" and (config.gamma or not spec.is_image):
        raise UserError(f"clip_x0 {config.clip_x0} is for images, whose pixels are in [-1, 1], without a gamma, beside "
                        "which x0 does not determine the rest: use --clip_x0 none")
    if config.cond_dropout and not shape:
        raise UserError(f"cond_dropout is set, but {config.dataset} has no condition: {needs}")
    if config.base == "condition" and not spec.cond_has_channels:
        raise UserError(f"base condition needs a condition with the {C} channels of the data, and {config.dataset} has "
                        f"{f'one of shape {shape}' if shape else 'none'}: {needs}, or --base noise")
    if shape and COUPLINGS[config.coupling]:
        raise UserError(f"coupling {config.coupling} ties the noise to the condition, but sampling starts from the "
                        "same noise for all: use --coupling independent")


def uses_bf16(config, device):
    """Whether the network runs in bfloat16: on a GPU that has it, unless bf16 is False; on a CPU if it is True."""
    if device.type == "cuda":
        return config.bf16 is not False and torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(config.bf16)


def autocast(config, device):
    """The context in which the network runs: bfloat16 or float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config, device))


def compiles(config, device, steps, enough):
    """Whether to compile the network: if the settings allow it (by default on a GPU), and it runs `enough` steps or
    more. Prints a line if so.
    """
    if steps < enough or config.compile is False or config.compile is None and device.type != "cuda":
        return False
    print0("compiling the network: the first call takes a minute or so")
    return True


def memory_format(config):
    """That of images: channels_last, if the settings say so; but torch's group norm has no forward mode for it."""
    return torch.channels_last if config.channels_last and not config.objective else torch.contiguous_format


def formatted(config, x):
    """A batch as the network gets it: images (B, C, H, W) in their memory format; others as they are."""
    return x.contiguous(memory_format=memory_format(config)) if x.ndim == 4 else x


def read_data(config, split="train", spec=None):
    """A split of the run's data, which rank 0 reads first, on the scale of `spec`, or its own. All ranks must call it.

    Raises UserError if it is missing, or not like data of this `spec`.
    """
    dataset = rank0_first(lambda first: load_dataset(config.dataset, download=first, split=split, **vars(config)))
    there = dataset.spec

    def kind(spec):
        return f"{'fields' if spec.is_field else 'items'} of shape {spec.shape} with conditions of {spec.cond_shape}"

    if spec and (kind(there) != kind(spec) or (
            config.class_conditional and not 0 < there.num_classes <= spec.num_classes)):
        raise UserError(f"the {split} split has {kind(there)}, in {there.num_classes} classes, and the run was trained "
                        f"on {kind(spec)}, in {spec.num_classes}: set --data_dir to that of the run, or mend the split")
    return replace(dataset, spec=spec or there)


def draw_all(config, spec, process, net: nn.Module, device, cases, sampler, guide=None):
    """Samples for the `cases`, of which each rank draws a share, and the mean network calls of one, on each rank's CPU.

    Samples are decoded: uint8 images, or float fields or vectors (num, ...). The network gets the labels if it is
    class_conditional. The settings of sampling are those of `config`. `guide` is a network for autoguidance. Raises
    UserError for a sampler that does not go with the settings; if one rank fails, all raise it when all are done.
    """
    check_sampler(config, process, sampler)
    rows = share(cases.num)
    compiled = compiles(config, device, config.sampling_steps * len(rows) / config.sampling_batch_size, SAMPLING_STEPS)

    def watched(net):
        forward = torch.compile(net) if compiled else net

        def network(xt, t, label, cond, *s):
            if number := stop_requested():  # in training, which defers signals
                raise UserError(f"stopped by {signal_name(number)}")
            progress.update()
            with autocast(config, device):
                return forward(formatted(config, xt), t, label, cond, *s)

        return network

    settings = vars(config) | cases._asdict() | dict(
        net=watched(net), guide=guide and watched(guide), process=process, device=device, rows=rows, shape=spec.shape,
        labels=cases.labels if config.class_conditional else None, sampler=sampler)

    def own_samples():
        samples, calls = [spec.decode(torch.empty(0, *spec.shape))], []  # of the right type, if this rank has no rows
        for batch, calls_of_each in draw(**settings):
            samples.append(spec.decode(batch).cpu())
            calls += [calls_of_each] * len(batch)
            progress.set_description(f"{sampler}: {len(calls)} of {len(rows)} samples", refresh=False)
        return torch.cat(samples), torch.tensor(calls, dtype=torch.float64)

    with Progress(f"{sampler}: 0 of {len(rows)} samples", unit="network call") as progress:
        samples, calls = map(gather_rows, all_or_none(own_samples))
    return samples, calls.mean().item()
