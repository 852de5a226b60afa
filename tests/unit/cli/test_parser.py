"""Words and options in any order, and words that look like options."""

from __future__ import annotations

import argparse

import pytest

from minicpm.cli.parser import Parser, UsageError


def make_parser() -> Parser:
    parser = Parser("try", "A verb for this test.", ["minicpm try smollm2"])
    parser.add_argument("model", metavar="MODEL", nargs="?")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--temperature", type=float)
    return parser


@pytest.mark.parametrize(
    ("arguments", "model", "words", "greedy"),
    [
        ([], None, [], False),
        (["m"], "m", [], False),
        (["m", "--greedy", "hello", "you"], "m", ["hello", "you"], True),
        (["--greedy", "m", "--temperature", "0.5", "hello"], "m", ["hello"], True),
        (["m", "--", "--greedy"], "m", ["--greedy"], False),
        (["--", "m", "-5", "--"], "m", ["-5", "--"], False),
        (["m", "--", ""], "m", [""], False),
        (["m", "- a list\n- of things"], "m", ["- a list\n- of things"], False),
    ],
)
def test_words_and_options_in_any_order(
    arguments: list[str], model: str | None, words: list[str], greedy: bool
) -> None:
    found = make_parser().parse(arguments)
    assert isinstance(found, argparse.Namespace)
    assert (found.model, found.words, found.greedy) == (model, words, greedy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temprature", "3"], "unknown option --temprature; did you mean --temperature?; see `minicpm try --help`"),
        (["--temprature=3"], "unknown option --temprature; did you mean --temperature?"),
        (["--gre"], "unknown option --gre; did you mean --greedy?"),
        (["--qqq"], "unknown option --qqq; see `minicpm try --help`"),
        (["--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (["--greedy=3"], "argument --greedy: ignored explicit argument '3'"),
    ],
)
def test_a_complaint_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_parser().parse(arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
