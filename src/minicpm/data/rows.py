"""Files of conversations and preferences, validated wholly before anything expensive begins.

What this leaves out: the shapes (`row_formats`), and the ids and masks (`minicpm.tokenizer.chat`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from minicpm.data.row_formats import Example, Kind, parse_row, shape_of
from minicpm.data.sources import read_source_rows
from minicpm.errors import ConfigError, DataError
from minicpm.tokenizer import LabelledRow, Tokenizer, build_labels
from minicpm.tokenizer.chat import TrainedTurns

_SHOWN = 3


@dataclass
class RowReport:
    """What was found in the files.

    Attributes:
        num_rows: rows read.
        shapes: rows by shape.
        bad: (file and line, what is wrong) of each row that was dropped.
    """

    num_rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, str]] = field(default_factory=list)

    def summary(self) -> str:
        """Return one line for people."""
        shapes = ", ".join(f"{count} {shape}" for shape, count in self.shapes.most_common())
        dropped = f"; {len(self.bad)} dropped, the first: {self.bad[0][1]}" if self.bad else ""
        return f"{self.num_rows} rows: {shapes}{dropped}"


def read_examples(
    sources: Sequence[str], kind: Kind = "conversation", *, drops_bad: bool = False
) -> tuple[list[Example], RowReport]:
    """Return every example of `sources`, and a report.

    Args:
        sources: files, folders, globs or data sets; see `sources`.
        kind: what each row must be.
        drops_bad: whether bad rows are dropped and counted; otherwise the first three end it.

    Raises:
        DataError: a file cannot be read, a file mixes shapes, rows are bad, or none is left.
    """
    report = RowReport()
    examples: list[Example] = []
    for source in sources:
        first: tuple[str, str] | None = None
        for row in read_source_rows(source):
            report.num_rows += 1
            try:
                example = parse_row(row)
                _check_kind(example, kind)
                first = first or (example.shape, example.where)
                if shape_of(row.value) != first[0]:
                    raise DataError(
                        f"{row.where}: the row is of the shape {example.shape}, the first one ({first[1]}) of "
                        f"{first[0]}; keep one shape per file"
                    )
            except DataError as error:
                report.bad.append((row.where, str(error)))
                continue
            report.shapes[example.shape] += 1
            examples.append(example)
    if report.bad and not drops_bad:
        shown = "; ".join(message for _, message in report.bad[:_SHOWN])
        raise DataError(
            f"{len(report.bad)} of {report.num_rows} rows cannot be used: {shown}"
            f"{'; …' if len(report.bad) > _SHOWN else ''}; correct them, or ask for bad rows to be dropped"
        )
    if not examples:
        why = f": {report.bad[0][1]}" if report.bad else " or the files are empty"
        raise DataError(f"no row of {', '.join(sources)} can be used{why}")
    return examples, report


def label(tokenizer: Tokenizer, example: Example, trained_turns: TrainedTurns = "last") -> LabelledRow:
    """Return the ids of a conversation (or judged answer) and which of them are targets.

    Raises:
        DataError: names file and line.
    """
    try:
        return build_labels(tokenizer, example.messages, trained_turns=trained_turns, tools=example.tools or None)
    except DataError as error:
        raise DataError(f"{example.where}: {error}") from error


def label_pair(tokenizer: Tokenizer, example: Example) -> tuple[LabelledRow, LabelledRow]:
    """Return the rows of the better and of the worse answer, each behind the same prompt.

    Raises:
        DataError: names file and line.
    """
    if example.kind != "preference":
        raise ConfigError(f"{example.where} is a {example.kind}, expected a preference")
    rows = []
    for answer in (example.chosen, example.rejected):
        messages = (*example.messages, {"role": "assistant", "content": answer})
        try:
            rows.append(build_labels(tokenizer, messages, trained_turns="last", tools=example.tools or None))
        except DataError as error:
            raise DataError(f"{example.where}: {error}") from error
    return rows[0], rows[1]


def _check_kind(example: Example, kind: Kind) -> None:
    if example.kind != kind:
        fields = {
            "conversation": "messages, conversations, instruction + output or prompt + completion",
            "preference": "a prompt with chosen + rejected",
            "judged": "an answer with label",
        }
        raise DataError(f"{example.where}: the row is a {example.kind}; this needs {fields[kind]}")
