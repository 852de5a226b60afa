"""The built pages in the package are what their sources make, byte for byte, and small."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {"chat": "serve", "history": "history"}
LIMIT_BYTES = 300_000


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("room", PAGES.values())
def test_pages_are_small_and_load_nothing_from_elsewhere(room: str) -> None:
    built = files(ROOT / "src" / "minicpm" / room / "static")
    assert "index.html" in built
    assert sum(map(len, built.values())) <= LIMIT_BYTES
    page = built["index.html"].decode()
    assert "<style" not in page
    assert "//" not in page.replace("<!doctype html>", "")


@pytest.mark.slow
def test_a_fresh_build_is_the_same(tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs node and npm; on Debian: apt install nodejs npm")
    web = tmp_path / "web"
    shutil.copytree(ROOT / "web", web, ignore=shutil.ignore_patterns("node_modules"))
    npm_ci = subprocess.run([npm, "ci", "--prefix", str(web)], capture_output=True, text=True, timeout=200)
    if npm_ci.returncode and any(word in npm_ci.stderr for word in ("ENOTFOUND", "ECONNREFUSED", "EAI_AGAIN")):
        pytest.skip("the packages of web/package-lock.json cannot be fetched here")
    assert npm_ci.returncode == 0, npm_ci.stderr
    for page, room in PAGES.items():
        made = subprocess.run(
            [str(web / "node_modules" / ".bin" / "vite"), "build"], cwd=web, env=os.environ | {"PAGE": page},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        assert files(tmp_path / "src" / "minicpm" / room / "static") == files(
            ROOT / "src" / "minicpm" / room / "static"
        ), f"build the pages again: make web ({page})"
