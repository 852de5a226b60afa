"""A real server process on this machine, and what talks to it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import httpx2 as httpx
import pytest


@dataclass
class Server:
    """A server process and a client of it."""

    process: subprocess.Popen[str]
    url: str
    client: httpx.Client

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def chat(self, text: str, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def gauge(self, name: str) -> float:
        return self.gauge_of(f"minicpm_{name}")

    def gauge_of(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def wait_until_idle(self, seconds: float = 10) -> None:
        """Return once nothing runs, waits or holds a block."""
        deadline = time.monotonic() + seconds
        names = ("requests_running", "requests_waiting", "tokens_waiting", "kv_blocks_held")
        while any(left := [self.gauge(name) for name in names]):
            assert time.monotonic() < deadline, f"still there: {dict(zip(names, left, strict=True))}"
            time.sleep(0.02)


# A server whose bounds on seconds are short enough for a test; a user cannot set them.
_WITH_CAPS = """
import json, sys
import minicpm
from minicpm.serve import ServeSettings, run_server
from minicpm.serve.settings import Caps

settings = ServeSettings("smollm2", port=0, caps=Caps(**json.loads(sys.argv[1])))
with minicpm.load("smollm2", context_length=1024, max_parallel=2) as model:
    run_server(model, settings, lambda url: print(url, file=sys.stderr, flush=True))
"""


def running(*arguments: str, **environment: str) -> AbstractContextManager[Server]:
    """A server on a free port; it is told to end, and must end well."""
    return _run([sys.executable, "-m", "minicpm", "serve", "smollm2", "--port", "0", *arguments], environment)


def running_with(**caps: float) -> AbstractContextManager[Server]:
    """The same with other caps."""
    return _run([sys.executable, "-c", _WITH_CAPS, json.dumps(caps)], {})


@contextmanager
def _run(command: list[str], environment: dict[str, str]) -> Iterator[Server]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + process.stderr.read()
        url = found[0].replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield Server(process, url, client)
            if process.poll() is None:
                process.terminate()
            assert process.wait(30) == 0, process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


Running: TypeAlias = Callable[..., Any]


@pytest.fixture(scope="package")
def start(smollm2_path: Path) -> Running:
    return running


@pytest.fixture(scope="package")
def server(smollm2_path: Path) -> Iterator[Server]:
    """One for all tests that leave nothing behind."""
    with running("--ctx", "1024") as started:
        yield started
