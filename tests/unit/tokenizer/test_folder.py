"""Model folders: which file is used, and what the settings beside it change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minicpm.errors import FormatError
from minicpm.tokenizer import Tokenizer


def write(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def json_folder(bpe_json: Path, tmp_path: Path) -> Path:
    shutil.copy(bpe_json, tmp_path)
    return tmp_path


@pytest.fixture
def model_folder(spm_model: Path, tmp_path: Path) -> Path:
    shutil.copy(spm_model, tmp_path)
    return tmp_path


def test_special_ids_come_from_every_file(json_folder: Path) -> None:
    write(
        json_folder,
        tokenizer_config={"bos_token": {"content": "<|im_start|>"}, "add_bos_token": True},
        special_tokens_map={"eos_token": "<|im_end|>"},
        generation_config={"eos_token_id": [2, 300]},
        config={"eos_token_id": 7, "bos_token_id": 9},
    )
    tokenizer = Tokenizer.from_folder(json_folder)
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (1, True)
    assert tokenizer.eos_ids == {0, 2, 300}


def test_ids_of_the_configuration_are_the_last_resort(json_folder: Path) -> None:
    write(json_folder, config={"eos_token_id": 2, "bos_token_id": 1})
    tokenizer = Tokenizer.from_folder(json_folder)
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.vocabulary.eos_id) == (1, False, 2)


def test_templates(json_folder: Path) -> None:
    write(json_folder, tokenizer_config={"chat_template": "one"})
    assert Tokenizer.from_folder(json_folder).render_chat([]) == "one"
    templates = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "three"}]
    write(json_folder, tokenizer_config={"chat_template": templates})
    assert Tokenizer.from_folder(json_folder).render_chat([], tools=[{}]) == "three"
    (json_folder / "chat_template.jinja").write_text("four")
    assert Tokenizer.from_folder(json_folder).render_chat([]) == "four"


def test_sentencepiece_folder(model_folder: Path, spm: Tokenizer) -> None:
    write(model_folder, tokenizer_config={"add_bos_token": False, "add_eos_token": True})
    tokenizer = Tokenizer.from_folder(model_folder)
    assert tokenizer.encode("a\nb") == spm.encode("a\nb")
    assert (tokenizer.adds_bos, tokenizer.vocabulary.adds_eos) == (False, True)
    write(model_folder, tokenizer_config={"add_prefix_space": False})
    plain = Tokenizer.from_folder(model_folder)
    assert plain.encode("a b") == spm.encode_continuation("a b")
    assert plain.decode(plain.encode(" a b")) == " a b"


def test_added_tokens_rename_and_extend_a_sentencepiece_vocabulary(model_folder: Path, spm: Tokenizer) -> None:
    size, renamed = spm.num_tokens, spm.token_id("<h2>")
    added = {
        str(renamed): {"content": "<image>", "special": True},
        str(size): {"content": "<|im_end|>", "special": True},
        str(size + 1): {"content": "<tool>", "special": False},
    }
    write(model_folder, tokenizer_config={"added_tokens_decoder": added, "eos_token": "<|im_end|>"})
    tokenizer = Tokenizer.from_folder(model_folder)
    assert tokenizer.num_tokens == size + 2
    assert tokenizer.eos_ids == {2, size}
    text = "a<image>b<tool>c<|im_end|>"
    ids = tokenizer.encode(text, allow_special=True)
    assert [i for i in ids if i in (renamed, size, size + 1)] == [renamed, size + 1, size]
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False).count("<image>") == 1
    again = Tokenizer.from_gguf(tokenizer.to_gguf_metadata())
    assert again.encode(text, allow_special=True) == ids


def test_added_tokens_extend_a_json(json_folder: Path, bpe: Tokenizer) -> None:
    entry = {"content": "<new>", "special": True, "lstrip": True}
    write(json_folder, tokenizer_config={"added_tokens_decoder": {str(bpe.num_tokens): entry}})
    tokenizer = Tokenizer.from_folder(json_folder)
    ids = tokenizer.encode("a  <new>b", allow_special=True)
    assert ids == [*bpe.encode("a"), bpe.num_tokens, *bpe.encode("b")]
    assert bpe.num_tokens not in tokenizer.encode("<new>")


def test_json_of_sentencepiece_equals_the_model(spm: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(spm.to_json())
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.vocabulary.kind, tokenizer.adds_bos, tokenizer.bos_id) == ("llama", True, 1)
    assert tokenizer.vocabulary.types[3] in (1, 4)
    for text in ("a\nb", " x</s>", "é☃"):
        for allow_special in (False, True):
            expected = spm.encode(text, allow_special=allow_special)
            assert tokenizer.encode(text, allow_special=allow_special) == expected
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert json.loads(tokenizer.to_json()) == json.loads(spm.to_json())


BROKEN: list[tuple[str, Any, str]] = [
    ("tokenizer_config", [], "JSON object is expected"),
    ("tokenizer_config", {"eos_token": 3}, "eos_token is 3"),
    ("tokenizer_config", {"add_bos_token": "yes"}, "true or false"),
    ("tokenizer_config", {"chat_template": 3}, "chat_template is a int"),
    ("tokenizer_config", {"added_tokens_decoder": {"x": {}}}, r"added_tokens_decoder\['x'\]"),
    ("tokenizer_config", {"added_tokens_decoder": {"5": {"content": "<|im_end|>"}}}, "as token 2"),
    ("generation_config", {"eos_token_id": "2"}, "token ids are expected"),
    ("generation_config", {"eos_token_id": 10**6}, "outside the vocabulary"),
    ("tokenizer", {"version": "1.0"}, "cannot|can read"),
    ("tokenizer", 3, "can read"),
]


@pytest.mark.parametrize(("name", "value", "complaint"), BROKEN, ids=lambda v: str(v)[:40])
def test_broken_settings(json_folder: Path, name: str, value: Any, complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint):
        Tokenizer.from_folder(write(json_folder, **{name: value}))


def test_broken_files(json_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(FormatError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_folder(tmp_path_factory.mktemp("empty"))
    (json_folder / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(FormatError, match="not valid JSON"):
        Tokenizer.from_folder(json_folder)
    (json_folder / "tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="not UTF-8"):
        Tokenizer.from_folder(json_folder)


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_other_models_are_refused(tmp_path: Path, kind: str) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    model = {
        "Unigram": lambda: models.Unigram([("a", 0.0)], 0),
        "WordPiece": lambda: models.WordPiece({"a": 0, "[UNK]": 1}),
        "WordLevel": lambda: models.WordLevel({"a": 0}, "a"),
    }[kind]()
    Backend(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FormatError, match=f"{kind} model"):
        Tokenizer.from_folder(tmp_path)
