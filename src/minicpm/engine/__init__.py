"""Inference on the CPU: weights, paged KV cache, scheduler, sampling, stopping; uses the compiled kernels, no torch.

`LanguageModel` is text in, text out; `Engine` is below it, for those who run many requests through steps of their own.
Names are loaded when first used: `opening` has a tokenizer to build while the others are read.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicpm.engine.batch import StepDecoder
    from minicpm.engine.completion import Completion
    from minicpm.engine.engine import Engine
    from minicpm.engine.events import Event, Load
    from minicpm.engine.language_model import LanguageModel
    from minicpm.engine.runner import TextStream
    from minicpm.engine.sampling import Sampler
    from minicpm.engine.scheduler import Limits, QueueFullError
    from minicpm.engine.sequence import Constraint, ContextLengthError, Owner, Request, Sequence, TokenLogprob

_HOMES = {
    "Completion": "completion",
    "Constraint": "sequence",
    "ContextLengthError": "sequence",
    "Engine": "engine",
    "Event": "events",
    "LanguageModel": "language_model",
    "Limits": "scheduler",
    "Load": "events",
    "Owner": "sequence",
    "QueueFullError": "scheduler",
    "Request": "sequence",
    "Sampler": "sampling",
    "Sequence": "sequence",
    "StepDecoder": "batch",
    "TextStream": "runner",
    "TokenLogprob": "sequence",
}

__all__ = [
    "Completion",
    "Constraint",
    "ContextLengthError",
    "Engine",
    "Event",
    "LanguageModel",
    "Limits",
    "Load",
    "Owner",
    "QueueFullError",
    "Request",
    "Sampler",
    "Sequence",
    "StepDecoder",
    "TextStream",
    "TokenLogprob",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minicpm.engine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minicpm.engine.{_HOMES[name]}"), name)
