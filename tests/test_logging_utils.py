"""Logging: metrics.jsonl, pictures, curves, what wandb holds, and that no failure of wandb stops a run."""

import http.server
import json
import math
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PATIENCE, ROOT, run
from PIL import Image

from logging_utils import Logger, image_grid, log_plot, scatter_plot

SETTINGS = {"mults": (1, 2), "bf16": None, "lr": 0.1}


def read_wandb(folder, runs="offline-run-*"):
    """Config and history that an offline run holds.

    The file: a header of 7 bytes, then blocks of 32 KiB of records. A record is a checksum (4 bytes), a length (2),
    a type (1: whole, 2: first, 3: middle, 4: last part) and a protobuf.
    """
    from wandb.proto import wandb_internal_pb2

    config, history = {}, []
    for path in sorted(folder.glob(f"wandb/{runs}/*.wandb")):
        content, position, parts = path.read_bytes(), 7, b""
        while position + 7 <= len(content):
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768
                continue
            length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
            if position + 7 + length > len(content):  # it is being written
                break
            parts += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):
                record, parts = wandb_internal_pb2.Record.FromString(parts), b""
                config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
                if record.HasField("history"):
                    items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                    history.append(items)
    return config, history


def logger(folder, mode="disabled", step=0):
    config = SimpleNamespace(**SETTINGS, wandb=mode, wandb_project="tests", num_training_steps=10)
    return Logger(str(folder), config, step)


def values(loss):
    return {"loss": loss, "grad_norm": 1.0, "learning_rate": 0.1, "images_per_second": 5.0}


def lines(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def test_metrics_of_a_resumed_run_have_each_step_once(tmp_path, capsys):
    log = logger(tmp_path)
    for step in (1, 2, 3):
        log.log(step, values(1 / step))
    log.finish()
    assert "step 2/10  loss 0.5" in capsys.readouterr().out  # plain lines, where there is no terminal
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    log = logger(tmp_path, step=2)
    log.log(3, values(0.2))
    log.finish()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 0.2)]
    logger(tmp_path, step=0).finish()
    assert lines(tmp_path) == []


def test_only_an_evaluation_counts_as_one(tmp_path):
    """Another line by itself, as a project may log, does not; curves show what it holds."""
    log = logger(tmp_path)
    log.log(1, values(1.0))
    log.log(1, {"spectrum_error": 0.5}, kind="spectrum")
    assert not log.evaluated(1) and not log.evaluated(2)
    log.log(1, {"recognised": 0.9}, kind="evaluation")
    assert log.evaluated(1) and not log.evaluated(2)
    assert [line["kind"] for line in lines(tmp_path)] == ["training", "spectrum", "evaluation"]
    log.curves()
    assert Image.open(tmp_path / "curves.png").size == (1500, 600)  # six panels in rows of three
    log.finish()


def test_pictures_and_curves(tmp_path):
    os.makedirs(tmp_path / "samples")
    log = logger(tmp_path)
    log.curves()  # nothing logged yet
    for step in range(1, 5):
        log.log(step, values(1 / step))
    log.curves()
    assert Image.open(tmp_path / "curves.png").size == (1500, 600)
    path = os.path.join(tmp_path, "samples", "x.png")
    log.picture(7, "ema_heun", image_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), 2), path)
    assert Image.open(path).width >= 450
    assert image_grid(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 2, width=100).width == 95  # five times 19
    log.finish()


def test_image_grid_places_images_by_row():
    images = torch.zeros(6, 3, 64, 64, dtype=torch.uint8)
    images[4] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    pixels = np.asarray(image_grid(images, 3).resize((3, 2), Image.Resampling.BOX))
    assert pixels[1, 1, 0] > 150 and pixels[1, 1, 1] == 0 and pixels[..., 0].sum() - pixels[1, 1, 0] == 0


@pytest.mark.parametrize("dimensions", [1, 2, 5])
def test_scatter_plot(dimensions):
    points = torch.randn(50, dimensions)
    picture = scatter_plot(points, points)
    assert picture.size == (1000, 500) and len(np.unique(np.asarray(picture))) > 20
    scatter_plot(points[:1], points[:1])  # a single point has no extent
    for value in (math.nan, math.inf):  # of a network that learned nothing
        scatter_plot(torch.cat([points, torch.full((1, dimensions), value)]))
        scatter_plot(torch.full((3, dimensions), value))
    assert scatter_plot(points).size == (500, 500)  # samples alone


def test_a_stray_point_sets_no_scale():
    points = torch.randn(2000, 2)
    stray = torch.cat([points[:-1], torch.full((1, 2), 1e6)])
    pixels = [np.asarray(scatter_plot(part).convert("RGB")).astype(int) for part in (points, stray)]
    blue = [(part[..., 2] - part[..., 0] > 30).sum() for part in pixels]
    assert blue[0] > 2000 and blue[1] == pytest.approx(blue[0], rel=0.1)


@pytest.mark.parametrize("xscale", ["linear", "log"])
def test_log_plot(xscale):
    """As many lines as there are samplers, which look different; and what real data get."""
    steps = np.array([5, 10, 20, 40])
    lines = {f"sampler {k}": (steps, (k + 1) / steps) for k in range(12)}
    axes = dict(xlabel="calls", ylabel="distance", xscale=xscale)
    pictures = [log_plot(lines, level, **axes) for level in (None, 0.05, -0.1)]
    plain, level, below_zero = [np.asarray(picture) for picture in pictures]
    assert pictures[0].size == (800, 500)
    assert (plain != level).any() and np.array_equal(plain, below_zero)  # a logarithmic axis has no place for it


def test_wandb_offline_holds_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    os.makedirs(tmp_path / "samples")
    picture = image_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), 2)
    for step in (0, 3):  # a run, and the same run resumed
        log = logger(tmp_path, "offline", step=step)
        log.log(step + 1, values(0.5))
        log.picture(step + 1, "real", picture, os.path.join(tmp_path, "real.png"))
        log.finish()
        for folder in (tmp_path / "wandb").glob("offline-run-*_*"):  # named by the second, which may be the same
            folder.rename(folder.with_name(f"offline-run-{step}-{folder.name.split('-')[-1]}"))
    config, history = read_wandb(tmp_path)
    assert config["mults"] == [1, 2] and config["bf16"] is None and config["lr"] == 0.1 and set(SETTINGS) <= set(config)
    assert [h["loss"] for h in history if "loss" in h] == [0.5, 0.5]
    assert [h["step"] for h in history if "loss" in h] == [1, 4]
    assert any(key.startswith("samples") and "real" in key for h in history for key in h)
    ids = {path.name.split("-")[-1] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {(tmp_path / "wandb_id").read_text().split()[0]}


ONLINE = """
import sys; sys.path.insert(0, sys.argv[1])
from config import Config
from logging_utils import Logger
log = Logger(sys.argv[2], Config(wandb="online", wandb_project="tests", num_training_steps=10), 0)
log.log(1, dict(loss=1.0, grad_norm=1.0, learning_rate=1.0, images_per_second=1.0))
log.finish()
"""


class NotFound(http.server.BaseHTTPRequestHandler):
    """A server that answers, but is no wandb."""

    def do_GET(self):
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *words):
        pass


@pytest.fixture
def servers():
    """Addresses: one that refuses, one that accepts and never answers, one that answers."""
    silent = socket.create_server(("127.0.0.1", 0))
    answering = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=answering.serve_forever, daemon=True).start()
    ports = {"refuses": 9, "silent": silent.getsockname()[1], "answers": answering.server_port}
    yield {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    answering.shutdown()
    silent.close()


@pytest.mark.parametrize("server, key, words", [
    ("refuses", "a" * 40, "Failed to authenticate"),
    ("silent", "a" * 40, "Failed to authenticate"),
    ("answers", None, "no API key: `wandb login` stores one"),
    ("answers", "wrong", "API key"),
    ("answers", "a" * 40, "Failed to authenticate"),
])
def test_online_without_key_or_server_becomes_offline_in_one_line(tmp_path, servers, server, key, words):
    """Offline with one line of notice, within 30 s on an idle machine."""
    start = time.monotonic()
    environment = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_MODE": "online",
                   "WANDB_BASE_URL": servers[server]}
    result = run("python", "-c", ONLINE, ROOT, tmp_path, **environment, **({"WANDB_API_KEY": key} if key else {}))
    assert result.returncode == 0 and time.monotonic() - start < PATIENCE / 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: wandb: logging offline, since online failed") and words in line
    assert "wandb sync" in result.stdout and list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert lines(tmp_path)[0]["loss"] == 1.0


def test_a_mode_of_the_environment(tmp_path, monkeypatch, capsys):
    """It holds where there is no setting: the command line wins. A bad one is reported, and the run continues."""
    for environment, setting in (("disabled", None), ("online", "disabled"), ("garbage", "disabled")):
        monkeypatch.setenv("WANDB_MODE", environment)
        assert logger(tmp_path, setting).run is None and capsys.readouterr().err == ""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = logger(tmp_path, "offline")
    assert log.run.offline
    log.finish()
    monkeypatch.setenv("WANDB_MODE", "garbage")
    log = logger(tmp_path, None)
    error = capsys.readouterr().err
    assert log.run is None and error.count("\n") == 1 and "wandb: the run continues without it" in error


MIDDLE = """
import os, pathlib, sys, time; sys.path.insert(0, sys.argv[1])
import logging_utils
from config import Config
from logging_utils import Logger, Timer
folder, logging_utils.Timer = pathlib.Path(sys.argv[2]), lambda seconds, end: Timer(seconds / 5, end)
os.makedirs(folder / "run", exist_ok=True)
log = Logger(str(folder / "run"), Config(wandb=sys.argv[3], wandb_project="tests", num_training_steps=10), 0)
for step in range(1, 40):
    log.log(step, dict(loss=1.0, grad_norm=1.0, learning_rate=1.0, images_per_second=1.0))
    if step == 20:
        (folder / "ready").touch()
        while not (folder / "go").exists():
            time.sleep(0.05)
log.finish()
print("finished", flush=True)
"""


def wait_for(ready):
    deadline = time.monotonic() + PATIENCE
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.05)


def break_in_the_middle(folder, mode, breaks, **environment):
    """Logs 39 steps, and calls `breaks(process)` after the 20th. Returns stderr, and the seconds from then on."""
    environment = {**os.environ, "HOME": str(folder), "NETRC": str(folder / "none"), "WANDB_MODE": mode, **environment}
    with subprocess.Popen([sys.executable, "-c", MIDDLE, ROOT, folder, mode], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        wait_for(lambda: (folder / "ready").exists() or process.poll() is not None)
        breaks(process)
        start = time.monotonic()
        (folder / "go").touch()
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and output.endswith("finished\n"), errors
    assert [line["step"] for line in lines(folder / "run")] == list(range(1, 40))
    return errors, time.monotonic() - start


class Wandb(NotFound):
    """Enough of a wandb server for a run to start."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request, data = json.loads(body) if self.path.endswith("/graphql") else {"query": ""}, {}
        if "upsertBucket" in request["query"]:
            bucket = {"id": "b", "name": request["variables"]["name"], "displayName": "run", "historyLineCount": 0,
                      "project": {"id": "p", "name": "tests", "entity": {"id": "e", "name": "me"}}}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
        elif "createRunFiles" in request["query"]:
            files = [{"name": name, "uploadUrl": f"http://{self.headers['Host']}/{name}"}
                     for name in request["variables"]["files"]]
            data = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        elif "viewer" in request["query"]:
            data = {"viewer": {"id": "v", "entity": "me", "username": "me", "email": "", "flags": "{}",
                               "teams": {"edges": []}}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST


def test_wandb_server_gone_in_the_middle(tmp_path):
    """Training continues, and its end waits for the server a few seconds, not 546. What wandb has is on the disk.

    The product's limit is 20 seconds, a fifth of it here.
    """
    class Server(http.server.ThreadingHTTPServer):
        def finish_request(self, *request):
            if not gone:
                super().finish_request(*request)

    gone, server = [], Server(("127.0.0.1", 0), Wandb)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    errors, seconds = break_in_the_middle(tmp_path, "online", gone.append, WANDB_API_KEY="a" * 40,
                                          WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    assert seconds < PATIENCE / 2 and errors.count("\n") == 1, errors
    assert "wandb: it failed" in errors and "sync --include-online" in errors, errors
    assert len(read_wandb(tmp_path / "run", "run-*")[1]) == 39


def test_wandb_process_killed_in_the_middle(tmp_path):
    def kill(process):
        wait_for(lambda: len(read_wandb(tmp_path / "run")[1]) >= 15)  # written up to a second after it is logged
        subprocess.run(["pkill", "-KILL", "-P", str(process.pid), "-f", "wandb-core"], check=True)

    errors, seconds = break_in_the_middle(tmp_path, "offline", kill)
    assert seconds < PATIENCE / 2 and errors.count("\n") == 1 and "wandb: it failed" in errors, errors
    assert len(read_wandb(tmp_path / "run")[1]) >= 15


def test_wandb_process_stuck_in_the_middle(tmp_path):
    """It is killed at the end, after a limit."""
    errors, seconds = break_in_the_middle(tmp_path, "offline", lambda process: subprocess.run(
        ["pkill", "-STOP", "-P", str(process.pid), "-f", "wandb-core"], check=True))
    assert seconds < PATIENCE / 2 and errors.count("\n") == 1 and "wandb: it failed" in errors, errors


def test_wandb_folder_full(tmp_path):
    """From the start: there is no room for a byte of wandb's."""
    folder = tmp_path / "run" / "wandb"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        (folder / "filler").write_bytes(b"x" * 4096)
        errors, seconds = break_in_the_middle(tmp_path, "offline", lambda process: None)
        assert seconds < PATIENCE / 2 and 1 <= errors.count("\n") <= 2, errors
        assert all(line.startswith("warning: wandb: ") for line in errors.splitlines()), errors
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_wandb_failing_in_the_middle_is_reported_once(tmp_path, capsys):
    class Broken:
        dir = "wandb/run/files"

        def log(self, values, step):
            raise RuntimeError("server gone")

        def finish(self):
            raise RuntimeError("server still gone")

    log = logger(tmp_path)
    log.run = Broken()
    log.log(1, values(1.0))
    log.log(2, values(1.0))
    log.finish()
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "server gone" in errors and len(lines(tmp_path)) == 2


def test_metrics_on_a_full_disk_are_written_later(tmp_path):
    """With the next checkpoint, each once; the limit on the size of a file stands in for the disk."""
    log = logger(tmp_path)
    log.log(1, values(1.0))
    size = os.path.getsize(log.metrics)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, old[1][1]))
        for step in (2, 3):
            with pytest.raises(OSError):
                log.log(step, values(1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old[1])
        signal.signal(signal.SIGXFSZ, old[0])
    log.log(4, values(1.0))
    log.write_all()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
