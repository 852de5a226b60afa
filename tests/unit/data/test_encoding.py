"""The fast encoder gives the ids of the tokenizer, whatever the text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm.data.encoding import BatchEncoder
from minicpm.tokenizer import Tokenizer, Vocabulary

SHARED = Path(__file__).parents[3] / "../shared"
REAL = SHARED / "tokenizers" / "minicpm-1b.model"

hard_text = st.lists(
    st.one_of(
        st.sampled_from([*" \n\t▁abcdetheing你好世界0123.,<>/", "</s>", "<s>", "\ud83d"]), st.characters(codec="utf-8")
    )
).map("".join)


def check(tokenizer: Tokenizer, texts: list[str], encoder: BatchEncoder | None = None) -> None:
    ids, lengths = (encoder or BatchEncoder(tokenizer)).encode(texts)
    expected = [tokenizer.encode(text) for text in texts]
    assert lengths.tolist() == [len(one) for one in expected]
    assert ids.tolist() == [i for one in expected for i in one]


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(hard_text, max_size=6))
def test_small_vocabulary(tokenizer: Tokenizer, texts: list[str]) -> None:
    check(tokenizer, texts)


def test_empty_texts_in_between(tokenizer: Tokenizer) -> None:
    check(tokenizer, ["", "the thing", "", "", "and", ""])
    check(tokenizer, [])
    check(tokenizer, [""])


def test_it_does_cut(tokenizer: Tokenizer) -> None:
    encoder = BatchEncoder(tokenizer)
    check(tokenizer, ["the thing and the thing", "the  thing\nand 12"], encoder)
    assert encoder._cutter is not None
    known = set(encoder._cutter._known)
    # Neighbours that no merge joins fall apart: t|h holds, g|▁ and the digits do not.
    assert {"▁the", "\n", "1", "2"} <= known
    assert not any(" " in piece or "\n" in piece[1:] for piece in known)


def test_without_bytes_to_fall_back_on_nothing_is_cut() -> None:
    vocabulary = Vocabulary("llama", ["<unk>", "</s>", "a"], [2, 3, 1], [0.0, 0.0, 0.0], eos_id=1, unk_id=0)
    tokenizer = Tokenizer.from_vocabulary(vocabulary)
    assert BatchEncoder(tokenizer)._cutter is None
    check(tokenizer, ["xyz a", "aa你好a"])


def test_memory_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minicpm.data.encoding._MAX_CACHED", 5)
    encoder = BatchEncoder(tokenizer)
    for text in ("abcdefgh ijk the 你好", "xyz the", "世界 the and"):
        check(tokenizer, [text], encoder)


@pytest.mark.skipif(not REAL.exists(), reason="the real vocabulary is not here")
def test_real_vocabulary_on_real_text() -> None:
    tokenizer = Tokenizer.from_sentencepiece(REAL)
    texts = []
    for name in ("pretrain/code_thealgorithms", "pretrain/zh_docs_d2l", "pretrain/en_wikipedia_vital_leads"):
        with gzip.open(SHARED / "data" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for _, line in zip(range(40), file, strict=False)]
    check(tokenizer, texts)


def test_byte_level_vocabularies_go_their_usual_way(smollm2_path: Path) -> None:
    from minicpm.formats.checkpoint import open_checkpoint

    tokenizer = Tokenizer.from_gguf(open_checkpoint(smollm2_path).metadata)
    encoder = BatchEncoder(tokenizer)
    assert encoder._cutter is None
    check(tokenizer, ["Hello  world\n", "", "你好 <|im_end|>"], encoder)
