"""The codec: every bit comes back, base layers chain, damage is named."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minicpm.errors import CheckpointError
from minicpm.history.codec import Cells, Reference, chunk_rows, decode, encode
from minicpm.history.frame import Chunk, Header, Layout

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


@settings(max_examples=60, deadline=None)
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


def test_what_no_longer_changes_costs_nothing_and_damage_to_its_header_is_seen() -> None:
    values = np.random.default_rng(5).standard_normal((700, 300), np.float32)
    cells = (values.view(np.uint32) >> 16).astype(np.uint16)
    cells[0] = 0x3F80
    frames = [encode(cells, None)]
    for _ in range(5):
        frames.append(encode(cells, frames[-1].reference))
    first, again = frames[-2:]
    # Small values in the middle of a row keep open bits.
    assert sum(map(len, again.base)) + sum(map(len, again.refinement)) < cells.nbytes / 20
    for at in range(len(again.header)):
        damaged = bytearray(again.header)
        damaged[at] ^= 16
        with pytest.raises(CheckpointError, match=r"header|version"):
            decode(bytes(damaged), again.base, again.refinement, first.reference)


def test_the_base_layer_is_as_close_as_asked() -> None:
    random = np.random.default_rng(1)
    scales = np.exp2(random.uniform(-9, 3, (400, 1))).astype(np.float32)
    values = random.standard_normal((400, 512), np.float32) * scales
    reference = None
    for _ in range(4):
        cells = (values.view(np.uint32) >> 16).astype(np.uint16)
        exact = (cells.astype(np.uint32) << 16).view(np.float32)
        for error in (0.14, 0.07, 0.035):
            base = encode(cells, reference, base_error=error).reference.base
            decoded = (base.astype(np.uint32) << 16).view(np.float32)
            found = np.sqrt(((decoded - exact) ** 2).mean(1) / exact.var(1))
            # The step of a single row is a power of two.
            assert np.sqrt((found**2).mean()) < 1.05 * error
            assert found.max() < 1.5 * error
        reference = encode(cells, reference).reference
        values = values + random.standard_normal(values.shape, np.float32) * scales * np.float32(0.33)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_the_bytes_nothing_but_our_error(data: st.DataObject) -> None:
    cells = np.arange(3000, dtype=np.uint16).reshape(30, 100) * 7
    coded = encode(cells, None)
    header = Header.from_bytes(coded.header)
    chunks = [bytearray(coded.base[0]), bytearray(coded.refinement[0])]
    for chunk in chunks:
        for _ in range(data.draw(st.integers(0, 3))):
            chunk[data.draw(st.integers(0, len(chunk) - 1))] = data.draw(st.integers(0, 255))
        del chunk[data.draw(st.integers(0, len(chunk))) :]
    # Someone who damages on purpose makes the checksums fit.
    base, low = map(bytes, chunks)
    table = [Chunk(len(base), zlib.crc32(base), len(low), zlib.crc32(low))]
    shape = data.draw(st.sampled_from([(30, 100), (31, 100), (30, 1 << 40), (1 << 50, 1)]))
    layout = Layout("uint16", shape)
    forged = dataclasses.replace(header, layout=layout, chunks=table)
    try:
        values, _ = decode(forged.to_bytes(), [base], [low], None)
    except CheckpointError:
        return
    assert values.shape == shape


def test_a_frame_of_another_kind_is_refused() -> None:
    cells = np.arange(600, dtype=np.uint16).reshape(6, 100)
    key = encode(cells, None)
    after = encode(cells + 1, key.reference)
    with pytest.raises(CheckpointError, match="key frame"):
        decode(after.header, after.base, None, None)
    with pytest.raises(CheckpointError, match="key frame"):
        decode(key.header, key.base, None, key.reference)
    with pytest.raises(CheckpointError, match="cannot be decoded from"):
        decode(after.header, after.base, None, Reference(np.zeros((5, 100), np.uint16)))
    with pytest.raises(CheckpointError, match="0 chunks"):
        decode(key.header, [], None, None)
    with pytest.raises(CheckpointError, match="upgrade"):
        decode(key.header[:3] + b"\x02" + key.header[4:], key.base, None, None)
    with pytest.raises(ValueError, match="bf16"):
        encode(np.zeros(3, np.int8), None)
