"""The real vocabularies of MiniCPM, where they lie beside the checkout: ids taken from the published tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minicpm.tokenizer import Tokenizer, build_labels

TOKENIZERS = Path(__file__).parents[2] / "../shared/tokenizers"
QUESTION = "山东省最高的山是哪座山, 它比黄山高还是矮?差距多少?"

# What raw SentencePiece gives for the 2B file: the ids of a text without the leading `▁`.
RAW_2B = {
    "<用户>你好<AI>": [95396, 4194, 95388, 23523, 95396, 10850, 95388],
    " <用户>你好<AI>": [1786, 4194, 95388, 23523, 95396, 10850, 95388],
    "Hello world": [15934, 2809],
    "a  b": [95324, 1345, 95340],
    "🤗": [105566],
    "</s>": [1731, 95328, 95388],
    "2024": [95349, 95344, 95349, 95370],
    "def f(x):\n    return x": [1962, 1368, 95348, 95356, 3307, 5, 1354, 1720, 1949],
    QUESTION: [6638, 27850, 95660, 71002, 96348, 95660, 95342, 95320, 95916, 95613, 46139, 95477, 2698, 98368, 74,
               16941, 4275, 74],
}  # fmt: skip
# What the published fast tokenizer of the 1B model gives.
FAST_1B = {
    "<用户>你好<AI>": [1786, 4194, 59388, 23523, 59396, 10850, 59388],
    "Hello world": [21045, 2809],
    "\n": [59320, 5],
    "": [],
}


def find(name: str) -> Path:
    path = TOKENIZERS / name
    if not path.is_file():
        pytest.skip(f"{name} is not here")
    return path


@pytest.fixture(scope="module")
def minicpm_2b() -> Tokenizer:
    return Tokenizer.from_sentencepiece(find("minicpm-2b.model"))


@pytest.fixture(scope="module")
def minicpm_1b() -> Tokenizer:
    return Tokenizer.from_sentencepiece(find("minicpm-1b.model"))


@pytest.mark.parametrize("text", RAW_2B)
def test_2b_without_prefix_equals_sentencepiece(minicpm_2b: Tokenizer, text: str) -> None:
    assert minicpm_2b.encode_continuation(text) == RAW_2B[text]
    assert minicpm_2b.decode(minicpm_2b.encode(text)) == text


def test_2b_chat(minicpm_2b: Tokenizer) -> None:
    assert minicpm_2b.num_tokens == 122753
    expected = [1, 1786, 4194, 95388, 23523, 95396, 10850, 95388]
    assert minicpm_2b.apply_chat([{"role": "user", "content": "你好"}]) == expected
    assert minicpm_2b.eos_ids == {2}
    assert minicpm_2b.token_bytes(1089) == b"\x00"
    assert minicpm_2b.token_text(5) == "\n"


def test_2b_training_row(minicpm_2b: Tokenizer) -> None:
    row = build_labels(
        minicpm_2b, [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello world"}]
    )
    assert row.ids == [1, 1786, 4194, 95388, 23523, 95396, 10850, 95388, 21045, 2809, 2]
    assert row.labels == [-100] * 8 + [21045, 2809, 2]


@pytest.mark.parametrize("text", FAST_1B)
def test_1b_equals_the_published_fast_tokenizer(minicpm_1b: Tokenizer, text: str) -> None:
    assert minicpm_1b.encode(text) == FAST_1B[text]
    assert minicpm_1b.encode(QUESTION)[:2] == [57537, 27850]


def test_1b_json_built_from_the_model_is_the_published_one(minicpm_1b: Tokenizer) -> None:
    built, published = json.loads(minicpm_1b.to_json()), json.loads(find("minicpm-1b.json").read_text())
    pairs = [tuple(pair) for pair in built["model"].pop("merges")]
    assert pairs == [tuple(line.split(" ")) for line in published["model"].pop("merges")]
    built["model"].pop("ignore_merges", None)
    assert built["model"] == {"type": "BPE", **published["model"]}
    assert {k: v for k, v in built.items() if k != "model"} == {k: v for k, v in published.items() if k != "model"}


def test_1b_json_and_model_agree(minicpm_1b: Tokenizer) -> None:
    published = Tokenizer.from_json(find("minicpm-1b.json"))
    ours, theirs = minicpm_1b.vocabulary, published.vocabulary
    assert list(ours.pieces) == list(theirs.pieces)
    for field in ("kind", "bos_id", "unk_id", "adds_bos", "adds_eos", "prepends_space", "added_ids", "end_ids"):
        assert getattr(ours, field) == getattr(theirs, field), field
    for text in [*RAW_2B, "<h2>x</h2>\n", "a</s>b"]:
        for allow_special in (False, True):
            ids = minicpm_1b.encode(text, allow_special=allow_special)
            assert published.encode(text, allow_special=allow_special) == ids


def test_gguf_of_the_2b_vocabulary_comes_back(minicpm_2b: Tokenizer) -> None:
    again = Tokenizer.from_gguf(minicpm_2b.to_gguf_metadata())
    assert again.encode_batch(list(RAW_2B)) == minicpm_2b.encode_batch(list(RAW_2B))
