"""What a model will see, for people: text with the borders of documents and the supervised tokens in colour.

What this leaves out: the terminal (the caller says whether there is colour), and files.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minicpm.data.batches import IGNORED, Batch, BatchStream
from minicpm.data.mixture import Mix, Span, StageMixture
from minicpm.data.rows import label, read_examples
from minicpm.data.shards import TokenShards
from minicpm.data.sources import read_documents
from minicpm.data.tokenization import document_ends
from minicpm.errors import ConfigError
from minicpm.tokenizer import LabelledRow, Tokenizer
from minicpm.tokenizer.chat import TrainedTurns
from minicpm.tokenizer.fingerprint import fingerprint

_RESET, _DIM, _TRAINED, _BORDER = "\x1b[0m", "\x1b[2m", "\x1b[32m", "\x1b[1;36m"
# Two shades, in turns, so that where one token ends and the next begins can be seen.
_TRAINED_OTHER, _DIM_OTHER = "\x1b[92m", "\x1b[2;4m"
# What a corpus holds must not move the cursor: control characters are shown as their pictures.
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def preview_shards(
    tokenizer: Tokenizer,
    path: Path,
    sequence_length: int,
    seed: int,
    first_row: int,
    num_rows: int,
    *,
    has_colour: bool = True,
) -> Iterator[str]:
    """Yield the rows of shards as a run of these alone would see them.

    Raises:
        DataError: the shards are damaged, or were made with another tokenizer.
    """
    name = path.name or "data"
    shards = TokenShards.open(path, fingerprint(tokenizer))
    mixture = StageMixture((Mix(name, 1.0),))
    stream = BatchStream([Span(0, mixture)], {name: shards}, sequence_length, seed=seed)
    plan = stream.order.plans[0]
    fill = 100 * plan.tokens_per_row / sequence_length
    lost = f", {plan.num_cut} documents cut, {plan.num_dropped} dropped" if plan.num_cut or plan.num_dropped else ""
    yield (
        f"{shards.num_documents:,} documents, {shards.num_tokens:,} tokens, {plan.num_rows:,} rows of "
        f"{sequence_length}, {fill:.1f} % full{lost}"
    )
    yield from show_batch(tokenizer, stream.batch(first_row, num_rows), has_colour=has_colour)


def preview_rows(
    tokenizer: Tokenizer, source: str, trained_turns: TrainedTurns, num_rows: int, *, has_colour: bool = True
) -> Iterator[str]:
    """Yield conversations with their supervised tokens, after a line about all of them.

    Raises:
        DataError: no row can be used; names file, line and field.
    """
    examples, report = read_examples([source], drops_bad=True)
    yield report.summary()
    for example in examples[:num_rows]:
        row = label(tokenizer, example, trained_turns)
        yield show_row(tokenizer, row, f"{example.where} · {example.shape}", has_colour=has_colour)


def preview_text(
    tokenizer: Tokenizer, source: str, field: str, num_documents: int, *, has_colour: bool = True
) -> Iterator[str]:
    """Yield documents as they will be tokenized.

    Raises:
        DataError: the source cannot be read; names file, line and field.
    """
    if num_documents < 1:
        raise ConfigError(f"at least 1 row can be shown, not {num_documents}")
    bos, eos = document_ends(tokenizer)
    for document in islice(read_documents(source, field), num_documents):
        ids = [*([] if bos is None else [bos]), *tokenizer.encode(document.text), eos]
        row = LabelledRow(ids, [i > 0 or bos is None for i in range(len(ids))])
        yield show_row(tokenizer, row, document.where, has_colour=has_colour)


def show_tokens(tokenizer: Tokenizer, ids: list[int], is_trained: list[bool], *, has_colour: bool = True) -> str:
    """Return the tokens as text; supervised ones green, the rest faint, or in ⟦ ⟧ where there is no colour."""
    parts: list[str] = []
    was_trained = False
    pending: list[int] = []

    def flush(index: int) -> None:
        # Bytes of one character are spread over several tokens: they are decoded together.
        text = b"".join(tokenizer.token_bytes(i) for i in pending).decode("utf-8", "replace").translate(_VISIBLE)
        pending.clear()
        if has_colour:
            colours = (_TRAINED, _TRAINED_OTHER) if was_trained else (_DIM, _DIM_OTHER)
            parts.append(f"{colours[index % 2]}{text}{_RESET}")
        else:
            parts.append(text)

    for index, (token_id, trained) in enumerate(zip(ids, is_trained, strict=True)):
        if trained != was_trained:
            if pending:
                flush(index)
            if not has_colour:
                parts.append("⟦" if trained else "⟧")
            was_trained = trained
        pending.append(token_id)
        if not _is_cut(b"".join(tokenizer.token_bytes(i) for i in pending)):
            flush(index)
    if pending:
        flush(0)
    if was_trained and not has_colour:
        parts.append("⟧")
    return "".join(parts)


def show_row(tokenizer: Tokenizer, row: LabelledRow, title: str, *, has_colour: bool = True) -> str:
    """Return one conversation with its targets, under a line that says where it is from and how much of it counts."""
    share = 100 * row.num_trained / max(len(row.ids), 1)
    head = f"── {title} · {len(row.ids)} tokens, {row.num_trained} supervised ({share:.0f} %)"
    return f"{_border(head, has_colour)}\n{show_tokens(tokenizer, row.ids, row.is_trained, has_colour=has_colour)}"


def show_batch(tokenizer: Tokenizer, batch: Batch, *, has_colour: bool = True) -> Iterator[str]:
    """Yield each segment of a batch under a line that says which document of which source it is."""
    row = -1
    for ref in batch.references:
        if ref.row != row:
            row = ref.row
            used = int((batch.document_ids[row] >= 0).sum())
            yield _border(f"═══ row {batch.first_row + row} · {used} of {batch.input_ids.shape[1]} tokens", has_colour)
        span = slice(ref.column, ref.column + ref.length)
        ids, targets = batch.input_ids[row, span], batch.targets[row, span]
        at = f", from token {ref.offset}" if ref.offset else ""
        head = f"── {ref.source} · document {ref.document}{at} · {ref.length} tokens · epoch {ref.epoch + 1}"
        yield _border(head, has_colour)
        yield show_tokens(tokenizer, *_with_last(ids, targets), has_colour=has_colour)


def _with_last(ids: NDArray[np.int64], targets: NDArray[np.int64]) -> tuple[list[int], list[bool]]:
    # A token is supervised as the target of the one before it; the last target is no input of this segment.
    trained = [False, *(targets != IGNORED).tolist()]
    return [*ids.tolist(), int(targets[-1])] if trained[-1] else ids.tolist(), trained if trained[-1] else trained[:-1]


def _is_cut(data: bytes) -> bool:
    """Whether `data` ends within a character, which the next token may complete."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return needed > back
    return False


def _border(text: str, has_colour: bool) -> str:
    return f"{_BORDER}{text}{_RESET}" if has_colour else text
