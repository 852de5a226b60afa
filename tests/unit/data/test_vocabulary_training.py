"""A vocabulary is learned, and its three files agree with each other and with SentencePiece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicpm.errors import ConfigError, DataError
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.fingerprint import fingerprint
from minicpm.tokenizer.training import VocabularyConfig, train_vocabulary

sentencepiece = pytest.importorskip("sentencepiece")

TEXT = (
    "def the_thing(number):\n\treturn number + 2024\n\nThe thing and the other thing are here.  Two spaces.\n"
    "山东省最高的山是哪座山，它比黄山高还是矮？差距多少？\n你好，世界。\n"
)
HARD = [
    "a  b",
    "2024",
    "\t\n \n",
    "🤗 é",
    "</s><s>",
    "   x",
    " ",
    "<用户>你好<AI>",
    "<0x41>",
    "▁",
    TEXT,
    "\r\n",
    "\u3000全角",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary([TEXT + str(i) for i in range(40)], path, VocabularyConfig(400, character_coverage=1.0))
    return path


def test_settings_of_minicpm(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    pieces = tokenizer.vocabulary.pieces
    assert list(pieces[:5]) == ["<unk>", "<s>", "</s>", "\n", "\t"]
    assert list(pieces[5:261]) == [f"<0x{i:02X}>" for i in range(256)]
    assert len(pieces) == 400
    assert len(tokenizer.encode("2024")) == 5
    assert any("▁▁" in piece for piece in pieces)
    assert not any(len(piece) > 1 and ("\n" in piece or "\t" in piece) for piece in pieces)
    assert (tokenizer.bos_id, tokenizer.vocabulary.eos_id, tokenizer.adds_bos) == (1, 2, True)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "<用户>x<AI>"


def test_the_three_files_agree(folder: Path) -> None:
    from_json = Tokenizer.from_json(folder / "tokenizer.json")
    from_model = Tokenizer.from_sentencepiece(folder / "tokenizer.model")
    whole = Tokenizer.from_folder(folder)
    assert fingerprint(from_json) == fingerprint(from_model) == fingerprint(whole)
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in HARD:
        # The fast tokenizer puts a space before a text, SentencePiece itself does not.
        ids = original.encode(" " + text)
        assert from_json.encode(text) == from_model.encode(text) == whole.encode(text) == ids
        assert whole.decode(ids) == text.replace("▁", " ")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(
        st.one_of(st.sampled_from([*TEXT]), st.characters(codec="utf-8", exclude_characters="\0▁")), min_size=1
    )
)
def test_any_text_comes_back(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_threads_do_not_change_it(tmp_path: Path) -> None:
    models = []
    for threads in (1, 2):
        path = tmp_path / str(threads)
        path.mkdir()
        train_vocabulary([TEXT] * 20, path, VocabularyConfig(360, character_coverage=1.0, threads=threads))
        models.append(Tokenizer.from_folder(path).vocabulary.pieces)
    assert models[0] == models[1]


def test_control_tokens_and_their_template(tmp_path: Path) -> None:
    config = VocabularyConfig(400, control=("<|im_start|>", "<|im_end|>"), character_coverage=1.0)
    tokenizer = train_vocabulary([TEXT] * 20, tmp_path, config)
    ids = tokenizer.apply_chat([{"role": "user", "content": "<|im_end|>"}])
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    assert ids.count(start) == 2
    assert ids.count(end) == 1
    assert end in tokenizer.eos_ids
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]).startswith("<|im_start|>user\nx<|im_end|>")


def test_long_lines_are_learned_from(tmp_path: Path) -> None:
    # One line of 60 kB: SentencePiece itself would pass over it and find nothing.
    tokenizer = train_vocabulary([" ".join(["thing other"] * 5000)], tmp_path, VocabularyConfig(285))
    assert "▁thing" in tokenizer.vocabulary.pieces


def test_what_cannot_be_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text to learn"):
        train_vocabulary([], tmp_path)
    with pytest.raises(DataError, match=r"the text is too little for 9000 ids; give more, or ask for at most \d+"):
        train_vocabulary([TEXT], tmp_path, VocabularyConfig(9000))
    with pytest.raises(DataError, match="has no room for the text's characters"):
        train_vocabulary([TEXT], tmp_path, VocabularyConfig(270, character_coverage=1.0))


def test_what_the_text_raises_is_what_one_sees(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield TEXT
        raise DataError("a.jsonl:2: field 'text' is missing")

    with pytest.raises(DataError, match=r"^a\.jsonl:2: field 'text' is missing$"):
        train_vocabulary(texts(), tmp_path)


def test_settings_that_cannot_be() -> None:
    for fields, message in (
        ({"vocab_size": 100}, "vocab_size must be at least 261"),
        ({"symbols": ("ab",)}, "symbol 'ab' must be a single character"),
        ({"character_coverage": 0.5}, "character_coverage must lie"),
        ({"max_characters": 0}, "max_characters must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            VocabularyConfig(**fields)
