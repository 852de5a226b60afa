"""The page of a run, for this machine alone: built files, and what they ask for as JSON. Nothing here writes.

Only addresses in two tables are answered, the host must be this machine by name (against DNS rebinding), another page's
requests are refused, and the browser may load from here only. What this leaves out: what is shown (`study`).
"""

from __future__ import annotations

import http.server
import json
import logging
import mimetypes
import urllib.parse
from collections.abc import Callable
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from minicpm import __version__
from minicpm.errors import CheckpointError, MiniCPMError
from minicpm.history.study import Study

_log = logging.getLogger("minicpm.history")
_HOSTS = {"127.0.0.1", "localhost"}
_PROTECTION = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
# A client that stops reading or sending is let go.
_TIMEOUT_SECONDS = 60


class PageServer(http.server.ThreadingHTTPServer):
    """Serves one study on this machine; `url` says where.

    Args:
        study: of the run.
        port: 0 takes a free one.

    Raises:
        CheckpointError: the port is taken or not allowed.
    """

    daemon_threads = True

    def __init__(self, study: Study, port: int = 0) -> None:
        self.files = _built_files()
        self.answers: dict[str, Callable[[int], dict[str, Any]]] = {
            "/api/layers": study.layers,
            "/api/samples": study.samples,
            "/api/generate": study.generate,
            "/api/manifest": study.manifest,
        }
        self.overview = study.overview
        try:
            super().__init__(("127.0.0.1", port), _Answer)
        except (OSError, OverflowError) as error:
            reason = error.strerror or error if isinstance(error, OSError) else error
            raise CheckpointError(f"cannot listen on port {port}: {reason}; give another --port") from error
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT_SECONDS
    # Head and body go out one after the other; the second would wait for the first to be acknowledged, 40 ms.
    disable_nagle_algorithm = True
    server_version, sys_version = f"minicpm/{__version__}", ""

    def do_GET(self) -> None:
        """Answer, or say why not."""
        host = self.headers.get("Host", "").rpartition(":")
        if (host[0] or host[2]).lower() not in _HOSTS:
            self._tell(403, {"error": "this page is for this machine: open it as 127.0.0.1 or localhost"})
        elif self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            self._tell(403, {"error": "another page may not ask here"})
        else:
            self._give(urllib.parse.urlsplit(self.path))

    do_HEAD = do_GET

    def _give(self, asked: urllib.parse.SplitResult) -> None:
        if (file := self.server.files.get(asked.path)) is not None:
            self._send(200, *file)
            return
        try:
            if asked.path == "/api/run":
                self._tell(200, self.server.overview())
            elif asked.path in self.server.answers:
                text = urllib.parse.parse_qs(asked.query).get("step", [""])[0]
                if not (text.isascii() and text.isdecimal() and len(text) <= 15):
                    self._tell(400, {"error": f"step must be a number, got {text[:40]!r}"})
                    return
                self._tell(200, self.server.answers[asked.path](int(text)))
            else:
                self._tell(404, {"error": f"there is no {asked.path[:100]}"})
        except MiniCPMError as error:
            self._tell(422, {"error": str(error)})
        except ConnectionError:
            self.close_connection = True
        except Exception:  # no request may end the server, nor see its insides
            _log.exception("%s failed", asked.path)
            self._tell(500, {"error": "this failed; the server's log says why"})

    def _tell(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, json.dumps(value, ensure_ascii=False, allow_nan=False).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in _PROTECTION.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """A page that is looked at is no news."""


def _built_files() -> dict[str, tuple[bytes, str]]:
    """Address → (content, type), read once: no path from a request touches the disk."""
    found: dict[str, tuple[bytes, str]] = {}

    def add(folder: Traversable, prefix: str) -> None:
        for item in folder.iterdir():
            if item.is_dir():
                add(item, f"{prefix}{item.name}/")
            else:
                kind = mimetypes.guess_type(item.name)[0] or "application/octet-stream"
                kind += "; charset=utf-8" if kind.startswith("text/") else ""
                found["/" if prefix + item.name == "/index.html" else prefix + item.name] = (item.read_bytes(), kind)

    add(resources.files("minicpm.history") / "static", "/")
    return found
