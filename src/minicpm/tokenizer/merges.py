"""Merge rules of a SentencePiece BPE vocabulary, which stores scores and no merges; and scores from merges.

Source: SentencePiece's BPE joins the neighbours whose concatenation has the best score; the fast tokenizers of
Hugging Face write that as a ranked list of pairs, every way to cut a piece into two pieces, best score first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minicpm.tokenizer.vocabulary import TokenType

# Text never merges into these: a typed `</s>` or `<0x0A>` must stay text.
_UNREACHABLE = frozenset({TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE})


def merges_from_scores(
    pieces: Sequence[str], types: Sequence[int], scores: Sequence[float], ids: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Every cut of a piece into two pieces, best score first, then by id, then by the ids of the halves."""
    parts = ids
    hidden = [i for i, kind in enumerate(types) if kind in _UNREACHABLE]
    if hidden:
        parts = dict(ids)
        for i in hidden:
            del parts[pieces[i]]
    # The sort is stable, so pieces of one score stay in the order of their ids.
    order = sorted((i for piece, i in parts.items() if len(piece) > 1), key=scores.__getitem__, reverse=True)
    merges: list[tuple[str, str]] = []
    for i in order:
        piece = pieces[i]
        if len(piece) == 2:
            left, right = piece[0], piece[1]
            if left in parts and right in parts:
                merges.append((left, right))
            continue
        cuts = [
            (left, right)
            for at in range(1, len(piece))
            if (left := piece[:at]) in parts and (right := piece[at:]) in parts
        ]
        if len(cuts) > 1:
            cuts.sort(key=lambda cut: (parts[cut[0]], parts[cut[1]]))
        merges += cuts
    return merges


def scores_from_merges(pieces: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Scores under which SentencePiece's rule takes merges in their given order: 0, -1, -2, … by first mention."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    return [-float(ranks.get(piece, 0)) for piece in pieces]
