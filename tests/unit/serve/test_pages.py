"""The built page: `/` and each file have a route, read once; without a build there is none."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from minicpm.serve.pages import page_routes


def routes_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("minicpm.serve.pages.resources.files", lambda name: folder)
    found = {}
    for route in page_routes():
        assert isinstance(route, Route)
        found[route.path] = asyncio.run(route.endpoint(None))
    return found


def test_each_file_of_a_build_has_a_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static = tmp_path / "static"
    (static / "assets").mkdir(parents=True)
    (static / "index.html").write_text("<p>page</p>")
    (static / "assets" / "index-1a2b.js").write_text("let x = 1")
    (static / ".hidden").write_text("secret")
    found = routes_of(tmp_path, monkeypatch)
    assert set(found) == {"/", "/assets/index-1a2b.js"}
    assert found["/"].body == b"<p>page</p>"
    assert found["/"].headers["content-type"] == "text/html; charset=utf-8"
    assert found["/"].headers["cache-control"] == "no-cache"
    script = found["/assets/index-1a2b.js"]
    assert script.headers["content-type"].startswith("text/javascript")
    assert "immutable" in script.headers["cache-control"]


def test_without_a_build_there_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert routes_of(tmp_path, monkeypatch) == {}
