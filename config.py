"""Every setting of an experiment, with its default, its range and one line of explanation; and the named presets.

`Config` is flat, and one line is one setting. Its type says which values are allowed (a range, or the names of a
dictionary), whether the setting may change when a run resumes, and whether sample.py and evaluate.py take it too. Its
comment is what `--help` shows. To add a setting, add a line here and read it where it is needed; a class of a
dictionary such as PROCESSES gets it as an argument of its name. `PRESETS` hold only what differs from the defaults,
which train CIFAR-10. `problems` finds settings that contradict each other.
This file imports nothing of the project, and nothing heavy: `--help` and wrong settings answer at once.
"""

import ast
import math
import os
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar, get_type_hints

HERE = os.path.dirname(__file__)


class Within(str):
    """An interval of numbers, such as Within("[0, 1)")."""

    def __contains__(self, x):
        low, high = map(float, self[1:-1].split(","))
        return low < x < high or x == low and self[0] == "[" or x == high and self[-1] == "]"


def key_of(table):
    """The type of the keys of a dictionary such as "sampling.GRIDS".

    They are read from its source, `GRIDS = {...}`: importing it would import torch.
    """
    file, name = table.split(".")
    with open(f"{HERE}/{file}.py") as source:
        begins = source.read().partition(f"\n{name} = ")[2]  # with the dictionary
    return Literal[tuple(key.value for key in ast.parse(begins).body[0].value.keys)]


T = TypeVar("T")
PositiveInt = Annotated[int, Within("(0, inf)")]
PositiveFloat = Annotated[float, Within("(0, inf)")]
NonNegativeInt = Annotated[int, Within("[0, inf)")]
NonNegativeFloat = Annotated[float, Within("[0, inf)")]
Share = Annotated[float, Within("[0, 1)")]
PositiveShare = Annotated[float, Within("(0, 1]")]
Shares = Annotated[float | tuple[float, ...], Within("[0, 1)")]
Seed = Annotated[int, Within("[0, 4294967296)")]
# A setting that may change when a run resumes: it changes how long the run is, where its files are, how it is run and
# how it is watched. It changes steps by no more than rounding (device, bf16, ...) or the draws of dropout
# (accumulation_steps). The schedules cosine and wsd follow num_training_steps, and data_dir must hold the same data.
MayChange = Annotated[T, "may change"]
Sampling = Annotated[T, "may change", "sampling"]  # and an option of sample.py and evaluate.py
Sampler = Literal[key_of("sampling.ODE_SAMPLERS"), key_of("sampling.SDE_SAMPLERS")]
CompileMode = Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]


@dataclass
class Config:
    # ---- The run
    run_name: MayChange[str] = "cifar10"  # Its folder is CKPT_DIR/RUN_NAME. The same command resumes a stopped run.
    ckpt_dir: MayChange[str] = "ckpts"  # Folder of all runs.
    seed: Seed = 0  # Seed of everything random: weights, batches, times, noise.

    # ---- Data
    dataset: key_of("data_utils.DATASETS") | str = "cifar10"  # A name, FILE.npz, FILE.npy, or FOLDER.
    data_dir: Sampling[str] = "data"  # Folder of downloaded data; for image_folder the folder of class folders.
    image_size: PositiveInt = 32  # Images of image_folder are resized and centre-cropped to this many pixels a side.
    random_flip: bool = True  # Mirror each training image left to right with probability 1/2.
    channels: tuple[int, ...] = ()  # Channels to take of the fields in a file or folder, such as 0 3; none: all.
    num_workers: MayChange[NonNegativeInt] = 2  # Processes of a rank that read items one at a time.
    overfit_one_batch: bool = False  # Train on the batch of step 0 alone: a network that cannot learn it has a bug.

    # ---- Condition: what the network sees beside xt. One of these, or what a file holds
    corruption: key_of("conditions.CORRUPTIONS") | None = None  # What this leaves of an item.
    downsample_factor: PositiveInt = 4  # downsample: pixels in a row that become one.
    mask_share: PositiveShare = 0.3  # mask_box, mask_pixels: share of the pixels that is hidden.
    lag: NonNegativeInt = 0  # The frame so many before in the trajectory; 0: none.
    cond_dropout: Share = 0.0  # Share of conditions that are hidden in training: guidance needs it.

    # ---- Process: xt = alpha(t) x0 + sigma(t) x1 + shift(t) m + gamma(t) z, t = 0 data and t = 1 the base, of mean m
    process: key_of("processes.PROCESSES") = "rf"  # How data turns into noise.
    beta_min: float = 0.1  # linear_vp, sub_vp: noise rate beta at t = 0.
    beta_max: float = 20.0  # linear_vp, sub_vp: noise rate beta at t = 1.
    sigma_min: float = 0.002  # ve, ve_linear, edm: sigma at t = 0. May be 0 for ve_linear and edm (Song et al.: 0.01).
    sigma_max: float = 80.0  # ve, ve_linear, edm: sigma at t = 1 (Song et al. 2021 take 50 for ve).
    rho: Annotated[float, Within("[0.1, inf)")] = 7.0  # Process and grid edm: (sigma / alpha)^(1 / rho) in equal steps.
    foellmer_epsilon: PositiveFloat = 1.0  # foellmer: size of the noise.
    foellmer_power: Annotated[float, Within("[1, inf)")] = 2.0  # foellmer: alpha = (1 - t)^power; 1 or 2.
    base: key_of("processes.BASES") = "noise"  # noise: m = 0. condition: m is the condition itself.
    base_std: PositiveFloat = 1.0  # condition: standard deviation of the base around m; foellmer has 0.
    source: Annotated[key_of("data_utils.DATASETS") | str, "sampling"] = "noise"  # x1: noise, or a data set by name.
    gamma: key_of("processes.GAMMAS") | None = None  # Noise on the way from source to data.
    gamma_scale: PositiveFloat = 1.0  # Factor of gamma.
    coupling: key_of("couplings.COUPLINGS") = "independent"  # Which x1 goes with which data.
    T_min: float = 1e-4  # Least time, in training and sampling.
    T_max: float = 0.9999  # Greatest time, in training and sampling.

    # ---- Prediction, loss and training times
    model_type: key_of("prediction.PREDICTIONS") = "velocity"  # What the network outputs.
    target_type: key_of("prediction.PREDICTIONS") = "velocity"  # What the loss compares.
    precondition: bool = False  # Give the network xt / std(xt - shift m), and log(sigma / alpha) / 4 for t (EDM).
    sigma_data: PositiveFloat = 0.5  # Standard deviation of the data: precondition, prediction and weighting edm.
    loss_weighting: key_of("prediction.LOSS_WEIGHTINGS") = "none"  # Weight of each time in the loss.
    min_snr_gamma: PositiveFloat = 5.0  # min_snr: the greatest weight.
    sigmoid_bias: float = 2.0  # sigmoid: log-SNR at which the weight is half of the likelihood's.
    time_sampler: key_of("time_samplers.TIME_SAMPLERS") = "uniform"  # How training times are drawn.
    importance_weights: bool = False  # Weigh losses by 1 / density of their times: the mean is that of uniform times.
    logit_normal_loc: float = 0.0  # logit_normal: mean of logit(t); above 0 means more noise.
    logit_normal_scale: PositiveFloat = 1.0  # logit_normal: standard deviation of logit(t).
    edm_P_mean: float = -1.2  # edm_log_normal: mean of log(sigma / alpha).
    edm_P_std: PositiveFloat = 1.2  # edm_log_normal: standard deviation of log(sigma / alpha).
    time_beta_a: PositiveFloat = 1.0  # beta: first parameter of the Beta distribution; larger means more noise.
    time_beta_b: PositiveFloat = 2.0  # beta: second parameter; larger means less noise.
    mode_scale: Annotated[float, Within("[-1, 1.75]")] = 1.29  # mode: above 0 prefers the middle, below 0 the ends.
    objective: key_of("flow_maps.OBJECTIVES") | None = None  # Learn a flow map by this, for few steps of flow_map.
    off_diagonal: Share = 0.5  # Share of a batch with two times t > s; the rest has s = t.
    off_diagonal_warmup: NonNegativeInt = 0  # Steps in which this share rises linearly.
    trainer: key_of("trainer.TRAINERS") = "diffusion"  # Class that makes batches and takes their loss.

    # ---- Network
    network: key_of("build.NETWORKS") = "unet"  # Architecture, called as net(xt, t, label, cond, s).
    model_channels: Annotated[int, Within("[2, inf)")] = 128  # unet: channels at full resolution.
    channel_mults: Annotated[tuple[int, ...], Within("(0, inf)")] = (1, 2, 2, 2)  # unet: multiples of model_channels.
    num_res_blocks: PositiveInt = 2  # unet: residual blocks at each resolution.
    attention_resolutions: tuple[int, ...] = (16,)  # unet: heights with self-attention, beside the middle's.
    hidden_dim: PositiveInt = 256  # mlp, plain_mlp, transformer: width.
    patch_size: PositiveInt = 2  # transformer: pixels along a side of a patch, which is a token.
    depth: PositiveInt = 12  # transformer: blocks.
    heads: PositiveInt = 4  # transformer: heads of the attention; 64 channels in each are common.
    checkpointing: MayChange[bool] = False  # transformer: compute blocks again in the backward pass, to save memory.
    num_layers: PositiveInt = 4  # mlp: residual layers; plain_mlp: hidden layers.
    activation: key_of("mlp.ACTIVATIONS") = "silu"  # mlp, plain_mlp: activation.
    dropout: Share = 0.1  # Dropout inside the network.
    class_conditional: bool = False  # Give the network the labels.
    label_dropout: Share = 0.1  # Share of training labels that are hidden: guidance needs it.

    # ---- Optimization
    batch_size: PositiveInt = 128  # Items in one step, over all ranks and accumulation steps.
    accumulation_steps: MayChange[PositiveInt] = 1  # Each rank takes its rows in this many parts, to save memory.
    num_training_steps: MayChange[PositiveInt] = 400_000  # Optimizer steps.
    optimizer: key_of("optimizers.OPTIMIZERS") = "adamw"  # muon: for the matrices of hidden layers; else adamw.
    base_lr: PositiveFloat = 2e-4  # Learning rate after warm-up.
    min_lr: NonNegativeFloat = 0.0  # Learning rate to which schedules fall: cosine and wsd at their end.
    lr_schedule: key_of("optimizers.SCHEDULES") = "constant"  # Course of the learning rate after warm-up.
    lr_decay_start: PositiveInt = 10_000  # inverse_sqrt: step t from which the rate falls as 1 / sqrt(t).
    lr_decay_share: PositiveShare = 0.2  # wsd: share of the steps after warm-up in which it falls.
    warmup_steps: NonNegativeInt = 5000  # Steps in which the learning rate rises linearly to base_lr.
    weight_decay: NonNegativeFloat = 0.0  # Decay of the matrices; biases and norms have none.
    grad_clip_norm: NonNegativeFloat = 1.0  # Gradients of a larger norm are scaled down to this one; 0 turns it off.
    max_skipped_steps: MayChange[PositiveInt] = 10  # The run stops after so many skipped (not finite) steps in a row.
    ema_decay: Shares = 0.9999  # Decays of averages of the weights, at most (1 + n) / (10 + n). The first one is shown.
    ema_snapshot_every: NonNegativeInt = 0  # Steps between snapshots of averages, for sample.py --ema_length; 0: none.

    # ---- Sampling: the grids of samples drawn in training, and the defaults of sample.py
    sampler: Sampling[Sampler] = "heun"  # Sampler of the first row of grids.
    sde_sampler: MayChange[key_of("sampling.SDE_SAMPLERS") | None] = "euler_maruyama"  # The second row.
    sampling_steps: Sampling[PositiveInt] = 50  # Steps from T_max to T_min; heun takes 2 calls in each but the last.
    grid: Sampling[key_of("sampling.GRIDS")] = "uniform"  # Times of the steps.
    grid_shift: Sampling[PositiveFloat] = 3.0  # shifted: above 1 for shorter steps near the noise.
    sde_diffusion: Sampling[key_of("sampling.DIFFUSIONS")] = "sigma"  # eps(t), half the SDE's squared noise.
    sde_scale: Sampling[NonNegativeFloat] = 1.0  # Factor of sde_diffusion; 0 makes the SDE the ODE.
    corrector_snr: Sampling[NonNegativeFloat] = 0.16  # predictor_corrector: size of Langevin's step.
    churn: Sampling[NonNegativeFloat] = 30.0  # edm_churn: EDM's S_churn; a step adds a share churn / steps of noise.
    churn_min: Sampling[NonNegativeFloat] = 0.01  # edm_churn: least sigma / alpha at which noise is added.
    churn_max: Sampling[float] = 1.0  # edm_churn: greatest sigma / alpha at which noise is added.
    churn_noise: Sampling[NonNegativeFloat] = 1.0  # edm_churn: standard deviation of that noise (EDM: up to 1.007).
    rtol: Sampling[PositiveFloat] = 1e-5  # dopri5: relative tolerance.
    atol: Sampling[PositiveFloat] = 1e-5  # dopri5: absolute tolerance.
    denoise: Sampling[bool] = False  # Take the predicted x0 at the end, without the noise left at T_min.
    clip_x0: Sampling[key_of("sampling.CLIPS")] = "none"  # How the predicted x0 of images is kept in [-1, 1].
    guidance_scale: Sampling[float] = 1.0  # Classifier-free guidance; 1 is none.
    guidance_t_min: Sampling[float] = 0.0  # Least time at which guidance acts.
    guidance_t_max: Sampling[float] = 1.0  # Greatest time at which guidance acts.
    num_samples: MayChange[PositiveInt] = 64  # Samples in a grid.
    samples_per_cond: Sampling[PositiveInt] = 4  # Samples for each condition.
    sampling_batch_size: Sampling[PositiveInt] = 500  # Samples that one rank draws at once.

    # ---- Evaluation in training, by the metrics that are cheap: see metrics.py; evaluate.py does more
    evaluate_every: MayChange[NonNegativeInt] = 50_000  # Steps between evaluations, also at the end; 0: none.
    evaluation_samples: MayChange[Annotated[int, Within("[10, inf)")]] = 1000  # Samples of EMA weights in each.

    # ---- Watching
    log_every: MayChange[PositiveInt] = 100  # Steps between lines of metrics.
    sample_every: MayChange[NonNegativeInt] = 10_000  # Steps between sample grids; 0: only at the end.
    save_every: MayChange[NonNegativeInt] = 5000  # Steps between checkpoints; 0: only when the run ends or stops.
    keep_checkpoints: MayChange[PositiveInt] = 2  # Newest checkpoints that are kept, in case one is damaged.
    milestone_every: MayChange[NonNegativeInt] = 0  # Steps between checkpoints that are kept for ever; 0: none.
    wandb: MayChange[Literal["online", "offline", "disabled"] | None] = None  # None: WANDB_MODE, or online, or offline.
    wandb_project: MayChange[str] = "diffusion"  # Project under which wandb files the run.

    # ---- Devices
    device: MayChange[Literal["auto", "cpu", "cuda"]] = "auto"  # auto: the GPU where there is one.
    bf16: Sampling[bool | None] = None  # Network in bfloat16; by default on a GPU that has it. Slow on most CPUs.
    compile: Sampling[bool | None] = None  # Compile the network; by default on a GPU, if it runs for long.
    compile_mode: MayChange[CompileMode] = "default"  # Mode of torch.compile.
    channels_last: bool = True  # Keep images as (B, H, W, C) in memory, which convolutions like.
    tf32: MayChange[bool] = True  # Allow TF32 in float32 products on a GPU.
    cudnn_benchmark: MayChange[bool] = True  # On a GPU let cuDNN time its kernels for each shape, and take the fastest.
    timeout: MayChange[Annotated[float, Within("(0, 10000]")]] = 10.0  # Minutes that a rank waits for the others.


SHORT = dict(random_flip=False, dropout=0.0, lr_schedule="cosine")  # for runs of minutes
SMALL_IMAGES = SHORT | dict(  # for networks that learn images of 8 x 8 pixels in a minute or two
    dataset="digits", time_sampler="logit_normal", base_lr=3e-3, warmup_steps=50, ema_decay=0.99, sampling_steps=20,
)
DIGITS = SMALL_IMAGES | dict(model_channels=24, channel_mults=(1, 2), attention_resolutions=(), num_res_blocks=1)
DIGITS_FROM_CONDITIONS = DIGITS | dict(
    num_training_steps=1000, log_every=50, sample_every=500, save_every=500, evaluate_every=1000,
)
MNIST = dict(  # also for data like it
    class_conditional=True, model_channels=64, channel_mults=(1, 2, 2), attention_resolutions=(7,), base_lr=1e-3,
    lr_schedule="cosine", warmup_steps=500, ema_decay=0.999, num_samples=100,
)
PRESETS = {
    "cifar10": {},
    "cifar10_debug": SHORT | dict(
        overfit_one_batch=True, model_channels=32, attention_resolutions=(8,), num_res_blocks=1, batch_size=16,
        num_training_steps=1000, base_lr=2e-3, warmup_steps=20, ema_decay=0.99, sampling_steps=20, num_samples=16,
        log_every=10, sample_every=250, save_every=250, evaluate_every=0,
    ),
    "digits": DIGITS | dict(
        class_conditional=True, num_training_steps=650, num_samples=100, log_every=25, sample_every=325,
        save_every=325, evaluate_every=650,
    ),
    "digits_transformer": SMALL_IMAGES | dict(
        network="transformer", hidden_dim=96, depth=4, class_conditional=True, num_training_steps=1200, num_samples=100,
    ),
    "digits_superres": DIGITS_FROM_CONDITIONS | dict(corruption="downsample"),
    "digits_inpaint": DIGITS_FROM_CONDITIONS | dict(corruption="mask_box"),
    "navier_stokes": SHORT | dict(
        dataset="navier_stokes", lag=1, process="foellmer", base="condition", model_type="drift", target_type="drift",
        T_max=1.0, model_channels=32, channel_mults=(1, 2, 2), attention_resolutions=(), num_res_blocks=1,
        batch_size=32, num_training_steps=3000, base_lr=1e-3, warmup_steps=100, ema_decay=0.999,
        sampler="stochastic_heun", sampling_steps=25, sde_sampler=None, sde_diffusion="own", evaluation_samples=400,
        sample_every=1000, save_every=1000, evaluate_every=3000,
    ),
    "mnist": SHORT | MNIST | dict(
        dataset="mnist", num_training_steps=20_000, sample_every=2000, save_every=2000, evaluate_every=4000,
    ),
    "fashion_mnist": MNIST | dict(
        dataset="fashion_mnist", num_training_steps=40_000, sample_every=4000, save_every=4000, evaluate_every=8000,
    ),
    "image_folder": dict(dataset="image_folder", data_dir="data/images", class_conditional=True),
    "cifar10_edm": dict(  # 18 noise levels, and 0
        process="ve_linear", model_type="edm", target_type="edm", precondition=True, time_sampler="edm_log_normal",
        T_min=0.0, T_max=1.0, grid="edm", sampling_steps=17, denoise=True, sde_sampler="edm_churn",
    ),
    "cifar10_transformer": dict(  # of size S; x0 with the loss of the velocity, and times as in Li & He 2025, "JiT"
        network="transformer", hidden_dim=384, heads=6, model_type="x0", time_sampler="logit_normal",
        logit_normal_loc=0.8, logit_normal_scale=0.8,
    ),
    "moons": SHORT | dict(
        dataset="moons", network="mlp", sigma_data=1.0, batch_size=512, num_training_steps=3000, base_lr=2e-3,
        warmup_steps=100, ema_decay=0.99, num_samples=2000, sample_every=1000, save_every=1000, evaluate_every=1000,
        evaluation_samples=5000,
    ),
}
PRESETS["digits_flow_map"] = PRESETS["digits"] | dict(
    objective="progressive", sampler="flow_map", sampling_steps=2, sde_sampler=None,
)
del PRESETS["digits_flow_map"]["time_sampler"]  # for that of the default: many times near both ends
PRESETS["moons_to_eight_gaussians"] = PRESETS["moons"] | dict(
    dataset="eight_gaussians_far", source="moons_far", gamma="brownian", gamma_scale=0.3, num_training_steps=2000,
    evaluate_every=2000,
)
for name in PRESETS.keys() - {"cifar10"}:  # a run has the name of its preset; the default is cifar10
    PRESETS[name]["run_name"] = name


def marks(cls):
    """What the type of each setting of a dataclass says beside its kind: Within, "may change", "sampling"."""
    return {name: getattr(hint, "__metadata__", ()) for name, hint in get_type_hints(cls, include_extras=True).items()}


def out_of_range(options):
    """Numbers that the types of their settings do not allow, or no number, one line each; None is ignored."""
    found = []
    for name, allowed in marks(type(options)).items():
        value = getattr(options, name)
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{name} is {value}: expected a finite number")
        elif value is not None:
            numbers = value if isinstance(value, tuple) else [value]
            found += [f"{name} is {value}: expected a number in {mark}" for mark in allowed
                      if isinstance(mark, Within) and any(number not in mark for number in numbers or [math.nan])]
    return found


def problems(c: Config, world_size=1, guide=None):
    """Settings out of range, or that contradict each other, one line each with the way out; none if all is well.

    `world_size` is the number of ranks, and `guide` a checkpoint for autoguidance. What depends on the data or on a
    formula is checked where it is known (data_utils.load_dataset, build.check_settings), also before any data is read.
    """
    parts = world_size * c.accumulation_steps
    contradictions = {
        f"batch_size {c.batch_size} is less than {parts}: ranks ({world_size}) x accumulation_steps "
        f"({c.accumulation_steps}); use --batch_size {parts} or more, or fewer of these": c.batch_size < parts,
        f"warmup_steps {c.warmup_steps} is longer than the training of {c.num_training_steps} steps: use "
        f"--warmup_steps {c.num_training_steps // 10}, or more --num_training_steps":
            c.warmup_steps > c.num_training_steps,
        f"min_lr {c.min_lr} is above base_lr {c.base_lr}: lower --min_lr": c.min_lr > c.base_lr,
        f"T_min {c.T_min} and T_max {c.T_max}: expected 0 <= T_min < T_max <= 1, such as --T_min 1e-4 --T_max 0.9999":
            not 0 <= c.T_min < c.T_max <= 1,
        f"beta_min {c.beta_min} and beta_max {c.beta_max}: expected 0 < beta_min <= beta_max, such as 0.1 and 20":
            not 0 < c.beta_min <= c.beta_max,
        f"sigma_min {c.sigma_min} and sigma_max {c.sigma_max}: expected 0 <= sigma_min < sigma_max, as 0.002 and 80":
            not 0 <= c.sigma_min < c.sigma_max,
        f"gamma {c.gamma} is the noise between data and a source: use it with a --source, or use --gamma None":
            c.gamma and c.source == "noise",
        "coupling sb goes with the noise of a Brownian bridge: use --gamma brownian and a --source, or --coupling ot":
            c.coupling == "sb" and (c.gamma != "brownian" or c.source == "noise"),
        "trainer regression predicts data from conditions alone: use --source noise, or --trainer diffusion":
            c.trainer == "regression" and c.source != "noise",
        "objective is for --model_type velocity --target_type velocity --precondition False --gamma None, and not for "
        "--trainer regression: use these, or --objective None":
            c.objective and ((c.model_type, c.target_type, c.precondition, c.gamma)
                             != ("velocity", "velocity", False, None) or c.trainer == "regression"),
        f"checkpointing gives no derivative in time, which objective {c.objective} takes: use --objective progressive, "
        "or --checkpointing False": c.checkpointing and c.objective not in (None, "progressive"),
        "coupling ot_within_class needs labels: use --class_conditional True, or --coupling ot":
            c.coupling == "ot_within_class" and not c.class_conditional,
        f"guidance_scale {c.guidance_scale} needs a network that was trained without labels or condition too: train "
        "with --class_conditional True --label_dropout 0.1, or --cond_dropout 0.1; or draw with a --guide, or with "
        "--guidance_scale 1":
            c.guidance_scale != 1 and not (guide or (c.label_dropout if c.class_conditional else c.cond_dropout)),
        "guide does nothing at guidance_scale 1: use --guidance_scale 2, or leave --guide out":
            guide and c.guidance_scale == 1,
        f"guidance_t_min {c.guidance_t_min} is above guidance_t_max {c.guidance_t_max}: lower --guidance_t_min, or "
        "raise --guidance_t_max": c.guidance_t_min > c.guidance_t_max,
        f"churn_min {c.churn_min} is above churn_max {c.churn_max}: lower --churn_min, or raise --churn_max":
            c.churn_min > c.churn_max,
        f"compile_mode {c.compile_mode} keeps gradients in CUDA graphs, where each of {c.accumulation_steps} parts of "
        "a batch overwrites the one before: use --compile_mode default, or --accumulation_steps 1":
            c.accumulation_steps > 1 and c.compile is not False
            and c.compile_mode in ("reduce-overhead", "max-autotune"),
        f"run_name {c.run_name!r}: expected the name of a folder, without '/' and not starting with '.'":
            not c.run_name or "/" in c.run_name or c.run_name.startswith("."),
        f"ckpt_dir is empty: expected a folder, such as --ckpt_dir {Config.ckpt_dir}": not c.ckpt_dir,
        f"data_dir is empty: expected a folder, such as --data_dir {Config.data_dir}": not c.data_dir,
    }
    return out_of_range(c) or [message for message, wrong in contradictions.items() if wrong]
