"""The progress line, the metrics file, the picture, TensorBoard on demand."""

from __future__ import annotations

import importlib.util
import io
import json
import resource
from pathlib import Path

import pytest
import torch

from minicpm.architecture import ModelConfig
from minicpm.errors import ConfigError
from minicpm.train.log import (
    MetricsFile,
    ProgressLine,
    duration,
    open_tensorboard,
    peak_bytes,
    read_metrics,
    record_row,
    resident_bytes,
    unwritten_is_said,
)
from minicpm.train.loop import StepRecord
from minicpm.train.optim import OptimizerConfig
from minicpm.train.plot import plot_loss, smooth
from minicpm.train.schedule import ScheduleConfig
from minicpm.train.state import new_state

SCHEDULE = ScheduleConfig(total_steps=100, warmup=10, decay=20)


def record(step: int, loss: float = 2.0, seconds: float = 0.5) -> StepRecord:
    return StepRecord(step, "stable", 0.01, loss, 0.7, 1000, seconds, {"loss/web": loss + 1})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


def test_plain_lines_say_everything(two_layers: ModelConfig) -> None:
    now = [0.0]
    stream = io.StringIO()
    line = ProgressLine(SCHEDULE, flops_per_token=1e6, peak_flops=4e9, stream=stream, clock=lambda: now[0])
    state = new_state(two_layers, OptimizerConfig(), 1, "float32", torch.device("cpu"))
    for step in range(1, 41):
        now[0] += 0.5
        line.show(state, record(step, seconds=30.0 if step == 1 else 0.5))
        if step == 30:
            line.mark_saved()
    lines = stream.getvalue().splitlines()
    # One each ten seconds, not one a step.
    assert len(lines) == 2
    for part in ("21/100", "stable 16% → decay starts at step 81", "loss 2.0000", "lr 1.00e-02", "norm 0.70"):
        assert part in lines[1]
    # 2,000 tokens/s of a million FLOP each, of 4 GFLOP/s; 79 steps of half a second, the first slow one forgotten.
    for part in ("2,000 tok/s", "MFU 50%", "GiB", "40s left", "not saved yet"):
        assert part in lines[1]
    assert "saved 5s ago" in line.text(record(40), 1 << 30, now[0])
    assert "1.00 GiB" in line.text(record(40), 1 << 30, now[0])


def test_at_a_terminal_one_line_moves(two_layers: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.get_terminal_size", lambda _: __import__("os").terminal_size((60, 20)))
    stream = Terminal()
    line = ProgressLine(SCHEDULE, flops_per_token=1e6, peak_flops=4e9, stream=stream)
    state = new_state(two_layers, OptimizerConfig(), 1, "float32", torch.device("cpu"))
    line.show(state, record(1))
    line.note("something happened")
    line.show(state, record(100))
    line.close()
    written = stream.getvalue()
    assert written.count("\n") == 1
    assert written.endswith("\r\x1b[2K")
    assert all(len(part) <= 59 for part in written.replace("\n", "\r\x1b[2K").split("\r\x1b[2K"))


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 200, 7500, 350000)] == ["0s", "59s", "3m20s", "2h05m", "4d01h"]


def test_metrics_go_on_where_the_checkpoint_stands(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path, 0, print)
    for step in range(1, 6):
        first.add(record_row(record(step), 5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    MetricsFile(tmp_path, 3, print).add(record_row(record(4, loss=9.0), 5))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["loss"] == 9.0
    assert rows[3]["loss/web"] == 10.0
    assert rows[0]["tokens_per_second"] == 2000
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["memory_bytes"] == 5


def test_a_full_disk_loses_no_record(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    said: list[str] = []
    metrics = MetricsFile(tmp_path, 0, said.append)
    try:
        for step in range(1, 8):
            # Room for one record and a half, then for all.
            size = len(json.dumps(record_row(record(1), 5))) * 3 // 2 if step < 5 else before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            metrics.add(record_row(record(step), 5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert len(said) == 2
    assert "metrics.jsonl cannot be written: File too large. Training goes on." in said[0]
    assert "is written again, nothing is missing" in said[1]


def test_what_a_run_can_do_without_is_warned_of(tmp_path: Path) -> None:
    said: list[str] = []
    with unwritten_is_said("the picture", said.append):
        (tmp_path / "absent" / "loss.png").write_text("")
    assert said[0].startswith("WARNING: the picture was NOT written: ")
    with pytest.raises(ValueError, match="ours"), unwritten_is_said("the picture", said.append):
        raise ValueError("ours")


def test_memory_is_plausible() -> None:
    assert 50 << 20 < resident_bytes(torch.device("cpu")) <= peak_bytes() * 1.01


def test_picture_of_the_loss(tmp_path: Path) -> None:
    assert plot_loss(tmp_path, SCHEDULE) is None
    metrics = MetricsFile(tmp_path, 0, print)
    for step in range(1, 101):
        metrics.add(record_row(record(step, loss=4 - step / 50), 5))
    metrics.add({"step": 50, "heldout_loss": 3.3})
    picture = plot_loss(tmp_path, SCHEDULE)
    assert picture is not None
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
    # The mean of what was seen so far: it starts at the first value, not at 0.
    assert smooth([(1, 5.0), (2, 5.0)]) == [(1, pytest.approx(5.0)), (2, pytest.approx(5.0))]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_is_written_or_refused(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ConfigError, match="pip install tensorboard"):
            open_tensorboard(tmp_path)
        return
    write = open_tensorboard(tmp_path)
    write({"step": 1, "loss": 2.0, "stage": "stable"})
    assert any((tmp_path / "tensorboard").iterdir())
