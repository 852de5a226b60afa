"""One step as arrays: the rows of all its chunks, and which of their outputs are wanted.

Left out: choosing the chunks (`scheduler.py`) and reading the outputs (`engine.py`).
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from minicpm.engine.scheduler import Chunk

Ints: TypeAlias = npt.NDArray[np.int32]
Floats: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]


class StepDecoder(Protocol):
    """What the engine needs of a `Decoder`."""

    def step(
        self,
        tokens: Ints,
        positions: Ints,
        sequences: Ints,
        block_tables: Ints,
        output_rows: Ints,
        outputs: Literal["logits", "hidden"] = "logits",
    ) -> Floats:
        """Compute rows of several sequences."""
        ...

    def pack(self) -> bool:
        """Make everything ready that steps would otherwise make ready on their way."""
        ...

    @property
    def cache_layout(self) -> str:
        """What the bytes of a block mean."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        ...

    def read_blocks(self, blocks: Ints) -> Bytes:
        """Return cache blocks."""
        ...

    def write_blocks(self, blocks: Ints, data: Bytes) -> None:
        """Fill cache blocks."""
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy a cache block into another."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """N rows of a step and the M rows among them whose outputs are wanted; the legend is that of `Decoder.step`.

    `num_outputs` says how many of the M belong to each chunk: they are its last rows.
    """

    chunks: Items[Chunk]
    tokens: Ints
    positions: Ints
    sequences: Ints
    output_rows: Ints
    num_outputs: Items[int]
    wants_hidden: bool


def build_batch(chunks: Items[Chunk]) -> Batch:
    """Return the arrays of `chunks`, one after another."""
    tokens: list[int] = []
    positions: list[int] = []
    sequences: list[int] = []
    output_rows: list[int] = []
    num_outputs = []
    for chunk in chunks:
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        stop = start + chunk.num_tokens
        tokens += sequence.token_ids[start:stop]
        tokens += chunk.drafts
        positions += range(start, stop + len(chunk.drafts))
        sequences += [sequence.slot] * (chunk.num_tokens + len(chunk.drafts))
        num_wanted = _num_wanted(chunk, start, stop) + len(chunk.drafts)
        num_outputs.append(num_wanted)
        output_rows += range(len(tokens) - num_wanted, len(tokens))
    return Batch(
        chunks=chunks,
        tokens=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        sequences=np.array(sequences, np.int32),
        output_rows=np.array(output_rows, np.int32),
        num_outputs=num_outputs,
        wants_hidden=chunks[0].sequence.wants_hidden,
    )


def _num_wanted(chunk: Chunk, start: int, stop: int) -> int:
    sequence = chunk.sequence
    if sequence.reads_every_row and sequence.num_read < sequence.num_prompt_tokens:
        return stop - max(start, min(sequence.num_read, stop))
    return 1 if stop == len(sequence.token_ids) else 0
