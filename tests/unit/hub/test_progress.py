"""The lines of a download, at a terminal and in a log."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from minicpm.hub.progress import TerminalReport, megabytes


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, float], str]:
    """Report 100 MB in 100 steps of `step_seconds`, by a clock of our own."""

    def run(is_terminal: bool, step_seconds: float) -> str:
        screen = Screen(is_terminal)
        now = 0.0
        monkeypatch.setattr("minicpm.hub.progress.time.monotonic", lambda: now)
        monkeypatch.setattr("sys.stderr", screen)
        report = TerminalReport()
        for megabyte in range(101):
            report.advance("file", megabyte * 1_000_000, 100_000_000)
            now += step_seconds
        report.close()
        return screen.getvalue()

    return run


def test_a_terminal_sees_one_line_rewritten(fetch: Callable[[bool, float], str]) -> None:
    text = fetch(True, 0.2)
    assert text.count("\n") == 1
    assert text.endswith("\rfile: 100 MB of 100 MB, 5.0 MB/s\n") or "100 MB of 100 MB, 5.0 MB/s" in text
    assert "50 MB of 100 MB, 5.0 MB/s, 10 s left" in text


def test_a_log_sees_few_lines_and_none_of_what_is_quick(fetch: Callable[[bool, float], str]) -> None:
    lines = fetch(False, 0.2).splitlines()
    assert 5 <= len(lines) <= 11
    assert lines[-1] == "file: 100 MB of 100 MB, 5.0 MB/s"
    assert fetch(False, 0.001) == ""


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(5, "5 B"), (5_400, "5 kB"), (98_362_432, "98 MB"), (5_450_000_000, "5.5 GB")]
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert megabytes(num_bytes) == text
