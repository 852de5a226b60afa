"""Sequences of the engine -> the answer of /v1/chat/completions, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from minicpm.engine import Event, TokenLogprob
from minicpm.engine import Sequence as EngineSequence
from minicpm.serve.engine_thread import Group
from minicpm.serve.replies import (
    ChatChoice,
    ChatLogprob,
    ChatLogprobs,
    ChatReply,
    PromptTokens,
    ReplyFunction,
    ReplyMessage,
    ReplyToolCall,
    TopLogprob,
    Usage,
)
from minicpm.serve.service import Service, new_id
from minicpm.serve.streaming import DONE, encode_event
from minicpm.serve.tools import Arguments, CallReader, CallStart, Piece, Text
from minicpm.tokenizer import Tokenizer


def whole_chat(service: Service, sequences: Sequence[EngineSequence], *, has_tools: bool) -> ChatReply:
    """The answer for finished sequences, one choice each."""
    return ChatReply(
        id=new_id("chatcmpl-"),
        object="chat.completion",
        created=int(time.time()),
        model=service.settings.model_name,
        system_fingerprint=service.fingerprint,
        choices=[_choice(service, sequence, i, has_tools=has_tools) for i, sequence in enumerate(sequences)],
        usage=count_usage(sequences),
    )


def count_usage(sequences: Sequence[EngineSequence], num_prompts: int = 1) -> Usage:
    """The tokens of finished sequences, of which `num_prompts` have prompts of their own and the others share them."""
    share = len(sequences) // num_prompts
    num_prompt = sum(sequence.num_prompt_tokens for sequence in sequences[::share])
    num_cached = sum(sequence.num_cached_tokens for sequence in sequences[::share])
    num_new = sum(len(sequence.new_ids) for sequence in sequences)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_new,
        total_tokens=num_prompt + num_new,
        prompt_tokens_details=PromptTokens(cached_tokens=num_cached),
    )


def _choice(service: Service, sequence: EngineSequence, index: int, *, has_tools: bool) -> ChatChoice:
    text, calls = sequence.text, list[ReplyToolCall]()
    if has_tools:
        reader = CallReader()
        text, calls = _join([*reader.push(text), *reader.finish()])
    reason = "tool_calls" if calls and sequence.finish_reason == "stop" else sequence.finish_reason
    logprobs = None
    if sequence.request.logprobs is not None:
        records = [chat_logprob(record, service.tokenizer) for record in sequence.logprobs]
        logprobs = ChatLogprobs(content=records, refusal=None)
    message = ReplyMessage(role="assistant", content=text or None if calls else text, refusal=None)
    if calls:
        message.tool_calls = calls
    return ChatChoice.model_construct(index=index, message=message, logprobs=logprobs, finish_reason=reason)


def _join(pieces: Sequence[Piece]) -> tuple[str, list[ReplyToolCall]]:
    text, calls = "", list[ReplyToolCall]()
    for piece in pieces:
        match piece:
            case Text(said):
                text += said
            case CallStart(_, name):
                function = ReplyFunction(name=name, arguments="")
                calls.append(ReplyToolCall(id=new_id("call_"), type="function", function=function))
            case Arguments(index, written):
                calls[index].function.arguments += written
    return text, calls


def chat_logprob(record: TokenLogprob, tokenizer: Tokenizer) -> ChatLogprob:
    """A token's record in OpenAI's form; `bytes` are what a part of a character really is."""
    tops = [
        TopLogprob(token=top.token, logprob=_number(top), bytes=list(tokenizer.token_bytes(top.token_id)))
        for top in record.top
    ]
    own = list(tokenizer.token_bytes(record.token_id))
    return ChatLogprob(token=record.token, logprob=_number(record), bytes=own, top_logprobs=tops)


def _number(record: TokenLogprob) -> float:
    # What cannot come at all has no number in JSON; OpenAI writes this.
    return max(record.logprob or 0.0, -9999.0)


class ChatStream:
    """The events of one request as chunks."""

    def __init__(self, service: Service, group: Group, *, has_tools: bool, includes_usage: bool) -> None:
        """Begin; nothing is sent here."""
        self._service = service
        self._group = group
        self._includes_usage = includes_usage
        self._indices = {sequence: index for index, sequence in enumerate(group.sequences)}
        self._readers = {sequence: CallReader() for sequence in group.sequences} if has_tools else {}
        self._begun: set[EngineSequence] = set()
        self._base = {
            "id": new_id("chatcmpl-"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": service.settings.model_name,
            "system_fingerprint": service.fingerprint,
        }
        self._tail: dict[str, Any] = {"usage": None} if includes_usage else {}

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The bytes to send, each time all that has come."""
        while events := await self._group.next():
            if data := b"".join([self._encode(event) for event in events]):
                yield data
        if self._includes_usage:
            usage = count_usage(self._group.sequences).model_dump(mode="json")
            yield encode_event({**self._base, "choices": [], "usage": usage})
        yield DONE

    def _encode(self, event: Event) -> bytes:
        sequence, reason = event.sequence, event.finish_reason
        logprobs = None
        if event.logprob is not None:
            record = chat_logprob(event.logprob, self._service.tokenizer).model_dump(mode="json")
            logprobs = {"content": [record], "refusal": None}
        deltas = self._deltas(event)
        if sequence not in self._begun and (deltas or logprobs or reason):
            self._begun.add(sequence)
            first = deltas.pop(0) if deltas and "content" in deltas[0] else {"content": ""}
            deltas.insert(0, {"role": "assistant", "refusal": None, **first})
        if logprobs and not deltas:
            deltas.append({"content": ""})
        chunks = [self._chunk(sequence, delta, logprobs if i == 0 else None) for i, delta in enumerate(deltas)]
        if reason is not None:
            reader = self._readers.get(sequence)
            has_called = reason == "stop" and reader is not None and reader.num_calls
            chunks.append(self._chunk(sequence, {}, None, "tool_calls" if has_called else reason))
        return b"".join(chunks)

    def _deltas(self, event: Event) -> list[dict[str, Any]]:
        reader = self._readers.get(event.sequence)
        if reader is None:
            return [{"content": event.text}] if event.text else []
        pieces = reader.push(event.text) + (reader.finish() if event.finish_reason is not None else [])
        return [_delta(piece) for piece in pieces]

    def _chunk(
        self, sequence: EngineSequence, delta: dict[str, Any], logprobs: Any, reason: str | None = None
    ) -> bytes:
        choice = {"index": self._indices[sequence], "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return encode_event({**self._base, "choices": [choice], **self._tail})


def _delta(piece: Piece) -> dict[str, Any]:
    match piece:
        case Text(text):
            return {"content": text}
        case CallStart(index, name):
            call = {"index": index, "id": new_id("call_"), "type": "function"}
            return {"tool_calls": [{**call, "function": {"name": name, "arguments": ""}}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
