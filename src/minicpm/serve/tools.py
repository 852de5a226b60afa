"""Tools: how the model is told of them, the grammar of its calls, and calls out of a text that streams.

A call is `<tool_call>` newline, `{"name": …, "arguments": …}`, newline `</tool_call>`, the form of Hermes that most
templates use. The grammar holds the model to it and to the schemas, so the reader of calls may rely on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minicpm.serve.api_error import ApiError
from minicpm.serve.fields import ChatMessage, ChatRequest, NamedToolChoice, Tool
from minicpm.serve.grammars import styled_json

BEGIN, END = "<tool_call>", "}\n</tool_call>"
_HEAD = re.compile(r'\n\{"name": "([^"]*)", "arguments": ')
_MOST_CALLS = 8

_INSTRUCTIONS = """\
# Tools

You may call one or more functions to assist with the user query. Their signatures, one a line:
<tools>
{tools}
</tools>

For each function call, return a JSON object with the function's name and its arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-as-JSON>}}
</tool_call>"""


@dataclass(frozen=True)
class Text:
    """A piece of plain text."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """Call number `index` of a reply begins; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Piece = Text | CallStart | Arguments


class CallReader:
    """Cuts a text that comes in pieces into plain text and calls; the same cuts however the pieces fall."""

    def __init__(self) -> None:
        self._held = ""
        self._state = "text"
        self.num_calls = 0

    def push(self, text: str) -> list[Piece]:
        """Return what became certain."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            count = len(self._held)
            state = self._state
            getattr(self, f"_read_{state}")(pieces)
            if self._state == state and len(self._held) == count:
                return pieces

    def finish(self) -> list[Piece]:
        """Return what was held back as the beginning of something that did not come."""
        held, self._held = self._held, ""
        if self._state == "text":
            return [Text(held)] if held and not (self.num_calls and held.isspace()) else []
        return [Arguments(self.num_calls - 1, held)] if self._state == "arguments" and held else []

    def _read_text(self, pieces: list[Piece]) -> None:
        before, mark, after = self._held.partition(BEGIN)
        if mark:
            # White space before a call only separates it.
            if before := before.rstrip():
                pieces.append(Text(before))
            self._held, self._state = after, "head"
            return
        kept = _num_begun(self._held, BEGIN)
        certain = self._held[: len(self._held) - kept].rstrip()
        if certain:
            pieces.append(Text(certain))
            self._held = self._held[len(certain) :]

    def _read_head(self, pieces: list[Piece]) -> None:
        if match := _HEAD.match(self._held):
            pieces.append(CallStart(self.num_calls, match[1]))
            self.num_calls += 1
            self._held, self._state = self._held[match.end() :], "arguments"

    def _read_arguments(self, pieces: list[Piece]) -> None:
        before, mark, after = self._held.partition(END)
        if not mark:
            kept = _num_begun(self._held, END)
            before, after = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        if before:
            pieces.append(Arguments(self.num_calls - 1, before))
        self._held = after
        if mark:
            self._state = "text"


def _num_begun(text: str, mark: str) -> int:
    """How long the longest end of `text` is with which `mark` begins."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def chosen_tools(request: ChatRequest) -> list[Tool]:
    """The tools that may be called.

    Raises:
        ApiError: the choice names none of them, or there is nothing to choose from.
    """
    tools, choice = request.tools or [], request.tool_choice
    if isinstance(choice, NamedToolChoice):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise ApiError(400, f"tool_choice names {choice.function.name!r}, which is no tool", param="tool_choice")
        return named
    if choice == "required" and not tools:
        raise ApiError(400, 'tool_choice is "required" and there are no tools', param="tool_choice")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "two tools have the same name", param="tools")
    return [] if choice == "none" else tools


def tool_grammar(request: ChatRequest, tools: Sequence[Tool]) -> str:
    """The grammar of replies that may call `tools`, or must, as `tool_choice` says."""
    must = request.tool_choice not in (None, "auto")
    is_parallel = request.parallel_tool_calls is not False and not isinstance(request.tool_choice, NamedToolChoice)
    lines = ["%llguidance {}"]
    if must:
        more = f' ("\\n" call){{0,{_MOST_CALLS - 1}}}' if is_parallel else ""
        lines += [f"start: call{more}", f"call: {json.dumps(BEGIN)} body"]
    else:
        start = f"start: call{{0,{_MOST_CALLS}}} TAIL" if is_parallel else "start: call | TAIL"
        lines += [start, "TAIL: /(.|\\n)*/", "call: call_begin body", f"call_begin[lazy]: TAIL {json.dumps(BEGIN)}"]
    lines.append("body: " + " | ".join(f"body_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        head = f'\n{{"name": "{tool.function.name}", "arguments": '
        schema = {"type": "object", **(tool.function.parameters or {"additionalProperties": False})}
        lines.append(f"body_{i}: {json.dumps(head)} %json {styled_json(schema)} {json.dumps(END)}")
    return "\n".join(lines)


def prepare_messages(messages: Sequence[ChatMessage], tools: Sequence[Tool], template: str) -> list[dict[str, Any]]:
    """The conversation as the template takes it; tools are written into it where the template knows of none."""
    knows_tools = "tools" in template
    prepared: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        given = message.model_dump(exclude_none=True, exclude={"annotations"})
        given["role"] = {"developer": "system", "function": "tool"}.get(message.role, message.role)
        _refuse_images(message, index)
        prepared.append(given if knows_tools else _as_text(given))
    if tools and not knows_tools:
        lines = "\n".join(json.dumps(tool.model_dump(exclude_none=True), ensure_ascii=False) for tool in tools)
        told = _INSTRUCTIONS.format(tools=lines)
        if prepared and prepared[0]["role"] == "system":
            prepared[0] = {**prepared[0], "content": f"{_text(prepared[0].get('content'))}\n\n{told}"}
        else:
            prepared.insert(0, {"role": "system", "content": told})
    return prepared


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """Calls and their results as words, for a template that only knows who says what."""
    calls = message.pop("tool_calls", None)
    if calls:
        written = [
            f'{BEGIN}\n{{"name": "{call["function"]["name"]}", "arguments": {call["function"]["arguments"]}{END}'
            for call in calls
        ]
        said = _text(message.get("content"))
        message["content"] = "\n".join([said, *written] if said else written)
    if message["role"] == "tool":
        message |= {"role": "user", "content": f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"}
    return message


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content)
    return content or ""


def _refuse_images(message: ChatMessage, index: int) -> None:
    if isinstance(message.content, list) and any(part.type == "image_url" for part in message.content):
        raise ApiError(
            400,
            f"messages[{index}] holds an image, and this model has no eyes; send text only",
            code="images_not_supported",
            param=f"messages[{index}].content",
        )
