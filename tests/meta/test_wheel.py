"""The wheel holds what the source tree holds: pages, tasks, reports and other data, not modules alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = {".so", ".pyc"}


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    for name in ("scikit_build_core", "nanobind"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install 'minicpm[dev]'")
    # Without the compiled engine, which takes minutes and adds one file.
    command = [
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-C",
        "wheel.cmake=false",
        "-C",
        "wheel.py-api=py3",
        "-w",
        str(tmp_path),
    ]
    made = subprocess.run(
        [sys.executable, "-m", "pip", *command, str(ROOT)], capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "src" / "minicpm").rglob("*") if path.is_file() and path.suffix not in LEFT_OUT]
    wanted = {str(path.relative_to(ROOT / "src")) for path in files}
    assert {"minicpm/history/static/index.html", "minicpm/serve/static/index.html"} <= wanted
    assert sorted(wanted - held) == []
