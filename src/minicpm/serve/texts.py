"""/tokenize, /detokenize and /tokenizer_info, in the words of llama-server (`content`) and of vLLM (`prompt`)."""

from __future__ import annotations

from fastapi import Request as HttpRequest
from starlette.responses import Response

from minicpm.serve.api_error import ApiError
from minicpm.serve.chat import encode_messages
from minicpm.serve.fields import DetokenizeRequest, TokenizeRequest
from minicpm.serve.json_reply import JsonReply
from minicpm.serve.replies import DetokenizeReply, TokenizeReply, TokenizerReply, TokenPiece
from minicpm.serve.service import Service


async def tokenize(service: Service, request: HttpRequest) -> Response:
    """Cut a text, or a conversation, into tokens. What a text says never becomes a control token.

    Raises:
        ApiError: the request is at fault.
    """
    fields = await service.read(request, TokenizeRequest)
    given = [name for name in ("content", "prompt", "messages") if getattr(fields, name) is not None]
    if len(given) != 1:
        raise ApiError(400, "give one of content, prompt and messages", param="content")
    ids = await service.compute(request, lambda: _encode(service, fields))
    tokens = [TokenPiece(id=i, piece=_piece(service, i)) for i in ids] if fields.with_pieces else ids
    return JsonReply(TokenizeReply(tokens=tokens, count=len(ids), max_model_len=service.model.context_length))


async def detokenize(service: Service, request: HttpRequest) -> Response:
    """Join tokens to a text, control tokens left out.

    Raises:
        ApiError: an id is outside the vocabulary.
    """
    fields = await service.read(request, DetokenizeRequest)
    text = await service.compute(request, lambda: service.tokenizer.decode(fields.tokens))
    return JsonReply(DetokenizeReply(content=text, prompt=text))


async def tell_tokenizer(service: Service, request: HttpRequest) -> Response:
    """The tokenizer's special tokens and chat template, as vLLM tells them."""
    vocabulary = service.tokenizer.vocabulary

    def text(token_id: int | None) -> str | None:
        return None if token_id is None else vocabulary.pieces[token_id]

    reply = TokenizerReply(
        bos_token=text(vocabulary.bos_id),
        eos_token=text(vocabulary.eos_id),
        pad_token=text(vocabulary.pad_id),
        unk_token=text(vocabulary.unk_id),
        vocab_size=service.tokenizer.vocab_size,
        adds_bos=vocabulary.adds_bos,
        chat_template=service.tokenizer.chat_template.source,
    )
    return JsonReply(reply)


def _encode(service: Service, fields: TokenizeRequest) -> list[int]:
    if fields.messages is not None:
        wants_prompt = fields.add_generation_prompt is not False
        return encode_messages(service, fields.messages, add_generation_prompt=wants_prompt)
    text = fields.content if fields.prompt is None else fields.prompt
    wishes = [wish for wish in (fields.add_special, fields.add_special_tokens) if wish is not None]
    adds_bos = wishes[0] if wishes else fields.prompt is not None
    ids = service.tokenizer.encode(text or "")
    return service.tokenizer.add_bos(ids) if adds_bos else ids


def _piece(service: Service, token_id: int) -> str | list[int]:
    data = service.tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
