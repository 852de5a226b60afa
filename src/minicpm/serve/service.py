"""`Service`: what the routes share: the model, the engine's thread, reading bodies, waiting, giving up."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from pydantic import ValidationError

from minicpm import __version__
from minicpm.engine import LanguageModel, Request, Sampler
from minicpm.errors import MiniCPMError
from minicpm.serve.api_error import ApiError, from_engine, from_failure
from minicpm.serve.engine_thread import EngineThread, Group
from minicpm.serve.fields import Fields, SamplingFields
from minicpm.serve.grammars import Grammars
from minicpm.serve.guard import CLIENT
from minicpm.serve.metrics import Metrics
from minicpm.serve.settings import ServeSettings

F = TypeVar("F", bound=Fields)
T = TypeVar("T")

# Bodies longer than this are turned into tokens in another thread, so that streams go on meanwhile.
_LONG_BYTES = 1 << 14
_SAMPLER_FIELDS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


# Fields of several kinds, whose faults pydantic tells once for each kind.
_ALTERNATIVES = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists is accepted, none of them empty",
    "input": "a text, a list of texts, a list of token ids, or a list of such lists is accepted, none of them empty",
    "stop": "a text or a list of texts is accepted",
    "tool_choice": '"none", "auto", "required", or {"type": "function", "function": {"name": …}} is accepted',
    "content": "a text or a list of {type: text, text} parts is accepted",
}


class ClientGone(Exception):
    """Whoever asked has closed the connection."""


class Service:
    """One model behind HTTP."""

    def __init__(self, model: LanguageModel, settings: ServeSettings) -> None:
        """Join the parts; `start` begins."""
        self.model = model
        self.tokenizer = model.tokenizer
        self.settings = settings
        self.caps = settings.caps
        self.metrics = Metrics(lambda: model.engine.load, settings.model_name)
        self.engine = EngineThread(model.engine, self.metrics.count_sequence)
        self.grammars = Grammars(model.tokenizer, settings.caps)
        self.created = int(time.time())
        told = f"{__version__} {settings.model_name} {model.dtypes}"
        self.fingerprint = f"fp_{hashlib.sha256(told.encode()).hexdigest()[:10]}"

    async def read(self, request: HttpRequest, kind: type[F]) -> F:
        """Return the body as `kind`.

        Raises:
            ApiError: it is not JSON, or not what the route takes, or for another model.
        """
        try:
            fields = kind.model_validate_json(await request.body())
        except ValidationError as error:
            raise _explain(error) from None
        name = getattr(fields, "model", None)
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here; this server has {self.settings.model_name!r}",
                code="model_not_found",
                param="model",
            )
        return fields

    async def compute(self, request: HttpRequest, work: Callable[[], T]) -> T:
        """Return what `work` on the texts of a request that was read gives.

        Raises:
            ApiError: the request was at fault.
        """
        try:
            is_long = len(await request.body()) > _LONG_BYTES
            return await asyncio.to_thread(work) if is_long else work()
        except MiniCPMError as error:
            raise from_engine(error) from error

    def submit(self, asked: HttpRequest, requests: Sequence[Request]) -> Group:
        """Have `requests`, all that `asked` wants, answered.

        Raises:
            ApiError: one is at fault, or too much waits.
        """
        try:
            return self.engine.submit(requests, asked.scope[CLIENT])
        except MiniCPMError as error:
            self.metrics.count_refusal(error)
            raise from_engine(error, self.metrics.retry_seconds()) from error

    async def answer(self, request: HttpRequest, group: Group) -> None:
        """Wait until all of `group` has come; it is cancelled when the client goes.

        Raises:
            ApiError: the engine failed.
            ClientGone: nobody waits any more.
        """
        try:
            await self.until_gone(request, group.finish())
        except MiniCPMError as error:
            raise from_failure(error) from error
        finally:
            self.engine.cancel(group)

    async def until_gone(self, request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` gives, unless the client closes the connection first.

        Raises:
            ClientGone: it did; the work was cancelled.
        """
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(_wait_for_end(request))
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            self.metrics.disconnects.inc()
            raise ClientGone
        finally:
            for unfinished in (task, watch):
                unfinished.cancel()

    def sampler(self, fields: SamplingFields, defaults: Sampler, choice: int) -> Sampler:
        """Return how the tokens of choice number `choice` are drawn.

        Raises:
            ApiError: a value is out of range.
        """
        given: dict[str, Any] = {name: getattr(fields, name) for name in _SAMPLER_FIELDS}
        given["top_k"] = None if fields.top_k is None else max(fields.top_k, 0)
        given["seed"] = None if fields.seed is None else fields.seed + choice
        given["logit_bias"] = self._bias(fields.logit_bias)
        values = {name: getattr(defaults, name) if value is None else value for name, value in given.items()}
        try:
            return Sampler(**values)
        except MiniCPMError as error:
            raise from_engine(error) from error

    def stops(self, fields: SamplingFields) -> list[str]:
        """Return the stop texts of a request.

        Raises:
            ApiError: too many, too long, or empty.
        """
        stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        caps = self.caps
        self.limit("stop", len(stops), caps.stops)
        for stop in stops:
            if not 0 < len(stop) <= caps.stop_characters:
                raise ApiError(400, f"a stop text has 1 to {caps.stop_characters} characters", param="stop")
        return stops

    def limit(self, param: str, count: int, most: int) -> None:
        """Return when `count` is within `most`.

        Raises:
            ApiError: with both numbers.
        """
        if count > most:
            raise ApiError(400, f"{param}: at most {most} are accepted, got {count}", code="too_many", param=param)

    def _bias(self, bias: dict[str, float] | None) -> dict[int, float]:
        if not bias:
            return {}
        self.limit("logit_bias", len(bias), self.caps.logit_bias)
        if not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in bias):
            raise ApiError(400, "logit_bias takes token ids as its keys", param="logit_bias")
        return {int(key): value for key, value in bias.items()}


def new_id(prefix: str) -> str:
    """A name that no other answer has."""
    return f"{prefix}{secrets.token_hex(12)}"


async def _wait_for_end(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _explain(error: ValidationError) -> ApiError:
    """The first fault of a body, named by its field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place, accepted = "", None
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f"{'.' if place else ''}{part}"
        if accepted := _ALTERNATIVES.get(str(part)):
            break
    place = place[:200]
    if first["type"] == "extra_forbidden" and not accepted:
        return ApiError(400, f"unrecognized request argument: {place}", code="unknown_parameter", param=place)
    told = accepted or first["msg"]
    return ApiError(400, f"{place}: {told}" if place else told, code=first["type"], param=place or None)
