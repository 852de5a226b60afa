"""Inference on the CPU: weights, paged KV cache, scheduler, sampling, stopping; uses the compiled kernels, no torch.

`LanguageModel` is text in, text out; `Engine` is below it, for those who run many requests through steps of their own.
"""

from minicpm.engine.batch import StepDecoder
from minicpm.engine.completion import Completion
from minicpm.engine.engine import Engine
from minicpm.engine.events import Event, Load
from minicpm.engine.language_model import LanguageModel
from minicpm.engine.runner import TextStream
from minicpm.engine.sampling import Sampler
from minicpm.engine.scheduler import Limits, QueueFullError
from minicpm.engine.sequence import Constraint, ContextLengthError, Owner, Request, Sequence, TokenLogprob

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
