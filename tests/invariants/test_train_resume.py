"""A run is a function of its configuration: however it was interrupted, the bits of its checkpoints are the same."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests import tiny_run
from tests.tiny_run import LAST, go, hashes, load, quick_runs, start

from minicpm.errors import CheckpointError
from minicpm.train import checkpoint
from minicpm.train.log import read_metrics
from minicpm.train.pretrain import prepare, pretrain
from minicpm.train.run_start import find_start


@pytest.fixture(autouse=True, scope="module")
def _quick_runs() -> Iterator[None]:
    with quick_runs():
        yield


@pytest.mark.parametrize("moment", [1, 5, 13])
def test_a_crash_changes_nothing(home: Path, straight: dict[str, str], moment: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(load(home), run, crash_after=moment)
    go(load(home), run, wants_resume=True)
    assert hashes(run / LAST) == straight
    # The curve has every step once, whatever was made twice.
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, 21))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on(
    home: Path, straight: dict[str, str], number: int, code: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def interrupt(state: object, record: object) -> None:
        if getattr(record, "step", 0) == 7:
            os.kill(os.getpid(), number)

    end, found = pretrain(start(load(home), run), print, [interrupt])
    assert (end.step, end.was_asked, found) == (7, True, code)
    assert [folder.name for folder in checkpoint.step_folders(run)] == ["step_000005", "step_000007"]
    go(load(home), run, wants_resume=True)
    assert hashes(run / LAST) == straight


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(
    home: Path, straight: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    go(load(home), run, crash_after=12)
    with (run / "step_000010" / "state.safetensors").open("r+b") as file:
        file.truncate(1000)
    said: list[str] = []
    config = load(home)
    found = find_start(run, config, True, said.append)
    assert found.step == 5
    assert "step_000010: state.safetensors has 1000 bytes" in said[0]
    pretrain(prepare(config, run, found, said.append), said.append)
    assert hashes(run / LAST) == straight


def test_a_save_that_the_disk_refuses_costs_a_checkpoint_and_not_the_run(
    home: Path, straight: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Files may have 100 kB during the second save: the weights fit, the optimizer's state breaks off inside."""
    run, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(state: object, record: object) -> None:
        step = getattr(record, "step", 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if step == 9 else before[0], before[1]))

    try:
        go(load(home), run, hooks=[limit])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [folder.name for folder in checkpoint.step_folders(run)] == ["step_000005", "step_000015", LAST]
    assert hashes(run / LAST) == straight
    assert not list(run.glob(".partial-*"))
    warning = next(line for line in capfd.readouterr().err.splitlines() if "WARNING" in line)
    assert "step 10 was NOT saved: " in warning
    assert "File too large" in warning
    assert "last good checkpoint is step_000005" in warning


def test_going_on_refuses_what_would_not_be_the_same_run(home: Path, straight: dict[str, str]) -> None:
    run = home / "straight"
    with pytest.raises(CheckpointError, match=rf"holds checkpoints up to {LAST}; go on with --resume"):
        start(load(home), run)
    with pytest.raises(CheckpointError, match=r"complete: step 20 of 20; raise schedule.total_steps, or branch"):
        start(load(home), run, wants_resume=True)
    for override, reason in (
        ("optimizer.beta1=0.8", r"straight/step_000020 was made with optimizer.beta1 = 0.9, and now it is 0.8"),
        ("model.scale_emb=10", r"model.scale_emb = 12.0, and now it is 10.0"),
        ("loop.seed=7", r"loop.seed = 1234, and now it is 7"),
        ("batch.sequences=[8]", r"batch.sequences"),
        ("schedule.total_steps=40", r"step_000020: step 16 was made in stage decay with lr"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            start(load(home, override), run, wants_resume=True)


# Ten of them on request, for the log: MINICPM_TEST_KILLS=10 python -m pytest -s -k kill tests/invariants
KILLS = range(int(os.environ.get("MINICPM_TEST_KILLS", "3")))


@pytest.fixture(scope="module")
def saved_often(home: Path) -> tuple[str, ...]:
    """Settings with which a save takes about as long as a step, and `straight` with them."""
    overrides = ("loop.save_every=1", "loop.eval_every=0")
    go(load(home, *overrides), home / "saved-often")
    return overrides


@pytest.mark.slow
@pytest.mark.parametrize("seed", KILLS)
def test_a_kill_at_any_moment_changes_nothing(
    home: Path, saved_often: tuple[str, ...], seed: int, tmp_path: Path
) -> None:
    run, wants_save = tmp_path / "run", seed % 2 == 1
    process = subprocess.Popen(
        [sys.executable, tiny_run.__file__, str(home), str(run), *saved_often],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        moment = wait_for_moment(process, run, wants_save, random.Random(seed))
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    half_written = [path.name for path in run.glob(".partial-*")]
    folder, manifest, skipped = checkpoint.newest_verified(run)
    # A folder that has its name is whole: nothing is ever skipped after a kill.
    assert skipped == []
    assert folder is not None
    assert manifest is not None
    sys.stderr.write(f"kill {seed}: {moment}; newest {folder.name}, half-written {half_written or 'nothing'}\n")
    go(load(home, *saved_often), run, wants_resume=True)
    assert not list(run.glob(".partial-*"))
    assert hashes(run / LAST) == hashes(home / "saved-often" / LAST)


def wait_for_moment(process: subprocess.Popen[bytes], run: Path, wants_save: bool, choice: random.Random) -> str:
    """Return at a random moment of a step or of a save, measured by the step before it: a loaded machine is slower."""
    first = choice.randrange(2, 8)
    saving = wait_for(process, lambda: half_written(run, first))
    saved = wait_for(process, lambda: (run / checkpoint.step_name(first)).exists())
    following = wait_for(process, lambda: half_written(run, first + 1))
    share = choice.random()
    if not wants_save:
        wait_for(process, lambda: (run / checkpoint.step_name(first + 1)).exists())
    time.sleep(share * (saved - saving if wants_save else following - saved))
    return f"{share:.0%} through {'the save' if wants_save else 'the step'} {first + 1 if wants_save else first + 2}"


def half_written(run: Path, step: int) -> bool:
    return any(run.glob(f".partial-{checkpoint.step_name(step)}-*")) or (run / checkpoint.step_name(step)).exists()


def wait_for(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> float:
    """Return the time at which something happened; a process that ended will not make it happen."""
    while not happened():
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.0005)
    return time.monotonic()
