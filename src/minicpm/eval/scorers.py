"""The answer in a generated text, and whether it is right. A scorer is a pure function (text, gold) -> bool.

What this leaves out: programs, which must be run to be judged (`code.py`), and dialogues (`dialogue.py`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

Scorer = Callable[[str, Any], bool]

# Thousands in groups of three, a decimal comma of one or two digits, a fraction, or plain digits.
_NUMBER = re.compile(
    r"[-+−]?\s?(?:\d{1,3}(?:[,，]\d{3})+(?:\.\d+)?|\d+,\d{1,2}(?![\d,])|\d+\s?/\s?\d+(?!\s?/)|\d+(?:\.\d+)?|\.\d+)"
)
_FRACTION = re.compile(r"(-?)\\frac\{([^{}]+)\}\{([^{}]+)\}")
# At the beginning: "A" and "I" may be words, so that something other than a word must follow them.
_LETTER = re.compile(r"[(（]([A-J])[)）]|([A-J])(?=[).:,。，：、]|\s*$|\n)|([B-HJ])(?=\s)")
_SAID_LETTER = re.compile(
    r"(?:answer|option|choice|答案|选项|选择|应选|故选|选)\s*(?:is|are|为|是|应该是|[:：])?\s*[:：]?\s*[*(（\"“]*([A-J])(?![A-Za-z])",
    re.I,
)


def find_number(text: str) -> Fraction | None:
    """Return the number that `text` gives as its answer: after `####` if that is there, else the last one."""
    marked = text.rpartition("####")[2] if "####" in text else text
    numbers = _NUMBER.findall(unicodedata.normalize("NFKC", marked).replace("⁄", "/"))
    if not numbers:
        return None
    number = (numbers[0] if "####" in text else numbers[-1]).replace(" ", "").replace("−", "-")
    whole, comma, rest = number.rpartition(",")
    number = f"{whole}.{rest}" if comma and len(rest.partition(".")[0]) < 3 else number.replace(",", "")
    try:
        return Fraction(number)
    except (ValueError, ZeroDivisionError):
        return None


def is_number(text: str, gold: Any) -> bool:
    """Whether the last number of `text` (or the one after `####`) equals `gold`'s."""
    found, wanted = find_number(text), find_number(str(gold))
    return found is not None and found == wanted


def find_letter(text: str) -> str | None:
    """Return the letter of the chosen option: where the text says that it answers, else the first that stands alone."""
    said = _SAID_LETTER.search(text)
    if said:
        return said[1].upper()
    first = _LETTER.match(text.strip())
    if first:
        return first[1] or first[2] or first[3]
    inside = re.search(r"[(（]([A-J])[)）]|(?<![A-Za-z])([A-J])(?=[.。,，:：]|\s*$)", text)
    return (inside[1] or inside[2]) if inside else None


def is_letter(text: str, gold: Any) -> bool:
    """Whether the option that `text` chooses is `gold` ("B", or the index 1)."""
    wanted = "ABCDEFGHIJ"[gold] if isinstance(gold, int) else str(gold).strip("()（） ")
    return find_letter(text) == wanted


def is_exact(text: str, gold: Any) -> bool:
    """Whether the first line of `text` is `gold` (or one of several), but for case, articles, quotes, a full stop."""
    golds = gold if isinstance(gold, list) else [gold]
    lines = text.strip().splitlines()
    return bool(lines) and _plain(lines[0]) in {_plain(str(item)) for item in golds}


def is_said(text: str, gold: Any) -> bool:
    """Whether the text after "the answer is" (else its last line) is `gold`, as in BIG-Bench Hard."""
    said = re.findall(r"answer is\s*:?\s*(.*?)(?:\.\s|\.?$|\n)", text, re.I | re.M)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    answer = said[-1] if said else (lines[-1] if lines else "")
    wanted = str(gold)
    if re.fullmatch(r"\([A-Z]\)", wanted):
        letter = re.search(r"\(([A-Z])\)", answer) or re.match(r"\s*([A-Z])\b", answer)
        return bool(letter) and f"({letter[1]})" == wanted if letter else False
    return _plain(answer) == _plain(wanted)


def find_boxed(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{…}`, its braces balanced; None without one."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None


def is_math(text: str, gold: Any) -> bool:
    r"""Whether the answer of `text` (`\boxed{…}`, else after "answer is", else the last `$…$`) is `gold`'s.

    Compared as LaTeX without what does not count: spaces, `\left`, `\text{}`, degree and dollar signs, and as numbers.
    Source: the normalization of Hendrycks et al., "Measuring Mathematical Problem Solving", `math_equivalence.py`, as a
    list of what it removes.
    """
    found, wanted = _math_answer(text), find_boxed(str(gold)) or str(gold)
    if found is None:
        return False
    left, right = _plain_math(found), _plain_math(wanted)
    return left == right or (_value(left) is not None and _value(left) == _value(right))


def _math_answer(text: str) -> str | None:
    boxed = find_boxed(text)
    if boxed is not None:
        return boxed
    said = re.findall(r"answer is:?\s*\$?(.+?)\$?(?:\.\s|\.?$|\n)", text, re.I | re.M)
    if said:
        return str(said[-1])
    dollars = re.findall(r"\$([^$]+)\$", text)
    return str(dollars[-1]) if dollars else None


def _plain_math(text: str) -> str:
    text = text.strip().rstrip(".").strip("$ ")
    text = re.sub(
        r"\\text\s*\{([^{}]*)\}|\\mathrm\s*\{([^{}]*)\}|\\mbox\s*\{([^{}]*)\}",
        lambda m: m[1] or m[2] or m[3] or "",
        text,
    )
    for piece in (
        "\\left",
        "\\right",
        "\\!",
        "\\,",
        "\\;",
        "\\:",
        "\\ ",
        "^\\circ",
        "^{\\circ}",
        "\\%",
        "%",
        "\\$",
        "$",
        " ",
    ):
        text = text.replace(piece, "")
    text = text.replace("dfrac", "frac").replace("tfrac", "frac")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)
    return re.sub(r"^[a-z]\s*=\s*", "", text)


def _value(text: str) -> Fraction | None:
    fraction = _FRACTION.fullmatch(text)
    try:
        if fraction:
            return Fraction(f"{fraction[1]}1") * Fraction(fraction[2]) / Fraction(fraction[3])
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold().strip().strip("\"'“”‘’`*").rstrip(".。!")
    return " ".join(re.sub(r"^(?:the|an?)\s+", "", text).split())


SCORERS: Mapping[str, Scorer | None] = {
    "number": is_number,
    "letter": is_letter,
    "exact": is_exact,
    "said": is_said,
    "math": is_math,
    # Judged by `code.py`, which runs the program against its tests.
    "code": None,
}
