"""Types and factors: nothing that need not change changes, and nothing becomes infinite in silence."""

import numpy as np
import pytest

from minicpm.errors import CheckpointError
from minicpm.exchange import recast as module
from minicpm.exchange.recast import recast
from minicpm.formats.weight import Weight


def weight(values: np.ndarray, block_type: str = "F32") -> Weight:
    return Weight.from_array(values.astype(np.float32), block_type)


def test_what_stays_is_the_same_object() -> None:
    source = weight(np.ones((3, 4)), "BF16")
    assert recast("w", source, "BF16") is source


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    source = weight(np.random.default_rng(0).normal(size=(37, 64)))
    whole = recast("w", source, "Q4_0", 1.7)
    monkeypatch.setattr(module, "PIECE", 200)
    assert np.array_equal(recast("w", source, "Q4_0", 1.7).data, whole.data)


def test_the_product_is_rounded_once() -> None:
    values = np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32)
    half = weight(values, "BF16")
    exact = half.decode() * np.float32(12)
    assert np.array_equal(recast("w", half, "F32", 12.0).decode(), exact)
    assert np.array_equal(recast("w", half, "BF16", 12.0).data, weight(exact, "BF16").data)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    values = np.ones((4, 32), np.float32)
    values[2, 5] = bad
    with pytest.raises(CheckpointError, match=r"^w holds .*(nan|inf) at row 2, column 5"):
        recast("w", weight(values), "BF16")


def test_large_finite_values_pass() -> None:
    values = np.full((2, 32), 3e38, np.float32)
    assert np.isfinite(recast("w", weight(values), "BF16").decode()).all()


def test_overflow_of_half_precision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.ones((4, 32), np.float32)
    values[3, 7] = 1e5
    monkeypatch.setattr(module, "PIECE", 32)
    with pytest.raises(CheckpointError, match=r"^w .*(fp16|F16)"):
        recast("w", weight(values), "F16")
