"""Scores of rows -> figures with standard errors, and the difference of two runs on the same rows.

Source: standard errors as in Miller, "Adding Error Bars to Evals", arXiv:2411.00640, sections 2 and 4; the exact paired
test is McNemar's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A metric over rows: its value, its standard error (nan for a single row), and the number of rows."""

    metric: str
    value: float
    stderr: float
    num_rows: int


@dataclass(frozen=True)
class Difference:
    """What changed from A to B on the same rows: B - A, its standard error, and the probability of it by chance."""

    metric: str
    difference: float
    stderr: float
    p_value: float
    num_rows: int


def mean(metric: str, values: Sequence[float]) -> Figure:
    """Return the mean of `values` and its standard error."""
    count = len(values)
    middle = math.fsum(values) / count
    if count < 2:
        return Figure(metric, middle, math.nan, count)
    variance = math.fsum((value - middle) ** 2 for value in values) / (count - 1)
    return Figure(metric, middle, math.sqrt(variance / count), count)


def perplexity(metric: str, logprobs: Sequence[float], weights: Sequence[float], *, is_bits: bool = False) -> Figure:
    """Return exp(-sum of `logprobs` / sum of `weights`), or the exponent in bits, and its standard error.

    The error is that of a ratio of two sums over rows, to first order.
    """
    count, total = len(logprobs), math.fsum(weights)
    rate = -math.fsum(logprobs) / total
    stderr = math.nan
    if count > 1:
        squares = math.fsum((-logprob - rate * weight) ** 2 for logprob, weight in zip(logprobs, weights, strict=True))
        stderr = math.sqrt(squares * count / (count - 1)) / total
    if is_bits:
        return Figure(metric, rate / math.log(2), stderr / math.log(2), count)
    value = math.exp(min(rate, 700.0))
    return Figure(metric, value, stderr * value, count)


def compare(metric: str, a: Sequence[float], b: Sequence[float]) -> Difference:
    """Return the paired difference of two runs on the same rows.

    Where every value is 0 or 1 the probability is McNemar's exact one, else that of a normal mean difference.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    figure = mean(metric, differences)
    if set(a) | set(b) <= {0.0, 1.0}:
        won, lost = differences.count(1.0), differences.count(-1.0)
        p_value = _sign_test(won, lost)
    elif figure.stderr and not math.isnan(figure.stderr):
        p_value = math.erfc(abs(figure.value) / figure.stderr / math.sqrt(2))
    else:
        p_value = 1.0 if figure.value == 0 or math.isnan(figure.stderr) else 0.0
    return Difference(metric, figure.value, figure.stderr, p_value, figure.num_rows)


def _sign_test(won: int, lost: int) -> float:
    total, few = won + lost, min(won, lost)
    if total == 0:
        return 1.0
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(few + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))
