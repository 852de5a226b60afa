"""Calls out of a text, however it is cut; and a template that knows no tools."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm.serve.api_error import ApiError
from minicpm.serve.fields import ChatMessage, ChatRequest, Tool
from minicpm.serve.tools import Arguments, CallReader, CallStart, Piece, Text, chosen_tools, prepare_messages

PLAIN = st.text(alphabet="ab <>/_tolcal{}\"\n'", max_size=20).filter(lambda text: "<tool_call>" not in text)
CALLS = st.tuples(st.sampled_from(["f", "get_time"]), st.dictionaries(PLAIN, PLAIN, max_size=2))


def written(name: str, arguments: dict[str, str]) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def collected(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    text, calls = "", []
    for piece in pieces:
        match piece:
            case Text(said):
                text += said
            case CallStart(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case Arguments(index, more):
                calls[index] = (calls[index][0], calls[index][1] + more)
    return text, calls


@settings(max_examples=300, deadline=None)
@given(PLAIN, st.lists(CALLS, max_size=3), st.data())
def test_any_cut_gives_the_same_calls(text: str, calls: list[tuple[str, dict[str, str]]], data: Any) -> None:
    whole = text + "\n".join(written(*call) for call in calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    reader, pieces = CallReader(), []
    for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        pieces += reader.push(whole[start:stop])
    pieces += reader.finish()
    said, found = collected(pieces)
    assert said == (text.rstrip() if calls else text)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    reader = CallReader()
    assert reader.push("I say <to") == [Text("I say")]
    assert reader.push("ol>") == [Text(" <tool>")]
    assert reader.push('<tool_call>\n{"name": "f", "arg') == []
    assert reader.push('uments": {"a": 1') == [CallStart(0, "f"), Arguments(0, '{"a": 1')]
    assert reader.push("}}") == [Arguments(0, "}")]
    assert reader.push("\n</tool_call>") == []
    assert reader.finish() == []


def tool(name: str = "f") -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name}})


def messages(*given: dict[str, Any]) -> list[ChatMessage]:
    return [ChatMessage.model_validate(message) for message in given]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CONVERSATION = messages(
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Call it."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "42"},
)


def test_a_template_without_tools_reads_them_as_text() -> None:
    prepared = prepare_messages(CONVERSATION, [tool()], "{{ messages }}")
    assert [message["role"] for message in prepared] == ["system", "user", "assistant", "user"]
    assert prepared[0]["content"].startswith("Be brief.\n\n# Tools")
    assert '"name": "f"' in prepared[0]["content"]
    assert prepared[2]["content"] == '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert prepared[3]["content"] == "<tool_response>\n42\n</tool_response>"


def test_a_template_with_tools_gets_them_as_they_are() -> None:
    prepared = prepare_messages(CONVERSATION, [tool()], "{% if tools %}…")
    assert [message["role"] for message in prepared] == ["system", "user", "assistant", "tool"]
    assert prepared[2]["tool_calls"] == [CALL]


@pytest.mark.parametrize(
    ("choice", "named", "expected"),
    [
        (None, ["f", "g"], ["f", "g"]),
        ("none", ["f"], []),
        ({"type": "function", "function": {"name": "g"}}, ["f", "g"], ["g"]),
        ({"type": "function", "function": {"name": "h"}}, ["f"], None),
        ("required", [], None),
        ("auto", ["f", "f"], None),
    ],
)
def test_which_tools_may_be_called(choice: Any, named: list[str], expected: list[str] | None) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "tool_choice": choice}
    request = ChatRequest.model_validate(body | {"tools": [tool(name) for name in named]})
    if expected is None:
        with pytest.raises(ApiError):
            chosen_tools(request)
    else:
        assert [found.function.name for found in chosen_tools(request)] == expected
