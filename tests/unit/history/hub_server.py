"""The hub's API as huggingface_hub speaks it, over one repository in memory: commits, large files, tags, ranges.

Source: huggingface_hub's own client (`_commit_api.py`, `lfs.py`, `hf_api.py`), which is what talks to it here.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import signal
import threading
import urllib.parse
from typing import Any


class HubServer(http.server.ThreadingHTTPServer):
    """`commits` are (message, files by path), the first one empty; `tags` name commits by number.

    Attributes:
        victim: a process to kill, and the number of requests after which.
        token: what writing takes.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.tags: dict[str, int] = {}
        self.branches: dict[str, int] = {}
        self.large: dict[str, bytes] = {}
        self.num_uploaded = self.num_requests = 0
        self.victim: tuple[int, int] | None = None
        self.token = "hf_secret"
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Hub)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, revision: str) -> dict[str, bytes]:
        """What a revision holds; KeyError where there is none."""
        revision = urllib.parse.unquote(revision)
        if not self.commits:
            raise KeyError("repository")
        return self.commits[self.number(revision)][1]

    def number(self, revision: str) -> int:
        """The commit that a branch, a tag or a hash means."""
        found = {oid(i): i for i in range(len(self.commits))} | self.tags | self.branches
        return found[urllib.parse.unquote(revision)]

    def add(self, message: str, files: dict[str, bytes], branch: str = "main") -> None:
        """Make a commit on a branch."""
        self.commits.append((message, files))
        self.branches[branch] = len(self.commits) - 1


def oid(index: int) -> str:
    return hashlib.sha1(str(index).encode()).hexdigest()


class _Hub(http.server.BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        with self.server.lock:
            self.server.num_requests += 1
            if self.server.victim and self.server.num_requests == self.server.victim[1]:
                os.kill(self.server.victim[0], signal.SIGKILL)
            path = urllib.parse.urlsplit(self.path).path
            for wanted, pattern, act in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method in wanted:
                    if method != "GET" and "revision" not in path and not self._may_write():
                        return
                    try:
                        act(self, body, *match.groups())
                    except (KeyError, ValueError):
                        code = "RevisionNotFound" if self.server.commits else "RepoNotFound"
                        self._send(404, b"{}", **{"X-Error-Code": code})
                    return
        self._send(404, b'{"error": "no such address"}')

    def _may_write(self) -> bool:
        is_allowed = self.command == "HEAD" or self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if not is_allowed and "/upload/" not in self.path:
            self._send(401, b'{"error": "Invalid username or password."}')
            return False
        return True

    def _chunks(self) -> list[bytes]:
        found = []
        while size := int(self.rfile.readline(), 16):
            found.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _send(self, status: int, content: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _tell(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    def create(self, body: bytes) -> None:
        is_there = bool(self.server.commits)
        if not is_there:
            self.server.add("initial commit", {".gitattributes": b"*.bin filter=lfs\n"})
        self._tell({"url": f"{self.server.url}/me/tiny", "name": "me/tiny"}, 409 if is_there else 200)

    def validate(self, body: bytes) -> None:
        self._tell({"errors": [], "warnings": []})

    def info(self, body: bytes, revision: str | None) -> None:
        self.server.files(revision or "main")
        sha = oid(self.server.number(revision or "main"))
        self._tell({"id": "me/tiny", "sha": sha, "tags": [], "siblings": [], "private": False})

    def refs(self, body: bytes) -> None:
        self.server.files("main")
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid(i)} for n, i in self.server.tags.items()]
        self._tell({"branches": [], "converts": [], "tags": tags})

    def tag(self, body: bytes, revision: str) -> None:
        name = json.loads(body)["tag"]
        if name in self.server.tags:
            self._tell({"error": "tag exists"}, 409)
            return
        self.server.tags[name] = self.server.number(revision)
        self._tell({})

    def branch(self, body: bytes, name: str) -> None:
        name = urllib.parse.unquote(name)
        if self.command == "DELETE":
            del self.server.branches[name]
        elif name in self.server.branches:
            self._tell({"error": "branch exists"}, 409)
            return
        else:
            self.server.branches[name] = self.server.number(json.loads(body)["startingPoint"])
        self._tell({})

    def preupload(self, body: bytes, revision: str) -> None:
        rules = self.server.files(revision)[".gitattributes"].decode()
        asked = json.loads(body)["files"]
        large = [
            word for word in (("objects/", "objects/**"), ("model.safetensors", "*.safetensors")) if word[1] in rules
        ]
        modes = ["lfs" if any(f["path"].startswith(w) for w, _ in large) else "regular" for f in asked]
        self._tell({"files": [
            {"path": f["path"], "uploadMode": mode, "shouldIgnore": False} for f, mode in zip(asked, modes, strict=True)
        ]})  # fmt: skip

    def batch(self, body: bytes) -> None:
        found = []
        for item in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.server.url}/upload/{item['oid']}", "header": {}}}
            found.append(item if item["oid"] in self.server.large else item | {"actions": actions})
        self._tell({"transfer": "basic", "objects": found})

    def upload(self, body: bytes, digest: str) -> None:
        assert hashlib.sha256(body).hexdigest() == digest
        self.server.large[digest] = body
        self.server.num_uploaded += len(body)
        self._send(200, b"")

    def commit(self, body: bytes, revision: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        branch = urllib.parse.unquote(revision)
        if parent is not None and parent != oid(self.server.branches[branch]):
            self._tell({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        files = dict(self.server.files(branch))
        for line in lines[1:]:
            value = line["value"]
            is_large = line["key"] == "lfsFile"
            content = self.server.large[value["oid"]] if is_large else base64.b64decode(value["content"])
            files[value["path"]] = content
        self.server.add(lines[0]["value"]["summary"], files, branch)
        self._tell({"success": True, "commitUrl": f"{self.server.url}/me/tiny/commit/x",
                    "commitOid": oid(len(self.server.commits) - 1)})  # fmt: skip

    def tree(self, body: bytes, revision: str, folder: str | None) -> None:
        folder = urllib.parse.unquote(folder or "").strip("/")
        prefix = f"{folder}/" if folder else ""
        inside = {path: content for path, content in self.server.files(revision).items() if path.startswith(prefix)}
        if folder and not inside:
            self._send(404, b"{}", **{"X-Error-Code": "EntryNotFound"})
            return
        found: dict[str, dict[str, Any]] = {}
        for path, content in inside.items():
            name, _, rest = path.removeprefix(prefix).partition("/")
            whole = prefix + name
            entry = {"type": "directory", "size": 0} if rest else {"type": "file", "size": len(content)}
            found[whole] = {"path": whole, "oid": hashlib.sha1(content).hexdigest(), **entry}
        self._tell(list(found.values()))

    def resolve(self, body: bytes, revision: str, path: str) -> None:
        files = self.server.files(revision)
        content = files.get(urllib.parse.unquote(path))
        if content is None:
            self._send(404, b"", **{"X-Error-Code": "EntryNotFound"})
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        part = content[int(span[1]) : int(span[2]) + 1] if span else content
        self._send(206 if span else 200, part, "application/octet-stream",
                   ETag=f'"{hashlib.sha1(content).hexdigest()}"', **{"X-Repo-Commit": oid(0)})  # fmt: skip

    def log_message(self, *_: object) -> None:
        pass


_API = r"/api/models/me/tiny"
_ROUTES = [
    (("POST",), r"/api/repos/create", _Hub.create),
    (("POST",), r"/api/validate-yaml", _Hub.validate),
    (("GET",), _API + r"(?:/revision/([^/]+))?", _Hub.info),
    (("GET",), _API + r"/refs", _Hub.refs),
    (("POST",), _API + r"/tag/([^/]+)", _Hub.tag),
    (("POST", "DELETE"), _API + r"/branch/([^/]+)", _Hub.branch),
    (("POST",), _API + r"/preupload/([^/]+)", _Hub.preupload),
    (("POST",), r"/me/tiny\.git/info/lfs/objects/batch", _Hub.batch),
    (("PUT",), r"/upload/([0-9a-f]{64})", _Hub.upload),
    (("POST",), _API + r"/commit/([^/]+)", _Hub.commit),
    (("GET",), _API + r"/tree/([^/]+)(/.*)?", _Hub.tree),
    (("GET", "HEAD"), r"/me/tiny/resolve/([^/]+)/(.+)", _Hub.resolve),
]
