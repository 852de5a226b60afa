"""minicpm: the whole life of small end-side language models in the MiniCPM architecture.

Public names are loaded when first used, so that `import minicpm` costs next to nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicpm.architecture import PRESETS, ModelConfig
    from minicpm.engine import LanguageModel
    from minicpm.errors import MiniCPMError
    from minicpm.history import History

__version__ = "0.1.0"

__all__ = ["PRESETS", "History", "LanguageModel", "MiniCPMError", "ModelConfig", "__version__", "load"]

_HOMES = {
    "PRESETS": "minicpm.architecture",
    "History": "minicpm.history",
    "LanguageModel": "minicpm.engine",
    "MiniCPMError": "minicpm.errors",
    "ModelConfig": "minicpm.architecture",
}


def load(
    name_or_path: str | os.PathLike[str],
    *,
    context_length: int | None = None,
    num_threads: int | None = None,
    max_parallel: int = 16,
    kv_cache_tokens: int | None = None,
    kv_type: str | None = None,
    draft: str | os.PathLike[str] | None = None,
    max_waiting: int = 1024,
    max_waiting_tokens: int = 1 << 20,
) -> LanguageModel:
    """Return a model, ready to `chat`, `stream`, `generate`, and tell its `logprobs`.

    Args:
        name_or_path: a name such as "smollm2", which is fetched when it is not here yet; a GGUF file; a folder; or
            RUN@STEP, a checkpoint of a run's history.
        context_length: the longest sequence in tokens; None is what the model was trained on, or as much as fits.
        num_threads: of the processor; None is all that this process may use.
        max_parallel: how many sequences run at once at most.
        kv_cache_tokens: tokens of all sequences together that the cache holds; None is a whole context of each, or as
            many as fit into half of the free memory. With fewer, sequences wait for each other.
        kv_type: how keys and values are kept: "f16", "bf16", "f32", or "q8", 8 bits with scales, about half of f16's
            memory; None is f32 for a model of float weights and f16 for a quantized one.
        draft: a smaller model with the same vocabulary, named like the first, that writes ahead: replies stay the same
            and come sooner where it is right often enough.
        max_waiting: requests that wait at most while `max_parallel` run; more are refused.
        max_waiting_tokens: tokens of all of them.

    Raises:
        HubError: nothing is called so, or it cannot be fetched.
        FormatError: the file is broken or of an unsupported kind.
        CheckpointError: weights, configuration and vocabulary do not fit each other.
        EngineError: a setting out of range, or too little memory; checked before any is taken.
    """
    from minicpm.engine.opening import open_language_model
    from minicpm.history.naming import resolve

    return open_language_model(
        resolve(os.fspath(name_or_path)),
        context_length=context_length,
        num_threads=num_threads,
        max_parallel=max_parallel,
        kv_cache_tokens=kv_cache_tokens,
        kv_type=kv_type,
        draft=None if draft is None else resolve(os.fspath(draft)),
        max_waiting=max_waiting,
        max_waiting_tokens=max_waiting_tokens,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minicpm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
