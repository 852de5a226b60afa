import numpy as np
import pytest

from minicpm.errors import FormatError
from minicpm.formats import names
from minicpm.formats.weight import Weight

VALUES = np.random.default_rng(0).standard_normal((3, 4, 64), np.float32)


def test_shapes_rows_and_bytes() -> None:
    weight = Weight.from_array(VALUES, "Q8_0")
    assert (weight.shape, weight.num_rows, weight.num_weights, weight.num_bytes) == (
        (3, 4, 64),
        12,
        768,
        768 // 32 * 34,
    )
    np.testing.assert_allclose(weight.decode(), VALUES, atol=0.02)
    np.testing.assert_array_equal(weight.decode_rows(3, 5), weight.decode().reshape(12, 64)[3:5])
    vector = Weight.from_array(VALUES[0, 0])
    assert vector.data.shape == (1, 256)
    assert np.array_equal(vector.decode(), VALUES[0, 0])


def test_another_type_and_the_same() -> None:
    weight = Weight.from_array(VALUES, "F32")
    assert weight.encode("F32") is weight
    assert np.array_equal(weight.encode("F16").decode(), VALUES.astype(np.float16).astype(np.float32))


def test_taking_rows_rounds_nothing() -> None:
    weight = Weight.from_array(VALUES[0].repeat(6, axis=0), "Q4_0")
    order = names.interleaved_order(3, 8)
    taken = weight.take_rows(order)
    assert np.array_equal(taken.data, weight.data[order])
    assert np.array_equal(taken.take_rows(names.rotate_half_order(3, 8)).data, weight.data)


def test_data_must_fit_shape_and_type() -> None:
    with pytest.raises(
        FormatError, match=r"a Q8_0 tensor of shape \(2, 64\) takes uint8 \(2, 68\), got uint8 \(2, 64\)"
    ):
        Weight("Q8_0", (2, 64), np.zeros((2, 64), np.uint8))
    with pytest.raises(FormatError, match="got float32"):
        Weight("F32", (2, 4), np.zeros((2, 16), np.float32))
    with pytest.raises(FormatError, match="at least one axis"):
        Weight.from_array(np.float32(1).reshape(()))
