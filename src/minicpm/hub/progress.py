"""What a pull tells the person who waits for it.

Written with the standard library only: the first `minicpm.load("smollm2")` in a notebook reports too, and the
one-shot chat must not pay for a terminal library that it does not use.
"""

from __future__ import annotations

import sys
import time

_REFRESH_SECONDS = 0.1
MEGABYTE = 1_000_000


def megabytes(num_bytes: int) -> str:
    """Return `num_bytes` as people read it on a download page: "98 MB", "1.4 GB"."""
    if num_bytes >= 1000 * MEGABYTE:
        return f"{num_bytes / (1000 * MEGABYTE):.1f} GB"
    if num_bytes >= MEGABYTE:
        return f"{num_bytes / MEGABYTE:.0f} MB"
    return f"{num_bytes / 1000:.0f} kB" if num_bytes >= 1000 else f"{num_bytes} B"


class Report:
    """A report that keeps silent; the base of those that speak."""

    def say(self, line: str) -> None:
        """Tell one whole line."""

    def advance(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Tell that `done_bytes` of `total_bytes` of `what` are here."""

    def close(self) -> None:
        """End the line that `advance` keeps rewriting, if there is one."""


class TerminalReport(Report):
    """A line on standard error that is rewritten in place; whole lines at each tenth when it is not a terminal."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._open_line = ""
        self._started = 0.0
        self._shown = 0.0
        self._what = ""
        self._first_bytes = 0
        self._tenth = -1

    def say(self, line: str) -> None:
        """Write `line` on its own line."""
        self.close()
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def advance(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Show done and total megabytes, the rate, and the seconds left."""
        now = time.monotonic()
        if what != self._what:
            self.close()
            self._what, self._started, self._first_bytes, self._tenth = what, now, done_bytes, -1
            self._shown = now
        is_whole = done_bytes >= total_bytes
        if self._is_terminal:
            if is_whole or now - self._shown >= _REFRESH_SECONDS:
                self._shown = now
                self._rewrite(self._describe(done_bytes, total_bytes, now))
            return
        # Into a log: nothing about what takes less than a second, then at most ten lines and the last.
        tenth = 10 * done_bytes // max(total_bytes, 1)
        if tenth > self._tenth and (now - self._shown >= 1.0 or (is_whole and self._tenth >= 0)):
            self._shown, self._tenth = now, tenth
            sys.stderr.write(self._describe(done_bytes, total_bytes, now) + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the rewritten line standing and go to the next."""
        if self._open_line:
            sys.stderr.write("\n")
            sys.stderr.flush()
        self._open_line = ""
        self._what = ""

    def _describe(self, done_bytes: int, total_bytes: int, now: float) -> str:
        text = f"{self._what}: {megabytes(done_bytes)} of {megabytes(total_bytes)}"
        seconds = now - self._started
        rate = (done_bytes - self._first_bytes) / seconds if seconds > 0.5 else 0.0
        if rate > 0:
            text += f", {rate / MEGABYTE:.1f} MB/s"
            if done_bytes < total_bytes:
                text += f", {(total_bytes - done_bytes) / rate:.0f} s left"
        return text

    def _rewrite(self, text: str) -> None:
        sys.stderr.write("\r" + text.ljust(len(self._open_line)))
        sys.stderr.flush()
        self._open_line = text
