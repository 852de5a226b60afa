"""OpenAI's own Python client against a real server: answers validate, streams join to the whole, texts are ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.e2e.serve.conftest import Server

import minicpm
from minicpm.engine import LanguageModel

QUESTIONS = [
    "What is the capital of France?",
    "Write a line about rain.",
    "How many legs has a spider?",
    "法国的首都是什么？",
]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": text,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name, text in {"weather": "the weather of a city", "local_time": "the time in a city"}.items()
]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[LanguageModel]:
    with minicpm.load(smollm2_path, context_length=1024) as model:
        yield model


def ask(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    return client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": text}], **fields)


def strictly(answer: Any) -> None:
    """The answer must validate against the client's own classes; when it parses answers it is lenient."""
    type(answer).model_validate(answer.model_dump(), strict=True)


def test_a_reply(client: openai.OpenAI) -> None:
    answer = ask(client, QUESTIONS[0], temperature=0)
    strictly(answer)
    choice = answer.choices[0]
    assert choice.message.content == "The capital of France is Paris."
    assert choice.finish_reason == "stop"
    assert choice.message.refusal is None
    assert choice.logprobs is None
    assert {"refusal", "content", "role"} <= choice.message.model_fields_set
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens == 45


def test_texts_are_the_engines(client: openai.OpenAI, model: LanguageModel) -> None:
    expected = [model.chat(text, temperature=0, max_new_tokens=24)[0] for text in QUESTIONS]
    alone = [ask(client, text, temperature=0, max_tokens=24) for text in QUESTIONS]
    assert [answer.choices[0].message.content for answer in alone] == expected
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda i: ask(client, QUESTIONS[i % 4], temperature=0, max_tokens=24), range(16)))
    # Kernels for one row and for many give the same bits here, so even near ties fall the same way.
    assert [answer.choices[0].message.content for answer in together] == expected * 4


def test_a_stream_joins_to_the_whole(client: openai.OpenAI) -> None:
    settings: Any = {"seed": 7, "temperature": 1, "max_tokens": 20, "n": 3, "logprobs": True, "top_logprobs": 2}
    whole = ask(client, QUESTIONS[1], **settings)
    texts, records, reasons, usage = ["", "", ""], [[], [], []], ["", "", ""], None
    for chunk in ask(client, QUESTIONS[1], stream=True, stream_options={"include_usage": True}, **settings):
        strictly(chunk)
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            records[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens
    for mine, choice in zip(records, whole.choices, strict=True):
        assert [record.token for record in mine] == [record.token for record in choice.logprobs.content]
        assert [r.logprob for r in mine] == pytest.approx([r.logprob for r in choice.logprobs.content], abs=1e-4)
        assert all(len(record.top_logprobs) == 2 for record in mine)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stop": [" France", "zzz"]}, "The capital of"),
        ({"max_tokens": 2}, "The capital"),
        ({"max_completion_tokens": 2}, "The capital"),
        ({"logit_bias": {"504": -100}, "max_tokens": 8}, None),
    ],
)
def test_settings_reach_the_engine(client: openai.OpenAI, fields: Any, expected: str | None) -> None:
    text = ask(client, QUESTIONS[0], temperature=0, **fields).choices[0].message.content
    if expected is None:
        assert text != "The capital of France is Paris."
    else:
        assert text == expected


def test_echo_tells_the_prompts_logprobs(client: openai.OpenAI, model: LanguageModel) -> None:
    prompt = "The capital of France is"
    settings: Any = {"model": "smollm2", "max_tokens": 1, "temperature": 0, "logprobs": 2}
    strictly(client.completions.create(prompt=prompt, **settings))
    # The first token's null is not in their schema, but evaluators count on it.
    answer = client.completions.create(prompt=prompt, echo=True, **settings)
    logprobs = answer.choices[0].logprobs
    truth = model.logprobs(prompt, top=2)
    assert answer.choices[0].text == prompt + " Paris"
    assert "".join(logprobs.tokens) == prompt + " Paris"
    assert logprobs.text_offset == [0, 3, 11, 14, 21, 24]
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.token_logprobs[1:-1] == pytest.approx([record.logprob for record in truth[1:]], abs=1e-4)


def test_a_stream_of_completions(client: openai.OpenAI) -> None:
    settings: Any = {"model": "smollm2", "prompt": ["1, 2,", "Paris is"], "max_tokens": 6, "temperature": 0}
    settings["logprobs"] = 1
    whole = client.completions.create(**settings, echo=True)
    texts, tokens = ["", ""], [[], []]
    for chunk in client.completions.create(**settings, echo=True, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]


def test_json_follows_its_schema(client: openai.OpenAI) -> None:
    chosen: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(3):
        answer = ask(client, "Invent a person.", response_format=chosen, temperature=2, seed=seed, max_tokens=100)
        person = json.loads(answer.choices[0].message.content)
        assert set(person) == {"name", "age"}
        assert 0 <= person["age"] <= 99
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("chosen", "accepted"),
    [
        ({"type": "regex", "regex": "(red|blue)"}, {"red", "blue"}),
        ({"type": "grammar", "grammar": 'start: "north" | "south"'}, {"north", "south"}),
        ({"type": "grammar", "grammar": 'root ::= "left" | "right"'}, {"left", "right"}),
    ],
)
def test_text_follows_its_grammar(server: Server, chosen: Any, accepted: set[str]) -> None:
    answer = server.chat("Which one?", response_format=chosen, temperature=1, seed=1).json()
    assert answer["choices"][0]["message"]["content"] in accepted
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "local_time"}}])
def test_tools_are_called_where_they_must(client: openai.OpenAI, choice: Any) -> None:
    settings: Any = {"tools": TOOLS, "tool_choice": choice, "temperature": 0, "max_tokens": 200, "seed": 1}
    settings["parallel_tool_calls"] = False
    answer = ask(client, "What is the weather in Paris?", **settings)
    strictly(answer)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name in {"weather", "local_time"} if choice == "required" else {"local_time"}
    assert set(json.loads(call.function.arguments)) == {"city"}
    name, arguments = "", ""
    for chunk in ask(client, "What is the weather in Paris?", stream=True, **settings):
        for part in chunk.choices[0].delta.tool_calls or []:
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert (name, arguments) == (call.function.name, call.function.arguments)


def test_tools_that_may_be_called_do_not_hinder_text(client: openai.OpenAI) -> None:
    answer = ask(client, "Say hello.", tools=TOOLS, temperature=0, max_tokens=30)
    strictly(answer)
    for call in answer.choices[0].message.tool_calls or []:
        assert set(json.loads(call.function.arguments)) == {"city"}
    none = ask(client, QUESTIONS[0], tools=TOOLS, tool_choice="none", temperature=0)
    assert none.choices[0].message.content == "The capital of France is Paris."


def test_embeddings(client: openai.OpenAI, model: LanguageModel) -> None:
    texts = ["a cat", "a kitten sleeps"]
    answer = client.embeddings.create(model="smollm2", input=texts)
    assert [item.embedding for item in answer.data] == [
        pytest.approx(row, abs=1e-5) for row in model.embed(texts).tolist()
    ]
    assert client.embeddings.create(model="smollm2", input=texts[0], encoding_format="float").data[0].embedding == (
        pytest.approx(answer.data[0].embedding, abs=1e-5)
    )


def test_models(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").id == "smollm2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_tokens_there_and_back(server: Server, model: LanguageModel) -> None:
    text = "Grüße, 世界 <|im_end|>"
    tokens = server.post("/tokenize", {"content": text}).json()["tokens"]
    assert tokens == list(model.encode_prompt(text))
    assert not set(tokens) & model.tokenizer.control_ids
    assert server.post("/detokenize", {"tokens": tokens}).json()["content"] == text
    pieces = server.post("/tokenize", {"content": text, "with_pieces": True}).json()["tokens"]
    assert b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces) == (
        text.encode()
    )
    messages = [{"role": "user", "content": text}]
    assert server.post("/tokenize", {"messages": messages}).json()["tokens"] == model.tokenizer.apply_chat(messages)
    shown = server.post("/apply-template", {"messages": messages}).json()["prompt"]
    assert shown == model.tokenizer.render_chat(messages)
