"""Server-sent events: an answer in pieces, for as long as somebody reads."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minicpm.errors import MiniCPMError
from minicpm.serve.api_error import from_failure
from minicpm.serve.engine_thread import Group
from minicpm.serve.service import ClientGone, Service

DONE = b"data: [DONE]\n\n"
# Made once: `json.dumps` would make one for every event.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # Proxies would otherwise collect the pieces.
    (b"x-accel-buffering", b"no"),
]


class EventStream(Response):
    """Sends what `chunks` gives; the group is cancelled when the client goes, and in any other end."""

    def __init__(self, service: Service, request: HttpRequest, group: Group, chunks: AsyncIterator[bytes]) -> None:
        """Send nothing yet."""
        super().__init__()
        self._service = service
        self._request = request
        self._group = group
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        try:
            await self._service.until_gone(self._request, self._pump(send))
        except ClientGone:
            pass
        finally:
            self._service.engine.cancel(self._group)

    async def _pump(self, send: Send) -> None:
        # With the first piece, so that both travel together.
        start = {"type": "http.response.start", "status": 200, "headers": _HEADERS}
        is_started = False
        try:
            async for chunk in self._chunks:
                if not is_started:
                    await send(start)
                    is_started = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except MiniCPMError as error:
            failure = from_failure(error)
            if not is_started:
                raise failure from error
            await send({"type": "http.response.body", "body": encode_event(failure.body) + DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def encode_event(data: dict[str, Any]) -> bytes:
    """One event with JSON; half a surrogate pair, which UTF-8 cannot hold, becomes `?`."""
    return b"data: %b\n\n" % _encode(data).encode("utf-8", "replace")
