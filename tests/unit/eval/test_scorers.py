"""Answers that tempt a scorer."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from minicpm.eval.scorers import find_boxed, find_letter, find_number, is_exact, is_letter, is_math, is_number, is_said


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $18 every day.\n#### 18", "18"),
        ("#### 1,234,567.50 dollars, or 3 more", "1234567.5"),
        ("It costs $1,200.", "1200"),
        ("It costs 3,50 Euro", "3.5"),
        ("Half: 0.5", "0.5"),
        ("that is .25", "0.25"),
        ("the change is -3.", "-3"),
        ("the change is −3°", "-3"),
        ("上半月完成全月计划的3/5。", "3/5"),
        ("答案是１２个", "12"),
        ("1 2 3", "3"),
        ("about 20%", "20"),
        ("first 7, then nothing else matters\n\n#### 8\n#### 9", "9"),
    ],
)
def test_numbers(text: str, number: str) -> None:
    assert find_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "no number", "####", "1/0"])
def test_no_number(text: str) -> None:
    assert find_number(text) is None
    assert not is_number(text, "1")


def test_equal_numbers_are_equal_however_they_are_written() -> None:
    assert is_number("so 1,000.00", "1000")
    assert is_number("0.6", "3/5")
    assert not is_number("10", "100")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B)", "B"),
        ("B.", "B"),
        (" (C) because A is wrong", "C"),
        ("The answer is (D).", "D"),
        ("The answer is: **A**", "A"),
        ("A cat would choose (B).", "B"),
        ("I think that a good choice is C.", "C"),
        ("答案是B", "B"),
        ("应选 C。", "C"),
        ("（D）", "D"),
        ("Both sound right, but B", "B"),
        ("Because of this", None),
        ("A dog barks", None),
        ("I do not know", None),
        ("B because", "B"),
        ("A\nB", "A"),
        ("", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert find_letter(text) == letter


def test_a_gold_letter_may_be_an_index() -> None:
    assert is_letter("(B)", 1)
    assert is_letter("(B)", "(B)")
    assert not is_letter("(B)", 2)


@pytest.mark.parametrize(
    ("text", "gold", "is_right"),
    [
        (" Yes.\nBecause", ["yes", "true"], True),
        ("the Moon", "moon", True),
        ("yes, but no", "yes", False),
        ("", "yes", False),
    ],
)
def test_exact(text: str, gold: Any, is_right: bool) -> None:
    assert is_exact(text, gold) is is_right


@pytest.mark.parametrize(
    ("text", "gold", "is_right"),
    [
        ("… So the answer is (B).", "(B)", True),
        ("(B) because it is not (C)", "(B)", True),
        ("No", "No", True),
        ("It is not. So the answer is Yes.", "Yes", True),
        ("So the answer is No. \nQ: next? the answer is Yes.", "Yes", True),
        ("So the answer is apple bear.", "apple bear", True),
        ("(C)", "(B)", False),
        ("", "(B)", False),
    ],
)
def test_said(text: str, gold: str, is_right: bool) -> None:
    assert is_said(text, gold) is is_right


@pytest.mark.parametrize(
    ("text", "gold", "is_right"),
    [
        (r"so \boxed{\frac{1}{2}} holds", r"\boxed{\dfrac12}", True),
        (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", True),
        (r"\boxed{-\frac{3}{4}}", r"-\frac34", True),
        (r"first \boxed{1}, then \boxed{x^{2}+1}", r"\boxed{x^{2}+1}", True),
        (r"The answer is $(3, \frac{\pi}{2})$.", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{1,000}", r"\boxed{1000}", True),
        (r"\boxed{90^\circ}", "90", True),
        (r"\boxed{\text{even}}", "even", True),
        (r"\boxed{2}", r"\boxed{3}", False),
        (r"\boxed{2", "2", False),
        ("no idea", "2", False),
    ],
)
def test_math(text: str, gold: str, is_right: bool) -> None:
    assert is_math(text, gold) is is_right


def test_braces_are_balanced() -> None:
    assert find_boxed(r"a \boxed{\frac{1}{\sqrt{2}}} b") == r"\frac{1}{\sqrt{2}}"
    assert find_boxed("nothing") is None
