"""What answers hold, for /openapi.json; names and order are OpenAI's.

Left out: the chunks of streams, which are server-sent events.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorFields(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every answer that is not 200."""

    error: ErrorFields


class PromptTokens(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """How many tokens there were."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens | None = None


class TopLogprob(BaseModel):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of one choice."""

    content: list[ChatLogprob] | None
    refusal: None


class ReplyFunction(BaseModel):
    """Which function is called, with JSON text of its arguments."""

    name: str
    arguments: str


class ReplyToolCall(BaseModel):
    """A call."""

    id: str
    type: Literal["function"]
    function: ReplyFunction


class ReplyMessage(BaseModel):
    """The reply."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ReplyToolCall] | None = None


class ChatChoice(BaseModel):
    """One reply of `n`."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatReply(BaseModel):
    """Of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Four lists with one place for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(BaseModel):
    """Of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    """The model that is served, and what it is."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    meta: dict[str, Any]


class ModelList(BaseModel):
    """Of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class EmbeddingVector(BaseModel):
    """One vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """How many tokens there were."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(BaseModel):
    """Of /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingVector]
    usage: EmbeddingUsage


class TokenPiece(BaseModel):
    """A token and its text; a part of a character as its bytes."""

    id: int
    piece: str | list[int]


class TokenizeReply(BaseModel):
    """Of /tokenize."""

    tokens: list[int] | list[TokenPiece]
    count: int
    max_model_len: int


class DetokenizeReply(BaseModel):
    """Of /detokenize; the text under both names that clients know."""

    content: str
    prompt: str


class TokenizerReply(BaseModel):
    """Of /tokenizer_info: what lm-evaluation-harness asks for before it asks for tokens."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    vocab_size: int
    adds_bos: bool
    chat_template: str


class ApplyTemplateReply(BaseModel):
    """Of /apply-template."""

    prompt: str


class HealthReply(BaseModel):
    """Of /health."""

    status: str
