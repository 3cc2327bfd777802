"""What a run shows: wandb, the local copy of everything logged, sample grids, scatter plots and curves.

A run's folder always gets `metrics.jsonl` (one line of JSON for each logged step), the pictures and `curves.png`; wandb gets the
same where it can be reached. Whatever happens to wandb, training goes on. To log another figure, add it to the dictionary
that the trainer hands to `Logger.log`.
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

from utils import first_line, import_torchvision, progress_bar, write_atomically

CURVES = ("loss", "learning_rate", "grad_norm", "images_per_second")


class Logger:
    """Logs on the process that has it (rank 0). `step` is the number of steps already taken; later lines of a run that goes on
    from an older checkpoint are dropped, so that metrics.jsonl has each step once."""

    def __init__(self, folder: str, settings: dict, mode: str, project: str, step: int, total: int):
        self.folder, self.metrics = folder, os.path.join(folder, "metrics.jsonl")
        self.unwritten = b""  # lines that the disk had no room for
        kept = [line for line in self.history() if line["step"] <= step] if step else []
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self.run = start_wandb(folder, settings, mode, project, new=step == 0)
        self.total = total
        self.bar = progress_bar(total=total, initial=step, unit="step")  # none where stderr is a file

    def history(self) -> list[dict]:
        """The lines of metrics.jsonl; one that a kill cut off is left out."""
        lines = []
        if os.path.exists(self.metrics):
            with open(self.metrics) as file:
                for line in file:
                    try:
                        lines.append(json.loads(line))
                    except ValueError:
                        break
        return lines

    def log(self, step: int, values: dict[str, float], kind: str = "training") -> None:
        """Adds a line of this kind to metrics.jsonl, to wandb, and to the terminal or the log file. Raises OSError if the disk has no room.

        Of the values of training, CURVES are shown; those of other kinds, as of an evaluation, are all shown.
        """
        self.unwritten += json.dumps({"step": step, "kind": kind, **values}).encode() + b"\n"
        self.to_wandb({"step": step, **values})
        training = kind == "training"
        shown = {k: f"{values[k]:.4g}" for k in (CURVES if training else values) if k in values}
        text = f"step {step}/{self.total}  " + "  ".join(f"{k} {v}" for k, v in shown.items())
        if training:
            self.bar.set_postfix({"loss": shown.get("loss"), "images/s": shown["images_per_second"]}, refresh=False)
        try:
            self.write_lines()
        finally:
            if self.bar.disable:
                print(text, flush=True)
            elif not training:
                self.bar.write(text)

    def evaluated(self, step: int) -> bool:
        """Whether there is a line of an evaluation at this step."""
        return any(line["step"] == step and line.get("kind") == "evaluation" for line in self.history())

    def write_lines(self, sync: bool = False) -> None:
        """Writes what is still to be written to metrics.jsonl, whole lines only, and with `sync` makes sure that it is on the disk.

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
        """Saves a PIL image as PNG at `path`, and logs it to wandb as samples/<name>."""
        write_atomically(path, lambda file: image.save(file, format="PNG"))
        self.to_wandb({"step": step}, {f"samples/{name}": image})

    def curves(self) -> None:
        """Draws loss, learning rate, gradient norm, speed, and the values of lines of other kinds over the steps into curves.png."""
        from matplotlib.figure import Figure

        lines = self.history()
        others = [line for line in lines if line.get("kind", "training") != "training"]
        names = [*CURVES, *dict.fromkeys(name for line in others for name in line if name not in ("step", "kind"))]
        columns = 2 if len(names) == len(CURVES) else 4
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
        for axes in figure.subplots(rows, columns).flat[len(names) :]:
            axes.remove()
        for axes, name in zip(figure.axes, names):
            points = np.array([(line["step"], line[name]) for line in lines if line.get(name) is not None]).reshape(-1, 2)
            axes.plot(points[:, 0], points[:, 1], marker="" if name in CURVES else ".")
            axes.set(xlabel="step", ylabel=name.replace("_", " "))
            axes.grid(alpha=0.3)
            if name in ("loss", "grad_norm") and len(points) and (points[:, 1] > 0).all():
                axes.set_yscale("log")
        write_atomically(os.path.join(self.folder, "curves.png"), lambda file: figure.savefig(file, format="png", dpi=100))

    def to_wandb(self, values: dict, images: dict | None = None) -> None:
        """Hands numbers and PIL images to wandb; if that fails, says so once and goes on without it."""
        if self.run is None:
            return
        try:
            import wandb

            values = values | {name: wandb.Image(image) for name, image in (images or {}).items()}
            self.run.log(values, step=values["step"])  # so that wandb drops steps that it has from before a restart
        except Exception as error:  # whatever happens to wandb, the run goes on
            notice(f"logging to it failed ({first_line(error)}); going on without it, metrics.jsonl has everything")
            close_wandb(self.run)
            self.run = None

    def finish(self) -> None:
        """Closes the bar and the wandb run."""
        self.bar.close()
        failure = close_wandb(self.run) if self.run is not None else None
        if failure:
            notice(f"closing it failed ({failure}); metrics.jsonl has everything, and `wandb sync --include-online "
                   f"{os.path.dirname(self.run.dir)}` uploads what wandb has")


# ---- wandb


def notice(text: str) -> None:
    print(f"wandb: {text}", file=sys.stderr, flush=True)


def run_id(folder: str, new: bool) -> str:
    """The wandb id kept in <folder>/wandb_id; a new one if there is none, if it is of a folder that this is a copy of, or if `new`."""
    path, name = os.path.join(folder, "wandb_id"), os.path.basename(folder)
    if not new and os.path.exists(path):
        with open(path) as file:
            kept, _, of = file.read().partition(" ")
        if of == name:
            return kept
    new_id = uuid.uuid4().hex[:8]
    write_atomically(path, f"{new_id} {name}")
    return new_id


def close_wandb(run, seconds: float = 25) -> str | None:
    """Closes the run and ends wandb's own process, within `seconds`. What went wrong, or None."""
    import wandb

    failures, connection = [], wandb.sdk.wandb_setup.singleton()._connection  # private; needed only where that process is stuck

    def close():
        for work in (lambda: run.finish(), wandb.teardown):
            try:
                work()
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


def wandb_mode(mode: str | None) -> str:
    """The mode of the setting; without one, that of the environment's WANDB_MODE, or online."""
    asked = mode or os.environ.get("WANDB_MODE") or "online"
    if asked in ("online", "offline", "disabled"):
        return asked
    notice(f"WANDB_MODE {asked!r} is not known: expected online, offline or disabled; taking offline")
    return "offline"


def no_answer(url: str) -> str | None:
    """Why no server answers at `url` within some seconds, or None if one does, whatever it says."""
    import requests  # as wandb does

    try:
        requests.get(url, timeout=8, stream=True).close()  # without what is there
    except requests.exceptions.SSLError:
        return None  # wandb may know more of certificates
    except requests.RequestException as error:
        return f"no answer from {url}, {type(error).__name__}"
    return None


def start_wandb(folder: str, settings: dict, mode: str, project: str, new: bool, name: str | None = None):
    """A wandb run, called `name` or as the folder, or None. Never asks anything: `online` without a key, or without a server within 30 s,
    becomes offline in one line.

    The run's id is kept in <folder>/wandb_id, so that a run that goes on is the same run on wandb.
    """
    mode = wandb_mode(mode)
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or its telemetry waits for a server that is gone, at the end
    logging.raiseExceptions = False  # or wandb's log files on a full disk fill the terminal with tracebacks
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # or it warns of each message to a process of wandb's that is gone
    stdin = sys.stdin
    try:
        import wandb

        arguments = dict(project=project, name=name or os.path.basename(folder), id=run_id(folder, new), resume="allow", dir=folder,
                         config=settings, settings=wandb.Settings(
                             init_timeout=20, finish_timeout=15, finish_timeout_raises=True,
                             x_transaction_log_flush_interval=1.0))  # seconds of history that a kill may cost, 15 by default
        sys.stdin = open(os.devnull)  # wandb asks for a key only where there is a terminal to ask
        run, failure = None, None
        if mode == "online":
            failure = no_answer(wandb.setup().settings.base_url)
            try:
                run = None if failure else wandb.init(mode="online", **arguments)
            except Exception as error:
                failure = first_line(error)
        if run is None:
            if failure:
                notice(f"logging offline, since online failed ({failure}); `wandb sync` uploads it later")
                with contextlib.suppress(BaseException):
                    wandb.teardown()  # wandb's own process may still hold the run's id, and then takes only another
            os.environ["WANDB_MODE"] = "offline"  # or its telemetry waits for the server at the end
            try:
                run = wandb.init(mode="offline", **arguments)
            except Exception:
                run = wandb.init(mode="offline", **{**arguments, "id": run_id(folder, new=True)})
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        if run.offline:
            print(f"wandb: offline; upload with `wandb sync {os.path.dirname(run.dir)}`", flush=True)
        else:
            print(f"wandb: {run.url}", flush=True)
        return run
    except Exception as error:
        notice(f"going on without it ({first_line(error)}); metrics.jsonl has everything")
        return None
    finally:
        sys.stdin = stdin


# ---- Pictures


def image_grid(images, columns: int):
    """Images (N, C, H, W) uint8, C 1, 3 or 4 -> one PIL image, `columns` in a row, small ones enlarged to some 500 pixels."""
    from PIL import Image

    grid = import_torchvision().utils.make_grid(images[:, :3], nrow=columns, padding=1 if images.shape[-1] < 64 else 2)
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

    shown = {"samples": samples} if data is None else {"samples": samples, "data": data}
    figure = Figure(figsize=(5 * len(shown), 5), layout="constrained")
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, points) in zip(panels, shown.items()):
        axes.scatter(points[:, 0], points[:, -1], s=3, alpha=0.5, linewidths=0)
        axes.set(title=title, aspect="equal")
    scale = np.asarray(samples if data is None else data)[:, [0, -1]]
    low, high = np.quantile(scale, [0.001, 0.999], axis=0)  # so that a stray sample does not set the scale
    margin = 0.25 * (high - low).max() or 1.0
    panels[0].set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin))
    return drawn(figure)


def picture_of(samples, data=None):
    """A picture of samples: the first hundred uint8 images (N, C, H, W), ten a row, or all vectors (N, D), beside data (M, D) if given."""
    return image_grid(samples[:100], 10) if samples.ndim == 4 else scatter_plot(samples, data)


def log_plot(lines: dict[str, tuple], x_label: str, y_label: str, log_x: bool = False, level: float | None = None):
    """Lines {name: (x, y, standard errors or None)} over a logarithmic y, and perhaps x, with a level of real data -> a PIL image."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, (x, y, errors)) in enumerate(lines.items()):
        axes.errorbar(x, y, yerr=errors, label=name, marker="osD^v<>"[i % 7], markersize=3, linewidth=1, color=colormaps["tab20"](i))
    if level is not None and level > 0:
        axes.axhline(level, label="real data", color="black", linestyle="--", linewidth=1)
    axes.set(xlabel=x_label, ylabel=y_label, yscale="log", xscale="log" if log_x else "linear")
    for axis in (axes.yaxis, *[axes.xaxis] * log_x):
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return drawn(figure)
