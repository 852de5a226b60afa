"""Two models on one text, whatever runtime each is in: the same ids to both, and how far their next tokens agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minicpm.errors import DataError
from minicpm.exchange.agreement import Agreement, agreement
from minicpm.exchange.backends import open_backend
from minicpm.exchange.check import TEXT
from minicpm.exchange.source import open_source

Resolve = Callable[[str], Path]


@dataclass(frozen=True)
class Comparison:
    """How B differs from A, and whether B's own tokenizer gives the same ids (None where B has no files)."""

    agreement: Agreement
    num_tokens: int
    tokenizer_difference: str | None
    dtypes: tuple[str, str]


def local_path(spec: str) -> str | None:
    """Return the name or path in a backend's name, None for a URL."""
    if spec.startswith(("http://", "https://")):
        return None
    kind, separator, rest = spec.partition(":")
    return rest if separator else kind


def compare(
    a: str, b: str, *, text: str = TEXT, dtype_a: str | None = None, dtype_b: str | None = None, max_tokens: int = 512
) -> Comparison:
    """Return how the model that `b` names differs from the one that `a` names; one is in memory at a time.

    Args:
        a: a backend such as `engine:PATH`, `torch:PATH`, `transformers:PATH`, `llama.cpp:FILE`; its tokenizer is used.
        b: another, or the URL of a server.
        text: what both read.
        dtype_a: the dtype that A computes in, where its runtime has a choice.
        dtype_b: likewise for B.
        max_tokens: the text is cut there.

    Raises:
        MiniCPMError: a model cannot be opened, or nothing can be compared.
    """
    path = local_path(a)
    if path is None:
        raise DataError("the first model gives the tokenizer, so it must be a file or folder; put the URL second")
    tokenizer = open_source(Path(path)).tokenizer
    ids = tokenizer.add_bos(tokenizer.encode(text))[:max_tokens]
    if len(ids) < 2:
        raise DataError("the text has fewer than 2 tokens; give a longer one with --text")
    scores, dtypes = [], []
    for spec, dtype in ((a, dtype_a), (b, dtype_b)):
        backend = open_backend(spec, dtype)
        scores.append(backend.score(ids))
        dtypes.append(backend.dtypes)
        del backend
    difference = _tokenizer_difference(ids, text, local_path(b))
    return Comparison(agreement(*scores), len(ids), difference, (dtypes[0], dtypes[1]))


def _tokenizer_difference(ids: list[int], text: str, other: str | None) -> str | None:
    if other is None:
        return None
    tokenizer = open_source(Path(other)).tokenizer
    theirs = tokenizer.add_bos(tokenizer.encode(text))[: len(ids)]
    for position, (ours, their) in enumerate(zip(ids, theirs, strict=False)):
        if ours != their:
            return f"the tokenizers differ from token {position}: {ours} and {their}; the first one's ids were used"
    return None
