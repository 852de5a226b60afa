"""How a run tells where it stands: one line that moves, plain lines where there is no terminal, `metrics.jsonl`.

What this leaves out: pictures (`plot`) and what is measured on held-out text (`heldout`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from minicpm.errors import CheckpointError, ConfigError
from minicpm.formats.atomic_file import atomic_file
from minicpm.train.loop import StepRecord
from minicpm.train.schedule import ScheduleConfig, stage_line
from minicpm.train.state import TrainState

METRICS = "metrics.jsonl"
# Seconds between plain lines, and between redraws of the moving one.
_PLAIN_SECONDS, _MOVING_SECONDS = 10.0, 0.2
_SMOOTHING = 0.9


def duration(seconds: float) -> str:
    """Return "42s", "3m20s", "2h05m" or "4d03h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def resident_bytes(device: torch.device) -> int:
    """Return the memory that the run holds: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """Return the largest resident set that the process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class ProgressLine:
    """step/total, stage, loss, rate, norm, tokens/s, MFU, memory, time left, age of the last checkpoint."""

    def __init__(
        self,
        schedule: ScheduleConfig,
        *,
        flops_per_token: float,
        peak_flops: float,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.schedule = schedule
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.stream = sys.stderr if stream is None else stream
        self.clock = clock
        self.is_moving = self.stream.isatty()
        self.loss: float | None = None
        self.seconds_per_step: float | None = None
        self.saved_at: float | None = None
        self._drawn = -1e9
        self._width = 0

    def mark_saved(self) -> None:
        """Say that a checkpoint has just been written."""
        self.saved_at = self.clock()

    def note(self, text: str) -> None:
        """Write a line of its own above the moving one."""
        self._erase()
        self.stream.write(text + "\n")
        self.stream.flush()

    def show(self, state: TrainState, record: StepRecord) -> None:
        """Take a step into account and draw, if it is time."""
        self.loss = record.loss if self.loss is None else _SMOOTHING * self.loss + (1 - _SMOOTHING) * record.loss
        before = self.seconds_per_step
        # The first step compiles and fills caches; it says nothing about the rest.
        self.seconds_per_step = record.seconds if before is None or record.seconds < before / 3 else (
            _SMOOTHING * before + (1 - _SMOOTHING) * record.seconds
        )  # fmt: skip
        now = self.clock()
        is_last = record.step == self.schedule.total_steps
        if now - self._drawn < (_MOVING_SECONDS if self.is_moving else _PLAIN_SECONDS) and not is_last:
            return
        self._drawn = now
        text = self.text(record, resident_bytes(state.device), now)
        if self.is_moving:
            columns = os.get_terminal_size(self.stream.fileno()).columns
            self._erase()
            self.stream.write(text[: columns - 1])
            self._width = 1
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def text(self, record: StepRecord, memory: int, now: float) -> str:
        """Return the line."""
        rate = record.tokens / record.seconds
        left = (self.schedule.total_steps - record.step) * (self.seconds_per_step or 0.0)
        saved = f"saved {duration(now - self.saved_at)} ago" if self.saved_at is not None else "not saved yet"
        return " · ".join(
            (
                f"{record.step}/{self.schedule.total_steps}",
                stage_line(self.schedule, record.step),
                f"loss {self.loss if self.loss is not None else record.loss:.4f}",
                f"lr {record.lr:.2e}",
                f"norm {record.grad_norm:.2f}",
                f"{rate:,.0f} tok/s",
                f"MFU {100 * rate * self.flops_per_token / self.peak_flops:.0f}%",
                f"{memory / 2**30:.2f} GiB",
                f"{duration(left)} left",
                saved,
            )
        )

    def close(self) -> None:
        """End the moving line."""
        self._erase()
        self.stream.flush()

    def _erase(self) -> None:
        if self._width:
            self.stream.write("\r\x1b[2K")
            self._width = 0


class MetricsFile:
    """`metrics.jsonl`: one object a record; a resumed run goes on where its checkpoint stands.

    What a full disk does not take waits in memory, and is written with the first record that it takes again.
    """

    def __init__(self, run: Path, last_step: int, say: Callable[[str], None]) -> None:
        """Drop what was recorded after `last_step`, which will be made again; `say` warns of a disk that is full."""
        self.path, self.say = run / METRICS, say
        kept = "".join(json.dumps(row) + "\n" for row in read_metrics(run) if row["step"] <= last_step).encode()
        with atomic_file(self.path) as file:
            file.write(kept)
        self._size, self._waiting = len(kept), b""

    def add(self, row: dict[str, Any]) -> None:
        """Append one object; it has a `step`."""
        was_waiting = bool(self._waiting)
        self._waiting += json.dumps(row).encode() + b"\n"
        try:
            with self.path.open("r+b") as file:
                # A write that broke off left a part behind.
                file.truncate(self._size)
                file.seek(self._size)
                file.write(self._waiting)
        except OSError as error:
            if not was_waiting:
                self.say(f"WARNING: {self.path} cannot be written: {error.strerror or error}. Training goes on.")
            return
        self._size, self._waiting = self._size + len(self._waiting), b""
        if was_waiting:
            self.say(f"{self.path} is written again, nothing is missing")


@contextlib.contextmanager
def unwritten_is_said(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Turn a disk that refuses something which the run can do without into a warning."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        say(f"WARNING: {what} was NOT written: {error}. Training goes on.")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run; a last line that a kill cut short is left out."""
    path = run / METRICS
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def record_row(record: StepRecord, memory: int) -> dict[str, Any]:
    """Return a record as it stands in the file."""
    row = dataclasses.asdict(record)
    means = row.pop("means")
    return {**row, "tokens_per_second": record.tokens / record.seconds, "memory_bytes": memory, **means}


def open_tensorboard(run: Path) -> Callable[[dict[str, Any]], None]:
    """Return what writes a record's numbers as TensorBoard events into `run/tensorboard`.

    Raises:
        ConfigError: tensorboard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("uses_tensorboard is set and tensorboard is not installed; pip install tensorboard")
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(run / "tensorboard"))

    def write(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write
