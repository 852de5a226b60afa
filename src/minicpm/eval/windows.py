"""Texts as token ids: a context and its continuation, and the windows of a text that is longer than the context.

Source: `_encode_pair` and `get_rolling_token_windows` of EleutherAI/lm-evaluation-harness 0.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Encode = Callable[[str], list[int]]
Pair = tuple[list[int], list[int]]


def encode_pair(encode: Encode, prefix: Sequence[int], context: str, continuation: str) -> Pair:
    """Return the ids of a context and of its continuation, cut where the context ends when it is encoded alone.

    Spaces at the end of the context belong to the continuation's first token. An empty context is `prefix`.

    Args:
        encode: text -> ids, bos included where the model wants one.
        prefix: what stands for an empty context.
        context: may be empty.
        continuation: is not.
    """
    if not context:
        ids = encode(continuation)
        ids = ids[len(prefix) :] if ids[: len(prefix)] == list(prefix) else ids
        return list(prefix), ids
    bare = context.rstrip()
    whole = encode(context + continuation)
    num_context = len(encode(bare))
    return whole[:num_context], whole[num_context:]


def cut_left(pair: Pair, limit: int) -> Pair:
    """Return `pair` without the beginning of its context, so that both have at most `limit` tokens together."""
    context, continuation = pair
    excess = len(context) + len(continuation) - limit
    if excess <= 0:
        return pair
    if excess < len(context):
        return context[excess:], continuation
    kept = continuation[-limit:]
    return kept[:1], kept[1:]


def rolling_windows(ids: Sequence[int], prefix: int, limit: int) -> list[Pair]:
    """Return (context, tokens to score) such that each of `ids` is scored once, after as much as the windows allow.

    The first window begins with `prefix`; a last one that is short takes tokens before it as its context.

    Args:
        ids: of the text, without bos.
        prefix: the token that the first is scored after.
        limit: tokens of a window, context and scored ones together.
    """
    if not ids:
        return []
    room = limit - 1
    windows = [([prefix], list(ids[:room]))]
    for start in range(room, len(ids), room):
        stop = min(start + room, len(ids))
        windows.append((list(ids[stop - room - 1 : start]), list(ids[start:stop])))
    return windows
