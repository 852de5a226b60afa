"""Conversations as token shards with a mask of targets, to be mixed into pretraining like any other source.

What this leaves out: the shapes of rows (`row_formats`) and what is a target (`minicpm.tokenizer.chat`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minicpm.data.atomic import new_folder
from minicpm.data.row_formats import Example
from minicpm.data.rows import label, read_examples
from minicpm.data.shard_writer import ShardWriter
from minicpm.data.tokenization import TokenizeConfig, shard_facts
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.chat import TrainedTurns

_BATCH_ROWS = 4096


def tokenize_rows(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    out: Path,
    *,
    trained_turns: TrainedTurns = "last",
    drops_bad: bool = False,
    replaces: bool = False,
) -> dict[str, Any]:
    """Write the conversations of `sources` as shards with masks to folder `out`, and return its manifest.

    Args:
        sources: files, folders, globs or data sets of conversations; see `row_formats`.
        tokenizer: whose ids and chat template.
        out: a new folder.
        trained_turns: whether the last answer or all of them are targets.
        drops_bad: whether bad rows are dropped and counted.
        replaces: whether a folder that is there already is replaced.

    Raises:
        DataError: a row cannot be used, or `out` exists; nothing is left behind.
    """
    examples, report = read_examples(sources, "conversation", drops_bad=drops_bad)
    facts = shard_facts(sources, tokenizer, TokenizeConfig())
    facts |= {"shapes": dict(report.shapes), "num_dropped_rows": len(report.bad)}
    return write_rows(examples, tokenizer, out, facts, trained_turns=trained_turns, replaces=replaces)


def write_rows(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    out: Path,
    facts: Mapping[str, Any],
    *,
    trained_turns: TrainedTurns = "last",
    replaces: bool = False,
) -> dict[str, Any]:
    """Write conversations as shards with masks to folder `out`, and return its manifest, which holds `facts` too.

    Raises:
        DataError: a row cannot be used, or `out` exists; nothing is left behind.
    """
    began = time.perf_counter()
    text_hash = hashlib.sha256()
    num_targets = 0
    with new_folder(out, replaces=replaces) as folder:
        writer = ShardWriter(folder, tokenizer.vocab_size, is_supervised=True)
        try:
            for first in range(0, len(examples), _BATCH_ROWS):
                part = examples[first : first + _BATCH_ROWS]
                rows = [label(tokenizer, example, trained_turns) for example in part]
                texts = [example.text.encode("utf-8", "replace") for example in part]
                for text in texts:
                    text_hash.update(text + b"\0")
                masks = np.concatenate([np.array(row.is_trained, np.uint8) for row in rows])
                writer.add(
                    np.concatenate([np.array(row.ids, np.uint32) for row in rows]),
                    np.fromiter((len(row.ids) for row in rows), np.int64, len(rows)),
                    np.fromiter(map(len, texts), np.int64, len(texts)),
                    masks,
                )
                num_targets += int(masks.sum())
        finally:
            writer.close()
        added = {
            "source_hash": text_hash.hexdigest(),
            "trained_turns": trained_turns,
            "num_targets": num_targets,
            "tokens_per_second": round(writer.num_tokens / max(time.perf_counter() - began, 1e-9)),
        }
        return writer.finish({**facts, **added})
