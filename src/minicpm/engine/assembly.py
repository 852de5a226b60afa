"""An open checkpoint, and a tokenizer still being built -> a `LanguageModel`; weights are repacked meanwhile."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping

from minicpm import _native
from minicpm.architecture import ModelConfig
from minicpm.engine.decoder import Decoder
from minicpm.engine.dtypes import default_kv_type
from minicpm.engine.engine import Engine
from minicpm.engine.language_model import LanguageModel
from minicpm.engine.scheduler import Limits
from minicpm.engine.sizing import check_weights, free_memory, plan_cache
from minicpm.engine.soon import Soon
from minicpm.engine.speculation_draft import DraftModel
from minicpm.errors import CheckpointError
from minicpm.formats.checkpoint import Checkpoint
from minicpm.formats.mapped_file import release_file
from minicpm.formats.weight import Weight
from minicpm.tokenizer import Tokenizer

BLOCK_TOKENS = 32
# Logits of one step beyond one row per sequence; more would not make scoring faster.
_MAX_LOGIT_BYTES = 64 << 20


def assemble(
    checkpoint: Checkpoint,
    tokenizer_soon: Soon[Tokenizer],
    *,
    context_length: int | None,
    num_threads: int | None,
    max_parallel: int,
    kv_cache_tokens: int | None,
    kernel: str | None,
    kv_type: str | None,
    draft: str | os.PathLike[str] | None,
    max_waiting: int,
    max_waiting_tokens: int,
) -> LanguageModel:
    """Return the model of `checkpoint`; the rest as `open_language_model` has it.

    Raises:
        FormatError: its vocabulary is broken, or the draft's file.
        CheckpointError: weights, configuration and vocabulary do not fit each other.
        EngineError: a setting out of range, or too little memory; with both numbers.
    """
    config, weights = checkpoint.config, checkpoint.weights
    kv_type = kv_type or default_kv_type(weights)
    size = plan_cache(
        config,
        context_length=context_length,
        max_parallel=max_parallel,
        kv_cache_tokens=kv_cache_tokens,
        block_tokens=BLOCK_TOKENS,
        kv_type=kv_type,
        free_bytes=_room_beside(checkpoint),
    )
    decoder = Decoder(
        config,
        weights,
        num_threads=num_threads,
        num_blocks=size.num_blocks,
        block_tokens=BLOCK_TOKENS,
        kernel=kernel,
        kv_type=kv_type,
        num_positions=size.context_length,
        is_lazy=True,
    )
    tokenizer = _fitting(_repack_until(tokenizer_soon, decoder, weights), config.vocab_size, checkpoint.path)
    engine = Engine(
        decoder,
        config,
        num_blocks=size.num_blocks,
        block_tokens=BLOCK_TOKENS,
        context_length=size.context_length,
        limits=_limits(config.vocab_size, max_parallel, max_waiting, max_waiting_tokens),
        tokenizer=tokenizer,
        draft=_open_draft(draft, tokenizer, size.context_length, max_parallel, num_threads),
    )
    return LanguageModel(engine, tokenizer, dtypes=decoder.dtypes, fingerprint=lambda: _fingerprint(config, weights))


def _repack_until(tokenizer_soon: Soon[Tokenizer], decoder: Decoder, weights: Mapping[str, Weight]) -> Tokenizer:
    """Return the tokenizer; weights are repacked meanwhile, and the rest of them by the steps after the first.

    Of the file and of what was needed to read it nothing else is left in memory.
    """
    # What renders conversations; the tokenizer's thread leaves the interpreter to others now and then.
    importlib.import_module("minicpm.tokenizer.sandbox")
    tokenizer_soon.tell(decoder.call)
    decoder.pack_until_called()
    tokenizer = tokenizer_soon.get()
    release_file(weights["model.norm.weight"].data)
    _native.trim_heap()
    return tokenizer


def _room_beside(checkpoint: Checkpoint) -> int:
    """Return the bytes that are free once the weights are loaded."""
    free_bytes = free_memory()
    check_weights(checkpoint.num_bytes, free_bytes)
    return free_bytes - checkpoint.num_bytes


def _limits(vocab_size: int, max_parallel: int, max_waiting: int, max_waiting_tokens: int) -> Limits:
    return Limits(
        max_parallel=max_parallel,
        max_output_rows=max(1, _MAX_LOGIT_BYTES // (4 * vocab_size)),
        max_waiting=max_waiting,
        max_waiting_tokens=max_waiting_tokens,
    )


def _open_draft(
    path: str | os.PathLike[str] | None,
    tokenizer: Tokenizer,
    context_length: int,
    max_parallel: int,
    num_threads: int | None,
) -> DraftModel | None:
    if path is None:
        return None
    from minicpm.engine.draft_opening import open_draft_model

    return open_draft_model(
        path,
        tokenizer,
        context_length=context_length,
        max_parallel=max_parallel,
        num_threads=num_threads,
        block_tokens=BLOCK_TOKENS,
    )


def _fingerprint(config: ModelConfig, weights: Mapping[str, Weight]) -> str:
    from minicpm.engine.prompt_cache import fingerprint_model

    return fingerprint_model(config, weights)


def _fitting(tokenizer: Tokenizer, vocab_size: int, path: str | os.PathLike[str]) -> Tokenizer:
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}")
    return tokenizer
