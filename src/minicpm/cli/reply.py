"""One reply, written to standard output as it comes, with its pace."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

# A model's text must not steer the terminal: of the control characters, only tab and line feed pass.
_STEERING = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


@dataclass(frozen=True)
class Reply:
    """What came of one message: `is_whole` is False when Ctrl-C stopped it."""

    text: str
    is_whole: bool
    first_seconds: float
    seconds: float


def write_reply(pieces: Iterable[str]) -> Reply:
    """Write `pieces` to standard output one by one, until they end or Ctrl-C, and a line feed after them."""
    is_terminal = sys.stdout.isatty()
    started = time.monotonic()
    first_seconds, is_whole, text = 0.0, True, []
    try:
        for piece in pieces:
            first_seconds = first_seconds or time.monotonic() - started
            text.append(piece)
            sys.stdout.write(piece.translate(_STEERING) if is_terminal else piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        is_whole = False
    seconds = time.monotonic() - started
    if not text or not text[-1].endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    return Reply("".join(text), is_whole, first_seconds, seconds)
