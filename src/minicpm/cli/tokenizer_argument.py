"""The option `--tokenizer`: a folder, a file, or the name of a model that has one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.cli.parser import Parser

if TYPE_CHECKING:
    from minicpm.tokenizer import Tokenizer


def add_tokenizer(verb: Parser) -> None:
    """Add the option, which must be given."""
    verb.add_argument(
        "--tokenizer", required=True, metavar="T", help="a folder, tokenizer.json, tokenizer.model, or a model's name"
    )


def open_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer in a folder or file, or of a model.

    Raises:
        MiniCPMError: there is none of that name, or it is broken.
    """
    from minicpm.tokenizer import Tokenizer

    path = Path(name).expanduser()
    if path.suffix == ".model" and path.is_file():
        return Tokenizer.from_sentencepiece(path)
    if path.suffix == ".json" and path.is_file():
        return Tokenizer.from_json(path)
    if path.is_dir():
        return Tokenizer.from_folder(path)
    from minicpm.formats.checkpoint import open_checkpoint
    from minicpm.history.naming import resolve

    checkpoint = open_checkpoint(resolve(name))
    if checkpoint.kind == "gguf":
        return Tokenizer.from_gguf(checkpoint.metadata)
    return Tokenizer.from_folder(checkpoint.path)
