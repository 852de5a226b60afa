"""A server under pressure: clients that leave, do not read, do not write, ask too much; and how it ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.e2e.serve.conftest import Running, Server

LONG = {"max_tokens": 4000, "temperature": 0, "logit_bias": {"0": -100, "2": -100}}


def open_request(server: Server, path: str, body: dict[str, Any], **headers: str) -> socket.socket:
    """Send a request by hand and return the socket."""
    data = json.dumps(body).encode()
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    lines = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    raw.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
    return raw


def wait_until_running(server: Server, count: int = 1) -> None:
    deadline = time.monotonic() + 20
    while server.gauge("requests_running") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_whoever_leaves_frees_everything(server: Server, is_streamed: bool) -> None:
    before = server.gauge("disconnects_total")
    raws = [
        open_request(server, "/v1/completions", {"prompt": f"{i}:", "stream": is_streamed, **LONG}) for i in range(4)
    ]
    wait_until_running(server, 4)
    for raw in raws:
        raw.close()
    server.wait_until_idle(3)
    assert server.gauge("disconnects_total") == before + 4


def test_a_reset_and_a_half_closed_stream_free_everything(server: Server) -> None:
    reset = open_request(server, "/v1/completions", {"prompt": "1,", "stream": True, **LONG})
    half = open_request(server, "/v1/completions", {"prompt": "2,", "stream": True, **LONG})
    wait_until_running(server, 2)
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset.close()
    half.shutdown(socket.SHUT_WR)
    server.wait_until_idle(3)
    half.close()


def test_whoever_leaves_the_queue_frees_its_place(start: Running) -> None:
    with start("--ctx", "1024", "--parallel", "1", "--max-queue", "2") as server:
        first = open_request(server, "/v1/completions", {"prompt": "1,", **LONG})
        wait_until_running(server)
        waiting = [open_request(server, "/v1/completions", {"prompt": "2,", **LONG}) for _ in range(2)]
        deadline = time.monotonic() + 10
        while server.gauge("requests_waiting") < 2:
            assert time.monotonic() < deadline
        full = server.post("/v1/completions", {"prompt": "3,"})
        assert full.status_code == 429
        assert full.json()["error"]["type"] == "rate_limit_error"
        assert int(full.headers["retry-after"]) >= 1
        # A request for several choices is taken whole or not at all.
        assert server.post("/v1/completions", {"prompt": "3,", "n": 3}).status_code == 429
        assert server.gauge("requests_waiting") == 2
        assert server.gauge("queue_refusals_total") == 2
        for raw in [*waiting, first]:
            raw.close()
        server.wait_until_idle(3)
        assert server.post("/v1/completions", {"prompt": "3,", "max_tokens": 1}).status_code == 200


def test_tokens_that_wait_are_bounded_too(start: Running) -> None:
    with start("--ctx", "1024", "--parallel", "1", "--max-queue-tokens", "500") as server:
        raws = [open_request(server, "/v1/completions", {"prompt": "1,", **LONG})]
        wait_until_running(server)
        raws.append(open_request(server, "/v1/completions", {"prompt": "a " * 400, **LONG}))
        deadline = time.monotonic() + 10
        while server.gauge("requests_waiting") < 1:
            assert time.monotonic() < deadline
        assert server.post("/v1/completions", {"prompt": "a " * 400}).status_code == 429
        for raw in raws:
            raw.close()


def test_blocks_that_run_out_preempt_and_change_nothing(start: Running, server: Server) -> None:
    bodies = [{"prompt": f"Number {i} is", **LONG, "max_tokens": 150} for i in range(6)]
    expected = [server.post("/v1/completions", body).json()["choices"][0]["text"] for body in bodies]
    with start("--ctx", "256", "--kv-cache-tokens", "512") as small, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda body: small.post("/v1/completions", body).json(), bodies))
        assert [answer["choices"][0]["text"] for answer in answers] == expected
        assert small.gauge("preemptions_total") > 0
        small.wait_until_idle()


@pytest.mark.slow
def test_slow_clients_are_let_go(start: Running) -> None:
    with start("--ctx", "512") as server:
        idle = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        drip = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        drip.sendall(b"GET /health HTTP/1.1\r\n")

        def drop() -> None:
            for i in range(15):
                try:
                    drip.sendall(f"X-{i}: y\r\n".encode())
                except OSError:
                    return
                time.sleep(1)

        threading.Thread(target=drop, daemon=True).start()
        begin = time.monotonic()
        for raw in (idle, drip):
            with contextlib.suppress(ConnectionResetError):
                assert raw.recv(1) == b""
            raw.close()
        assert 8 < time.monotonic() - begin < 14
        # Others were served all the while.
        assert server.client.get("/health").status_code == 200


def test_a_bomb_of_headers_is_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        try:
            for i in range(2000):
                raw.sendall(f"X-{i}: {'y' * 500}\r\n".encode())
            answer = raw.recv(100)
        except OSError:
            answer = b""
        assert b" 200 " not in answer
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxx",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"GET http://evil.example/health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    ],
    ids=range(8),
)
def test_broken_heads(server: Server, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        raw.sendall(head)
        raw.shutdown(socket.SHUT_WR)
        try:
            answer = raw.makefile("rb").readline()
        except ConnectionResetError:
            answer = b""
        assert b" 2" not in answer[8:11]
        assert b" 5" not in answer[8:11]
    assert server.client.get("/health").status_code == 200


def test_it_ends_after_what_runs(start: Running) -> None:
    with start("--ctx", "1024") as server:
        body = {
            "prompt": "1, 2,",
            "max_tokens": 300,
            "temperature": 0,
            "logit_bias": LONG["logit_bias"],
            "stream": True,
        }
        raw = open_request(server, "/v1/completions", body)
        wait_until_running(server)
        server.process.send_signal(signal.SIGTERM)
        data = b"".join(iter(lambda: raw.recv(65536), b""))
        raw.close()
        assert data.count(b'"finish_reason":"length"') == 1
        assert b"data: [DONE]" in data
        assert server.process.wait(10) == 0


def test_it_ends_in_time_even_if_something_runs_on(start: Running) -> None:
    with start("--ctx", "8192", "--drain-seconds", "1") as server:
        raw = open_request(server, "/v1/completions", {"prompt": "1,", **LONG})
        wait_until_running(server)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(15) == 0
        assert time.monotonic() - begin < 10
        raw.close()


def test_a_port_in_use(server: Server, smollm2_path: Any) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "minicpm", "serve", "smollm2", "--port", str(server.port), "--ctx", "64"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "another --port" in run.stderr


@pytest.mark.slow
def test_many_requests_of_whom_a_fifth_leave(start: Running) -> None:
    """Fifty at a time, some in the middle of it: no error, nothing held, and as much memory as before."""
    with start("--ctx", "256", "--kv-cache-tokens", "2048", "--parallel", "16") as server:

        def ask(i: int) -> int:
            body = {"prompt": f"{i} " * (1 + i % 50), "max_tokens": 8, "stream": i % 2 == 0}
            if i % 5:
                return server.post("/v1/completions", body).status_code
            raw = open_request(server, "/v1/completions", body | LONG)
            time.sleep(i % 7 * 0.03)
            raw.close()
            return 0

        sizes = []
        with ThreadPoolExecutor(64) as pool:
            for part in range(3):
                statuses = list(pool.map(ask, range(part * 50, part * 50 + 50)))
                assert set(statuses) <= {0, 200}
                sizes.append(server.gauge_of("process_resident_memory_bytes"))
        server.wait_until_idle()
        assert sizes[-1] < sizes[0] * 1.1
