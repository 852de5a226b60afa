"""What a conversion starts from: an open checkpoint, its tokenizer, and what its files say about origin and licence."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm.errors import CheckpointError
from minicpm.exchange.family import FoldNote
from minicpm.formats.checkpoint import Checkpoint, open_checkpoint
from minicpm.tokenizer import Tokenizer

FOLD_KEY = "minicpm_fold"
# The tokenizer's own files in a folder; what is there is copied as it is.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_LICENCE = re.compile(r"^license:[ \t]*([\w.\-]+)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """An open model with everything that an export carries on."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    name: str
    licence: str | None
    note: FoldNote | None

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.checkpoint.path


def open_source(path: Path, *, allow_pickle: bool = False) -> Source:
    """Return the model at `path` with its tokenizer.

    Raises:
        MiniCPMError: whatever is wrong with the model or its tokenizer, in one line.
    """
    checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
    if checkpoint.kind == "gguf":
        tokenizer = Tokenizer.from_gguf(checkpoint.metadata)
        licence = checkpoint.metadata.get("general.license")
        name = checkpoint.metadata.get("general.name")
        note = checkpoint.metadata.get(f"general.{FOLD_KEY}")
        fold: Any = json.loads(note) if isinstance(note, str) else None
    else:
        tokenizer = Tokenizer.from_folder(path)
        licence, name = _licence_of(path), None
        fold = checkpoint.hf_config.get(FOLD_KEY)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model only {checkpoint.config.vocab_size} rows"
        )
    return Source(
        checkpoint,
        tokenizer,
        name=name if isinstance(name, str) and name else path.stem if path.is_file() else path.name,
        licence=licence if isinstance(licence, str) else None,
        note=FoldNote.parse(fold),
    )


def _licence_of(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")[:20_000]
    found = _LICENCE.search(text)
    return found.group(1) if found else None
