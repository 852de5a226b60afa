"""Block types: sizes, errors, what is refused. Parity with other implementations is in tests/parity."""

import numpy as np
import pytest

from minicpm.errors import FormatError
from minicpm.formats import blocks
from minicpm.formats.blocks import BLOCK_TYPES

SCALED = [name for name, kind in BLOCK_TYPES.items() if kind.block_size > 1]
# Relative root-mean-square error on normal weights, measured and rounded up by a fifth.
ERRORS = {
    "F32": 0, "F16": 2.5e-4, "BF16": 2e-3, "Q8_0": 6.6e-3, "Q4_0": 0.104, "Q4_1": 0.094, "Q5_0": 0.052, "Q5_1": 0.046,
    "Q4_K": 0.086, "Q5_K": 0.044, "Q6_K": 0.0213,
}  # fmt: skip


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_error_of_rounding_is_that_of_the_type(name: str) -> None:
    values = normal((40, 768))
    error = np.sqrt(np.mean((blocks.decode(name, blocks.encode(name, values)) - values) ** 2))
    assert error <= ERRORS[name]
    assert error >= ERRORS[name] / 2


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rounding_twice_changes_nothing_in_types_that_hold_their_own_levels(name: str) -> None:
    once = blocks.decode(name, blocks.encode(name, normal((8, 512), 1)))
    twice = blocks.decode(name, blocks.encode(name, once))
    if name in ("F32", "F16", "BF16"):
        assert np.array_equal(once, twice)
    else:
        # The scale itself is rounded to half precision, so a block may move by one part in 2^10, not by a level.
        assert np.abs(once - twice).max() < ERRORS[name]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_pieces_and_strides_make_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal((31, 512), 2)
    data = blocks.encode(name, values)
    wide = np.zeros((31, data.shape[1] + 3), np.uint8)
    wide[:, 1:-2] = data
    decoded = blocks.decode(name, data)
    monkeypatch.setattr(blocks, "PIECE", 1000)
    assert np.array_equal(blocks.encode(name, values.astype(np.float64)), data)
    assert np.array_equal(blocks.encode(name, np.asfortranarray(values)), data)
    assert np.array_equal(blocks.decode(name, wide[:, 1:-2]), decoded)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_zeros_constants_and_empties(name: str) -> None:
    width = BLOCK_TYPES[name].block_size
    assert not blocks.decode(name, blocks.encode(name, np.zeros((2, width), np.float32))).any()
    for constant in (0.5, -0.5):
        values = np.full((1, width), constant, np.float32)
        np.testing.assert_allclose(blocks.decode(name, blocks.encode(name, values)), values, rtol=1e-3)
    assert blocks.decode(name, np.empty((0, BLOCK_TYPES[name].block_bytes), np.uint8)).shape == (0, width)
    assert blocks.encode(name, np.empty((3, 0), np.float32)).shape == (3, 0)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_block_type_refuses_what_would_decode_to_nonsense(name: str, bad: float) -> None:
    values = normal((3, 512))
    values[1, 300] = bad
    with pytest.raises(FormatError, match=rf"NaN, infinite or need a scale beyond 65504 cannot be stored as {name}"):
        blocks.encode(name, values)


@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_float_types_keep_what_is_not_finite(name: str) -> None:
    values = np.array([[np.nan, np.inf, -np.inf, -0.0]], np.float32)
    decoded = blocks.decode(name, blocks.encode(name, values))
    np.testing.assert_array_equal(decoded, values)
    assert np.signbit(decoded[0, 3])


def test_bf16_rounds_to_even_and_keeps_a_nan_of_low_bits() -> None:
    bits = np.array([[0x3F808000, 0x3F818000, 0x7F800001, 0x7F7FFFFF]], np.uint32)
    halves = blocks.encode("BF16", bits.view(np.float32)).view(np.uint16)[0]
    assert halves.tolist()[:2] == [0x3F80, 0x3F82]
    assert np.isnan(blocks.decode("BF16", halves.view(np.uint8)[None])[0, 2])
    assert halves[3] == 0x7F80  # beyond the largest bf16


def test_sub_blocks_of_opposite_signs_and_single_outliers() -> None:
    values = np.zeros((2, 256), np.float32)
    values[0, 7], values[0, 200], values[1, :32] = -3.0, 1.5, np.linspace(1, 2, 32)
    for name in ("Q4_K", "Q5_K", "Q6_K"):
        decoded = blocks.decode(name, blocks.encode(name, values))
        assert np.abs(decoded - values).max() < 0.06, name


def test_rows_that_are_no_whole_blocks() -> None:
    with pytest.raises(FormatError, match="a row of 33 weights cannot be stored as Q4_0: no multiple of 32"):
        blocks.encode("Q4_0", np.zeros((1, 33), np.float32))
    with pytest.raises(FormatError, match="a row of 19 bytes is no multiple of Q4_0's 18 bytes a block"):
        blocks.decode("Q4_0", np.zeros((1, 19), np.uint8))


def test_an_unknown_type_names_the_known() -> None:
    with pytest.raises(FormatError, match="'Q3_K' is unknown; known: F32, F16, BF16, Q8_0"):
        blocks.decode("Q3_K", np.zeros((1, 110), np.uint8))
