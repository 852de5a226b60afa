"""Task files, templates and rows: the package's own tasks load; wrong ones are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from minicpm.errors import ConfigError, DataError, EvalError
from minicpm.eval.forms import FormReader
from minicpm.eval.rows import read_task
from minicpm.eval.task import Form, load_task, task_names

ARC = {
    "question": "What is wet?",
    "choices": {"text": ["Sand", "Water"], "label": ["A", "B"]},
    "answerKey": "B",
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", task_names())
def test_every_task_of_the_package_compiles(name: str) -> None:
    task = load_task(name)
    for form in task.form:
        FormReader(form, name)
    assert task.forms("plain")


def test_an_unknown_task_is_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean hellaswag"):
        load_task("helaswag")
    with pytest.raises(ConfigError, match="no task"):
        load_task(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('version = 1\nsource = "x"\nfile = "x.jsonl"\nfrom = 1\n', "unknown field from"),
        ('version = 1\nsource = "x"\nfile = "x.jsonl"\nform = []\n', "a task needs forms"),
        ('version = 1\nsource = "x"\nfile = "x.jsonl"\n[[form]]\nname = "a"\nmode = "chioce"\n', "mode"),
        (
            'version = 1\nsource = "x"\nfile = "x.jsonl"\n[[form]]\nname = "a"\nmode = "generate"\nscorer = "n"\n',
            "scorer",
        ),
        (
            'version = 1\nsource = "x"\nfile = "x.jsonl"\n[[form]]\nname="a"\nmode="cloze"\nprotocols=["p"]\n',
            "protocol 'p'",
        ),
    ],
)
def test_a_wrong_task_file_is_named_with_its_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_task(str(path))
    assert "mine.toml" in str(raised.value)


def test_choices_and_gold(tmp_path: Path) -> None:
    write_rows(tmp_path / "arc_easy_test.jsonl.gz", [ARC])
    task = load_task("arc_easy")
    rows = read_task("arc_easy", task, tmp_path)
    question = FormReader(task.form[0], "arc_easy").questions(rows.rows, rows.examples)[0]
    assert question.pairs == (
        ("Question: What is wet?\nAnswer:", " Sand"),
        ("Question: What is wet?\nAnswer:", " Water"),
    )
    assert (question.gold, question.lengths) == (1, (4, 5))


def test_another_publication_of_the_same_rows_gives_the_same_questions(tmp_path: Path) -> None:
    listed = {"query": "Question: What is wet?\n A. Sand\n B. Water\nAnswer:", "choices": ["A", "B"], "gold": 1}
    task = load_task("arc_easy")
    reader = FormReader(task.form[0], "arc_easy")
    assert reader.questions([listed], []) == reader.questions([ARC], [])


def test_examples_come_from_the_same_group_and_are_never_the_row_itself() -> None:
    form = Form(name="a", mode="cloze", context="{{ x }}", continuation="{{ y }}", shots=1, group="g")
    rows = [{"x": str(i), "y": str(-i), "g": i % 2} for i in range(4)]
    questions = FormReader(form, "t").questions(rows, rows)
    assert [q.pairs[0][0] for q in questions] == ["2 -2\n\n0", "3 -3\n\n1", "0 0\n\n2", "1 -1\n\n3"]
    with pytest.raises(DataError, match="row 0 wants 1 examples, there are 0"):
        FormReader(form, "t").questions(rows[:2], rows[:2])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Form(name="a", mode="choice", context="{{ missing }}", choices="[1, 2]"), "context cannot be made"),
        (Form(name="a", mode="choice", context="x", choices="missing"), "choices"),
        (Form(name="a", mode="choice", context="x", choices="[1]"), "1 choices"),
        (Form(name="a", mode="choice", context="x", choices="[1, 2]", gold="2"), "the right one is 2"),
        (Form(name="a", mode="cloze", context="{{ x.__class__ }}", continuation="y"), "context"),
    ],
)
def test_a_row_that_does_not_fit_is_named(form: Form, message: str) -> None:
    with pytest.raises(DataError, match=message):
        FormReader(form, "t").questions([{"x": "1"}], [])


def test_a_broken_template_is_a_wrong_task() -> None:
    with pytest.raises(ConfigError, match="context"):
        FormReader(Form(name="a", mode="cloze", context="{{ x"), "t")


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    task = load_task("arc_easy")
    with pytest.raises(EvalError, match=r"holds no arc_easy_test\.jsonl"):
        read_task("arc_easy", task, tmp_path)
    with pytest.raises(EvalError, match="is no folder"):
        read_task("arc_easy", task, tmp_path / "none")
    write_rows(tmp_path / "arc_easy_test.jsonl", [])
    with pytest.raises(DataError, match="has no row"):
        read_task("arc_easy", task, tmp_path)
    (tmp_path / "arc_easy_test.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(DataError, match=r"arc_easy_test\.jsonl"):
        read_task("arc_easy", task, tmp_path)


def test_the_hash_says_which_rows(tmp_path: Path) -> None:
    task = load_task("arc_easy")
    write_rows(tmp_path / "a" / "arc_easy_test.jsonl", [ARC])
    write_rows(tmp_path / "b" / "arc_easy_test.jsonl", [ARC, ARC])
    first, second = (read_task("arc_easy", task, tmp_path / name).sha256 for name in "ab")
    assert len(first) == 64
    assert first != second


def test_c_eval_in_its_published_columns(tmp_path: Path) -> None:
    header = "id,question,A,B,C,D,answer,subject\n"
    row = '{0},"水的化学式是,{0}",H2O,CO2,O2,N2,A,chemistry\n'
    (tmp_path / "ceval_val.csv").write_text(header + row.format(9), encoding="utf-8")
    (tmp_path / "ceval_dev.csv").write_text(header + "".join(row.format(i) for i in range(5)), encoding="utf-8")
    task = load_task("ceval")
    rows = read_task("ceval", task, tmp_path)
    question = FormReader(task.form[0], "ceval").questions(rows.rows, rows.examples)[0]
    assert question.gold == 0
    assert question.pairs[0][0].count("答案：A") == 5
    (tmp_path / "ceval_val.csv").write_text(header + "1,short\n", encoding="utf-8")
    with pytest.raises(DataError, match="row 2: has not the columns"):
        read_task("ceval", task, tmp_path)


def test_articles_of_one_text_file(tmp_path: Path) -> None:
    text = " \n = First = \n \n a b , c \n = = Part = = \n d \n \n = Second = \n \n e \n"
    (tmp_path / "wikitext2_raw_test.txt").write_text(text)
    task = load_task("wikitext")
    rows = read_task("wikitext", task, tmp_path)
    questions = FormReader(task.form[0], "wikitext").questions(rows.rows, rows.examples)
    assert [row["text"].split("\n")[0] for row in rows.rows] == [" = First = ", " = Second = "]
    assert "a b, c" in questions[0].pairs[0][1]
    assert "a b , c" in questions[0].counted
