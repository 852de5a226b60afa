"""A history survives every crash and every refusal of the disk: it opens, and all that it lists is there and right."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.invariants.history_writer import weights_at

from minicpm.errors import CheckpointError
from minicpm.history import History
from minicpm.history.verification import verify

ROOT = Path(__file__).parents[2]
WRITER = Path(__file__).with_name("history_writer.py")
NUM_KILLS = 50


class Writers:
    """The process that forks writers."""

    def __init__(self, **settings: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WRITER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, **settings},
        )  # fmt: skip

    def start(self, folder: Path, steps: int, output: Path, **settings: str) -> int:
        """Return the process id of a writer."""
        task = {"folder": str(folder), "steps": steps, "output": str(output), "settings": settings}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self.line()

    def line(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@contextlib.contextmanager
def writers(**settings: str) -> Iterator[Writers]:
    found = Writers(**settings)
    with found.process:
        yield found
        assert found.process.stdin is not None
        found.process.stdin.close()


def check(folder: Path, told: list[int]) -> list[int]:
    """What is listed is whole, and what the writer was told is there is listed."""
    try:
        history = History(folder)
    except CheckpointError:
        # Killed before the first index was there.
        assert not told
        return []
    assert set(told) <= set(history.steps)
    assert verify(history) == []
    for step in history.steps[-1:]:
        for name, weight in weights_at(step).items():
            assert history[step].weight(name).data.tobytes() == weight.data.tobytes()
    return history.steps


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path) -> None:
    chance = random.Random(5)
    folder, output = tmp_path / "history", tmp_path / "output"
    listed, seen = 0, 0
    with writers() as fork:
        for _ in range(NUM_KILLS):
            output.unlink(missing_ok=True)
            writer = fork.start(folder, 1_000_000, output)
            # Now and then while the folder is made, else some way into the checkpoint after those that it has told of.
            goal = chance.randrange(4)
            since = time.perf_counter()
            while goal and count_lines(output) < min(listed + goal, 9) and time.perf_counter() - since < 60:
                time.sleep(0.002)
            pace = (time.perf_counter() - since) / goal if goal else 0.2
            time.sleep(chance.uniform(0.0, min(pace, 1.0)))
            os.kill(writer, signal.SIGKILL)
            assert fork.line() == -signal.SIGKILL
            told = output.read_text().split("\n")[:-1] if output.exists() else []
            steps = check(folder, [int(line) for line in told])
            assert len(steps) >= listed
            listed = len(steps)
            seen += len(told)
            if listed > 8:
                shutil.rmtree(folder)
                listed = 0
    assert seen > NUM_KILLS


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: the calls are the same, and thousands of syncs take no time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_every_write_and_sync_fails_once(folder: Path, failing_disk: Path, number: int) -> None:
    output, count = folder / "output", folder / "count"
    with writers(LD_PRELOAD=str(failing_disk)) as fork:

        def write(path: Path, at: int) -> tuple[int, list[str]]:
            settings = {"FAIL_BELOW": str(path), "FAIL_AT": str(at), "FAIL_WITH": str(number)}
            fork.start(path, 3, output, **settings, COUNT_INTO=str(count))
            return fork.line(), output.read_text().splitlines()

        assert write(folder / "whole", -1) == (0, ["0", "1", "2"])
        calls = count.stat().st_size
        assert calls > 40
        for at in range(1, calls + 1):
            check_failure(folder / f"fail-{at}", folder / "whole", at, os.strerror(number), write)


def check_failure(
    folder: Path, whole: Path, at: int, reason: str, write: Callable[[Path, int], tuple[int, list[str]]]
) -> None:
    code, lines = write(folder, at)
    assert code == 2, (at, lines)
    assert reason in lines[-1]
    check(folder, [int(line) for line in lines[:-1]])
    assert not list(folder.rglob(".partial-*"))
    # With room again the same writer ends, and the history is as if nothing had happened.
    assert write(folder, -1) == (0, ["0", "1", "2"])
    assert (folder / "index.json").read_bytes() == (whole / "index.json").read_bytes()
    shutil.rmtree(folder)
