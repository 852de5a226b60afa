"""Text for calibration and for judging: conversations in the model's own template, as packed windows of token ids.

Rows are laid one behind another into windows of one length; each attends to itself only. Without a file the rows are
questions about Python's standard library, answered by its own documentation strings: every installation has them.
What this leaves out: the layouts in which people keep conversations (`minicpm.data`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minicpm.data.row_formats import shape_of
from minicpm.data.rows import label, read_examples
from minicpm.data.sources import read_documents, read_source_rows
from minicpm.errors import DataError
from minicpm.tokenizer import Tokenizer

MIN_ROWS = 32
DEFAULT_SOURCE = "stdlib:docs"
_QUESTION = "What does the documentation of Python's {} say?"
_ANSWER_CHARACTERS = 1500


@dataclass(frozen=True)
class Windows:
    """Packed text.

    Attributes:
        ids: int64 (B, T).
        document_ids: int64 (B, T); a row of text is an unbroken run of one number.
        num_rows: how many rows of text there were.
        origin: where they are from, for people.
    """

    ids: Tensor
    document_ids: Tensor
    num_rows: int
    origin: str

    @property
    def num_tokens(self) -> int:
        """How many tokens there are."""
        return self.ids.numel()

    @property
    def is_scored(self) -> Tensor:
        """Which positions predict a token of their own row: bool (B, T - 1)."""
        return self.document_ids[:, 1:] == self.document_ids[:, :-1]


def read_token_rows(tokenizer: Tokenizer, source: str, *, is_plain: bool = False) -> list[list[int]]:
    """Return the ids of every row of `source`, in its order.

    Args:
        tokenizer: the model's.
        source: conversations in any shape that `minicpm data` knows, or text; `stdlib:docs` becomes conversations.
        is_plain: whether conversations too are taken as text without a template.

    Raises:
        DataError: nothing can be read, or a row is broken.
    """
    if source.startswith("stdlib:"):
        return [tokenizer.apply_chat(row, add_generation_prompt=False) for row in _questions(source)]
    if _holds_conversations(source):
        examples, _ = read_examples([source])
        if is_plain:
            texts = ("\n\n".join(str(message["content"]) for message in example.messages) for example in examples)
            return [tokenizer.add_bos(tokenizer.encode(text)) for text in texts]
        return [label(tokenizer, example).ids for example in examples]
    return [tokenizer.add_bos(tokenizer.encode(document.text)) for document in read_documents(source)]


def _holds_conversations(source: str) -> bool:
    first = next(iter(read_source_rows(source)), None)
    return first is not None and shape_of(first.value) is not None


def _questions(source: str) -> list[list[dict[str, str]]]:
    rows = []
    for document in read_documents(source):
        # A module's documentation is "name", blank line, text, and so on for each of its parts.
        name, _, text = document.text.partition("\n\n")
        if text and len(name) < 60 and "\n" not in name:
            answer = text[:_ANSWER_CHARACTERS].strip()
            rows.append([{"role": "user", "content": _QUESTION.format(name)}, {"role": "assistant", "content": answer}])
    return rows


def split_rows(rows: Sequence[list[int]], seed: int, heldout_share: float) -> tuple[list[list[int]], list[list[int]]]:
    """Return two disjoint parts of `rows`, shuffled by `seed`; the second has `heldout_share` of them."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    num_heldout = round(len(rows) * heldout_share)
    return [rows[i] for i in order[num_heldout:]], [rows[i] for i in order[:num_heldout]]


def check_rows(rows: Sequence[list[int]], source: str, minimum: int = MIN_ROWS) -> None:
    """Return when there is enough text.

    Raises:
        DataError: fewer than `minimum` rows with at least two tokens.
    """
    num_usable = sum(len(row) > 1 for row in rows)
    if num_usable < minimum:
        raise DataError(
            f"{source} has {num_usable} rows of text; calibration needs at least {minimum}, hundreds are better"
        )


def pack(rows: Sequence[list[int]], origin: str, length: int, num_windows: int) -> Windows:
    """Return at most `num_windows` windows of `length` tokens, filled with `rows` in order; rows are cut at the end.

    No row takes more than a quarter of all windows' tokens, so that one long text cannot be all there is.

    Raises:
        DataError: not a single token to score.
    """
    longest = max(2, length * num_windows // 4)
    ids: list[int] = []
    document_ids: list[int] = []
    num_used = 0
    for row in rows:
        if len(row) < 2 or len(ids) >= length * num_windows:
            continue
        ids += row[:longest]
        document_ids += [num_used] * len(row[:longest])
        num_used += 1
    if len(ids) < 2:
        raise DataError(f"{origin} has no row of at least two tokens; give more text")
    length = min(length, len(ids))
    count = min(num_windows, len(ids) // length)
    shape, end = (count, length), count * length
    return Windows(torch.tensor(ids[:end]).view(shape), torch.tensor(document_ids[:end]).view(shape), num_used, origin)


def pack_evenly(texts: Mapping[str, Sequence[list[int]]], length: int, num_windows: int) -> Windows:
    """Return windows of several texts' rows, by name: each text fills as many, as far as its rows reach.

    Raises:
        DataError: a text without a token to score, or more texts than windows.
    """
    if len(texts) > num_windows:
        raise DataError(f"{len(texts)} texts do not fit {num_windows} windows; allow at least one for each")
    shares = [num_windows // len(texts) + (index < num_windows % len(texts)) for index in range(len(texts))]
    packed = [pack(rows, name, length, share) for (name, rows), share in zip(texts.items(), shares, strict=True)]
    length = min(windows.ids.shape[1] for windows in packed)
    return Windows(
        torch.cat([windows.ids[:, :length] for windows in packed]),
        torch.cat([windows.document_ids[:, :length] for windows in packed]),
        sum(windows.num_rows for windows in packed),
        ", ".join(texts),
    )


def document_rows(windows: Windows) -> list[list[int]]:
    """Return the ids of every row of text in `windows`, as far as they hold it."""
    ids, numbers = windows.ids.flatten(), windows.document_ids.flatten()
    borders = (numbers[1:] != numbers[:-1]).nonzero()[:, 0] + 1
    return [row.tolist() for row in ids.tensor_split(borders)]
