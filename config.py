"""Every setting of an experiment, with its default and one line of explanation; and the named presets.

`Config` is flat: one line is one setting, and its comment is what `python main.py --help` shows. To add a setting, add a
line here and read it where it is needed; a class of a dictionary such as PROCESSES gets it by naming it in `__init__`.
`PRESETS` hold only what differs from the defaults, which train CIFAR-10. `CHOICES` says which dictionary, in which file,
holds the allowed names of a setting. `problems` finds settings that contradict each other.
This file imports nothing of the project, and nothing heavy: `--help` and wrong settings answer at once.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass
class Config:
    # ---- The run
    run_name: str = "cifar10"  # Its folder is CKPT_DIR/RUN_NAME. The same command goes on with a run that was stopped.
    ckpt_dir: str = "ckpts"  # Folder of all runs.
    seed: int = 0  # Seed of everything random: weights, batches, times, noise, samples.

    # ---- Data
    dataset: str = "cifar10"  # A name, or a FILE.npz or FILE.npy of vectors or images.
    data_dir: str = "data"  # Folder of downloaded data; for image_folder the folder of class folders.
    image_size: int = 32  # Images of image_folder are resized and centre-cropped to this many pixels a side.
    random_flip: bool = True  # Mirror each training image left to right with probability 1/2.
    overfit_one_batch: bool = False  # Train on the batch of step 0 alone: a network that cannot learn it has a bug.

    # ---- Process: xt = alpha(t) x0 + sigma(t) x1, with t = 0 data and t = 1 noise
    process: str = "rf"  # How data turns into noise.
    beta_min: float = 0.1  # linear_vp, sub_vp: noise rate beta at t = 0.
    beta_max: float = 20.0  # linear_vp, sub_vp: noise rate beta at t = 1.
    sigma_min: float = 0.002  # ve, ve_linear, edm: sigma at t = 0, which only ve_linear and edm let be 0 (Song et al. 2021: 0.01 for ve).
    sigma_max: float = 80.0  # ve, ve_linear, edm: sigma at t = 1 (Song et al. 2021 take 50 for ve).
    rho: float = 7.0  # Process edm and grid edm: sigma^(1 / rho) takes equal steps.
    coupling: str = "independent"  # Which noise goes with which data; ot_within_class for labels. All processes see all rows.
    T_min: float = 1e-4  # Least time, in training and sampling.
    T_max: float = 0.9999  # Greatest time, in training and sampling.

    # ---- Prediction, loss and training times
    model_type: str = "velocity"  # What the network outputs.
    target_type: str = "velocity"  # What the squared error compares, after conversion of the network's output.
    precondition: bool = False  # Show the network xt at unit variance, and log(sigma / alpha) / 4 for t, as EDM does.
    sigma_data: float = 0.5  # Standard deviation of the data, for precondition, prediction edm and weighting edm; 1 for vectors.
    loss_weighting: str = "none"  # Weight of each time in the loss; but for none, as a weight of the squared error of x0.
    min_snr_gamma: float = 5.0  # min_snr: the greatest weight.
    sigmoid_bias: float = 2.0  # sigmoid: log-SNR at which the weight is half of the likelihood's.
    time_sampler: str = "uniform"  # How training times are drawn.
    importance_weights: bool = False  # Weigh the losses by 1 / density of their times, so that the mean is that of uniform times.
    logit_normal_loc: float = 0.0  # logit_normal: mean of logit(t); above 0 means more noise.
    logit_normal_scale: float = 1.0  # logit_normal: standard deviation of logit(t).
    edm_P_mean: float = -1.2  # edm_log_normal: mean of log(sigma / alpha).
    edm_P_std: float = 1.2  # edm_log_normal: standard deviation of log(sigma / alpha).
    time_beta_a: float = 1.0  # beta: first parameter of the Beta distribution; larger means more noise.
    time_beta_b: float = 2.0  # beta: second parameter; larger means less noise.
    mode_scale: float = 1.29  # mode: above 0 prefers the middle, below 0 the ends; from -1 to 1.75.

    trainer: str = "diffusion"  # Class of trainer.py that makes the batches and takes their loss.

    # ---- Network
    network: str = "unet"  # Architecture; every one is called as net(xt, t, label).
    model_channels: int = 128  # unet: channels at full resolution.
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)  # unet: multiples of model_channels, one for each resolution.
    num_res_blocks: int = 2  # unet: residual blocks at each resolution.
    attention_resolutions: tuple[int, ...] = (16,)  # unet: image sides, in pixels, at which there is self-attention.
    hidden_dim: int = 256  # mlp: width.
    num_layers: int = 4  # mlp: residual layers.
    dropout: float = 0.1  # Dropout inside the network.
    class_conditional: bool = False  # Give the network the labels.
    label_dropout: float = 0.1  # Share of training labels that are hidden, so that guidance has an unconditional field.

    # ---- Optimization
    batch_size: int = 128  # Images in one step, over all processes and accumulation steps.
    accumulation_steps: int = 1  # Each process takes its share of the batch in this many parts, to save memory.
    num_training_steps: int = 400_000  # Optimizer steps.
    base_lr: float = 2e-4  # Learning rate after warm-up.
    min_lr: float = 0.0  # Learning rate at the end of the cosine schedule.
    lr_schedule: str = "constant"  # Learning rate after warm-up.
    warmup_steps: int = 5000  # Steps in which the learning rate rises linearly to base_lr.
    weight_decay: float = 0.0  # AdamW's decay of the matrices; biases and norms have none.
    grad_clip_norm: float = 1.0  # Gradients of a larger norm are scaled down to this one; 0 turns it off.
    max_skipped_steps: int = 10  # The run stops after so many steps in a row whose loss or gradient is not finite, and so skipped.
    ema_decay: float = 0.9999  # Decay of the moving average of the weights; shorter at the start, as (1 + n) / (10 + n).

    # ---- Sampling: the grids of samples drawn in training, and the defaults of sample.py
    sampler: str = "heun"  # Sampler of the first row of grids, and of sample.py.
    sde_sampler: str | None = "euler_maruyama"  # Sampler of the second row of grids; None: no second row.
    sampling_steps: int = 50  # Steps from T_max to T_min; heun takes two network calls in each but the last.
    grid: str = "uniform"  # Times of the steps.
    grid_shift: float = 3.0  # shifted: above 1 for shorter steps near the noise.
    sde_diffusion: str = "sigma"  # Noise that the SDE adds, as g(t)^2 / 2; delta is the exact reversal of the process.
    sde_scale: float = 1.0  # Factor of sde_diffusion; 0 makes the SDE the ODE.
    corrector_snr: float = 0.16  # predictor_corrector: size of Langevin's step.
    churn: float = 30.0  # edm_churn: EDM's S_churn, noise added in a step, in shares of the noise there, times the number of steps.
    churn_min: float = 0.01  # edm_churn: least sigma / alpha at which noise is added.
    churn_max: float = 1.0  # edm_churn: greatest sigma / alpha at which noise is added.
    churn_noise: float = 1.0  # edm_churn: standard deviation of that noise; EDM takes up to 1.007 against lost detail.
    rtol: float = 1e-5  # dopri5: relative tolerance.
    atol: float = 1e-5  # dopri5: absolute tolerance.
    denoise: bool = False  # Take the predicted x0 at the end, without the noise left at T_min.
    guidance_scale: float = 1.0  # Classifier-free guidance; 1 is none.
    guidance_t_min: float = 0.0  # Least time at which guidance acts.
    guidance_t_max: float = 1.0  # Greatest time at which guidance acts.
    num_samples: int = 64  # Samples in a grid.
    sampling_batch_size: int = 500  # Samples that one process draws at once.

    # ---- Evaluation in training, by the metrics that are cheap: see metrics.py; evaluate.py does more
    evaluate_every: int = 50_000  # Steps between evaluations, also at the end; 0: none.
    evaluation_samples: int = 1000  # Samples of EMA weights, by `sampler`, in each.

    # ---- Watching
    log_every: int = 100  # Steps between lines of metrics.
    sample_every: int = 10_000  # Steps between sample grids; 0: only at the end.
    save_every: int = 5000  # Steps between checkpoints; 0: only at the end, or when the run is stopped.
    keep_checkpoints: int = 2  # Newest checkpoints that are kept; from the second on they stand in for a damaged one.
    milestone_every: int = 0  # Steps between checkpoints that are kept for ever; 0: none.
    wandb: Literal["online", "offline", "disabled"] | None = None  # None: WANDB_MODE, or online, which falls back to offline.
    wandb_project: str = "diffusion"  # Project under which wandb files the run.

    # ---- Devices
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one.
    bf16: bool | None = None  # Run the network in bfloat16 (autocast). None: on a GPU that has it (capability 8.0).
    compile: bool | None = None  # Compile the network with torch.compile. None: on a GPU, for 10,000 training steps or more.
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"] = "default"  # Of torch.compile.
    channels_last: bool = True  # Keep images as (B, H, W, C) in memory, which convolutions like.
    tf32: bool = True  # Allow TF32 in float32 products on a GPU.
    cudnn_benchmark: bool = True  # Let cuDNN try its convolutions for each shape on a GPU, and take the fastest.
    timeout: float = 10.0  # Minutes that a process waits in a step for the others, before it takes one of them to hang, and ends.


PRESETS = {
    "cifar10": {},
    "cifar10_debug": dict(
        run_name="cifar10_debug", overfit_one_batch=True, random_flip=False, model_channels=32, dropout=0.0,
        attention_resolutions=(8,), num_res_blocks=1, batch_size=16, num_training_steps=1000, base_lr=2e-3,
        lr_schedule="cosine", warmup_steps=20, ema_decay=0.99, sampling_steps=20, num_samples=16, log_every=10, sample_every=250,
        save_every=250, evaluate_every=0,
    ),
    "digits": dict(
        run_name="digits", dataset="digits", random_flip=False, class_conditional=True, model_channels=24, channel_mults=(1, 2),
        attention_resolutions=(), num_res_blocks=1, dropout=0.0, time_sampler="logit_normal", num_training_steps=650, base_lr=3e-3,
        lr_schedule="cosine", warmup_steps=50, ema_decay=0.99, sampling_steps=20, num_samples=100, log_every=25, sample_every=325,
        save_every=325, evaluate_every=650,
    ),
    "mnist": dict(
        run_name="mnist", dataset="mnist", random_flip=False, class_conditional=True, model_channels=64, channel_mults=(1, 2, 2),
        attention_resolutions=(7,), dropout=0.0, num_training_steps=20_000, base_lr=1e-3, lr_schedule="cosine", warmup_steps=500,
        ema_decay=0.999, num_samples=100, sample_every=2000, save_every=2000, evaluate_every=4000,
    ),
    "fashion_mnist": dict(
        run_name="fashion_mnist", dataset="fashion_mnist", class_conditional=True, model_channels=64, channel_mults=(1, 2, 2),
        attention_resolutions=(7,), num_training_steps=40_000, base_lr=1e-3, lr_schedule="cosine", warmup_steps=500,
        ema_decay=0.999, num_samples=100, sample_every=4000, save_every=4000, evaluate_every=8000,
    ),
    "image_folder": dict(run_name="image_folder", dataset="image_folder", data_dir="data/images", class_conditional=True),
    "cifar10_edm": dict(
        run_name="cifar10_edm", process="ve_linear", model_type="edm", target_type="edm", precondition=True,
        time_sampler="edm_log_normal", T_min=0.0, T_max=1.0, grid="edm", sampling_steps=17, denoise=True,  # 18 noise levels, and 0
        sde_sampler="edm_churn",
    ),
    "moons": dict(
        run_name="moons", dataset="moons", network="mlp", random_flip=False, sigma_data=1.0, dropout=0.0, batch_size=512,
        num_training_steps=3000, base_lr=2e-3, lr_schedule="cosine", warmup_steps=100, ema_decay=0.99, num_samples=2000,
        sample_every=1000, save_every=1000, evaluate_every=1000, evaluation_samples=5000,
    ),
}

# Settings that name an entry of a dictionary: setting -> (file, dictionary). The names are the dictionary's keys; a third entry
# is the type of what is allowed beside them.
CHOICES = {
    "dataset": ("data_utils.py", "DATASETS", str),
    "process": ("processes.py", "PROCESSES"),
    "coupling": ("couplings.py", "COUPLINGS"),
    "model_type": ("prediction.py", "PREDICTIONS"),
    "target_type": ("prediction.py", "PREDICTIONS"),
    "loss_weighting": ("prediction.py", "LOSS_WEIGHTINGS"),
    "time_sampler": ("time_samplers.py", "TIME_SAMPLERS"),
    "trainer": ("trainer.py", "TRAINERS"),
    "network": ("build.py", "NETWORKS"),
    "lr_schedule": ("optimizers.py", "SCHEDULES"),
    "sampler": ("sampling.py", "SAMPLERS"),
    "sde_sampler": ("sampling.py", "SDE_SAMPLERS", type(None)),
    "grid": ("sampling.py", "GRIDS"),
    "sde_diffusion": ("sampling.py", "DIFFUSIONS"),
}

# Settings that may differ when a run goes on: they change how it is run and watched, and what it computes by no more than rounding
# (device, bf16, ...) or the draws of dropout (accumulation_steps).
MAY_CHANGE = {
    "run_name", "ckpt_dir", "data_dir", "accumulation_steps", "num_training_steps", "sampler", "sde_sampler", "sampling_steps", "grid",
    "grid_shift", "sde_diffusion", "sde_scale", "corrector_snr", "churn", "churn_min", "churn_max", "churn_noise", "rtol", "atol",
    "denoise", "guidance_scale", "guidance_t_min", "guidance_t_max", "num_samples", "sampling_batch_size", "evaluate_every",
    "evaluation_samples", "log_every", "sample_every", "save_every", "keep_checkpoints", "milestone_every", "max_skipped_steps", "wandb",
    "wandb_project", "device", "bf16", "compile", "compile_mode", "channels_last", "tf32", "cudnn_benchmark", "timeout",
}


def out_of_range(settings: dict) -> list[str]:
    """Numbers that cannot be used, one line each. A setting that is absent or None is passed over, so that sample.py can ask too."""
    given = {name: value for name, value in settings.items() if value is not None}
    found = [f"{name} is {value}: expected a finite number" for name, value in given.items()
             if isinstance(value, float) and not math.isfinite(value)]
    positive = ("batch_size", "accumulation_steps", "num_training_steps", "base_lr", "sampling_steps", "num_samples", "log_every",
                "sampling_batch_size", "image_size", "model_channels", "num_res_blocks", "hidden_dim", "num_layers", "logit_normal_scale",
                "edm_P_std", "time_beta_a", "time_beta_b", "min_snr_gamma", "sigma_data", "grid_shift", "rtol", "atol", "num",
                "keep_checkpoints", "max_skipped_steps", "evaluation_samples", "seeds", "rounds", "seconds")
    not_negative = ("warmup_steps", "weight_decay", "grad_clip_norm", "sample_every", "save_every", "milestone_every", "min_lr",
                    "evaluate_every", "likelihood_num", "loss_num", "neighbours_num", "sde_scale", "corrector_snr", "churn",
                    "churn_min", "churn_noise")
    shares = ("dropout", "label_dropout", "ema_decay")
    for names, expected, fits in (
        (positive, "more than 0", lambda value: value > 0),
        (not_negative, "0 or more", lambda value: value >= 0),
        (("seed",), "0 or more, and less than 2^32", lambda value: 0 <= value < 2**32),
        (("model_channels",), "2 or more, or the network cannot see the time", lambda value: value != 1),
        (shares, "a number in [0, 1)", lambda value: 0 <= value < 1),
        (("timeout",), "minutes, from more than 0 to 10,000", lambda value: 0 < value <= 10_000),
        (("rho",), "0.1 or more", lambda value: value >= 0.1),
        (("mode_scale",), "a number from -1 to 1.75, or the times would not be one to one", lambda value: -1 <= value <= 1.75),
    ):
        found += [f"{name} is {given[name]}: expected {expected}" for name in names if name in given and not fits(given[name])]
    for low, high in (("guidance_t_min", "guidance_t_max"), ("churn_min", "churn_max")):
        if low in given and high in given and given[low] > given[high]:
            found.append(f"{low} {given[low]} is above {high} {given[high]}: lower --{low}, or raise --{high}")
    return found


def problems(c: Config, world_size: int) -> list[str]:
    """Settings out of range, or that contradict each other, one line each with the way out; an empty list if all is well.

    `world_size` is the number of processes. What depends on the data or on a formula is checked where it is known
    (data_utils.load_dataset, build.check_settings), also before any data is read.
    """
    if found := out_of_range(vars(c)):
        return found

    parts = world_size * c.accumulation_steps
    contradictions = {
        f"batch_size {c.batch_size} is less than {parts}: processes ({world_size}) x accumulation_steps ({c.accumulation_steps}); use "
        f"--batch_size {parts} or more, or fewer of these": c.batch_size < parts,
        f"warmup_steps {c.warmup_steps} is longer than the training of {c.num_training_steps} steps: use --warmup_steps "
        f"{c.num_training_steps // 10}, or more --num_training_steps": c.warmup_steps > c.num_training_steps,
        f"min_lr {c.min_lr} is above base_lr {c.base_lr}: lower --min_lr": c.min_lr > c.base_lr,
        f"T_min {c.T_min} and T_max {c.T_max}: expected 0 <= T_min < T_max <= 1, such as --T_min 1e-4 --T_max 0.9999":
            not 0 <= c.T_min < c.T_max <= 1,
        f"beta_min {c.beta_min} and beta_max {c.beta_max}: expected 0 < beta_min <= beta_max, such as 0.1 and 20":
            not 0 < c.beta_min <= c.beta_max,
        f"sigma_min {c.sigma_min} and sigma_max {c.sigma_max}: expected 0 <= sigma_min < sigma_max, such as 0.002 and 80":
            not 0 <= c.sigma_min < c.sigma_max,
        "coupling ot_within_class needs labels: use --class_conditional True, or --coupling ot":
            c.coupling == "ot_within_class" and not c.class_conditional,
        f"guidance_scale {c.guidance_scale} needs labels: use --class_conditional True, or --guidance_scale 1":
            c.guidance_scale != 1 and not c.class_conditional,
        f"guidance_scale {c.guidance_scale} needs an unconditional field: use --label_dropout 0.1, or --guidance_scale 1":
            c.guidance_scale != 1 and c.class_conditional and c.label_dropout == 0,
        f"compile_mode {c.compile_mode} keeps gradients in CUDA graphs, where each of {c.accumulation_steps} parts of a batch overwrites "
        "that before: use --compile_mode default, or --accumulation_steps 1":
            c.accumulation_steps > 1 and c.compile is not False and c.compile_mode in ("reduce-overhead", "max-autotune"),
        f"channel_mults {c.channel_mults}: expected one positive number for each resolution, such as 1 2 2":
            not c.channel_mults or min(c.channel_mults) < 1,
        f"run_name {c.run_name!r}: expected the name of a folder, without '/' and not starting with '.'":
            not c.run_name or "/" in c.run_name or c.run_name.startswith("."),
        f"ckpt_dir is empty: expected a folder, such as --ckpt_dir {Config.ckpt_dir}": not c.ckpt_dir,
        f"data_dir is empty: expected a folder, such as --data_dir {Config.data_dir}": not c.data_dir,
    }
    return [message for message, wrong in contradictions.items() if wrong]
