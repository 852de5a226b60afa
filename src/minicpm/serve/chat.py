"""POST /v1/chat/completions, and the two routes that show what it does to a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import Request as HttpRequest
from starlette.responses import Response

from minicpm.engine import Constraint, Request, Sampler
from minicpm.engine.settings import DEFAULTS
from minicpm.errors import MiniCPMError
from minicpm.serve.api_error import ApiError, from_engine
from minicpm.serve.chat_reply import ChatStream, whole_chat
from minicpm.serve.fields import ApplyTemplateRequest, ChatMessage, ChatRequest, Tool
from minicpm.serve.json_reply import JsonReply
from minicpm.serve.replies import ApplyTemplateReply
from minicpm.serve.service import Service
from minicpm.serve.streaming import EventStream
from minicpm.serve.tools import chosen_tools, prepare_messages, tool_grammar

_CARD = Sampler(temperature=DEFAULTS["temperature"], top_p=DEFAULTS["top_p"], top_k=DEFAULTS["top_k"])


async def chat(service: Service, request: HttpRequest) -> Response:
    """Answer a conversation.

    Raises:
        ApiError: the request is at fault, or too much waits.
    """
    fields = await service.read(request, ChatRequest)
    _check(service, fields)
    tools = chosen_tools(fields)
    prompt = await service.compute(request, lambda: _encode(service, fields, tools))
    requests = await _requests(service, fields, tools, prompt)
    group = service.submit(request, requests)
    if fields.stream:
        includes_usage = bool(fields.stream_options and fields.stream_options.include_usage)
        stream = ChatStream(service, group, has_tools=bool(tools), includes_usage=includes_usage)
        return EventStream(service, request, group, stream.__aiter__())
    await service.answer(request, group)
    return JsonReply(whole_chat(service, group.sequences, has_tools=bool(tools)))


async def apply_template(service: Service, request: HttpRequest) -> Response:
    """Show the text that the model is given for a conversation.

    Raises:
        ApiError: the request is at fault.
    """
    fields = await service.read(request, ApplyTemplateRequest)
    service.limit("messages", len(fields.messages), service.caps.messages)
    messages = prepare_messages(fields.messages, fields.tools or [], service.tokenizer.chat_template.source)
    text = await service.compute(
        request,
        lambda: service.tokenizer.render_chat(
            messages,
            add_generation_prompt=fields.add_generation_prompt is not False,
            tools=[tool.model_dump(exclude_none=True) for tool in fields.tools or []] or None,
            variables=fields.chat_template_kwargs,
        ),
    )
    return JsonReply(ApplyTemplateReply(prompt=text))


def encode_messages(
    service: Service, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
) -> list[int]:
    """The ids of a conversation without tools.

    Raises:
        MiniCPMError: the template refuses it.
    """
    service.limit("messages", len(messages), service.caps.messages)
    prepared = prepare_messages(messages, [], service.tokenizer.chat_template.source)
    return service.tokenizer.apply_chat(prepared, add_generation_prompt=add_generation_prompt)


def _check(service: Service, fields: ChatRequest) -> None:
    caps = service.caps
    service.limit("messages", len(fields.messages), caps.messages)
    service.limit("n", fields.n or 1, caps.choices)
    service.limit("top_logprobs", fields.top_logprobs or 0, caps.top_logprobs)
    service.limit("tools", len(fields.tools or []), caps.tools)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    if None not in (fields.max_tokens, fields.max_completion_tokens) and (
        fields.max_tokens != fields.max_completion_tokens
    ):
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", param="max_tokens")
    has_format = fields.response_format is not None and fields.response_format.type != "text"
    if has_format and fields.tools and fields.tool_choice != "none":
        raise ApiError(400, "response_format and tools exclude each other; give one", param="response_format")


def _encode(service: Service, fields: ChatRequest, tools: Sequence[Tool]) -> list[int]:
    messages = prepare_messages(fields.messages, tools, service.tokenizer.chat_template.source)
    return service.tokenizer.apply_chat(
        messages,
        tools=[tool.model_dump(exclude_none=True) for tool in tools] or None,
        variables=fields.chat_template_kwargs,
    )


async def _requests(
    service: Service, fields: ChatRequest, tools: Sequence[Tool], prompt: Sequence[int]
) -> list[Request]:
    constraint: Callable[[], Constraint] | None
    if tools:
        size = sum(len(tool.model_dump_json()) for tool in tools)
        constraint = await service.grammars.compile(lambda: tool_grammar(fields, tools), size, "tools")
    else:
        constraint = await service.grammars.constrain(fields.response_format)
    most = fields.max_completion_tokens if fields.max_tokens is None else fields.max_tokens
    stops = [*service.stops(fields), *service.tokenizer.turn_marks]
    try:
        return [
            Request(
                prompt,
                service.sampler(fields, _CARD, choice),
                max_new_tokens=most,
                end_ids=service.model.end_ids,
                stop=stops,
                logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
                constraint=constraint,
            )
            for choice in range(fields.n or 1)
        ]
    except MiniCPMError as error:
        raise from_engine(error) from error
