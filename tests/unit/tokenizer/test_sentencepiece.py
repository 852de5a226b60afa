"""SentencePiece files: read without a protobuf library, equal to SentencePiece itself, and safe against any bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicpm.errors import FormatError
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.sentencepiece import read_sentencepiece

TEXT = "The quick 山东省 fox,  jumps 2024 times 🤗 é"


def test_pieces_equal_those_of_the_library(spm_model: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(spm_model))
    vocabulary = read_sentencepiece(spm_model)
    size = reference.get_piece_size()
    assert list(vocabulary.pieces) == [reference.id_to_piece(i) for i in range(size)]
    assert vocabulary.scores == pytest.approx([reference.get_score(i) for i in range(size)])
    assert [i for i in range(size) if vocabulary.types[i] == 6] == [i for i in range(size) if reference.is_byte(i)]
    assert [i for i in range(size) if vocabulary.types[i] == 3] == [i for i in range(size) if reference.is_control(i)]
    ids = (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.pad_id)
    assert ids == (reference.bos_id(), reference.eos_id(), reference.unk_id(), None)


@pytest.mark.parametrize("text", [TEXT, "a\nb\t c", "  x", "Hello", ""])
def test_ids_equal_the_library_with_one_space_in_front(spm: Tokenizer, spm_model: Path, text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(spm_model))
    assert spm.encode(text) == (reference.encode(" " + text) if text else [])


def test_user_defined_pieces_are_ordinary_vocabulary(spm: Tokenizer) -> None:
    newline = spm.token_id("\n")
    assert spm.encode("a\nb") == [*spm.encode("a"), newline, *spm.encode_continuation("b")]
    # The fast tokenizer of these models reaches a longer one only through merges, of which it has none.
    assert spm.token_id("<h2>") not in spm.encode("<h2>")


def test_compiled_normalization_is_applied(train_sentencepiece: Callable[..., Path], tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "nfkc.model", normalization_rule_name="nmt_nfkc", add_dummy_prefix=True)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer.from_sentencepiece(path)
    for text in ("ＴＨＥ　quick", "ﬁ ①", TEXT):
        assert tokenizer.encode(text) == reference.encode(text)


def test_other_models_are_refused(train_sentencepiece: Callable[..., Path], tmp_path: Path) -> None:
    path = train_sentencepiece(
        tmp_path / "u.model", model_type="unigram", normalization_rule_name="identity", vocab_size=420
    )
    with pytest.raises(FormatError, match="unigram model; only BPE"):
        Tokenizer.from_sentencepiece(path)


@pytest.mark.parametrize("size", [0, 1, 3, 17, 100, 5000])
def test_truncated_files(spm_model: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.model"
    path.write_bytes(spm_model.read_bytes()[:size])
    with pytest.raises(FormatError):
        Tokenizer.from_sentencepiece(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_end_in_our_errors_only(spm_model: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(spm_model.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.model"
    path.write_bytes(bytes(content))
    try:
        tokenizer = Tokenizer.from_sentencepiece(path)
    except FormatError:
        return
    tokenizer.decode(tokenizer.encode(TEXT))


@given(content=st.binary(max_size=200))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_end_in_our_errors_only(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.model"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        Tokenizer.from_sentencepiece(path)
