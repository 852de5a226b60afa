"""`create_app`: the routes, what wraps them, and the description of both at /openapi.json."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from minicpm import __version__
from minicpm.engine import LanguageModel
from minicpm.serve import fields, replies
from minicpm.serve.api_error import ApiError
from minicpm.serve.chat import apply_template, chat
from minicpm.serve.completions import complete
from minicpm.serve.embeddings import embed
from minicpm.serve.guard import Guard
from minicpm.serve.pages import page_routes
from minicpm.serve.service import ClientGone, Service
from minicpm.serve.settings import ServeSettings
from minicpm.serve.status import list_models, show_model, tell_health, tell_metrics
from minicpm.serve.texts import detokenize, tell_tokenizer, tokenize

_log = logging.getLogger("minicpm.serve")
Answer = Callable[[Service, HttpRequest], Awaitable[Response]]
_SCHEMAS = "#/components/schemas/{model}"
_GONE = 499


class _Verb(NamedTuple):
    method: str
    path: str
    answer: Answer
    body: type[BaseModel] | None
    reply: type[BaseModel] | None


_VERBS = (
    _Verb("POST", "/v1/chat/completions", chat, fields.ChatRequest, replies.ChatReply),
    _Verb("POST", "/v1/completions", complete, fields.CompletionRequest, replies.CompletionReply),
    _Verb("POST", "/v1/embeddings", embed, fields.EmbeddingRequest, replies.EmbeddingReply),
    _Verb("GET", "/v1/models", list_models, None, replies.ModelList),
    _Verb("GET", "/v1/models/{model}", show_model, None, replies.ModelCard),
    _Verb("POST", "/tokenize", tokenize, fields.TokenizeRequest, replies.TokenizeReply),
    _Verb("POST", "/detokenize", detokenize, fields.DetokenizeRequest, replies.DetokenizeReply),
    _Verb("GET", "/tokenizer_info", tell_tokenizer, None, replies.TokenizerReply),
    _Verb("POST", "/apply-template", apply_template, fields.ApplyTemplateRequest, replies.ApplyTemplateReply),
    _Verb("GET", "/health", tell_health, None, replies.HealthReply),
    _Verb("GET", "/metrics", tell_metrics, None, None),
)


def create_app(model: LanguageModel, settings: ServeSettings) -> ASGIApp:
    """Return the ASGI application of one model; it starts with its lifespan and leaves `model` to its owner."""
    service = Service(model, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.close()
        service.grammars.close()

    # Its own pages of documentation load from elsewhere.
    app = FastAPI(
        title="minicpm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, routes=page_routes()
    )
    for verb in _VERBS:
        app.add_api_route(
            verb.path, _endpoint(service, verb), methods=[verb.method], response_model=None, name=verb.answer.__name__
        )
    app.add_exception_handler(ApiError, _answer_error)  # type: ignore[arg-type]  # called with this class only
    app.add_exception_handler(HTTPException, _answer_http_error)  # type: ignore[arg-type]  # the same
    describe = functools.cache(functools.partial(_describe, app, bool(settings.api_keys)))
    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's documented way to describe an API oneself
    guarded: ASGIApp = Guard(app, settings)
    if settings.allowed_origins:
        headers = ["authorization", "content-type"]
        guarded = CORSMiddleware(guarded, settings.allowed_origins, ["GET", "POST"], headers)
    return guarded


def _endpoint(service: Service, verb: _Verb) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def answer(request: HttpRequest) -> Response:
        status = 500
        try:
            response = await verb.answer(service, request)
            status = response.status_code
            return response
        except ApiError as error:
            status = error.status
            raise
        except ClientGone:
            status = _GONE
            return Response(status_code=_GONE)
        except Exception as error:  # no request may end the process, nor see its insides
            _log.exception("%s failed", verb.path)
            raise ApiError(500, "the server failed; its log says why", code="internal_error") from error
        finally:
            service.metrics.count_answer(verb.path, status)

    return answer


async def _answer_error(request: HttpRequest, error: ApiError) -> Response:
    headers = {"content-type": "application/json", **error.headers}
    return Response(error.encode(), error.status, headers)


async def _answer_http_error(request: HttpRequest, error: HTTPException) -> Response:
    path = request.url.path[:100]
    told = {404: f"there is no {path}", 405: f"{request.method} is not for {path}"}.get(error.status_code)
    headers = dict(error.headers or {})
    return await _answer_error(request, ApiError(error.status_code, told or str(error.detail), headers=headers))


def _describe(app: FastAPI, has_key: bool) -> dict[str, Any]:
    """The OpenAPI document, written from the same classes that bodies are read with."""
    kinds = [kind for verb in _VERBS for kind in (verb.body, verb.reply) if kind] + [replies.ErrorReply]
    names, definitions = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_SCHEMAS)
    schemas = {kind: names[kind, "validation"] for kind in kinds}
    paths: dict[str, Any] = {}
    for verb in _VERBS:
        operation: dict[str, Any] = {
            "operationId": verb.answer.__name__,
            "summary": (verb.answer.__doc__ or "").partition("\n")[0],
            "responses": _responses(verb, schemas),
        }
        if verb.body is not None:
            content = {"application/json": {"schema": schemas[verb.body]}}
            operation["requestBody"] = {"required": True, "content": content}
        if "{model}" in verb.path:
            parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            operation["parameters"] = [parameter]
        if verb.path == "/health":
            operation["security"] = []
        paths.setdefault(verb.path, {})[verb.method.lower()] = operation
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": app.title, "version": app.version},
        "paths": paths,
        "components": components,
    }
    if has_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _responses(verb: _Verb, schemas: dict[type[BaseModel], Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if verb.reply is not None:
        content = {"application/json": {"schema": schemas[verb.reply]}}
    if verb.path in ("/v1/chat/completions", "/v1/completions"):
        content["text/event-stream"] = {"schema": {"type": "string"}}
    failed = {"application/json": {"schema": schemas[replies.ErrorReply]}}
    told = {"200": {"description": "the answer", "content": content}}
    for status, text in _ERRORS.items():
        told[status] = {"description": text, "content": failed}
    return told


_ERRORS = {
    "400": "the request is at fault; the message says how",
    "401": "no valid key",
    "403": "this host or origin is not allowed",
    "404": "there is no such thing",
    "405": "not with this method",
    "408": "the body did not come in time",
    "413": "the body is too long",
    "415": "the body is not JSON",
    "429": "too much waits; come again after Retry-After seconds",
    "500": "our fault; other requests go on",
    "503": "the engine does not run",
}
