"""A tiny run that nothing interrupted, for all tests that interrupt one; and a disk that fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny_run import LAST, go, hashes, load, make_home, quick_runs


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of text, tokenizer, shards and configuration that the runs share."""
    with quick_runs():
        return make_home(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def straight(home: Path) -> dict[str, str]:
    """The files of the last checkpoint of a run that nothing interrupted."""
    with quick_runs():
        go(load(home), home / "straight")
    return hashes(home / "straight" / LAST)


@pytest.fixture(scope="session")
def failing_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that lets one write of a process fail."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and Linux")
    library = tmp_path_factory.mktemp("disk") / "failing_disk.so"
    source = Path(__file__).with_name("failing_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library
