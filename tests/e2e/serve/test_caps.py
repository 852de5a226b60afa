"""The bounds on seconds and connections, on a real server that has short ones."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.serve.conftest import Server, running_with

LONG_MESSAGES = [{"role": "user", "content": "x"}] * 1025


@pytest.fixture(scope="module")
def strict(smollm2_path: Path) -> Iterator[Server]:
    with running_with(body_seconds=1, write_seconds=1, connections=6, grammar_seconds=0.001) as server:
        yield server


def test_a_body_that_drips_is_refused(strict: Server) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as raw:
        raw.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n")
        raw.sendall(b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
        begin = time.monotonic()
        raw.settimeout(0.2)
        answer = b""
        while not answer:
            assert time.monotonic() - begin < 10
            raw.sendall(b" ")
            try:
                answer = raw.recv(4096)
            except TimeoutError:
                continue
        assert b" 408 " in answer.partition(b"\r\n")[0]
        assert time.monotonic() - begin > 0.9


def test_whoever_asks_and_does_not_read_is_let_go(strict: Server) -> None:
    # The answer is twice as long as what the kernel takes for a reader that does not read.
    body = b'{"with_pieces": true, "content": "%s"}' % (b"a " * 250_000)
    expected = len(strict.client.post("/tokenize", content=body, headers={"content-type": "application/json"}).content)
    assert expected > 6_000_000
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(20)
    with raw:
        raw.connect(("127.0.0.1", strict.port))
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(b"POST /tokenize HTTP/1.1\r\n" + head.encode() + body)
        first = raw.recv(1)
        time.sleep(2.5)
        got = len(first)
        try:
            while data := raw.recv(1 << 16):
                got += len(data)
        except ConnectionResetError:
            pass
    assert 0 < got < expected


def test_no_more_connections_than_that(strict: Server) -> None:
    strict.client.close()  # keeps connections open
    raws = [socket.create_connection(("127.0.0.1", strict.port), timeout=5) for _ in range(12)]
    ended = 0
    for raw in raws:
        raw.settimeout(0.5)
        try:
            ended += raw.recv(1) == b""
        except ConnectionResetError:
            ended += 1
        except TimeoutError:
            pass
        raw.close()
    assert ended == 6


def test_a_grammar_has_its_time(strict: Server) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as raw:
        body = b'{"prompt": "x", "max_tokens": 1, "response_format": {"type": "json_object"}}'
        head = b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nConnection: close\r\n" + head + body)
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert b" 400 " in answer.partition(b"\r\n")[0]
    assert b"schema_too_complex" in answer
    assert b"0.001 seconds" in answer


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": ["x"] * 129}, "prompts"),
        ("/v1/embeddings", {"input": "x", "dimensions": 7}, "dimensions"),
        ("/v1/embeddings", {"input": "x", "unknown": 7}, "unknown"),
        ("/apply-template", {"messages": LONG_MESSAGES}, "messages"),
        ("/tokenize", {"messages": LONG_MESSAGES}, "messages"),
        ("/tokenize", {}, None),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [49152]}, None),
        ("/v1/completions", {"prompt": "x", "stop": ["x"] * 17}, "stop"),
        ("/v1/completions", {"prompt": "x", "stop": "x" * 257}, "stop"),
        ("/v1/completions", {"prompt": "x", "n": 129}, "n"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_every_cap_of_the_other_routes(server: Server, path: str, body: object, param: str | None) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400, answer.text
    assert param is None or answer.json()["error"]["param"] == param
