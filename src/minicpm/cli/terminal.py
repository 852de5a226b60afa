"""What a verb writes besides its result, so that the result alone is on standard output.

T20 forbids `print` in the package; verbs write with `out`, one name to find them all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def out(text: str, end: str = "\n") -> None:
    """Write `text` to standard output now."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def note(text: str) -> None:
    """Write a line for the person at the terminal to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def suggest(command: str) -> None:
    """Name the command that a person would want next; only to a person."""
    if sys.stderr.isatty():
        note(dim(f"next: {command}"))


def dim(text: str) -> str:
    """Return `text` in the terminal's faint style where standard error has one."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[2m{text}\x1b[0m"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return `rows` under `header` in columns two spaces apart; the columns in `right` end flush."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
