"""What requests may hold: the fields of OpenAI's API, and those of vLLM and llama-server beside them.

A field that is not known is an error, as it is there. Accepted and without effect: who the user is and what a
provider keeps (`user`, `metadata`, `store`, `service_tier`, …). Left out: what a field does (the routes).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
# Ids of any vocabulary; the engine checks against its own.
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Fields(BaseModel):
    """The base of everything that a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Fields):
    """What a stream tells beside its text."""

    include_usage: bool | None = Field(None, description="a last chunk says how many tokens there were")
    include_obfuscation: bool | None = None


class JsonSchema(Fields):
    """A schema that the reply must follow."""

    name: str = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextFormat(Fields):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Fields):
    """Some JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Fields):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(Fields):
    """Text that a regular expression matches as a whole (syntax of Rust's `regex`)."""

    type: Literal["regex"]
    regex: str = Field(min_length=1)


class GrammarFormat(Fields):
    """Text of a context-free grammar, in Lark's syntax or llama.cpp's GBNF."""

    type: Literal["grammar"]
    grammar: str = Field(min_length=1)


ResponseFormat: TypeAlias = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat, Field(discriminator="type")
]


class SamplingFields(Fields):
    """How tokens are chosen and when they end."""

    model: str | None = Field(None, description="a name that /v1/models lists; may be left out")
    n: int | None = Field(None, ge=1, le=1024, description="choices for each prompt")
    seed: Seed | None = Field(None, description="the same seed makes the same choices; choice i has seed + i")
    stop: str | list[str] | None = Field(None, description="texts that end the reply before them")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1 is all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="token id → what is added to its logit"
    )
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="of each reply; the context bounds it too")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class ImageUrl(Fields):
    """Where an image is."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(Fields):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(Fields):
    """An image, for models with eyes."""

    type: Literal["image_url"]
    image_url: ImageUrl


class CalledFunction(Fields):
    """Which function was called, and with what."""

    name: str
    arguments: str = Field(description="JSON text")


class ToolCall(Fields):
    """A call that an earlier reply made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Fields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart | ImagePart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # What the clients send back of a reply that had none of it.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class Function(Fields):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments")
    strict: bool | None = None


class Tool(Fields):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(Fields):
    """Names a function."""

    name: str


class NamedToolChoice(Fields):
    """This function must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions. Defaults of sampling are the model card's: temperature 0.3, top_p 0.8, top_k 50."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=1024)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="further names for the chat template")


Prompts: TypeAlias = (
    str
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
)


class CompletionRequest(SamplingFields):
    """POST /v1/completions. Sampling is the model's plain distribution unless said otherwise, and 16 tokens long."""

    prompt: Prompts
    echo: bool | None = Field(None, description="the prompt stands before the text, with its log-probabilities")
    logprobs: int | None = Field(None, ge=0, le=1024, description="likeliest tokens told at each place")
    best_of: int | None = Field(None, ge=1, le=1024, description="must equal n")
    suffix: None = None


class EmbeddingRequest(Fields):
    """POST /v1/embeddings: the mean of the hidden states after the last norm, of length 1."""

    input: Prompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=2**31 - 1, description="must be the model's")
    user: str | None = None


class TokenizeRequest(Fields):
    """POST /tokenize: of a text (`content` or `prompt`) or a conversation."""

    content: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special: bool | None = Field(None, description="bos where the model wants one; default: for `prompt`")
    add_special_tokens: bool | None = Field(None, description="the same")
    add_generation_prompt: bool | None = None
    with_pieces: bool | None = Field(None, description="each token as {id, piece}")
    model: str | None = None


class DetokenizeRequest(Fields):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


class ApplyTemplateRequest(Fields):
    """POST /apply-template: the text that the model is given for a conversation."""

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    model: str | None = None
