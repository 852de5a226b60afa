"""Packed matrices of GPTQ and AWQ folders: they mean what their readers make of them, and come back whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minicpm.errors import CheckpointError, ConfigError, FormatError
from minicpm.formats import blocks
from minicpm.formats.int4_folder import Int4Layout
from minicpm.formats.weight import Weight

ROWS, COLUMNS = 24, 384
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where AutoAWQ's kernels look for output i of eight


def matrix(block_type: str, width: int, *, lowest: int = 0) -> Weight:
    """Random levels of 4 bits around a random zero; blocks of a group share the scale."""
    rng = np.random.default_rng(width)
    groups = (ROWS, COLUMNS // width)
    zeros = np.full(groups, 8) if block_type == "Q4_0" else rng.integers(lowest, 16, groups)
    signed = rng.integers(0, 16, (ROWS, COLUMNS)) - np.repeat(zeros, width, axis=1)
    signed[:, ::32], signed[:, 1::32] = (
        -np.repeat(zeros, width // 32, axis=1),
        15 - np.repeat(zeros, width // 32, axis=1),
    )
    scales = np.repeat(rng.normal(size=groups).astype("<f2"), width // 32, axis=1).reshape(-1, 1)
    unit = blocks.encode(block_type, np.zeros((ROWS, COLUMNS), np.float32)).reshape(ROWS * COLUMNS // 32, -1)
    top = {"Q4_0": 8, "Q5_0": 16}[block_type]
    levels = (signed + top).astype(np.uint8).reshape(-1, 32)
    nibbles = (levels[:, :16] & 15) | ((levels[:, 16:] & 15) << 4)
    fifth = np.packbits(levels >> 4, axis=1, bitorder="little")
    parts = [scales.view(np.uint8), *([fifth] if block_type == "Q5_0" else []), nibbles]
    data = np.concatenate(parts, axis=1).reshape(ROWS, -1)
    assert data.size == unit.size
    return Weight(block_type, (ROWS, COLUMNS), data)


def nibble(word: int, place: int) -> int:
    return (int(word) >> (4 * place)) & 15


def by_the_formula(method: str, tensors: dict[str, np.ndarray], shift: int) -> np.ndarray:
    """Each weight by the published rule: scale of its group times level minus zero."""
    weights = np.empty((ROWS, COLUMNS), np.float32)
    groups = tensors["g_idx"] if method == "gptq" else np.arange(COLUMNS) // (COLUMNS // len(tensors["scales"]))
    for row in range(ROWS):
        for column in range(COLUMNS):
            group = groups[column]
            if method == "gptq":
                level = nibble(tensors["qweight"][column // 8, row], column % 8)
                zero = nibble(tensors["qzeros"][group, row // 8], row % 8) + shift
            else:
                level = nibble(tensors["qweight"][column, row // 8], AWQ_PLACES[row % 8])
                zero = nibble(tensors["qzeros"][group, row // 8], AWQ_PLACES[row % 8])
            weights[row, column] = np.float32(tensors["scales"][group, row]) * np.float32(level - zero)
    return weights


@pytest.mark.parametrize(
    ("method", "block_type"), [("gptq", "Q4_0"), ("gptq", "Q5_0"), ("awq", "Q5_0"), ("awq", "Q4_0")]
)
@pytest.mark.parametrize("width", [32, 128])
def test_packed_words_mean_the_weights_and_come_back_to_the_bit(method: str, block_type: str, width: int) -> None:
    layout = Int4Layout.of(method, width)
    weight = matrix(block_type, width, lowest=layout.zero_shift)
    tensors = layout.pack(weight)
    assert {name: (array.dtype.str, array.shape) for name, array in tensors.items()} == {
        name: ({"I32": "<i4", "F16": "<f2"}[dtype], shape)
        for name, (dtype, shape) in layout.tensors(weight.shape).items()
    }
    np.testing.assert_array_equal(by_the_formula(method, tensors, layout.zero_shift), weight.decode())
    entry = layout.entry(tensors, "m")
    assert (entry.shape, entry.block_type) == (weight.shape, block_type)
    np.testing.assert_array_equal(entry.make().data, weight.data)


def test_columns_in_act_order_and_whole_rows_are_read() -> None:
    layout = Int4Layout.of("gptq", 128)
    tensors = layout.pack(matrix("Q4_0", 128))
    order = np.random.default_rng(1).permutation(COLUMNS)
    shuffled = {**tensors, "g_idx": tensors["g_idx"][order]}
    entry = layout.entry(shuffled, "m")
    assert entry.block_type == "F32"
    np.testing.assert_array_equal(entry.make().decode(), by_the_formula("gptq", shuffled, 1))
    whole = Int4Layout.parse({"quant_method": "gptq", "bits": 4, "group_size": -1}, "config.json")
    weight = matrix("Q4_0", COLUMNS)
    tensors = whole.pack(weight)
    assert tensors["scales"].shape == (1, ROWS)
    del tensors["g_idx"]
    np.testing.assert_array_equal(whole.entry(tensors, "m").make().data, weight.data)


def test_the_second_version_of_gptq_keeps_zeros_as_they_are() -> None:
    fields = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    layout = Int4Layout.parse(fields, "config.json")
    weight = matrix("Q5_0", 32)
    tensors = layout.pack(weight)
    np.testing.assert_array_equal(by_the_formula("gptq", tensors, 0), weight.decode())
    np.testing.assert_array_equal(layout.entry(tensors, "m").make().data, weight.data)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_is_written_is_read_as_the_same_layout(method: str) -> None:
    layout = Int4Layout.of(method, 64)
    assert Int4Layout.parse(layout.to_hf(), "config.json") == layout


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "fp8"},
        {"bits": 8},
        {"quant_method": "awq", "version": "gemv"},
        {"checkpoint_format": "marlin"},
        {"group_size": "many"},
    ],
)
def test_other_layouts_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"config.json: quantization_config"):
        Int4Layout.parse({"quant_method": "gptq", "bits": 4, "group_size": 128} | changes, "config.json")


def test_what_does_not_fit_is_refused() -> None:
    layout = Int4Layout.of("gptq", 128)
    with pytest.raises(ConfigError, match="they must divide 96"):
        layout.tensors((32, 96))
    with pytest.raises(ConfigError, match="8 must divide 20"):
        layout.tensors((20, 256))
    with pytest.raises(FormatError, match="several scales in one group of 128"):
        layout.pack(matrix("Q4_0", 32))
    with pytest.raises(FormatError, match="a Q8_0 matrix cannot be packed"):
        layout.pack(Weight.from_array(np.zeros((8, 128), np.float32), "Q8_0"))
    wide = Weight.from_array(np.linspace(-1, 1, 8 * 128, dtype=np.float32).reshape(8, 128), "Q5_0")
    with pytest.raises(FormatError, match=r"need more than 4 bits|several scales"):
        layout.pack(wide)
    tensors = layout.pack(matrix("Q4_0", 128))
    with pytest.raises(CheckpointError, match="m: scales missing"):
        layout.entry({name: array for name, array in tensors.items() if name != "scales"}, "m")
    with pytest.raises(CheckpointError, match=r"m\.qzeros is int32 \(3, 2\), expected int32 \(3, 3\)"):
        layout.entry({**tensors, "qzeros": tensors["qzeros"][:, :2]}, "m")
    with pytest.raises(CheckpointError, match=r"m\.scales is float32"):
        layout.entry({**tensors, "scales": tensors["scales"].astype(np.float32)}, "m")
    with pytest.raises(CheckpointError, match=r"m\.g_idx names groups that are not there"):
        layout.entry({**tensors, "g_idx": tensors["g_idx"] + 1}, "m")
