"""Which tokens of a conversation are supervised: the one label builder for training, scoring and serving.

A row is laid out as the model will meet it: the prompt is encoded exactly as for generation, and each trained answer is
encoded on its own behind it, as the tokens that the model would have produced. For the MiniCPM vocabulary an answer
therefore begins with its own `▁`, as it did in the original training rows. Bos stands once, at the start; each trained
answer ends with one end token.
Left out: shifting (label `i` belongs to id `i`; the loss compares it with the prediction made at `i - 1`), truncation
and packing, which are the caller's.
Source: the row layout of the original training code, `[bos] + enc(input) + enc(output) + [eos]` with the input masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from minicpm.errors import ConfigError, DataError
from minicpm.tokenizer.provenance import TracedText
from minicpm.tokenizer.tokenizer import Message, Tokenizer

IGNORED_LABEL = -100
TrainedTurns = Literal["last", "all"]


class LabelledRow(NamedTuple):
    """The ids of one row and which of them are targets; two lists of one length."""

    ids: list[int]
    is_trained: list[bool]

    @property
    def labels(self) -> list[int]:
        """The id where it is a target, else -100; not shifted."""
        return [i if trained else IGNORED_LABEL for i, trained in zip(self.ids, self.is_trained, strict=True)]

    @property
    def num_trained(self) -> int:
        """The number of targets."""
        return sum(self.is_trained)


def build_labels(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    trained_turns: TrainedTurns = "last",
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> LabelledRow:
    """The ids of a conversation and its mask: assistant answers are targets, everything else is not.

    With `last`, earlier answers stand in the prompt just as they do when the model is asked; with `all`, each answer is
    a target and ends with an end token.

    Args:
        tokenizer: the model's.
        messages: ends with an assistant's answer.
        trained_turns: which answers are targets.
        tools: JSON schemas of functions, for templates that take them.
        variables: further names for the template.

    Raises:
        DataError: a message is malformed, the row does not end with an answer, or an answer is empty.
        ConfigError: the template changes what it wrote for earlier messages, or the model has no end token.
        FormatError: the template fails.
    """
    if trained_turns not in get_args(TrainedTurns):
        raise ConfigError(f"trained_turns is {trained_turns!r}; 'last' and 'all' are accepted")
    answers = _find_answers(messages)
    if trained_turns == "last":
        answers = answers[-1:]

    def render(stop: int, add_generation_prompt: bool) -> TracedText:
        return tokenizer.chat_template.render(
            messages[:stop], add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )

    row = LabelledRow([], [])
    done = TracedText()
    for answer in answers:
        prompt, whole = render(answer, True), render(answer + 1, False)
        _append(row, _encode(tokenizer, _rest(prompt, done, answer), is_start=not row.ids), trained=False)
        ids, num_read = _encode_answer(tokenizer, _rest(whole, prompt, answer))
        _append(row, ids, trained=True)
        done = whole[: len(prompt) + num_read]
    return row


def build_completion_labels(tokenizer: Tokenizer, prompt: str, completion: str, *, ends: bool = True) -> LabelledRow:
    """The ids of a plain prompt and its completion, of which only the completion (and its end token) is a target.

    Both are plain text: no template is applied and no control token is read.

    Args:
        tokenizer: the model's.
        prompt: what comes before; may be empty.
        completion: what is learned or scored.
        ends: whether an end token follows.

    Raises:
        DataError: the completion is empty.
        ConfigError: the model has no end token.
    """
    if not completion:
        raise DataError("the completion is empty; there is nothing to train on")
    row = LabelledRow([], [])
    _append(row, _encode(tokenizer, TracedText(prompt), is_start=True), trained=False)
    _append(row, _encode_generated(tokenizer, completion), trained=True)
    if ends:
        _append(row, [_end_id(tokenizer)], trained=True)
    return row


def _find_answers(messages: Sequence[Message]) -> list[int]:
    if not messages:
        raise DataError("the row has no messages; it must end with an assistant's answer")
    answers = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") != "assistant":
            continue
        content = message.get("content")
        if (content is None or (isinstance(content, str) and not content.strip())) and not message.get("tool_calls"):
            raise DataError(f"messages[{i}].content is empty; an assistant's answer needs text")
        answers.append(i)
    if not answers or answers[-1] != len(messages) - 1:
        last = messages[-1].get("role") if isinstance(messages[-1], Mapping) else type(messages[-1]).__name__
        raise DataError(f"the row ends with the role {last!r}; it must end with an assistant's answer")
    return answers


def _rest(text: TracedText, beginning: TracedText, answer: int) -> TracedText:
    if not text.startswith(beginning):
        raise ConfigError(
            f"the chat template rewrites what comes before messages[{answer}], so its answer cannot be told from the "
            "prompt; train on the last answer only, or give a template that only appends"
        )
    return text[len(beginning) :]


def _encode(tokenizer: Tokenizer, text: TracedText, *, is_start: bool) -> list[int]:
    ids = tokenizer.encode_spans(text, text.trusted_spans)
    return tokenizer.add_bos(ids) if is_start else ids


def _encode_answer(tokenizer: Tokenizer, text: TracedText) -> tuple[list[int], int]:
    """The ids of an answer with its one end token, and how many characters of `text` they cover."""
    ids: list[int] = []
    for start, stop, token_id in tokenizer.split_spans(text, text.trusted_spans):
        if token_id is None:
            plain = text[start:stop]
            ids += _encode_generated(tokenizer, plain) if start == 0 else tokenizer.encode_part(plain)
            continue
        ids.append(token_id)
        if token_id in tokenizer.eos_ids:
            return ids, stop
    return [*ids, _end_id(tokenizer)], len(text)


def _encode_generated(tokenizer: Tokenizer, text: str) -> list[int]:
    # A template that writes its own space before the answer has already given it the one leading `▁`.
    return tokenizer.encode_continuation(text) if text.startswith(" ") else tokenizer.encode(text)


def _end_id(tokenizer: Tokenizer) -> int:
    eos = tokenizer.vocabulary.eos_id
    if eos is None:
        raise ConfigError("the tokenizer names no eos token, so answers cannot end; set one in its configuration")
    return eos


def _append(row: LabelledRow, ids: list[int], *, trained: bool) -> None:
    row.ids.extend(ids)
    row.is_trained.extend([trained] * len(ids))
