"""Grids hold what the files hold; error feedback and descent lower what they say they lower."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minicpm.errors import CheckpointError
from minicpm.formats import blocks
from minicpm.quant.grid import GRIDS
from minicpm.quant.layer import RoundingSettings, round_matrix, second_moment
from minicpm.quant.rounding import damped, descend, feed_back, inverse_factor, relative_error, round_nearest

ROWS, COLUMNS = 40, 512


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def hessian() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    spread = torch.rand(COLUMNS, generator=generator).mul(4).exp()
    return second_moment(torch.randn(2048, COLUMNS, generator=generator) @ mixing * spread)


@pytest.mark.parametrize("block_type", GRIDS)
def test_packed_bytes_decode_to_the_weights_that_were_chosen(
    block_type: str, matrix: torch.Tensor, hessian: torch.Tensor
) -> None:
    rounded = feed_back(matrix, block_type, inverse_factor("m", hessian, 0.01))
    descend(matrix, damped(hessian, 0.01), rounded, 1)
    weight = rounded.to_weight()
    assert weight.shape == (ROWS, COLUMNS)
    assert weight.data.shape[1] == blocks.block_type(GRIDS[block_type].block_type).row_bytes(COLUMNS)
    np.testing.assert_allclose(weight.decode(), rounded.columns(0, COLUMNS).T.numpy(), rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    "block_type", ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "GPTQ-128", "AWQ-128", "AWQ-64"]
)
def test_each_step_lowers_the_error_of_the_outputs(
    block_type: str, matrix: torch.Tensor, hessian: torch.Tensor
) -> None:
    def error(weight: np.ndarray) -> float:
        return relative_error(matrix, torch.from_numpy(weight), hessian)

    plain = RoundingSettings("nearest")
    nearest = error(round_matrix("m", matrix, hessian, block_type, plain).weight.decode())
    searched = error(round_nearest(matrix, block_type, hessian.diagonal()).to_weight().decode())
    rounded = feed_back(matrix, block_type, inverse_factor("m", hessian, 0.01))
    fed_back = error(rounded.to_weight().decode())
    descend(matrix, damped(hessian, 0.01), rounded, 2)
    descended = error(rounded.to_weight().decode())
    assert searched < nearest
    assert fed_back < 0.7 * searched
    assert descended < fed_back


def test_weights_on_the_grid_stay_as_they_are(hessian: torch.Tensor) -> None:
    levels = torch.randint(0, 16, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(2)) - 8
    levels[:, ::32] = -8
    exact = levels * 0.0625
    result = round_matrix("m", exact, hessian, "Q4_0", RoundingSettings())
    np.testing.assert_array_equal(result.weight.decode(), exact.numpy())
    assert result.error == 0


def test_columns_that_no_input_touches_are_rounded_too(matrix: torch.Tensor, hessian: torch.Tensor) -> None:
    hessian[5], hessian[:, 5] = 0, 0
    weight = round_matrix("m", matrix, hessian, "Q4_0", RoundingSettings()).weight.decode()
    assert np.abs(weight[:, 5] - matrix[:, 5].numpy()).max() < 0.1


def test_rows_of_zeros_stay_zeros(hessian: torch.Tensor) -> None:
    for block_type in GRIDS:
        weight = round_matrix("m", torch.zeros(3, COLUMNS), hessian, block_type, RoundingSettings()).weight
        assert not weight.decode().any(), block_type


def test_what_is_not_finite_is_named(matrix: torch.Tensor, hessian: torch.Tensor) -> None:
    broken = hessian.clone()
    broken[3, 3] = torch.nan
    with pytest.raises(CheckpointError, match="layer 3: the Hessian of its inputs is not finite"):
        inverse_factor("layer 3", broken, 0.01)
    with pytest.raises(CheckpointError, match="cannot be factored"):
        inverse_factor("layer 3", -torch.eye(8) * 1e3, 0.001)
    matrix[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="m holds NaN or infinity"):
        round_matrix("m", matrix, hessian, "Q4_0", RoundingSettings())


def test_shrinkage_takes_correlations_and_leaves_mean_squares(matrix: torch.Tensor, hessian: torch.Tensor) -> None:
    shrunk = damped(hessian, 0.01, 0.3)
    off = ~torch.eye(COLUMNS, dtype=torch.bool)
    torch.testing.assert_close(shrunk[off], 0.7 * hessian[off])
    torch.testing.assert_close(shrunk.diagonal(), damped(hessian, 0.01).diagonal())
    # Of inputs that are not correlated nothing is left to feed errors back into.
    alone = feed_back(matrix, "Q4_0", inverse_factor("m", hessian, 0.01, 1.0))
    searched = round_nearest(matrix, "Q4_0", damped(hessian, 0.01).diagonal())
    np.testing.assert_array_equal(alone.to_weight().data, searched.to_weight().data)
