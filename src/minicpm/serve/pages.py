"""The built chat page, read once at the start: no path from a request touches the disk."""

from __future__ import annotations

import mimetypes
from importlib import resources
from importlib.resources.abc import Traversable

from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_KEPT = {"cache-control": "public, max-age=31536000, immutable"}


def page_routes() -> list[BaseRoute]:
    """A route for each built file, and `/` for the page itself; none without a build."""
    root = resources.files("minicpm.serve") / "static"
    if not root.is_dir():
        return []
    routes: list[BaseRoute] = []
    for path, data in _files(root, "/"):
        routes.append(_route("/" if path == "/index.html" else path, path, data))
    return routes


def _files(folder: Traversable, prefix: str) -> list[tuple[str, bytes]]:
    found = []
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            found += _files(item, f"{prefix}{item.name}/")
        elif not item.name.startswith((".", "_")):
            found.append((prefix + item.name, item.read_bytes()))
    return found


def _route(address: str, path: str, data: bytes) -> Route:
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    if kind.startswith("text/") or kind == "application/json":
        kind += "; charset=utf-8"
    # Names under assets/ change with their content.
    headers = _KEPT if path.startswith("/assets/") else {"cache-control": "no-cache"}

    async def give(request: object) -> Response:
        return Response(data, headers={**headers, "content-type": kind})

    return Route(address, give, methods=["GET"], include_in_schema=False)
