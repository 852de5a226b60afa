"""Builds and runs the native tests (`native/tests`), which need no Python; kept in `build/` from run to run."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 900
RUN_SECONDS = 300


def tool(name: str) -> str:
    """The program beside this Python, else the one of the machine."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or pytest.skip(f"{name} is not installed")


def build(name: str, *options: str) -> Path:
    """Configure and compile in build/native-tests/NAME; return that folder."""
    folder = ROOT / "build" / "native-tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    configure = [tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DMINICPM_BUILD_TESTS=ON"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *options]
    # Two runs of the tests at a time would compile into each other's files.
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [tool("cmake"), "--build", str(folder)]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
            assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return folder


def run(folder: Path, *arguments: str, under: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the executable of a build, perhaps `under` an emulator; bounded."""
    command = [*under, str(folder / "native" / "native_tests"), *arguments]
    # Options of sanitizers that someone has set for other programs could hide what is looked for.
    settings = {name: value for name, value in os.environ.items() if not name.endswith("SAN_OPTIONS")}
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, env=settings)


def check_passed(done: subprocess.CompletedProcess[str], kernels: list[str], at_least: int) -> None:
    """Every test ran on exactly these kernels, and none failed."""
    text = done.stdout[-8000:] + done.stderr[-8000:]
    assert done.returncode == 0, text
    assert done.stdout.splitlines()[0].split() == ["kernels:", *kernels], text
    counts = re.fullmatch(r"(\d+) run, 0 failed", done.stdout.splitlines()[-1])
    assert counts is not None, text
    assert int(counts[1]) >= at_least, text
