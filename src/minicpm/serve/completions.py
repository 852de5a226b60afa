"""POST /v1/completions: continuations of plain texts, and log-probabilities of the texts themselves."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from starlette.responses import Response

from minicpm.engine import Event, Request, Sampler, TokenLogprob
from minicpm.engine import Sequence as EngineSequence
from minicpm.errors import MiniCPMError
from minicpm.serve.api_error import ApiError, from_engine
from minicpm.serve.chat_reply import count_usage
from minicpm.serve.engine_thread import Group
from minicpm.serve.fields import CompletionRequest, Prompts
from minicpm.serve.json_reply import JsonReply
from minicpm.serve.replies import CompletionChoice, CompletionLogprobs, CompletionReply
from minicpm.serve.service import Service, new_id
from minicpm.serve.streaming import DONE, EventStream, encode_event

_PLAIN = Sampler()
_DEFAULT_TOKENS = 16


async def complete(service: Service, request: HttpRequest) -> Response:
    """Continue one or several texts.

    Raises:
        ApiError: the request is at fault, or too much waits.
    """
    fields = await service.read(request, CompletionRequest)
    _check(service, fields)
    prompts = await encode_prompts(service, request, fields.prompt)
    service.limit("n times prompts", len(prompts) * (fields.n or 1), service.caps.choices)
    group = service.submit(request, await _requests(service, fields, prompts))
    echoes = [_echo(service, fields, prompt) for prompt in prompts for _ in range(fields.n or 1)]
    if fields.stream:
        return EventStream(service, request, group, _stream(service, fields, group, echoes, len(prompts)))
    await service.answer(request, group)
    reply = CompletionReply(
        id=new_id("cmpl-"),
        object="text_completion",
        created=int(time.time()),
        model=service.settings.model_name,
        system_fingerprint=service.fingerprint,
        choices=[
            _choice(service, fields, sequence, echo, index)
            for index, (sequence, echo) in enumerate(zip(group.sequences, echoes, strict=True))
        ],
        usage=count_usage(group.sequences, len(prompts)),
    )
    return JsonReply(reply)


async def encode_prompts(service: Service, request: HttpRequest, given: Prompts) -> list[Sequence[int]]:
    """The ids of what `prompt` or `input` holds: one or several texts, or ids as they are.

    Raises:
        ApiError: too many.
    """
    is_one = isinstance(given, str) or isinstance(given[0], int)
    prompts: list[Any] = [given] if is_one else list(given)
    service.limit("prompts", len(prompts), service.caps.prompts)
    return await service.compute(request, lambda: [service.model.encode_prompt(prompt) for prompt in prompts])


def _check(service: Service, fields: CompletionRequest) -> None:
    service.limit("logprobs", fields.logprobs or 0, service.caps.top_logprobs)
    service.limit("n", fields.n or 1, service.caps.choices)
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise ApiError(400, "best_of must equal n: all that is generated is answered", param="best_of")
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")


async def _requests(service: Service, fields: CompletionRequest, prompts: Sequence[Sequence[int]]) -> list[Request]:
    constraint = await service.grammars.constrain(fields.response_format)
    stops, num_choices = service.stops(fields), fields.n or 1
    try:
        return [
            Request(
                prompt,
                service.sampler(fields, _PLAIN, choice),
                max_new_tokens=_DEFAULT_TOKENS if fields.max_tokens is None else fields.max_tokens,
                end_ids=service.model.end_ids,
                stop=stops,
                logprobs=fields.logprobs,
                prompt_logprobs=fields.logprobs if fields.echo else None,
                constraint=constraint,
            )
            for prompt in prompts
            for choice in range(num_choices)
        ]
    except MiniCPMError as error:
        raise from_engine(error) from error


def _echo(service: Service, fields: CompletionRequest, prompt: Sequence[int]) -> str:
    return service.tokenizer.decode(prompt) if fields.echo else ""


def _choice(
    service: Service, fields: CompletionRequest, sequence: EngineSequence, echo: str, index: int
) -> CompletionChoice:
    logprobs = None
    if fields.logprobs is not None:
        writer = LogprobWriter(service)
        logprobs = writer.add([*sequence.prompt_logprobs, *sequence.logprobs])
    return CompletionChoice.model_construct(
        text=echo + sequence.text, index=index, logprobs=logprobs, finish_reason=sequence.finish_reason
    )


async def _stream(
    service: Service, fields: CompletionRequest, group: Group, echoes: Sequence[str], num_prompts: int
) -> AsyncIterator[bytes]:
    base = {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.settings.model_name,
        "system_fingerprint": service.fingerprint,
    }
    includes_usage = bool(fields.stream_options and fields.stream_options.include_usage)
    tail: dict[str, Any] = {"usage": None} if includes_usage else {}
    waiting = dict(zip(group.sequences, echoes, strict=True))
    indices = {sequence: index for index, sequence in enumerate(group.sequences)}
    writers = {sequence: LogprobWriter(service) for sequence in group.sequences}

    def encode(event: Event) -> bytes:
        sequence, text, records = event.sequence, event.text, []
        if sequence in waiting:
            text = waiting.pop(sequence) + text
            records += sequence.prompt_logprobs
        if event.logprob is not None:
            records.append(event.logprob)
        if not text and not records and event.finish_reason is None:
            return b""
        logprobs = None if fields.logprobs is None else writers[sequence].add(records).model_dump(mode="json")
        choice = {"text": text, "index": indices[sequence], "logprobs": logprobs, "finish_reason": event.finish_reason}
        return encode_event({**base, "choices": [choice], **tail})

    while events := await group.next():
        if data := b"".join([encode(event) for event in events]):
            yield data
    if includes_usage:
        usage = count_usage(group.sequences, num_prompts).model_dump(mode="json")
        yield encode_event({**base, "choices": [], "usage": usage})
    yield DONE


class LogprobWriter:
    """Records of one choice as OpenAI's four lists; offsets count on from one `add` to the next."""

    def __init__(self, service: Service) -> None:
        """Begin at the start of the text."""
        self._tokenizer = service.tokenizer
        self._text = service.tokenizer.stream()
        self._offset = 0

    def add(self, records: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """The lists of the next `records`."""
        lists = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for record in records:
            lists.tokens.append(self._name(record))
            lists.token_logprobs.append(record.logprob)
            lists.text_offset.append(self._offset)
            lists.top_logprobs.append(self._tops(record))
            self._offset += len(self._text.push(record.token_id))
        return lists

    def _tops(self, record: TokenLogprob) -> dict[str, float] | None:
        if record.logprob is None:
            return None
        # The token itself stands among them even when others are likelier, as in OpenAI's answers.
        return {self._name(top): top.logprob or 0.0 for top in (*record.top, record)}

    def _name(self, record: TokenLogprob) -> str:
        """The token's text; where that is no text, its bytes, so that two of them never look the same."""
        data = self._tokenizer.token_bytes(record.token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
