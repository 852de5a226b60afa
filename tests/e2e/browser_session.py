"""Headless Chromium against a page of ours, driven by a script of `browser/`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

WEB = Path(__file__).parents[2] / "web"


def browse(script: str, url: str, pictures: Path, *arguments: str) -> dict[str, Any]:
    """Return what the script saw; the test is skipped where no browser or no node is installed."""
    node, chromium = shutil.which("node"), shutil.which("chromium")
    if node is None or chromium is None:
        pytest.skip("needs node and chromium; on Debian: apt install nodejs npm chromium")
    if not (WEB / "node_modules" / "playwright-core").is_dir():
        pytest.skip("needs playwright-core: npm ci --prefix web")
    command = [node, str(Path(__file__).parent / "browser" / f"{script}.mjs"), str(WEB), chromium, url, str(pictures)]
    seen = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200)
    assert seen.returncode == 0, seen.stderr
    facts: dict[str, Any] = json.loads(seen.stdout)
    return facts
