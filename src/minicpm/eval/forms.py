"""Rows -> what is asked of a model: templates over a row's fields, examples in front, choices as pairs to score.

Task files may come from anyone, so templates run in Jinja's immutable sandbox.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minicpm.errors import ConfigError, DataError
from minicpm.eval import text_filters
from minicpm.eval.task import Form

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One row as one form puts it.

    Attributes:
        pairs: contexts and continuations to score: one per choice, or one.
        lengths: characters of each choice, for `acc_norm`.
        gold: the index of the right choice, or the right answer of a generated one.
        prompt: what a text is generated from.
        counted: the text whose words and bytes count in perplexity.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    lengths: tuple[int, ...] = ()
    gold: Any = None
    prompt: str = ""
    counted: str = ""


class FormReader:
    """The templates of one form, compiled."""

    def __init__(self, form: Form, where: str) -> None:
        """Compile the templates of `form`; `where` names it in messages.

        Raises:
            ConfigError: a template is not valid.
        """
        self.form = form
        self._where = where
        self._context = self._template("context")
        self._continuation = self._template("continuation")
        self._description = self._template("description")
        self._counted = self._template("counted")
        self._gold = self._expression("gold")
        self._choices = self._expression("choices") if form.choices else None
        self._contexts = self._expression("contexts") if form.contexts else None
        self._group = self._expression("group")

    def questions(self, rows: Sequence[Row], examples: Sequence[Row]) -> list[Question]:
        """Return each of `rows` as a question, with examples from `examples` (of its group) in front.

        Raises:
            DataError: a row has not what the form needs; there are too few examples.
        """
        shots = self.form.shots
        by_group: dict[Any, list[Row]] = {}
        if shots:
            for example in examples:
                by_group.setdefault(self._group(example), []).append(example)
        questions = []
        for index, row in enumerate(rows):
            front = self._description(row)
            if shots:
                chosen = [e for e in by_group.get(self._group(row), ()) if e != row][:shots]
                if len(chosen) < shots:
                    raise DataError(f"{self._where}: row {index} wants {shots} examples, there are {len(chosen)}")
                front += "".join(self._example(example) + self.form.separator for example in chosen)
            questions.append(self._question(row, front, index))
        return questions

    def _question(self, row: Row, front: str, index: int) -> Question:
        form = self.form
        if form.mode == "perplexity":
            text = self._continuation(row)
            return Question(pairs=(("", text),), counted=self._counted(row) if form.counted else text)
        gold = self._gold(row)
        if form.mode in ("generate", "dialogue"):
            return Question(prompt=front + self._context(row), gold=gold)
        if form.mode == "cloze":
            return Question(pairs=((front + self._context(row), form.delimiter + self._continuation(row)),), gold=0)
        choices = self._choices(row) if self._choices else []
        if self._contexts:
            choices = self._contexts(row)
            tail = form.delimiter + self._continuation(row)
            pairs = tuple((front + choice, tail) for choice in choices)
        else:
            context = front + self._context(row)
            pairs = tuple((context, form.delimiter + str(choice)) for choice in choices)
        if len(choices) < 2 or not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise DataError(f"{self._where}: row {index} has {len(choices)} choices and the right one is {gold!r}")
        return Question(pairs=pairs, lengths=tuple(len(str(choice)) for choice in choices), gold=gold)

    def _example(self, row: Row) -> str:
        form, gold = self.form, self._gold(row)
        if form.mode == "choice" and self._contexts:
            return str(self._contexts(row)[gold]) + form.delimiter + self._continuation(row)
        if form.mode == "choice" and self._choices:
            return self._context(row) + form.delimiter + str(self._choices(row)[gold])
        # Of a generated answer the example shows the worked one, where the rows have it.
        return self._context(row) + form.delimiter + (self._continuation(row) if form.continuation else str(gold))

    def _template(self, name: str) -> Callable[[Row], str]:
        source = getattr(self.form, name)
        try:
            template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{self._where}: {name}: {error}") from error
        return functools.partial(self._render, name, template.render)

    def _expression(self, name: str) -> Callable[[Row], Any]:
        try:
            compiled = _environment().compile_expression(getattr(self.form, name), undefined_to_none=False)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{self._where}: {name}: {error}") from error
        return functools.partial(self._render, name, compiled)

    def _render(self, name: str, render: Callable[..., Any], row: Row) -> Any:
        try:
            value = render(row)
        except (jinja2.TemplateError, TypeError, ValueError, IndexError, KeyError) as error:
            fields = ", ".join(sorted(row))
            raise DataError(
                f"{self._where}: {name} cannot be made of a row with the fields {fields}: {error}"
            ) from error
        if isinstance(value, jinja2.Undefined):
            raise DataError(f"{self._where}: {name} names a field that a row lacks; it has {', '.join(sorted(row))}")
        return value


def select(rows: Sequence[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Return those of `rows` for which the expression `where` holds.

    Raises:
        ConfigError: it is not a valid expression.
    """
    try:
        holds = _environment().compile_expression(where)
    except jinja2.TemplateError as error:
        raise ConfigError(f"where: {error}") from error
    return [row for row in rows if holds(row)]


def digest(form: Form) -> str:
    """Return a short hash of everything that `form` says."""
    return hashlib.sha256(repr(form).encode()).hexdigest()[:12]


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= text_filters.FILTERS
    return environment
