"""Filters of task templates: what the published evaluations do to a row's text before a model sees it."""

from __future__ import annotations

import re
from collections.abc import Callable

_WIKITEXT = (
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
    (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
_WIKITEXT_PAIRS = (r"\(\s*([^\)]*?)\s*\)", "(\\1)"), (r"\[\s*([^\]]*?)\s*\]", "[\\1]"), (r"{\s*([^}]*?)\s*}", "{\\1}")
_WIKITEXT_QUOTES = (r"\"\s*([^\"]*?)\s*\"", '"\\1"'), (r"'\s*([^']*?)\s*'", "'\\1'")
_WIKITEXT_LAST = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "),
    (" 's", "'s"),
)  # fmt: skip
_LISTED = re.compile(r"Question: (.*?)\n((?: [A-J]\. .*\n?)+?)Answer:\Z", re.S)


def wikihow(text: str) -> str:
    """Return a HellaSwag text without the marks of the WikiHow part. Source: lm-evaluation-harness, hellaswag 1.0."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def detokenize_wikitext(text: str) -> str:
    """Return a WikiText article as people write it. Source: lm-evaluation-harness, wikitext 2.0."""
    for old, new in _WIKITEXT:
        text = text.replace(old, new)
    for pattern, by in (*_WIKITEXT_PAIRS, *_WIKITEXT_QUOTES):
        text = re.sub(pattern, by, text)
    for old, new in _WIKITEXT_LAST:
        text = text.replace(old, new)
    return text


def letters(choices: list[str]) -> str:
    """Return "A. first", "B. second", …, a line each."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJ", choices, strict=False))


def bracketed(choices: list[str]) -> str:
    """Return "(A) first", "(B) second", …, a line each."""
    return "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCDEFGHIJ", choices, strict=False))


def listed_question(query: object) -> str:
    """Return the question of "Question: … A. … B. … Answer:", as some copies publish it; "" for another text."""
    found = _LISTED.match(query) if isinstance(query, str) else None
    return found[1] if found else ""


def listed_choices(query: object) -> list[str]:
    """Return the options of such a text, in their order; none for another text."""
    found = _LISTED.match(query) if isinstance(query, str) else None
    return [c.strip() for c in re.findall(r"^ [A-J]\. (.*(?:\n(?! [A-J]\. ).*)*)", found[2], re.M)] if found else []


FILTERS: dict[str, Callable[..., object]] = {
    "wikihow": wikihow,
    "wikitext": detokenize_wikitext,
    "letters": letters,
    "bracketed": bracketed,
    "listed_question": listed_question,
    "listed_choices": listed_choices,
}
