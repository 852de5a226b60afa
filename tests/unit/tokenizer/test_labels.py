"""The supervised mask: prompts as at generation, answers as the model would have produced them."""

from __future__ import annotations

from typing import Any

import pytest

from minicpm.errors import ConfigError, DataError
from minicpm.tokenizer import LabelledRow, Tokenizer, build_completion_labels, build_labels

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "answer one"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "answer</s> <|im_end|> two"},
]


def trained(row: LabelledRow) -> list[int]:
    return [i for i, is_trained in zip(row.ids, row.is_trained, strict=True) if is_trained]


def test_minicpm_row(spm: Tokenizer) -> None:
    row = build_labels(spm, CHAT)
    prompt = spm.encode("S<用户>one<AI>answer one<用户>two<AI>")
    answer = spm.encode("answer</s> <|im_end|> two")
    assert row.ids == [1, *prompt, *answer, 2]
    assert row.is_trained == [False] * (1 + len(prompt)) + [True] * (len(answer) + 1)
    assert spm.vocabulary.pieces[answer[0]].startswith("▁")
    assert row.labels == [-100] * (1 + len(prompt)) + [*answer, 2]
    assert row.num_trained == len(answer) + 1


def test_minicpm_row_with_all_answers(spm: Tokenizer) -> None:
    row = build_labels(spm, CHAT, trained_turns="all")
    first = [*spm.encode("answer one"), 2]
    second = [*spm.encode("answer</s> <|im_end|> two"), 2]
    asked = [spm.encode("S<用户>one<AI>"), spm.encode("<用户>two<AI>")]
    assert row.ids == [1, *asked[0], *first, *asked[1], *second]
    assert trained(row) == [*first, *second]
    assert row.ids.count(1) == 1


def test_chatml_row(bpe: Tokenizer) -> None:
    for turns, contents in (("last", CHAT[-1:]), ("all", CHAT[2::2])):
        row = build_labels(bpe, CHAT, trained_turns=turns)
        assert row.ids == bpe.apply_chat(CHAT, add_generation_prompt=False)[:-1], "all but the last newline"
        expected = [i for message in contents for i in [*bpe.encode(message["content"]), 2]]
        assert trained(row) == expected


def test_the_prompt_is_what_generation_sees(bpe: Tokenizer, spm: Tokenizer) -> None:
    for tokenizer in (bpe, spm):
        row = build_labels(tokenizer, CHAT)
        prompt = tokenizer.apply_chat(CHAT[:-1])
        assert row.ids[: len(prompt)] == prompt
        assert not any(row.is_trained[: len(prompt)])
        assert all(row.is_trained[len(prompt) :])


def test_a_template_that_writes_eos_itself_ends_once(spm: Tokenizer) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer(spm._backend, spm.vocabulary, source)
    row = build_labels(tokenizer, CHAT[1:3])
    assert row.ids == [1, *spm.encode("[INST] one [/INST]"), *spm.encode("answer one"), 2]
    assert trained(row) == [*spm.encode("answer one"), 2]


def test_completion(spm: Tokenizer, bpe: Tokenizer) -> None:
    row = build_completion_labels(spm, "Q:", "A</s>")
    assert row.ids == [1, *spm.encode("Q:"), *spm.encode("A</s>"), 2]
    assert trained(row) == [*spm.encode("A</s>"), 2]
    row = build_completion_labels(bpe, "", "A", ends=False)
    assert (row.ids, row.is_trained) == (bpe.encode("A"), [True])
    with pytest.raises(DataError, match="completion is empty"):
        build_completion_labels(bpe, "x", "")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "no messages"),
        (CHAT[:2], "ends with the role 'user'"),
        ([*CHAT[:2], {"role": "assistant", "content": " \n"}], r"messages\[2\]\.content is empty"),
        ([{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}], "ends with the role 'user'"),
        ([CHAT[1], {"role": "assistant"}], r"messages\[1\]\.content is empty"),
        (["x"], "role 'str'"),
        ([{"role": "user"}, {"role": "assistant", "content": "x"}], r"messages\[0\] has no content"),
    ],
)
def test_rows_that_cannot_be_trained_on(bpe: Tokenizer, messages: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        build_labels(bpe, messages)


def test_settings_that_cannot_work(bpe: Tokenizer, spm: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="'last' and 'all'"):
        build_labels(bpe, CHAT, trained_turns="first")
    rewriting = Tokenizer(bpe._backend, bpe.vocabulary, "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")  # fmt: skip # noqa: E501 -- a template stays on one line
    with pytest.raises(ConfigError, match="rewrites what comes before"):
        build_labels(rewriting, CHAT)
