"""What drafts gain on this machine: replies with them and without, for `minicpm bench --speculate` and `--draft`.

What this leaves out: the table's place (`bench.py`), and many texts (`bench/speculation.py` of the source tree).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minicpm.engine.opening import open_language_model
from minicpm.engine.sequence import Speculation
from minicpm.errors import EngineError

if TYPE_CHECKING:
    from minicpm.engine import LanguageModel

NUM_TOKENS = 64
_TEXT = (
    "The ferry leaves the old harbour at seven and reaches the island an hour later. Ms Okafor keeps the lamp of the "
    "lighthouse, counts the ships that pass, and writes their names into a grey book. On clear days she can see the "
    "mountains of the mainland."
)
PROMPTS = {
    "copied text": f"{_TEXT}\n\nThe same text once more:\n\nThe ferry leaves the old harbour at",
    "new text": "Dear friend, let me tell you how I spent my holidays.",
}


@dataclass(frozen=True)
class Gain:
    """Tokens per second of one greedy reply, after its first token."""

    text: str
    tokens_per_second: float
    plain_tokens_per_second: float
    num_drafted_tokens: int
    num_accepted_tokens: int

    @property
    def ratio(self) -> float:
        """With drafts to without."""
        return self.tokens_per_second / self.plain_tokens_per_second


def measure_gains(
    path: Path, draft: Path | None, speculate: Literal["ngram", "draft"], threads: int, rounds: int, kv_type: str | None
) -> list[Gain]:
    """Return the medians of `rounds` rounds, both ways taking turns.

    Raises:
        EngineError: the model's context does not hold the texts, or the draft model does not fit.
    """
    with open_language_model(path, draft=draft, num_threads=threads, max_parallel=1, kv_type=kv_type) as model:
        return [_measure(model, text, prompt, speculate, rounds) for text, prompt in PROMPTS.items()]


def _measure(model: LanguageModel, text: str, prompt: str, speculate: Literal["ngram", "draft"], rounds: int) -> Gain:
    ids = model.encode_prompt(prompt)
    if len(ids) + NUM_TOKENS > model.context_length:
        raise EngineError(
            f"drafts are measured on {len(ids) + NUM_TOKENS} tokens; the model's context is {model.context_length}"
        )
    # No end token stops it: both ways make the same number of tokens.
    settings: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": NUM_TOKENS, "logit_bias": _no_end(model)}
    paces: dict[Speculation, list[float]] = {speculate: [], "off": []}
    last = {}
    for _ in range(rounds):
        for way, found in paces.items():
            (last[way],) = model.generate([ids], speculate=way, **settings)
            found.append(last[way].tokens_per_second or 0.0)
    reply = last[speculate]
    return Gain(
        text,
        statistics.median(paces[speculate]),
        statistics.median(paces["off"]),
        reply.num_drafted_tokens,
        reply.num_accepted_tokens,
    )


def _no_end(model: LanguageModel) -> dict[int, float]:
    return dict.fromkeys(model.tokenizer.eos_ids | set(model.config.eos_token_id), -1e9)
