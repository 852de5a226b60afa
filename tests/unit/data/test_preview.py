from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from minicpm.cli.main import run
from minicpm.data.preview import preview_rows, preview_shards, show_tokens
from minicpm.data.supervised import tokenize_rows
from minicpm.data.tokenization import tokenize_documents
from minicpm.tokenizer import Tokenizer

ANSI = re.compile(r"\x1b\[[\d;]*m")


def test_supervised_tokens_are_marked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the thing")
    trained = [i >= 2 for i in range(len(ids))]
    text = show_tokens(tokenizer, ids, trained, has_colour=False)
    assert text.replace("⟦", "").replace("⟧", "") == " the thing"
    assert text.count("⟦") == text.count("⟧") == 1
    coloured = show_tokens(tokenizer, ids, trained)
    assert ANSI.sub("", coloured) == " the thing"
    assert "\x1b[32m" in coloured or "\x1b[92m" in coloured


def test_characters_of_several_bytes_stay_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🤗é")
    assert len(ids) > 4
    for colour in (True, False):
        assert ANSI.sub("", show_tokens(tokenizer, ids, [False] * len(ids), has_colour=colour)) == " 🤗é"


def test_text_cannot_drive_the_terminal(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\x1b[2Jb\r\x07")
    assert show_tokens(tokenizer, ids, [False] * len(ids), has_colour=False) == " a␛[2Jb␍␇"


def test_shards_and_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"the thing {i}"}) + "\n" for i in range(10)))
    tokenize_documents([str(file)], tokenizer, tmp_path / "shards")
    lines = list(preview_shards(tokenizer, tmp_path / "shards", 64, 1, 0, 2, has_colour=False))
    assert lines[0].startswith("10 documents, ")
    assert lines[1].startswith("═══ row 0 · ")
    assert lines[2].startswith("── shards · document ")
    assert re.fullmatch(r"<s>⟦ the thing \d</s>⟧", lines[3])
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"prompt": "the", "completion": "and"}) + "\n")
    lines = list(preview_rows(tokenizer, str(chat), "last", 3, has_colour=False))
    assert lines[0] == "1 rows: 1 completion"
    assert lines[1].endswith("<s> <用户>the<AI>⟦ and</s>⟧")
    tokenize_rows([str(chat)], tokenizer, tmp_path / "chat")
    assert list(preview_shards(tokenizer, tmp_path / "chat", 64, 1, 0, 1, has_colour=False))[-1].endswith("⟦ and</s>⟧")


def test_verbs_from_text_to_preview(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sentencepiece")
    text = tmp_path / "text.jsonl"
    words = "the quick brown fox jumps over lazy dogs while seven wise owls watch from old trees".split()  # noqa: SIM905 -- a sentence is easier to read than its list
    rows = [" ".join(words[i % 15 :] + [f"n{i}"] + words[: i % 15] + [words[(i * 7) % 15]] * 2) for i in range(200)]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    cleaned, tok, shards = (str(tmp_path / name) for name in ("clean", "tok", "shards"))
    command = ["data", "clean", f"a={text}", "--out", cleaned, "--workers", "1", "--near", "0"]
    assert run(command) == 0
    assert "200 of 200 rows kept" in capsys.readouterr().out
    assert run(["data", "tokenizer", cleaned, "--vocab-size", "300", "--out", tok]) == 0
    assert "300 ids learned" in capsys.readouterr().out
    assert run(["data", "tokenize", cleaned, "--tokenizer", tok, "--out", shards, "--workers", "1"]) == 0
    assert "200 documents" in capsys.readouterr().out
    assert run(["data", "show", shards, "--tokenizer", tok, "--length", "64", "--number", "1"]) == 0
    assert "═══ row 0" in capsys.readouterr().out
    assert run(["data", "show", str(text), "--tokenizer", tok]) == 0
    capsys.readouterr()
    for command, message in (
        (["data", "shwo"], "error: minicpm data has no verb 'shwo'; did you mean show?"),
        (["data", "clean", "x", "--out", "y"], "error: 'x' is not of the form NAME=SOURCE"),
        (["data", "tokenize", "nope", "--tokenizer", tok, "--out", str(tmp_path / "x")], "error: nope does not exist"),
        (["data", "tokenize", str(text), "--tokenizer", tok, "--out", shards], f"error: {shards} exists already"),
        (["data", "tokenize", str(text), "--tokenizer", tok, "--out", "x", "--worker", "1"], "did you mean --workers?"),
    ):
        assert run(command) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
