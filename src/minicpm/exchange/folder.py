"""Writes a model folder for transformers and its kin: whole or not at all, the manifest of hashes last."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minicpm.errors import CheckpointError
from minicpm.exchange import remote_code
from minicpm.exchange.family import Move
from minicpm.exchange.source import FOLD_KEY, TOKENIZER_FILES, Source
from minicpm.tokenizer.exports import hf_settings

MANIFEST = "SHA256SUMS"


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill; after the block it lies at `path`, on the disk. On any failure nothing is left.

    Raises:
        CheckpointError: `path` exists, or cannot be written.
    """
    if path.exists():
        raise CheckpointError(f"{path} exists already; name a folder that does not, or remove it first")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in sorted(partial.rglob("*")):
            _sync(file)
        _sync(partial)
        partial.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_config(folder: Path, move: Move, hf_config: Mapping[str, Any]) -> None:
    """Write config.json, generation_config.json and, for the minicpm format, the model's code."""
    fields = dict(hf_config)
    if move.note is not None:
        fields[FOLD_KEY] = move.note.to_dict()
    if move.config.model_type == "minicpm":
        fields["auto_map"] = dict(remote_code.AUTO_MAP)
        for name, text in remote_code.read_files().items():
            (folder / name).write_bytes(text)
    write_json(folder / "config.json", fields)


def write_generation_config(folder: Path, source: Source) -> None:
    """Write generation_config.json: the source's own settings if it has them, and the ids that begin and end a text."""
    tokenizer, config = source.tokenizer, source.checkpoint.config
    fields: dict[str, Any] = {}
    given = source.path / "generation_config.json"
    if source.checkpoint.kind == "folder" and given.is_file():
        fields = json.loads(given.read_text(encoding="utf-8"))
    ends = sorted(tokenizer.eos_ids) or list(config.eos_token_id)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": tokenizer.pad_id,
    }
    fields |= {key: value for key, value in ids.items() if value is not None}
    write_json(folder / "generation_config.json", fields)


def write_tokenizer(folder: Path, source: Source) -> None:
    """Write the tokenizer for both worlds: the source folder's own files, and what is missing made from them."""
    if source.checkpoint.kind == "folder":
        for name in TOKENIZER_FILES:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
    if not (folder / "tokenizer.json").exists():
        (folder / "tokenizer.json").write_text(source.tokenizer.to_json(), encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    if not settings.exists():
        max_length = source.checkpoint.config.max_position_embeddings
        write_json(settings, hf_settings(source.tokenizer, max_length, source.checkpoint.chat_template))
    elif source.checkpoint.chat_template is None:
        # What chats with the model here must be there, too: the default of its family.
        fields = json.loads(settings.read_text(encoding="utf-8"))
        write_json(settings, fields | {"chat_template": source.tokenizer.chat_template.source})


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write `fields` as JSON text."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(folder: Path) -> None:
    """Write `SHA256SUMS` over every other file; `sha256sum -c` reads it."""
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder).as_posix()}\n")
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")
