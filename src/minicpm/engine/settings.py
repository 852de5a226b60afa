"""The keywords that shape a reply, and the request that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypedDict

from minicpm.engine.sampling import Sampler
from minicpm.engine.sequence import Request, Speculation
from minicpm.errors import EngineError


class Settings(TypedDict, total=False):
    """Keywords of `chat`, `stream`, `generate` and `continue_text`; those of sampling are fields of `Sampler`."""

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    speculate: Speculation | None


# Those of the model card's `chat`; its top_k is the default of transformers, which acted there unsaid.
DEFAULTS: Settings = {"temperature": 0.3, "top_p": 0.8, "top_k": 50}

_SAMPLER_FIELDS = frozenset(field.name for field in dataclasses.fields(Sampler))
_KNOWN = _SAMPLER_FIELDS | {"max_new_tokens", "stop", "logprobs", "speculate"}


def build_request(
    prompt: Sequence[int], settings: Settings, *, end_ids: AbstractSet[int], stops: Sequence[str] = ()
) -> Request:
    """Return the request of `prompt` with `settings`, completed by `DEFAULTS`; `stops` come on top of its own.

    Raises:
        TypeError: an unknown keyword, as from any function.
        ConfigError: a value out of range.
        EngineError: a limit out of range.
    """
    given: dict[str, Any] = {**DEFAULTS, **settings}
    for name in given.keys() - _KNOWN:
        import difflib

        near = difflib.get_close_matches(name, _KNOWN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(_KNOWN))}"
        raise TypeError(f"unexpected keyword argument {name!r}; {hint}")
    max_new_tokens = given.get("max_new_tokens")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise EngineError(f"max_new_tokens must be at least 1, or None for the whole context, got {max_new_tokens}")
    stop = given.get("stop", ())
    return Request(
        prompt=prompt,
        sampler=Sampler(**{name: value for name, value in given.items() if name in _SAMPLER_FIELDS}),
        max_new_tokens=max_new_tokens,
        end_ids=end_ids,
        stop=[*([stop] if isinstance(stop, str) else stop), *stops],
        logprobs=given.get("logprobs"),
        speculate=given.get("speculate"),
    )
