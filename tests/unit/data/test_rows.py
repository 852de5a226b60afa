from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minicpm.data.readers import Row
from minicpm.data.row_formats import Example, parse_row
from minicpm.data.rows import label, label_pair, read_examples
from minicpm.errors import ConfigError, DataError
from minicpm.tokenizer import Tokenizer

SHARED = Path(__file__).parents[3] / "../shared/data"
TURNS = [("user", "q"), ("assistant", "a")]


def parse(**fields: Any) -> Example:
    return parse_row(Row(fields, "f.jsonl:3"))


def turns(example: Example) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in example.messages]


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("fields", "shape", "expected"),
    [
        ({"messages": CHAT}, "messages", TURNS),
        ({"conversations": SHARE, "system": "s"}, "sharegpt", [("system", "s"), *TURNS]),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", TURNS),
        ({"instruction": "q", "input": "i", "output": "a"}, "alpaca", [("user", "q\ni"), ("assistant", "a")]),
        (
            {"instruction": "q", "output": "a", "history": [["q0", "a0"]]},
            "alpaca",
            [("user", "q0"), ("assistant", "a0"), *TURNS],
        ),
        ({"prompt": "q", "completion": "a"}, "completion", TURNS),
        ({"question": "q", "answer": "a"}, "completion", TURNS),
    ],
)
def test_shapes_of_conversations(fields: dict[str, Any], shape: str, expected: list[tuple[str, str]]) -> None:
    example = parse(**fields)
    assert (example.kind, example.shape, turns(example)) == ("conversation", shape, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": CHAT[:1], "chosen": [{"role": "assistant", "content": "good"}], "rejected": "bad"},
        {"conversations": SHARE[:1], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"value": "bad"}},
        {"instruction": "q", "chosen": "good", "rejected": "bad"},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {
            "prompt": "q",
            "chosen": [CHAT[0], {"role": "assistant", "content": "good"}],
            "rejected": [CHAT[0], {"role": "assistant", "content": "bad"}],
        },
    ],
)
def test_shapes_of_preferences(fields: dict[str, Any]) -> None:
    example = parse(**fields)
    assert example.kind == "preference"
    assert (turns(example), example.chosen, example.rejected) == ([("user", "q")], "good", "bad")


@pytest.mark.parametrize(
    "fields", [{"messages": CHAT, "label": False}, {"prompt": "q", "completion": "a", "kto_tag": False}]
)
def test_shapes_of_judgements(fields: dict[str, Any]) -> None:
    example = parse(**fields)
    assert (example.kind, example.is_good, turns(example)) == ("judged", False, TURNS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"foo": 1}, "a row with 'foo' is of no known shape"),
        ({"messages": CHAT[:1]}, "'messages' ends with the role 'user'"),
        ({"messages": []}, "'messages' must be a list of messages"),
        ({"messages": ["x"]}, r"'messages\[0\]' is str"),
        (
            {"messages": [{"role": "bot2", "content": "x"}]},
            r"'messages\[0\].role' is 'bot2', expected one of assistant",
        ),
        ({"messages": [*CHAT, {"role": "system", "content": "x"}]}, "may only come first"),
        ({"messages": [{"role": "user", "content": " "}, CHAT[1]]}, r"'messages\[0\].content' is empty"),
        ({"messages": [{"role": "user", "content": 5}, CHAT[1]]}, r"'messages\[0\].content' is int"),
        ({"prompt": "q", "completion": ""}, "'completion' is empty"),
        ({"instruction": "q", "input": 3, "output": "a"}, "'input' is int"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, r"'history\[0\]' must be a pair"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "'rejected' equals 'chosen'"),
        ({"chosen": "good", "rejected": "bad"}, "is no dialogue of Human: and Assistant:"),
        ({"messages": CHAT, "chosen": "x", "rejected": "y"}, "the prompt is empty or ends with an answer"),
        ({"messages": CHAT, "label": 1}, "'label' is 1, expected true or false"),
        ({"messages": CHAT, "tools": "{"}, "'tools' is not valid JSON"),
    ],
)
def test_bad_rows_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"^f\.jsonl:3: .*" + message):
        parse(**fields)


def test_files_are_validated_wholly(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = {"messages": CHAT}
    rows = [good, {"messages": []}, good, {"prompt": "q", "completion": "a"}, {"foo": 1}, {"foo": 2}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"^4 of 6 rows cannot be used: .*:2: .*; .*:4: .*one shape.*; .*:5: .*; …"):
        read_examples([str(file)])
    examples, report = read_examples([str(file)], drops_bad=True)
    assert len(examples) == 2
    assert [where.rpartition(":")[2] for where, _ in report.bad] == ["2", "4", "5", "6"]
    assert report.summary().startswith("6 rows: 2 messages; 4 dropped, the first: ")
    with pytest.raises(DataError, match="is a conversation; this needs a prompt with chosen"):
        read_examples([str(file)], "preference")
    file.write_text("")
    with pytest.raises(DataError, match=r"no row of .* can be used or the files are empty"):
        read_examples([str(file)])


def test_labels_of_answers_and_pairs(tokenizer: Tokenizer) -> None:
    row = label(tokenizer, parse(prompt="the thing", completion="and abc"))
    assert tokenizer.decode([i for i, t in zip(row.ids, row.is_trained, strict=True) if t]) == "and abc"
    chosen, rejected = label_pair(tokenizer, parse(prompt="the thing", chosen="and", rejected="abc"))
    length = chosen.is_trained.index(True)
    assert chosen.ids[:length] == rejected.ids[:length]
    assert not any(rejected.is_trained[:length])
    with pytest.raises(ConfigError, match="is a conversation, expected a preference"):
        label_pair(tokenizer, parse(prompt="q", completion="a"))


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not here")
@pytest.mark.parametrize(
    ("file", "kind", "count", "dropped"),
    [
        ("sft/gsm8k_train.jsonl.gz", "conversation", 7473, 0),
        ("sft/llamafactory/glaive_toolcall_zh_demo.json.gz", "conversation", 300, 0),
        ("dpo/llamafactory_dpo_zh_demo.json.gz", "preference", 300, 0),
        ("dpo/zh_dpo_500.jsonl.gz", "preference", 500, 0),
        ("dpo/hh_rlhf_harmless_base_test.jsonl.gz", "preference", 2303, 9),
        ("dpo/llamafactory_kto_en_demo.json.gz", "judged", 300, 0),
    ],
)
def test_real_files(file: str, kind: Any, count: int, dropped: int) -> None:
    examples, report = read_examples([str(SHARED / file)], kind, drops_bad=True)
    assert (len(examples), len(report.bad)) == (count, dropped)
