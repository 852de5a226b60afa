"""A hub on this machine that speaks the two protocols and misbehaves on request."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT = "c0ffee" + "0" * 34


class FakeHub(ThreadingHTTPServer):
    """Serves `files` as the repository acme/tiny; counts and records what it is asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.lfs_suffixes = (".safetensors", ".gguf", ".bin")
        self.requests: list[tuple[str, str | None, str | None]] = []  # path, Range, Authorization
        self.cut_after_bytes: list[int] = []  # of each of the next downloads, the bytes before the connection breaks
        self.statuses: list[int] = []  # of each of the next downloads, a refusal
        self.knows_ranges = True
        self.redirect_to: str | None = None
        self.replaced: dict[str, bytes] = {}  # what is sent where the listing states something else
        self.listing_override: bytes | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[tuple[str, str | None]]:
        return [(path, span) for path, span, _ in self.requests if "/resolve/" in path or "/repo?" in path]

    def hf_listing(self) -> dict[str, object]:
        siblings: list[dict[str, object]] = []
        for path, data in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": blob}
            if path.endswith(self.lfs_suffixes):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {"sha": COMMIT, "cardData": {"license": "apache-2.0"}, "siblings": siblings}

    def ms_listing(self) -> dict[str, object]:
        files: list[dict[str, object]] = [{"Path": "onnx", "Type": "tree", "Size": 0}]
        files += [
            {"Path": path, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
            for path, data in self.files.items()
        ]
        return {"Code": 200, "Data": {"Files": files}}


class _Answer(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server
        hub.requests.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if parts.path == "/api/models/acme/tiny/revision/main" and query["blobs"] == ["true"]:
            return self.answer(200, hub.listing_override or json.dumps(hub.hf_listing()).encode())
        if parts.path == "/api/v1/models/acme/tiny":
            return self.answer(200, b'{"Data": {"License": "Apache License 2.0"}}')
        if parts.path == "/api/v1/models/acme/tiny/repo/files" and query["Recursive"] == ["true"]:
            return self.answer(200, json.dumps(hub.ms_listing()).encode())
        if parts.path == "/api/v1/models/acme/tiny/repo" and query["Revision"] == ["master"]:
            return self.send(query["FilePath"][0])
        prefix = f"/acme/tiny/resolve/{COMMIT}/"
        if parts.path.startswith(prefix):
            return self.send(unquote(parts.path.removeprefix(prefix)))
        return self.answer(404, b"{}")

    def send(self, path: str) -> None:
        hub = self.server
        if hub.redirect_to:
            self.send_response(302)
            self.send_header("Location", hub.redirect_to + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if hub.statuses:
            return self.answer(hub.statuses.pop(0), b"")
        if path not in hub.files:
            return self.answer(404, b"")
        data = hub.replaced.get(path, hub.files[path])
        start = 0
        if (span := self.headers.get("Range")) and hub.knows_ranges:
            start = int(span.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        body = data[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if hub.cut_after_bytes:
            self.wfile.write(body[: hub.cut_after_bytes.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def serving() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving() as server:
        for setting in ("HF_ENDPOINT", "MINICPM_MS_ENDPOINT"):
            monkeypatch.setenv(setting, server.url)
        for setting in ("HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(setting, raising=False)
        yield server


@pytest.fixture
def store() -> Iterator[FakeHub]:
    """A second server, to be redirected to."""
    with serving() as server:
        yield server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that does not exist yet."""
    folder = tmp_path / "home"
    monkeypatch.setenv("MINICPM_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr("minicpm.hub.transfer.time.sleep", lambda seconds: None)
