"""GGUF metadata: written and read back, defaults, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from minicpm.errors import FormatError
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.pretokenizers import ALIASES, PATTERNS, build_pre_tokenizer, describe, name_pre_tokenizer

TEXTS = ["Hello  world 2024!\n\n  x", "山东省 🤗 é", "<|im_end|></s>", "it's\tWE'LL 12345 $+<=>", ""]


@pytest.mark.parametrize("name", ["bpe", "spm"])
def test_round_trip(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    metadata = tokenizer.to_gguf_metadata()
    again = Tokenizer.from_gguf(metadata)
    for text in TEXTS:
        for allow_special in (False, True):
            ids = tokenizer.encode(text, allow_special=allow_special)
            assert again.encode(text, allow_special=allow_special) == ids
        assert again.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    ours, theirs = tokenizer.vocabulary, again.vocabulary
    for field in ("kind", "bos_id", "eos_id", "end_ids", "pad_id", "unk_id", "adds_bos", "prepends_space", "added_ids"):
        assert getattr(theirs, field) == getattr(ours, field), field
    assert again.to_gguf_metadata() == metadata


def test_scores_follow_from_the_merges_of_a_json(spm: Tokenizer, tmp_path: Any) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(spm.to_json())
    from_json = Tokenizer.from_json(path)
    again = Tokenizer.from_gguf(from_json.to_gguf_metadata())
    for text in TEXTS:
        assert from_json.encode(text) == again.encode(text) == spm.encode(text)


def test_user_defined_pieces_are_written_as_normal_ones(spm: Tokenizer) -> None:
    newline = spm.token_id("\n")
    assert spm.vocabulary.types[newline] == 4
    assert spm.to_gguf_metadata()["tokenizer.ggml.token_type"][newline] == 1


def test_template_and_end_ids(bpe: Tokenizer) -> None:
    metadata = bpe.to_gguf_metadata() | {"tokenizer.chat_template": "{{ 'x' }}"}
    assert Tokenizer.from_gguf(metadata).render_chat([]) == "x"
    metadata |= {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "{{ 'tools' }}"}
    assert Tokenizer.from_gguf(metadata).render_chat([], tools=[{}]) == "tools"
    assert Tokenizer.from_gguf(metadata | {"tokenizer.ggml.eot_token_id": 300}).eos_ids == {0, 2, 300}
    metadata["tokenizer.ggml.padding_token_id"] = 0xFFFFFFFF
    assert Tokenizer.from_gguf(metadata).pad_id is None


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"model": "t5"}, "'t5'; supported are 'gpt2'"),
    ({"model": None}, "supported are"),
    ({"pre": "nosuch"}, "unknown pre-tokenizer 'nosuch'"),
    ({"pre": 3}, r"tokenizer\.ggml\.pre is 3"),
    ({"tokens": None}, "tokens is missing"),
    ({"tokens": [1, 2]}, "array of str"),
    ({"tokens": []}, "empty"),
    ({"tokens": "abc"}, "array of str"),
    ({"token_type": [1]}, "1 token types"),
    ({"merges": None}, "merges is missing"),
    ({"merges": ["ab"]}, r"merges\[0\] is 'ab'"),
    ({"merges": ["a "]}, r"merges\[0\]"),
    ({"merges": ["no such"]}, "do not fit together"),
    ({"bos_token_id": 10**6}, "bos token id 1000000 is outside"),
    ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ({"add_bos_token": True, "bos_token_id": None}, "no bos token id"),
    ({"add_bos_token": 1}, "a bool is expected"),
]


@pytest.mark.parametrize(("changes", "complaint"), BROKEN, ids=lambda v: str(v)[:40])
def test_broken_metadata(bpe: Tokenizer, changes: dict[str, Any], complaint: str) -> None:
    metadata = bpe.to_gguf_metadata()
    for key, value in changes.items():
        metadata.pop(f"tokenizer.ggml.{key}", None)
        if value is not None:
            metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(FormatError, match=complaint):
        Tokenizer.from_gguf(metadata)


def test_twin_tokens_and_missing_scores(bpe: Tokenizer, spm: Tokenizer) -> None:
    metadata = bpe.to_gguf_metadata()
    metadata["tokenizer.ggml.tokens"][5] = metadata["tokenizer.ggml.tokens"][9]
    with pytest.raises(FormatError, match="tokens 5 and 9"):
        Tokenizer.from_gguf(metadata)
    metadata = spm.to_gguf_metadata()
    del metadata["tokenizer.ggml.scores"]
    with pytest.raises(FormatError, match="scores is missing"):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("name", [*PATTERNS, *ALIASES])
def test_names_of_pre_tokenizers_go_both_ways(name: str) -> None:
    component = describe(build_pre_tokenizer(name))
    whole_words = name in {"llama-bpe", "llama3", "llama-v3", "falcon3"}
    found = name_pre_tokenizer(component, whole_words=whole_words)
    assert describe(build_pre_tokenizer(found)) == component


def test_pre_tokenizers_without_a_name() -> None:
    with pytest.raises(FormatError, match="no GGUF name"):
        name_pre_tokenizer({"type": "Whitespace"}, whole_words=False)


def test_cuts_of_the_named_pre_tokenizers() -> None:
    def cut(name: str, text: str) -> list[str]:
        return [
            piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in build_pre_tokenizer(name).pre_tokenize_str(text)
        ]

    assert cut("gpt-2", "It's 2024  ok") == ["It", "'s", " 2024", " ", " ok"]
    assert cut("smollm", "It's 2024") == ["It", "'s", " ", "2", "0", "2", "4"]
    assert cut("llama-bpe", "It'S 20245\n\nx") == ["It", "'S", " ", "202", "45", "\n\n", "x"]
    assert cut("qwen2", "a 20\n\nx") == ["a", " ", "2", "0", "\n\n", "x"]
    assert cut("default", "a+b 12345") == ["a", "+", "b", " ", "123", "45"]
