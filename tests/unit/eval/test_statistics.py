"""Figures and differences against numbers worked by hand and by scipy's formulas."""

from __future__ import annotations

import math

import pytest

from minicpm.eval.statistics import compare, mean, perplexity


def test_mean() -> None:
    figure = mean("acc", [1, 0, 0, 1])
    assert figure.value == 0.5
    assert figure.stderr == pytest.approx(math.sqrt(1 / 3 / 4))
    assert math.isnan(mean("acc", [1]).stderr)


def test_perplexity() -> None:
    figure = perplexity("perplexity", [-1.0, -3.0], [1, 1])
    assert figure.value == pytest.approx(math.exp(2))
    assert figure.stderr == pytest.approx(math.exp(2) * 1.0)
    bits = perplexity("bits_per_byte", [-4 * math.log(2), -4 * math.log(2)], [4, 4], is_bits=True)
    assert (bits.value, bits.stderr) == (pytest.approx(1), pytest.approx(0))
    # A row twice as long counts twice.
    assert perplexity("p", [-1.0, -6.0], [1, 2]).value == pytest.approx(math.exp(7 / 3))


def test_an_impossible_text_has_a_finite_perplexity() -> None:
    assert math.isfinite(perplexity("perplexity", [-1e6], [1]).value)


def test_paired_difference() -> None:
    a, b = [1.0] * 10 + [0.0] * 10, [1.0] * 9 + [0.0] + [1.0] * 8 + [0.0] * 2
    difference = compare("acc", a, b)
    assert difference.difference == pytest.approx(7 / 20)
    # McNemar, exact: 8 won, 1 lost: 2 * (1 + 9) / 2**9.
    assert difference.p_value == pytest.approx(2 * 10 / 512)
    assert compare("acc", a, a).p_value == 1
    graded = compare("logprob", [1.0, 2.0, 3.0], [1.5, 2.4, 3.6])
    assert graded.p_value < 1e-6
    assert compare("logprob", [1.0, 2.0], [1.0, 2.0]).p_value == 1
