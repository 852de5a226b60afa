"""A publication that is killed, or whose disk is full, leaves whole checkpoints; a reader never sees anything else."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.invariants.history_writer import weights_at, write

from minicpm.errors import CheckpointError
from minicpm.history import History
from minicpm.history.verification import verify

NUM_KILLS = 10
NUM_STEPS = 60


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    assert write(folder / "history", NUM_STEPS, folder / "told") == 0
    return folder / "history"


def command(source: Path, public: Path) -> list[str]:
    return [sys.executable, "-m", "minicpm", "history", "publish", str(source), str(public)]


def num_objects(public: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return sum(not name.startswith(".") for name in os.listdir(public / "objects"))
    return 0


class Reader(threading.Thread):
    """Opens the destination over and over; everything that it lists must be there and right."""

    def __init__(self, public: Path) -> None:
        super().__init__(daemon=True)
        self.public, self.problems, self.lengths = public, [], [0]
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            with contextlib.suppress(FileNotFoundError):
                self._look()
            time.sleep(0.01)

    def _look(self) -> None:
        if not (self.public / "history.json").exists():
            return
        try:
            history = History(self.public)
            self.problems += verify(history, is_deep=False)
            for step in history.steps[-1:]:
                row = history.row(step)
                found = history.at(step, precision=row.precision)["model.embed_tokens.weight"]
                exact = weights_at(step)["model.embed_tokens.weight"].decode()
                assert abs(found - exact).max() <= (0.0 if row.precision == "exact" else 0.5 * exact.std())
        except (CheckpointError, AssertionError) as error:
            self.problems.append(error)
            return
        self.lengths.append(len(history))


@pytest.mark.slow
def test_ten_kills_and_a_reader(source: Path, tmp_path: Path) -> None:
    chance = random.Random(3)
    public = tmp_path / "public"
    reader = Reader(public)
    reader.start()
    kills = 0
    while kills < NUM_KILLS:
        goal = num_objects(public) + chance.randrange(1, 5)
        with subprocess.Popen(command(source, public), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and num_objects(public) < goal:
                time.sleep(0.0005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
        kills += 1
    killed = History(public)
    assert killed.steps == sorted(set(killed.steps))
    assert verify(killed) == []
    assert len(killed) < NUM_STEPS or any(row.precision == "base" for row in killed.rows)
    assert subprocess.run(command(source, public), capture_output=True).returncode == 0
    reader.ended.set()
    reader.join()
    assert reader.problems == []
    assert len(set(reader.lengths)) > 5
    whole = History(public)
    assert whole.steps == list(range(NUM_STEPS))
    assert all(row.precision == "exact" for row in whole.rows)
    assert verify(whole) == []
    assert not list(public.rglob(".partial-*"))
    assert num_objects(public) == num_objects(source)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 4, 9, 30])
def test_a_full_disk(source: Path, tmp_path: Path, failing_disk: Path, at: int) -> None:
    public = tmp_path / "public"
    settings = {"LD_PRELOAD": str(failing_disk), "FAIL_BELOW": str(public), "FAIL_AT": str(at), "FAIL_WITH": "28"}
    first = [*command(source, public), "--steps", "0,1,2,3,4"]
    result = subprocess.run(first, capture_output=True, text=True, env=os.environ | settings)
    assert result.returncode == 2
    assert "No space left" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob(".partial-*"))
    if (public / "history.json").exists():
        assert verify(History(public)) == []
    assert subprocess.run(first, capture_output=True).returncode == 0
    assert History(public).steps == [0, 1, 2, 3, 4]
    assert verify(History(public)) == []


def test_a_run_that_is_still_written(source: Path, tmp_path: Path) -> None:
    from minicpm.history import HistoryWriter

    with HistoryWriter(source):
        result = subprocess.run(command(source, tmp_path / "public"), capture_output=True, text=True)
    assert result.returncode == 2
    assert f"another process is writing the history {source}; wait for it to end" in result.stderr
    assert not (tmp_path / "public").exists()
