"""What a run shows: metrics, progress, pictures and curves, in its folder and on wandb.

A run's folder always gets `metrics.jsonl` (one line of JSON for each logged step), the pictures and `curves.png`. wandb
gets the same where it can be reached; whatever happens to wandb, training continues. To log another figure, add it to
the dictionary that the trainer hands to `Logger.log`: it is shown, drawn and sent to wandb as the others are.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from threading import Timer

import numpy as np
import torch
from tqdm import tqdm

from distributed import print0, rank
from utils import UserError, enlarged, first_line, import_torchvision, warn, write_atomically

# ---- Metrics


class Logger:
    """Logs on the rank that has it (rank 0). `step` is the number of steps already taken.

    A run that resumes from an older checkpoint loses its later lines, so that metrics.jsonl has each step once.
    """

    def __init__(self, folder, config, step):
        self.folder = folder
        self.metrics = f"{folder}/metrics.jsonl"
        self.lines = []  # all of metrics.jsonl
        with contextlib.suppress(FileNotFoundError, ValueError), open(self.metrics) as file:
            for line in map(json.loads, file):  # up to one that a kill cut off
                if line["step"] <= step:
                    self.lines.append(line)
        self.write_all()
        self.run = start_wandb(folder, config, vars(config), new=step == 0)
        # none in a log file
        self.bar = tqdm(total=config.num_training_steps, initial=step, unit="step", disable=None, **BAR)

    def log(self, step, values, kind="training"):
        """Adds a line of this kind to metrics.jsonl, to wandb, and to the terminal or the log file.

        Raises OSError if the disk has no room, and keeps the line for `write_all`.
        """
        self.lines.append({"step": step, "kind": kind, **values})
        self.run = log_to_wandb(self.run, {"step": step, **values})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if "_t_" not in name)
        self.bar.write(f"step {step}/{self.bar.total}  {shown}")
        sys.stdout.flush()
        with open(self.metrics, "a") as file:
            print(json.dumps(self.lines[-1]), file=file)

    def evaluated(self, step):
        """Whether there is a line of an evaluation at this step."""
        return any(line["step"] == step and line["kind"] == "evaluation" for line in self.lines)

    def write_all(self):
        """Writes metrics.jsonl anew, down to the disk, with lines for which the disk had no room.

        Raises UserError if it still has none.
        """
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in self.lines))

    def picture(self, step, name, image, path):
        """Saves a PIL image at `path`, and logs it to wandb as samples/<name>."""
        save_picture(image, path)
        self.run = log_to_wandb(self.run, {"step": step}, **{f"samples/{name}": image})

    def finish(self):
        """Closes the bar and the wandb run."""
        self.bar.close()
        close_wandb(self.run)

    def curves(self):
        """Draws all figures of metrics.jsonl over the steps into curves.png, the loss by quarter of t with the loss."""
        panels = {}  # the first name of each, and its lines
        for line in self.lines:
            for name, value in line.items():
                if name not in ("step", "kind", "epoch"):
                    steps, values = panels.setdefault(name.partition("_t_")[0], {}).setdefault(name, ([], []))
                    steps.append(line["step"])
                    values.append(value)
        rows = -(-len(panels) // 3) or 1
        figure = new_figure(15, 3 * rows)
        for i, (title, lines) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(rows, 3, i)
            draw_lines(axes, lines, xlabel="step")
            if title in ("loss", "grad_norm") and axes.dataLim.ymin > 0:
                axes.set_yscale("log")
        write_atomically(f"{self.folder}/curves.png", figure.savefig)


# ---- Progress


# 80 columns where a terminal has no width, as in some containers
BAR = {"ncols": shutil.get_terminal_size().columns, "nrows": 24}


class Progress(tqdm):
    """How far long work has come, on rank 0: a bar on a terminal, a line every 30 seconds in a log file.

    It gives the items of `work` one by one in a `for`. In a `with` it is updated.
    """

    def __init__(self, what, work=None, unit="step"):
        self.terminal = sys.stderr.isatty()
        shown = "{desc}{n_fmt}{unit}" if work is None else "{desc}{n_fmt} of {total_fmt}{unit}"
        # miniters: or tqdm's monitor, a thread, would print a line again with the number of steps before
        lines = {"mininterval": 30, "miniters": 1, "delay": 30, "bar_format": shown}
        super().__init__(work, desc=f"{what}: ", unit=f" {unit}s", leave=False, disable=rank() > 0,
                         **BAR if self.terminal else lines)

    def display(self, msg=None, pos=None):
        """What tqdm calls to show the bar, or, with an empty message, to remove it."""
        if self.terminal:
            super().display(msg, pos)
        elif msg is None:
            print0(self)


# ---- wandb


def start_wandb(folder, config, shown, new):
    """A wandb run with the folder's name, or None if that fails. It never asks for input. Its settings are `shown`.

    Its mode is config.wandb, or else WANDB_MODE. `online` without a key, or without a server within some seconds,
    becomes offline, and one line reports it. The run's id is kept in <folder>/wandb_id: a run that resumes is the same
    run on wandb.
    """
    mode = config.wandb or os.environ.get("WANDB_MODE") or "online"
    path = Path(folder, "wandb_id")
    if mode == "disabled":
        return
    os.environ["WANDB_SILENT"] = "true"
    logging.raiseExceptions = False  # or wandb's log files on a full disk fill the terminal with tracebacks
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # or it warns of each message to a wandb process that is gone
    try:
        import wandb

        if mode == "online":
            try:
                if not wandb.login(prompt=False):
                    raise UserError("no API key: `wandb login` stores one")
            except Exception as error:
                warn(f"wandb: logging offline, since online failed ({first_line(error)}); `wandb sync` uploads it")
                mode = "offline"
        run_id = path.read_text().split()[0] if path.exists() and not new else None
        run = wandb.init(mode=mode, project=config.wandb_project, name=os.path.basename(folder), id=run_id,
                         resume="allow", dir=folder, config=shown,
                         # a kill may cost 1 s of history, not 15
                         settings=wandb.Settings(x_transaction_log_flush_interval=1.0))
        write_atomically(path, run.id)
        print0("wandb:", f"offline; upload with `wandb sync {os.path.dirname(run.dir)}`" if run.offline else run.url)
        return run
    except Exception as error:
        warn(f"wandb: the run continues without it ({first_line(error)}); metrics.jsonl has everything")


def log_to_wandb(run, values, **images):
    """Hands numbers and PIL images, by name, at values["step"] to a run, if there is one. Returns the run.

    If that fails, whatever the error, it closes the run and returns None.
    """
    if run is None:
        return
    try:
        import wandb

        run.log(values | {name: wandb.Image(image) for name, image in images.items()},
                step=values["step"])  # wandb drops steps that it has from before a restart
        return run
    except Exception as error:
        close_wandb(run, first_line(error))


def close_wandb(run, failure=None):
    """Closes a run, if there is one, within some 20 s. One line reports its failure, or `failure`, of before."""
    if run is None:
        return
    import wandb

    # private; wandb's own process may be stuck, or wait for a server that is gone
    limit = Timer(20, lambda: wandb.sdk.wandb_setup.singleton()._connection._proc._process.kill())
    limit.start()
    try:
        run.finish()
    except Exception as error:
        failure = failure or first_line(error)
    with contextlib.suppress(BaseException):  # SystemExit, for one
        wandb.teardown()
    limit.cancel()
    if failure:
        warn(f"wandb: it failed ({failure}); metrics.jsonl has everything, and `wandb sync --include-online "
             f"{os.path.dirname(run.dir)}` uploads what wandb has")


# ---- Pictures


def save_picture(image, path, **options):
    """Writes a PIL image at `path`, as a whole or not at all, in the format of its suffix; `options` are those of PIL.

    Raises UserError if it cannot be written.
    """
    write_atomically(path, lambda file: image.save(file, path.rpartition(".")[2], **options))


def image_grid(images, columns, width=500):
    """Images (N, C, H, W) uint8, C 1, 3 or 4 -> one PIL image, `columns` in a row, enlarged to some `width` pixels."""
    from PIL import Image, ImageOps

    grid = import_torchvision().utils.make_grid(images[:, :3], nrow=columns, padding=1)
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    return ImageOps.scale(image, max(1, width // image.width), Image.Resampling.NEAREST)


def new_figure(width, height):
    """A figure of matplotlib, in inches."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def drawn(figure):
    """A figure of matplotlib -> a PIL image."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer)
    return Image.open(buffer)


def draw_lines(axes, lines, **settings):
    """Lines {name: (x, y)} into axes of matplotlib, with these settings of the axes, and a legend."""
    for i, (name, (x, y)) in enumerate(lines.items()):
        # after ten lines the colours come again
        axes.plot(x, y, label=name, linewidth=1, marker=".", markersize=4, linestyle="-" if i < 10 else "--")
    axes.set(**settings)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def scatter_plot(samples, data=None):
    """Samples (N, D), beside 2,000 of the data (M, D) if given, first and last coordinate -> a PIL image."""
    panels = {"samples": samples}
    if data is not None:
        panels["data"] = data[:2000]
    figure = new_figure(5 * len(panels), 5)
    *_, points = panels.values()  # the data, if there are
    points = np.nan_to_num(np.asarray(points)[:, [0, -1]], posinf=0.0, neginf=0.0)
    low, high = np.quantile(points, [0.001, 0.999], axis=0)  # a stray point sets no scale
    x, y = (low + high) / 2
    reach = 0.6 * (high - low).max() or 1.0
    for i, (title, points) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), i, title=title, aspect="equal")
        axes.axis((x - reach, x + reach, y - reach, y + reach))
        axes.scatter(points[:, 0], points[:, -1], s=3, alpha=0.5, linewidths=0)
    return drawn(figure)


def coloured(fields, columns):
    """The first channel of fields (N, C, H, W) as uint8 images (N, 3, H, W): viridis, with one scale for a row."""
    from matplotlib import colormaps, colors

    found = [colormaps["viridis"](colors.Normalize()(row.numpy()), bytes=True)[..., :3]
             for row in fields[:, 0].split(columns)]
    return torch.from_numpy(np.concatenate(found)).permute(0, 3, 1, 2)


def picture_of(samples, columns=None, data=None, cases=None, spec=None):
    """A picture of samples: uint8 images or fields (N, C, H, W) in `columns`, or vectors (N, D), beside data (M, D).

    Without `columns` the grid is a square. If `cases` (`data_utils.Cases`, of data with this `spec`) have conditions, a
    row is a condition, if it is an image, its samples, and the truth, if known. Of a condition the channels of the data
    are shown, or the first one for all of these.
    """
    if samples.ndim == 2:
        return scatter_plot(samples, data)
    if cases and cases.cond is not None:
        rows = min(16, len(samples) // cases.times) or 1
        parts = [samples[: rows * cases.times].unflatten(0, (rows, -1))]
        if cases.cond.ndim == 4:
            channels = [min(k, cases.cond.shape[1] - 2) for k in range(spec.shape[0])]
            shown = enlarged(cases.cond[:: cases.times][:rows, channels], spec.shape[1:], "nearest")
            parts.insert(0, spec.decode(shown)[:, None])
        if cases.truth is not None:
            parts.append(cases.truth[:rows, None])
        grid = torch.cat(parts, dim=1)
        samples = grid.flatten(0, 1)
        columns = grid.shape[1]
    columns = columns or round(len(samples) ** 0.5)
    return image_grid(coloured(samples, columns) if samples.is_floating_point() else samples, columns)


def log_plot(lines, level=None, **settings):
    """Lines {name: (x, y)} over a logarithmic y axis -> a PIL image, with these settings of the axes.

    `level` is what real data get, a horizontal line.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    if level and level > 0:
        axes.axhline(level, label="real data", color="black", linestyle="--")
    draw_lines(axes, lines, yscale="log", **settings)
    return drawn(figure)
