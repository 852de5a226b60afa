"""The option `--prompt-cache FILE`: what was computed of a prompt is kept for the next command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.cli.parser import UsageError
from minicpm.cli.terminal import note
from minicpm.errors import CheckpointError

if TYPE_CHECKING:
    from minicpm.engine import LanguageModel

# A file that holds this share of a prompt is left as it is: the rest differs from question to question.
_ENOUGH = 0.75


def add_prompt_cache(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--prompt-cache",
        type=Path,
        metavar="FILE",
        help="keep what was computed of the prompt in this file, and begin with what it holds; it is written when it "
        "holds less than three quarters of the prompt",
    )


class KeptPrompt:
    """The file at `path`, or none: its content is in the memory of `model` from the start."""

    def __init__(self, path: Path | None, model: LanguageModel) -> None:
        """Take the file in if there is one; a stale or damaged one is told and left out.

        Raises:
            UsageError: the file could not be written later.
            FormatError: the file is something else.
        """
        self._path, self._model = path, model
        self._ids: list[int] = []
        if path is None:
            return
        if not path.parent.is_dir():
            raise UsageError(f"--prompt-cache {path}: there is no folder {path.parent}; make it, or name another")
        if path.exists():
            try:
                self._ids = model.load_prompt_cache(path)
            except CheckpointError as error:
                note(str(error))

    def keep(self, ids: Sequence[int]) -> None:
        """Write the file if it does not hold enough of `ids`, which were computed.

        Raises:
            CheckpointError: it cannot be written; what was there is untouched.
        """
        if self._path is None:
            return
        num_common = next((i for i, (a, b) in enumerate(zip(ids, self._ids, strict=False)) if a != b), None)
        if num_common is None:
            num_common = min(len(ids), len(self._ids))
        block_tokens = self._model.engine.prefixes.block_tokens
        if len(ids) < block_tokens:
            note(f"the prompt has {len(ids)} tokens; from {block_tokens} on there is something to keep")
        elif num_common < _ENOUGH * len(ids):
            self._model.save_prompt_cache(self._path, ids)
