"""A run in miniature: weights that wander as in training, written step by step."""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicpm.architecture import ModelConfig
from minicpm.formats.weight import Weight
from minicpm.history import About, Facts, HistoryWriter

Weights = dict[str, Weight]
STEPS = (0, 1, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500)


@functools.cache
def weights_at(config: ModelConfig, step: int) -> Weights:
    """Every tensor as a function of the step: a random walk whose updates are a third of a weight's size."""
    return {
        name: Weight.from_array((_walk(index, shape, step // 50) + 1e-6 * step).astype(np.float32), "BF16")
        for index, (name, shape) in enumerate(config.weight_shapes().items())
    }


@functools.cache
def _walk(index: int, shape: tuple[int, ...], length: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    step = np.random.default_rng((index, length)).standard_normal(shape)
    return step * 0.05 if not length else 0.95 * _walk(index, shape, length - 1) + 0.016 * step


def facts_at(step: int) -> Facts:
    stage = "warmup" if step < 50 else "stable" if step <= 400 else "decay"
    return Facts(step, tokens=step * 1000, stage=stage, lr=0.01, losses={"train": 5.0 - step / 1000}, seed=7)


@pytest.fixture
def make_history(tiny_config: ModelConfig, tmp_path: Path) -> Callable[..., Path]:
    """Write the given steps into a new folder."""

    def make(steps: tuple[int, ...] = STEPS, name: str = "history", **settings: int) -> Path:
        about = About(tiny_config, "0" * 64, {"config": {"name": "tiny"}}, **settings)
        files = {"tokenizer_config.json": json.dumps({"model_max_length": 512}).encode()}
        with HistoryWriter(tmp_path / name, about, files) as writer:
            for step in steps:
                writer.append(facts_at(step), weights_at(tiny_config, step))
        return tmp_path / name

    return make


class Server(http.server.ThreadingHTTPServer):
    """Static files as they lie in a folder; `requests` are (path, range header or None)."""

    daemon_threads = True

    def __init__(self, folder: Path, knows_ranges: bool = True) -> None:
        self.folder, self.knows_ranges = folder, knows_ranges
        self.requests: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), _Files)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Files(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        try:
            content = (self.server.folder / self.path.lstrip("/")).read_bytes()
        except OSError:
            self.send_error(404)
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")
        status = 200
        if span and self.server.knows_ranges:
            first, last = int(span[1]), int(span[2])
            if first >= len(content):
                self.send_error(416)
                return
            status, content = 206, content[first : last + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Serve a folder until the test ends."""
    servers = []

    def start(folder: Path, **settings: bool) -> Server:
        server = Server(folder, **settings)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
