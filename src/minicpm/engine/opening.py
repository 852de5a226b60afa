"""A file or folder -> a `LanguageModel` ready to answer.

The tokenizer takes longest where the vocabulary is large, so it is begun before anything else of the engine is even
imported. Left out: names of models (`hub`, through `minicpm.load`), and the rest of the way (`assembly`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from minicpm.engine.soon import Soon
from minicpm.errors import EngineError
from minicpm.formats.checkpoint import Checkpoint, open_checkpoint
from minicpm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minicpm.engine.language_model import LanguageModel


def open_language_model(
    path: str | os.PathLike[str],
    *,
    context_length: int | None = None,
    num_threads: int | None = None,
    max_parallel: int = 16,
    kv_cache_tokens: int | None = None,
    kernel: str | None = None,
    kv_type: str | None = None,
    draft: str | os.PathLike[str] | None = None,
    max_waiting: int = 1024,
    max_waiting_tokens: int = 1 << 20,
) -> LanguageModel:
    """Return the model at `path`, its weights repacked and its cache sized; see `minicpm.load`.

    `kernel` and `kv_type` are those of `Decoder`; `draft` is the path of a smaller model that writes ahead.

    Raises:
        FormatError: no model there, or a broken one.
        CheckpointError: weights, configuration and vocabulary do not fit each other.
        EngineError: a setting out of range, or too little memory; with both numbers.
    """
    _check_threads(num_threads)
    checkpoint = open_checkpoint(path)
    tokenizer_soon = Soon(lambda: _open_tokenizer(checkpoint))
    from minicpm.engine.assembly import assemble

    return assemble(
        checkpoint,
        tokenizer_soon,
        context_length=context_length,
        num_threads=num_threads,
        max_parallel=max_parallel,
        kv_cache_tokens=kv_cache_tokens,
        kernel=kernel,
        kv_type=kv_type,
        draft=draft,
        max_waiting=max_waiting,
        max_waiting_tokens=max_waiting_tokens,
    )


def _check_threads(num_threads: int | None) -> None:
    if num_threads is not None and not 1 <= num_threads <= 1024:
        raise EngineError(f"num_threads must be 1 to 1024, got {num_threads}")


def _open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.kind == "gguf":
        return Tokenizer.from_gguf(checkpoint.metadata)
    return Tokenizer.from_folder(checkpoint.path)
