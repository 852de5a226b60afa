"""The lines that were typed, kept over conversations: the arrow keys bring them back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from minicpm.cli.terminal import dim, note
from minicpm.hub import cache_folder

_NUM_LINES = 1000


@contextlib.contextmanager
def line_history() -> Iterator[None]:
    """Inside the block, input() edits lines and remembers them in the cache folder, for this user only."""
    try:
        import readline
    except ImportError:
        # A Python without readline still reads lines.
        yield
        return
    path = cache_folder() / "chat_history"
    readline.set_history_length(_NUM_LINES)
    with contextlib.suppress(OSError):  # the first conversation has none
        readline.read_history_file(path)
    try:
        yield
    finally:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # What a person typed is nobody else's; made so before anything is in it.
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(path)
        except OSError as error:
            note(dim(f"the typed lines were not kept: {error.strerror or error}"))
