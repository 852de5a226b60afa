"""A second, smaller model beside the one that answers: opened, and checked to have the same vocabulary."""

from __future__ import annotations

import os

from minicpm.architecture import ModelConfig
from minicpm.engine.decoder import Decoder
from minicpm.engine.dtypes import default_kv_type
from minicpm.engine.sizing import check_weights, free_memory, longest_context, plan_cache
from minicpm.engine.speculation_draft import DraftModel
from minicpm.errors import EngineError
from minicpm.formats.checkpoint import Checkpoint, open_checkpoint
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.fingerprint import fingerprint


def open_draft_model(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    context_length: int,
    max_parallel: int,
    num_threads: int | None,
    block_tokens: int,
) -> DraftModel:
    """Return the model at `path` as one that drafts for another, whose tokenizer is `tokenizer`.

    It follows as many sequences as half of the free memory holds contexts for, up to `max_parallel`, and each of them
    to `context_length` or what it was made for.

    Raises:
        FormatError: no model there, or a broken one.
        CheckpointError: weights, configuration and vocabulary do not fit each other.
        EngineError: another vocabulary, or too little memory.
    """
    checkpoint = open_checkpoint(path)
    config, weights = checkpoint.config, checkpoint.weights
    _check_vocabulary(checkpoint, config, tokenizer)
    free_bytes = free_memory()
    check_weights(checkpoint.num_bytes, free_bytes)
    kv_type = default_kv_type(weights)
    size = plan_cache(
        config,
        context_length=min(context_length, longest_context(config)),
        max_parallel=max_parallel,
        kv_cache_tokens=None,
        block_tokens=block_tokens,
        kv_type=kv_type,
        free_bytes=free_bytes - checkpoint.num_bytes,
    )
    num_slots = max(1, min(max_parallel, size.num_blocks // -(-size.context_length // block_tokens)))
    decoder = Decoder(
        config,
        weights,
        num_threads=num_threads,
        num_blocks=num_slots * -(-size.context_length // block_tokens),
        block_tokens=block_tokens,
        kv_type=kv_type,
        num_positions=size.context_length,
    )
    return DraftModel(
        decoder,
        num_slots=num_slots,
        context_length=size.context_length,
        vocab_size=tokenizer.vocab_size,
        block_tokens=block_tokens,
    )


def _check_vocabulary(checkpoint: Checkpoint, config: ModelConfig, tokenizer: Tokenizer) -> None:
    path = checkpoint.path
    own = Tokenizer.from_gguf(checkpoint.metadata) if checkpoint.kind == "gguf" else Tokenizer.from_folder(path)
    if own.vocab_size != tokenizer.vocab_size or config.vocab_size < tokenizer.vocab_size:
        raise EngineError(
            f"the draft model {path} has {own.vocab_size} tokens, the model {tokenizer.vocab_size}: it needs the same "
            "vocabulary"
        )
    if fingerprint(own) != fingerprint(tokenizer):
        raise EngineError(f"the draft model {path} has another vocabulary than the model; it needs the same")
