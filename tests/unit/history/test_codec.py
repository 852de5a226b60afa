"""The codec: every bit comes back, base layers chain, damage is named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minicpm.errors import CheckpointError
from minicpm.history.codec import Cells, chunk_rows, decode, encode

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40)
BITS = {"uint16": np.uint16, "float32": np.uint32}


def bits(cells: Cells) -> Cells:
    return cells.view(BITS[cells.dtype.name])


@st.composite
def histories(draw: st.DrawFn) -> list[Cells]:
    """Any bits, and neighbours of them."""
    dtype = draw(st.sampled_from(sorted(BITS)))
    shape = draw(SHAPES)
    first = draw(hnp.arrays(BITS[dtype], shape))
    steps = [draw(hnp.arrays(np.uint8, shape)) for _ in range(draw(st.integers(0, 3)))]
    frames = [first]
    for step in steps:
        frames.append(frames[-1] ^ step.astype(first.dtype))
    return [frame.view(dtype) for frame in frames]


@settings(max_examples=150, deadline=None)
@given(histories())
def test_every_bit_comes_back_and_base_layers_chain(frames: list[Cells]) -> None:
    previous = behind = None
    for cells in frames:
        coded = encode(cells, previous)
        whole, after = decode(coded.header, coded.base, coded.refinement, behind)
        np.testing.assert_array_equal(bits(whole), bits(cells))
        base, after_base = decode(coded.header, coded.base, None, behind)
        for other in (base, after.base, after_base.base):
            np.testing.assert_array_equal(bits(other), bits(coded.reference.base))
        previous, behind = coded.reference, after


def test_some_rows() -> None:
    cells = np.random.default_rng(0).integers(0, 1 << 16, (3000, 700)).astype(np.uint16)
    first = encode(cells ^ 3, None)
    coded = encode(cells, first.reference)
    rows = chunk_rows(coded.header)
    assert [r.stop for r in rows[:-1]] == [r.start for r in rows[1:]]
    assert rows[-1].stop == 3000
    part = slice(rows[1].start, rows[2].stop)
    whole, _ = decode(coded.header, coded.base[1:3], coded.refinement[1:3], first.reference.rows(part), part)
    np.testing.assert_array_equal(whole, cells[part])


@pytest.mark.parametrize("layer", ["base", "refinement"])
def test_a_flipped_bit_is_named(layer: str) -> None:
    coded = encode(np.arange(5000, dtype=np.uint16).reshape(50, 100), None)
    chunks = {"base": list(coded.base), "refinement": list(coded.refinement)}
    damaged = bytearray(chunks[layer][0])
    damaged[len(damaged) // 2] ^= 4
    chunks[layer][0] = bytes(damaged)
    with pytest.raises(CheckpointError, match="chunk 0 of the"):
        decode(coded.header, chunks["base"], chunks["refinement"], None)
