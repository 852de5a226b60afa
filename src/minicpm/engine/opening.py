"""A file or folder -> a `LanguageModel` ready to answer.

Left out: names of models (`hub`, through `minicpm.load`).
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from minicpm import _native
from minicpm.architecture import ModelConfig
from minicpm.engine.decoder import Decoder
from minicpm.engine.dtypes import default_kv_type
from minicpm.engine.engine import Engine
from minicpm.engine.language_model import LanguageModel
from minicpm.engine.scheduler import Limits
from minicpm.engine.sizing import check_weights, free_memory, plan_cache
from minicpm.engine.speculation_draft import DraftModel
from minicpm.errors import CheckpointError, EngineError
from minicpm.formats.checkpoint import Checkpoint, open_checkpoint
from minicpm.formats.mapped_file import release_file
from minicpm.formats.weight import Weight
from minicpm.tokenizer import Tokenizer

T = TypeVar("T")

BLOCK_TOKENS = 32
# Logits of one step beyond one row per sequence; more would not make scoring faster.
_MAX_LOGIT_BYTES = 64 << 20


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
    tokenizer_soon = _Soon(lambda: _open_tokenizer(checkpoint))
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
    tokenizer = _fitting(_repack_until(tokenizer_soon, decoder, weights), config.vocab_size, path)
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


def _repack_until(tokenizer_soon: _Soon[Tokenizer], decoder: Decoder, weights: Mapping[str, Weight]) -> Tokenizer:
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


def _check_threads(num_threads: int | None) -> None:
    if num_threads is not None and not 1 <= num_threads <= 1024:
        raise EngineError(f"num_threads must be 1 to 1024, got {num_threads}")


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


def _open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.kind == "gguf":
        return Tokenizer.from_gguf(checkpoint.metadata)
    return Tokenizer.from_folder(checkpoint.path)


class _Soon(Generic[T]):
    """A value that another thread computes meanwhile.

    A tokenizer takes as long as weights where the vocabulary is large, and both leave the interpreter to others.
    """

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._error: BaseException | None = None
        self._listener: Callable[[], None] | None = None
        self._is_there = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def tell(self, listener: Callable[[], None]) -> None:
        """Call `listener` as soon as `get` would not wait; it may be called twice."""
        self._listener = listener
        if self._is_there:
            listener()

    def get(self) -> T:
        """Wait for the value; what its computation raised is raised here."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._compute()
        except BaseException as error:
            self._error = error
        # In this order: either this thread sees the listener or `tell` sees that it is too late.
        self._is_there = True
        if self._listener is not None:
            self._listener()
