"""What a run shows: metrics, progress, pictures and curves, in its folder and on wandb.

A run's folder always gets `metrics.jsonl` (one line of JSON for each logged step), the pictures and `curves.png`. wandb
gets the same where it can be reached; whatever happens to wandb, training continues. To log another figure, add it to
the dictionary that the trainer hands to `Logger.log`: it is shown, drawn and sent to wandb as the others are.
"""

import contextlib
import errno
import io
import json
import logging
import os
import sys
import threading
import uuid

import numpy as np
from tqdm import tqdm

from distributed import print0, rank
from utils import first_line, import_torchvision, write_atomically

# ---- Metrics


class Logger:
    """Logs on the rank that has it (rank 0). `step` is the number of steps already taken.

    A run that resumes from an older checkpoint loses its later lines, so that metrics.jsonl has each step once.
    """

    def __init__(self, folder: str, settings: dict, mode: str, project: str, step: int, total: int):
        self.folder, self.metrics, self.total = folder, os.path.join(folder, "metrics.jsonl"), total
        self.unwritten = b""  # lines that the disk had no room for
        kept = [line for line in self.history() if line["step"] <= step] if step else []
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self.run = start_wandb(folder, settings, mode, project, new=step == 0)
        self.bar = tqdm(total=total, initial=step, unit="step", disable=None, **bar_shape())  # none in a log file

    def history(self) -> list[dict]:
        """The lines of metrics.jsonl, without one that a kill cut off."""
        lines = []
        if os.path.exists(self.metrics):
            with open(self.metrics) as file, contextlib.suppress(ValueError):
                for line in file:
                    lines.append(json.loads(line))
        return lines

    def log(self, step: int, values: dict[str, float], kind: str = "training") -> None:
        """Adds a line of this kind to metrics.jsonl, to wandb, and to the terminal or the log file.

        Raises OSError if the disk has no room, and keeps the line for later.
        """
        self.unwritten += json.dumps({"step": step, "kind": kind, **values}).encode() + b"\n"
        self.to_wandb({"step": step, **values})
        shown = {name: f"{value:.4g}" for name, value in values.items() if "_t_" not in name}
        try:
            self.write_lines()
        finally:
            if self.bar.disable or kind != "training":
                self.bar.write(f"step {step}/{self.total}  " + "  ".join(map(" ".join, shown.items())))
                sys.stdout.flush()
            else:
                self.bar.set_postfix(shown, refresh=False)

    def evaluated(self, step: int) -> bool:
        """Whether there is a line of an evaluation at this step."""
        return any(line["step"] == step and line.get("kind") == "evaluation" for line in self.history())

    def write_lines(self, sync: bool = False) -> None:
        """Writes to metrics.jsonl what is not written yet, whole lines only; with `sync`, down to the disk.

        Raises OSError, and keeps the lines for the next time, if the disk has no room.
        """
        with open(self.metrics, "ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(self.unwritten) < len(self.unwritten):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.metrics)
            except OSError:
                file.truncate(end)
                raise
            self.unwritten = b""
            if sync:
                os.fsync(file.fileno())

    def picture(self, step: int, name: str, image, path: str) -> None:
        """Saves a PIL image at `path`, and logs it to wandb as samples/<name>."""
        save_picture(image, path)
        self.to_wandb({"step": step}, {f"samples/{name}": image})

    def curves(self) -> None:
        """Draws all figures of metrics.jsonl over the steps into curves.png, the loss by quarter of t with the loss."""
        from matplotlib.figure import Figure

        panels = {}
        for line in self.history():
            for name in [name for name in line if name not in ("step", "kind", "epoch")]:
                panels.setdefault(name.partition("_t_")[0], {}).setdefault(name, []).append((line["step"], line[name]))
        rows = -(-len(panels) // 3) or 1
        figure = Figure(figsize=(15, 3 * rows), layout="constrained")
        for i, (title, lines) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(rows, 3, i)
            for name, points in lines.items():
                axes.plot(*zip(*points), marker="." if len(points) < 20 else "", label=name.removeprefix(f"{title}_"))
            axes.set(xlabel="step", ylabel=title.replace("_", " "))
            if title in ("loss", "grad_norm") and all(value > 0 for points in lines.values() for _, value in points):
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
            if len(lines) > 1:
                axes.legend(fontsize="small")
        save_picture(drawn(figure), os.path.join(self.folder, "curves.png"))

    def to_wandb(self, values: dict, images: dict | None = None) -> None:
        """Hands numbers and PIL images to wandb. If that fails, one line reports it, and the run continues without."""
        if self.run is None:
            return
        try:
            import wandb

            values = values | {name: wandb.Image(image) for name, image in (images or {}).items()}
            self.run.log(values, step=values["step"])  # wandb drops steps that it has from before a restart
        except Exception as error:  # whatever happens to wandb, the run continues
            notice(f"logging to it failed ({first_line(error)}); the run continues without it, metrics.jsonl has all")
            close_wandb(self.run)
            self.run = None

    def finish(self) -> None:
        """Closes the bar and the wandb run."""
        self.bar.close()
        if self.run is not None and (failure := close_wandb(self.run)):
            notice(f"closing it failed ({failure}); metrics.jsonl has everything, and `wandb sync --include-online "
                   f"{os.path.dirname(self.run.dir)}` uploads what wandb has")


# ---- Progress


def bar_shape() -> dict:
    """As wide as the terminal of stderr; 80 columns where it has no width, as in some containers."""
    with contextlib.suppress(OSError):  # no terminal
        return {"dynamic_ncols": True} if os.get_terminal_size(2).columns else {"ncols": 80, "nrows": 24}
    return {}


class Progress(tqdm):
    """How far long work has come, on rank 0: a bar on a terminal, a line every 30 seconds in a log file.

    Used in a `with`. `update(n, what)` adds n, and may change the words before the numbers.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "step"):
        self.terminal = sys.stderr.isatty()
        shape = bar_shape() if self.terminal else {"file": io.StringIO(), "mininterval": 30, "delay": 30}
        super().__init__(desc=what, total=total, unit=f" {unit}s", leave=False, disable=rank() > 0, **shape)

    def update(self, n: int = 1, what: str | None = None) -> None:
        if what is not None:
            self.set_description(what, refresh=False)
        super().update(n)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """What tqdm calls to show the bar, or, with an empty message, to remove it."""
        if self.terminal:
            super().display(msg, pos)
        elif msg is None:
            print0(f"{self.desc.rstrip(': ')}: {self.n}{f' of {self.total}' if self.total else ''}{self.unit}")


# ---- wandb


def notice(text: str) -> None:
    print(f"wandb: {text}", file=sys.stderr, flush=True)


def run_id(folder: str, new: bool) -> str:
    """The wandb id of this folder's run, kept in <folder>/wandb_id; a new one if `new`, or if the folder is a copy."""
    path, name = os.path.join(folder, "wandb_id"), os.path.basename(folder)
    if not new and os.path.exists(path):
        with open(path) as file:
            kept, _, folder_then = file.read().partition(" ")
        if folder_then == name:
            return kept
    new_id = uuid.uuid4().hex[:8]
    write_atomically(path, f"{new_id} {name}")
    return new_id


def close_wandb(run, seconds: float = 25) -> str | None:
    """Closes the run and ends wandb's own process, within `seconds`. Returns what failed, or None."""
    import wandb

    # private; needed only where wandb's process is stuck
    failures, connection = [], wandb.sdk.wandb_setup.singleton()._connection

    def close():
        for step in (lambda: run.finish(), wandb.teardown):
            try:
                step()
            except BaseException as error:  # teardown raises SystemExit
                failures.append(first_line(error))

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        failures.insert(0, f"no end in {seconds} s")
        with contextlib.suppress(Exception):
            connection._proc._process.kill()
        thread.join(2)
    return failures[0] if failures else None


def wandb_mode(setting: str | None) -> str:
    """The mode of the setting; without one, that of the environment's WANDB_MODE, or online."""
    mode = setting or os.environ.get("WANDB_MODE") or "online"
    if mode in ("online", "offline", "disabled"):
        return mode
    notice(f"WANDB_MODE {mode!r} is not known: expected online, offline or disabled; taking offline")
    return "offline"


def no_answer(url: str) -> str | None:
    """Why no server answers at `url` within some seconds, or None if one does, whatever it answers."""
    import requests  # as wandb does

    try:
        requests.get(url, timeout=8, stream=True).close()  # without the content
    except requests.exceptions.SSLError:
        return None  # wandb may know more certificates
    except requests.RequestException as error:
        return f"no answer from {url}, {type(error).__name__}"
    return None


def start_wandb(folder: str, settings: dict, mode: str | None, project: str, new: bool, name: str | None = None):
    """A wandb run, called `name` or as the folder, or None. It never asks for input.

    `online` without a key, or without a server within 30 s, becomes offline, and one line reports it. The run's id is
    kept in <folder>/wandb_id: a run that resumes is the same run on wandb.
    """
    mode = wandb_mode(mode)
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or it waits at the end for a server that is gone
    logging.raiseExceptions = False  # or wandb's log files on a full disk fill the terminal with tracebacks
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # or it warns of each message to a wandb process that is gone
    stdin, run, failure = sys.stdin, None, None
    try:
        import wandb

        limits = wandb.Settings(init_timeout=20, finish_timeout=15, finish_timeout_raises=True,
                                x_transaction_log_flush_interval=1.0)  # a kill may cost 1 s of history, not 15
        arguments = dict(project=project, name=name or os.path.basename(folder), id=run_id(folder, new), resume="allow",
                         dir=folder, config=settings, settings=limits)
        sys.stdin = open(os.devnull)  # wandb asks for a key only where there is a terminal
        if mode == "online":
            failure = no_answer(wandb.setup().settings.base_url)
            try:
                run = None if failure else wandb.init(mode="online", **arguments)
            except Exception as error:
                failure = first_line(error)
        if failure:
            notice(f"logging offline, since online failed ({failure}); `wandb sync` uploads it later")
            with contextlib.suppress(BaseException):
                wandb.teardown()  # wandb's own process may still hold the run's id, and then takes only another
        if run is None:
            os.environ["WANDB_MODE"] = "offline"  # or wandb waits for the server at the end
            try:
                run = wandb.init(mode="offline", **arguments)
            except Exception:
                run = wandb.init(mode="offline", **{**arguments, "id": run_id(folder, new=True)})
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        where = f"offline; upload with `wandb sync {os.path.dirname(run.dir)}`" if run.offline else run.url
        print(f"wandb: {where}", flush=True)
        return run
    except Exception as error:
        notice(f"the run continues without it ({first_line(error)}); metrics.jsonl has everything")
        return None
    finally:
        sys.stdin = stdin


# ---- Pictures


def save_picture(image, path: str, **options) -> None:
    """Writes a PIL image at `path`, as a whole or not at all, in the format of its suffix; `options` are those of PIL.

    Raises UserError if it cannot be written.
    """
    kind = os.path.splitext(path)[1][1:].upper()
    write_atomically(path, lambda file: image.save(file, format=kind, **options))


def image_grid(images, columns: int):
    """Images (N, C, H, W) uint8, C 1, 3 or 4 -> one PIL image, `columns` in a row, enlarged to some 500 pixels."""
    from PIL import Image

    padding = 1 if images.shape[-1] < 64 else 2
    grid = import_torchvision().utils.make_grid(images[:, :3], nrow=columns, padding=padding)
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    factor = max(1, 500 // image.width)
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def drawn(figure):
    """A figure of matplotlib -> a PIL image."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer)


def scatter_plot(samples, data=None):
    """Samples (N, D), beside data (M, D) if given, first and last coordinate -> a PIL image."""
    from matplotlib.figure import Figure

    panels = {"samples": samples} if data is None else {"samples": samples, "data": data}
    figure = Figure(figsize=(5 * len(panels), 5), layout="constrained")
    row = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, points) in zip(row, panels.items()):
        axes.scatter(points[:, 0], points[:, -1], s=3, alpha=0.5, linewidths=0)
        axes.set(title=title, aspect="equal")
    low, high = np.quantile(np.asarray(points)[:, [0, -1]], [0.001, 0.999], axis=0)  # a stray point sets no scale
    margin = 0.25 * (high - low).max() or 1.0
    row[0].set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin))
    return drawn(figure)


def picture_of(samples, data=None, columns: int | None = None):
    """A picture of samples: uint8 images (N, C, H, W) in `columns`, or vectors (N, D), beside data (M, D) if given.

    Without `columns`, it is of the first hundred images, ten in a row.
    """
    if samples.ndim == 2:
        return scatter_plot(samples, data)
    return image_grid(samples, columns) if columns else image_grid(samples[:100], 10)


def log_plot(lines: dict[str, tuple], x_label: str, y_label: str, log_x: bool = False, level: float | None = None):
    """Lines {name: (x, y, standard errors or None)} over a logarithmic y axis -> a PIL image.

    With `log_x` the x axis is logarithmic, too. `level` is what real data get, a horizontal line.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, (x, y, errors)) in enumerate(lines.items()):
        axes.errorbar(x, y, errors, label=name, marker="osD^v<>"[i % 7], markersize=3, color=colormaps["tab20"](i))
    if level is not None and level > 0:
        axes.axhline(level, label="real data", color="black", linestyle="--")
    axes.set(xlabel=x_label, ylabel=y_label, yscale="log", xscale="log" if log_x else "linear")
    for axis in (axes.yaxis, *[axes.xaxis] * log_x):
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return drawn(figure)
