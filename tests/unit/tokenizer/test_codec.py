"""Ids and text: round trips, streaming, control tokens that users cannot type."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm.errors import DataError
from minicpm.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "  leading and  double  spaces ",
    "tabs\tand\nnewlines\r\n\n",
    "山东省最高的山是哪座山, 它比黄山高还是矮?",
    "🤗👩‍👩‍👧 é e\u0301 \u200b \ufeff",
    "</s><s><unk><|im_end|> <|im_start|>user",
    "<0x0A><h2>x</h2>",
    "\x00\x01\x7f",
    "▁ is not a space",
]


@pytest.fixture(params=["bpe", "spm"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    lossless = text if tokenizer.vocabulary.kind == "gpt2" else text.replace("▁", " ")
    assert tokenizer.decode(ids) == lossless
    assert not set(ids) & tokenizer.control_ids


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_from_bytes(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_from_sentencepiece(spm: Tokenizer, text: str) -> None:
    assert spm.decode(spm.encode(text)) == text


@given(data=st.data())
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("name", ["bpe", "spm"])
@pytest.mark.parametrize("skip_special", [True, False])
def test_stream_equals_decode_for_any_ids(
    request: pytest.FixtureRequest, name: str, skip_special: bool, data: st.DataObject
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.num_tokens - 1), max_size=40))
    stream = tokenizer.stream(skip_special=skip_special)
    pieces = [stream.push(i) for i in ids]
    text = "".join(pieces) + stream.finish()
    assert text == tokenizer.decode(ids, skip_special=skip_special)


def test_stream_holds_half_a_character(bpe: Tokenizer) -> None:
    ids = [bpe.token_id(c) for c in "ðŁĴ¯"]  # the four bytes of one emoji, as the vocabulary spells them
    stream = bpe.stream()
    pieces = [stream.push(i) for i in ids if i is not None]
    assert pieces == ["", "", "", "💯"]
    assert stream.finish() == ""
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


def test_one_leading_space_is_stripped_once(spm: Tokenizer) -> None:
    first, second = spm.encode(" a"), spm.encode("b")
    assert spm.decode(first) == " a"
    assert spm.decode([*spm.encode("a"), *second]) == "a b"


@pytest.mark.parametrize("text", ["<|im_end|>", "x<|im_start|>y", "<|im_<|im_end|>end|>", "<|endoftext|>" * 2])
def test_typed_control_tokens_stay_text(bpe: Tokenizer, text: str) -> None:
    assert not set(bpe.encode(text)) & bpe.control_ids
    assert bpe.encode_batch([text, "a"]) == [bpe.encode(text), bpe.encode("a")]
    assert set(bpe.encode(text, allow_special=True)) & bpe.control_ids


def test_sentencepiece_control_tokens_stay_text(spm: Tokenizer) -> None:
    for text in ("</s>", "<s>", "<unk>", "a</s>b", "<0x41>"):
        ids = spm.encode(text)
        assert spm.decode(ids) == text
        assert not any(spm.vocabulary.types[i] in (2, 3, 6) for i in ids)
    assert spm.encode("a</s>b", allow_special=True) == [*spm.encode("a"), 2, *spm.encode("b")]


def test_user_defined_tokens_match_in_plain_text(bpe: Tokenizer) -> None:
    assert bpe.token_id("<tool_call>") in bpe.encode("x<tool_call>y")


def test_lone_surrogates_become_replacement_characters(bpe: Tokenizer) -> None:
    assert bpe.decode(bpe.encode("a\ud800b")) == "a\ufffdb"
    assert bpe.decode(bpe.encode_batch(["\ud83e\udd17", "x"])[0]) == "🤗"


def test_bytes_of_tokens(bpe: Tokenizer, spm: Tokenizer) -> None:
    assert b"".join(map(bpe.token_bytes, bpe.encode("é 山"))) == "é 山".encode()
    assert b"".join(map(spm.token_bytes, spm.encode("é ☃"))) == " é ☃".encode()
    assert bpe.token_bytes(1) == b"<|im_start|>"
    assert bpe.token_text(1) == "<|im_start|>"


def test_ids_outside_the_vocabulary(bpe: Tokenizer) -> None:
    with pytest.raises(DataError, match=f"vocabulary of {bpe.num_tokens}"):
        bpe.decode([1, 10**6])
    with pytest.raises(DataError, match="-1"):
        bpe.token_bytes(-1)


def test_facts(bpe: Tokenizer, spm: Tokenizer) -> None:
    assert (bpe.bos_id, bpe.adds_bos, bpe.pad_id, bpe.eos_ids) == (None, False, 0, {0, 2})
    assert (spm.bos_id, spm.adds_bos, spm.pad_id, spm.eos_ids) == (1, True, None, {2})
