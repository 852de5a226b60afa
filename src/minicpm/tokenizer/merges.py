"""Merge rules of a SentencePiece BPE vocabulary, which stores scores and no merges; and scores from merges.

Source: SentencePiece's BPE joins the neighbours whose concatenation has the best score; the fast tokenizers of
Hugging Face write that as a ranked list of pairs, every way to cut a piece into two pieces, best score first.
"""

from __future__ import annotations

from collections.abc import Sequence

from minicpm import _native
from minicpm.tokenizer.vocabulary import TokenType

# Text never merges into these: a typed `</s>` or `<0x0A>` must stay text.
_UNREACHABLE = frozenset({TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE})


def merges_from_scores(pieces: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every cut of a piece into two pieces, best score first, then by id, then by the ids of the halves.

    `pieces` differ from each other.
    """
    is_part = bytes(kind not in _UNREACHABLE for kind in types)
    # The sort is stable, so pieces of one score stay in the order of their ids.
    order = sorted((i for i, part in enumerate(is_part) if part), key=scores.__getitem__, reverse=True)
    return _native.find_merges(list(pieces), order, is_part)


def scores_from_merges(pieces: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Scores under which SentencePiece's rule takes merges in their given order: 0, -1, -2, … by first mention."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    return [-float(ranks.get(piece, 0)) for piece in pieces]
