"""The real command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

Command: TypeAlias = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def minicpm() -> Command:
    """Run `minicpm ARGUMENTS…` and return what it wrote; bounded, and with a closed standard input unless given one."""

    def run(*arguments: str, input: str | None = None, timeout: float = 120, **settings: str) -> object:
        return subprocess.run(
            [sys.executable, "-m", "minicpm", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | settings,
            **({"stdin": subprocess.DEVNULL} if input is None else {"input": input}),
        )

    return run


@pytest.fixture
def empty_home(tmp_path: Path) -> Path:
    """A cache folder that does not exist yet."""
    return tmp_path / "home"
