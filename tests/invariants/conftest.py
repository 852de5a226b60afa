"""A tiny run that nothing interrupted, for all tests that interrupt one."""

from __future__ import annotations

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
