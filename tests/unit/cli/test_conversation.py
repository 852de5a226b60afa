"""What is said is kept, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from minicpm.cli.conversation import Conversation
from minicpm.errors import DataError


def test_a_round_trip(tmp_path: Path) -> None:
    conversation = Conversation("Be brief.")
    conversation.add("你好", "Hello.\n")
    path = tmp_path / "talk.json"
    conversation.save(path, "smollm2")
    assert Conversation.load(path) == conversation
    assert "你好" in path.read_text(encoding="utf-8")
    conversation.reset()
    assert conversation.messages() == [{"role": "system", "content": "Be brief."}]
    path.write_text('[{"role": "user", "content": "hi", "extra": 1}]')
    assert Conversation.load(path) == Conversation(None, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "holds no conversation"),
        ('[{"role": "wizard", "content": "x"}]', "holds no conversation"),
        ('[{"role": "user", "content": 3}]', "holds no conversation"),
        ("[3]", "holds no conversation"),
    ],
)
def test_other_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        Conversation.load(path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*No such file"):
        Conversation.load(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"cannot write .*Is a directory"):
        Conversation().save(tmp_path, "smollm2")
