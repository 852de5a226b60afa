"""The shapes in which people keep conversations and preferences, recognised by their fields.

    messages        {"messages": [{"role": "user", "content": "…"}, …]}
    sharegpt        {"conversations": [{"from": "human", "value": "…"}, …]}
    alpaca          {"instruction": "…", "input": "…", "output": "…", "history": [["…", "…"], …]}
    completion      {"prompt": "…", "completion": "…"}, also question/answer, query/response
    preference      any of the above prompts with {"chosen": …, "rejected": …}; or two whole conversations
    judged          any of the above answers with {"label": true} or {"kto_tag": false}

`system` and `tools` are taken where they stand. What this leaves out: files and counts (`rows`), and ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minicpm.data.readers import Row
from minicpm.errors import DataError

Kind = Literal["conversation", "preference", "judged"]
Message = dict[str, Any]

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    "system": "system",
    "developer": "system",
}
_PROMPT_AND_ANSWER = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"))
_LABELS = ("label", "kto_tag")
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Example:
    """One row, whatever its shape was.

    Attributes:
        kind: `conversation` ends with the answer to learn; `preference` has two answers; `judged` one with a verdict.
        shape: the name of the shape that was recognised.
        messages: the conversation, its last answer included for `conversation` and `judged`, left out for `preference`.
        where: file and line.
        chosen: the better answer, of `preference`.
        rejected: the worse answer, of `preference`.
        is_good: the verdict, of `judged`.
        tools: schemas of functions, as the template takes them.
    """

    kind: Kind
    shape: str
    messages: tuple[Message, ...]
    where: str
    chosen: str = ""
    rejected: str = ""
    is_good: bool = True
    tools: tuple[Any, ...] = ()

    @property
    def text(self) -> str:
        """All texts of the row, one after another; of a preference the conversation alone."""
        return "".join(str(message["content"] or "") for message in self.messages)


def shape_of(fields: Mapping[str, Any]) -> str | None:
    """Return the name of the shape that a row with these fields has, or None."""
    base = _base_shape(fields)
    if {"chosen", "rejected"} <= fields.keys():
        return f"preference/{base or 'whole'}"
    if base is None:
        return None
    return f"judged/{base}" if any(name in fields for name in _LABELS) else base


def parse_row(row: Row) -> Example:
    """Return the example in a row.

    Raises:
        DataError: no shape is recognised, or a field has the wrong type or an empty or misplaced text; names it.
    """
    shape = shape_of(row.value)
    if shape is None:
        there = ", ".join(map(repr, list(row.value)[:12])) or "no fields"
        raise DataError(
            f"{row.where}: a row with {there} is of no known shape; known are messages, conversations, "
            "instruction + output, prompt + completion, each also with chosen + rejected, or with label"
        )
    try:
        if shape.startswith("preference/"):
            return _preference(row, shape)
        return _conversation(row, shape)
    except _FieldError as error:
        raise DataError(f"{row.where}: field {error}") from error


class _FieldError(Exception):
    """A field of a row is wrong; the row's place is added by `parse_row`."""


def _base_shape(fields: Mapping[str, Any]) -> str | None:
    if "messages" in fields:
        return "messages"
    if "conversations" in fields:
        return "sharegpt"
    if "instruction" in fields and ("output" in fields or "chosen" in fields):
        return "alpaca"
    if any(p in fields and (a in fields or "chosen" in fields) for p, a in _PROMPT_AND_ANSWER):
        return "completion"
    return None


def _conversation(row: Row, shape: str) -> Example:
    fields, base = row.value, shape.rpartition("/")[2]
    messages = _prompt(fields, base)
    if base == "alpaca":
        messages.append({"role": "assistant", "content": _text(fields, "output")})
    elif base == "completion":
        name = next(a for p, a in _PROMPT_AND_ANSWER if p in fields and a in fields)
        messages.append({"role": "assistant", "content": _text(fields, name)})
    list_name = {"messages": "messages", "sharegpt": "conversations"}.get(base, base)
    if messages[-1]["role"] != "assistant":
        raise _FieldError(f"{list_name!r} ends with the role {messages[-1]['role']!r}; it must end with an answer")
    is_good = True
    kind: Kind = "conversation"
    if shape.startswith("judged/"):
        name = next(name for name in _LABELS if name in fields)
        is_good, kind = fields[name], "judged"
        if not isinstance(is_good, bool):
            raise _FieldError(f"{name!r} is {is_good!r}, expected true or false")
    return Example(kind, shape, tuple(messages), row.where, is_good=is_good, tools=_tools(fields))


def _preference(row: Row, shape: str) -> Example:
    fields, base = row.value, shape.rpartition("/")[2]
    if base == "whole" or _is_whole(fields["chosen"]):
        prompt, chosen, rejected = _split_whole(fields)
        if base not in ("whole", "completion"):
            raise _FieldError(f"'chosen' is a whole conversation, but {base} gives the prompt too; keep one of them")
    else:
        prompt = _prompt(fields, base)
        chosen, rejected = (_answer(fields[name], name) for name in ("chosen", "rejected"))
    if not prompt or prompt[-1]["role"] == "assistant":
        raise _FieldError("'chosen' answers nothing: the prompt is empty or ends with an answer")
    if chosen == rejected:
        raise _FieldError("'rejected' equals 'chosen'; there is nothing to prefer")
    return Example("preference", shape, tuple(prompt), row.where, chosen, rejected, tools=_tools(fields))


def _prompt(fields: Mapping[str, Any], base: str) -> list[Message]:
    messages: list[Message] = []
    system = fields.get("system")
    if system:
        messages.append({"role": "system", "content": _text(fields, "system")})
    if base == "messages":
        messages += _turns(fields["messages"], "messages", "role", "content")
    elif base == "sharegpt":
        messages += _turns(fields["conversations"], "conversations", "from", "value")
    elif base == "alpaca":
        for i, pair in enumerate(fields.get("history") or []):
            if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise _FieldError(f"'history[{i}]' must be a pair of texts, got {pair!r:.60}")
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        extra = fields.get("input") or ""
        if not isinstance(extra, str):
            raise _FieldError(f"'input' is {type(extra).__name__}, expected text")
        instruction = _text(fields, "instruction")
        messages.append({"role": "user", "content": f"{instruction}\n{extra}" if extra.strip() else instruction})
    else:
        name = next(p for p, a in _PROMPT_AND_ANSWER if p in fields and (a in fields or "chosen" in fields))
        if isinstance(fields[name], list):
            messages += _turns(fields[name], name, "role", "content")
        else:
            messages.append({"role": "user", "content": _text(fields, name)})
    return messages


def _turns(value: Any, name: str, role_key: str, text_key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _FieldError(f"{name!r} must be a list of messages, got {value!r:.60}")
    messages = []
    for i, turn in enumerate(value):
        at = f"{name}[{i}]"
        if not isinstance(turn, Mapping):
            raise _FieldError(f"'{at}' is {type(turn).__name__}, expected an object with {role_key} and {text_key}")
        role = turn.get(role_key)
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise _FieldError(f"'{at}.{role_key}' is {role!r}, expected one of {', '.join(sorted(_ROLES))}")
        role = _ROLES[role.lower()]
        if role == "system" and i:
            raise _FieldError(f"'{at}.{role_key}' is {role!r}, which may only come first")
        message: Message = {"role": role, "content": turn.get(text_key)}
        calls = turn.get("tool_calls")
        if calls:
            message["tool_calls"] = calls
        if not isinstance(message["content"], str) and not calls:
            raise _FieldError(f"'{at}.{text_key}' is {type(message['content']).__name__}, expected text")
        if role in ("user", "assistant") and not calls and not message["content"].strip():
            raise _FieldError(f"'{at}.{text_key}' is empty; a message needs text")
        messages.append(message)
    return messages


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise _FieldError(f"{name!r} is {type(value).__name__}, expected text")
    if not value.strip():
        raise _FieldError(f"{name!r} is empty; it needs text")
    return value


def _answer(value: Any, name: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("content", value.get("value"))
    return _text({name: value}, name)


def _is_whole(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1


def _split_whole(fields: Mapping[str, Any]) -> tuple[list[Message], str, str]:
    """Return the common beginning of two whole conversations, and the answer that ends each."""
    ends = []
    for name in ("chosen", "rejected"):
        value = fields[name]
        turns = _turns(value, name, "role", "content") if isinstance(value, list) else _dialogue(value, name)
        if turns[-1]["role"] != "assistant":
            raise _FieldError(f"{name!r} ends with the role {turns[-1]['role']!r}; it must end with an answer")
        ends.append(turns)
    chosen, rejected = ends
    if chosen[:-1] != rejected[:-1]:
        raise _FieldError("'rejected' is another conversation than 'chosen'; they may differ in the last answer only")
    return chosen[:-1], str(chosen[-1]["content"]), str(rejected[-1]["content"])


def _dialogue(value: Any, name: str) -> list[Message]:
    parts = _TURN.split(value) if isinstance(value, str) else []
    if len(parts) < 3 or parts[0].strip():
        raise _FieldError(f"{name!r} has no prompt beside it and is no dialogue of Human: and Assistant: turns")
    turns = [{"from": role, "value": text.strip()} for role, text in zip(parts[1::2], parts[2::2], strict=True)]
    return _turns(turns, name, "from", "value")


def _tools(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    value = fields.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _FieldError(f"'tools' is not valid JSON: {error}") from error
    if not value:
        return ()
    if not isinstance(value, list):
        raise _FieldError(f"'tools' is {type(value).__name__}, expected a list of schemas")
    return tuple(value)
