"""What is read off a step's rows: the next token, log-probabilities and pooled hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from minicpm.engine.sampling import choose_token, log_total, top_tokens
from minicpm.engine.sequence import Sequence, TokenLogprob

if TYPE_CHECKING:
    from minicpm.tokenizer import Tokenizer

Floats: TypeAlias = npt.NDArray[np.float32]


def choose_next(
    sequence: Sequence, logits: Floats, vocab_size: int, tokenizer: Tokenizer | None
) -> tuple[int, bool, TokenLogprob | None]:
    """Return the next token after logits (V,), whether nothing can follow it, and its record where one is wanted.

    Raises:
        EngineError: the logits are not numbers, or the constraint is too costly.
    """
    request, choosable, is_complete, record = sequence.request, logits[:vocab_size], False, None
    if sequence.constraint is not None:
        choosable = np.where(sequence.constraint.allowed(), choosable, np.float32(-np.inf))
    token_id = choose_token(choosable, request.sampler, sequence.occurrences, sequence.generator)
    if sequence.constraint is not None and not sequence.ending.is_end(token_id):
        is_complete = sequence.constraint.accept(token_id)
    if request.logprobs is not None:
        record = token_logprob(logits, token_id, request.logprobs, tokenizer)
        sequence.logprobs.append(record)
    if sequence.occurrences is not None:
        sequence.occurrences.add(token_id)
    return token_id, is_complete, record


def token_logprob(logits: Floats, token_id: int, num_top: int, tokenizer: Tokenizer | None) -> TokenLogprob:
    """The record of `token_id` after logits (V,), with the `num_top` likeliest tokens beside it."""
    total = log_total(logits)
    best = top_tokens(logits, num_top) if num_top else ()
    top = tuple(TokenLogprob(_text(int(i), tokenizer), int(i), float(logits[i]) - total) for i in best)
    return TokenLogprob(_text(token_id, tokenizer), token_id, float(logits[token_id]) - total, top)


def score_prompt(sequence: Sequence, rows: Floats, tokenizer: Tokenizer | None) -> None:
    """Append the records of the prompt's tokens that `rows`, the next logits not read yet, predict."""
    num_top = sequence.request.prompt_logprobs or 0
    records, prompt = sequence.prompt_logprobs, sequence.request.prompt
    first = sequence.num_read
    if first >= len(prompt):
        return
    if not records and not sequence.request.first_scored:
        records.append(TokenLogprob(_text(prompt[0], tokenizer), prompt[0], None))
    targets = prompt[first + 1 : first + 1 + len(rows)]
    records += [token_logprob(row, target, num_top, tokenizer) for row, target in zip(rows, targets, strict=False)]
    sequence.num_read += len(rows)


def read_hidden(sequence: Sequence, rows: Floats) -> None:
    """Add hidden states (M, E), the next ones not read yet, to the pooled vector (E,) of `sequence`."""
    if not len(rows):
        return
    if sequence.request.pooling == "last":
        sequence.pooled = rows[-1].astype(np.float64)
        return
    total = rows.sum(axis=0, dtype=np.float64) / sequence.num_prompt_tokens
    sequence.pooled = total if sequence.pooled is None else sequence.pooled + total
    sequence.num_read += len(rows)


def _text(token_id: int, tokenizer: Tokenizer | None) -> str:
    return tokenizer.token_text(token_id) if tokenizer else ""
