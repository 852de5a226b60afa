"""`Guard`: what every request passes before any route sees it.

The host must be one of ours (against DNS rebinding), the key must be right, a page of another origin must be allowed,
a body must be JSON, whole, in time, and not too long. Every answer carries headers that tie the browser's hands.
Left out: connections and request heads (`connection.py`).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Hashable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minicpm.serve.api_error import ApiError
from minicpm.serve.settings import ServeSettings

OPEN_PATHS = frozenset({"/health"})
# Where a request's scope says who asks: the number of the key that was given, or an address.
CLIENT = "minicpm.client"
_PROTECTION = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        b"connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]
_BEARER = (b"www-authenticate", b"Bearer")
# In a header of its own: of two in one, Chromium reads the first only. Only for who opens a page: where a script of the
# page is refused, the page asks for the key.
_BASIC = (b"www-authenticate", b'Basic realm="minicpm: any name, the API key as the password"')
# After a refusal a client may still be sending; cut off, it would never read the answer.
_DRAINED_BODIES, _DRAIN_SECONDS = 8, 5.0


class Guard:
    """ASGI middleware; the outermost one."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        """Guard `app`."""
        self._app = app
        self._caps = settings.caps
        self._keys = [_digest(key) for key in settings.api_keys]
        self._hosts = {"localhost", settings.host.lower(), *(name.lower() for name in settings.allowed_hosts)}
        self._origins = frozenset(settings.allowed_origins)
        own = [] if self._origins else [(b"cross-origin-resource-policy", b"same-origin")]
        self._protection = [*_PROTECTION, *own]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def protected(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._protection]
            await send(message)

        incoming = _Incoming(receive)
        try:
            headers = _headers(scope)
            self._check_host(headers)
            scope[CLIENT] = self._check_key(scope, headers)
            self._check_origin(scope, headers)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = await self._read_body(headers, incoming)
        except ApiError as error:
            challenges = [_BASIC, _BEARER] if _opens_page(scope) else [_BEARER]
            await self._refuse(error, challenges if error.status == 401 else [], incoming, protected)
            return
        await self._app(scope, receive, protected)

    def _check_host(self, headers: dict[str, str]) -> None:
        name = _host_name(headers.get("host", ""))
        if name not in self._hosts and not _is_address(name):
            raise ApiError(
                403,
                f"the Host {headers.get('host', '')[:100]!r} is not one of this server's; start it with --allow-host "
                "NAME to be reached by that name",
                code="host_not_allowed",
            )

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> Hashable:
        """Return who asks."""
        if not self._keys or scope["path"] in OPEN_PATHS:
            return scope["client"][0] if scope["client"] else None
        given = _digest(_given_key(headers.get("authorization", "")))
        # All are compared, so that the time tells nothing.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if not any(matches):
            raise ApiError(
                401,
                "no valid API key was given; send the header `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )
        return matches.index(True)

    def _check_origin(self, scope: Scope, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self._origins:
            return
        if urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            raise ApiError(
                403,
                f"web pages of {origin[:100]!r} may not use this server; start it with --allow-origin ORIGIN for that",
                code="origin_not_allowed",
            )

    async def _read_body(self, headers: dict[str, str], incoming: _Incoming) -> Receive:
        """Return a `receive` that gives the whole body at once, and after it what the connection says."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415, f"the content type must be application/json, got {kind[:100]!r}", code="unsupported_media_type"
            )
        limit = self._caps.body_bytes
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > limit:
            raise _too_long(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self._caps.body_seconds):
                while not incoming.is_over:
                    message = await incoming.next()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the body ended early", code="incomplete_body")
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise _too_long(limit)
        except TimeoutError:
            seconds = self._caps.body_seconds
            raise ApiError(408, f"the body did not come within {seconds:g} seconds", code="timeout") from None
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await incoming.next()

        return replay

    async def _refuse(
        self, error: ApiError, challenges: list[tuple[bytes, bytes]], incoming: _Incoming, send: Send
    ) -> None:
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
        headers += challenges
        body = error.encode()
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        num_bytes = 0
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not incoming.is_over and num_bytes <= _DRAINED_BODIES * self._caps.body_bytes:
                    num_bytes += len((await incoming.next()).get("body", b""))
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})


class _Incoming:
    """The body of one request as it comes; `is_over` once nothing of it can follow."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_over = False

    async def next(self) -> Message:
        message = await self._receive()
        self.is_over = not message.get("more_body", False)
        return message


def _headers(scope: Scope) -> dict[str, str]:
    """The headers by name.

    Raises:
        ApiError: one that must be single stands there twice.
    """
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in found and key in ("host", "authorization", "origin", "content-type", "content-length"):
            raise ApiError(400, f"the header {key} stands there twice", code="invalid_header")
        found[key] = value.decode("latin-1")
    return found


def _opens_page(scope: Scope) -> bool:
    return any(name.lower() == b"accept" and b"text/html" in value for name, value in scope["headers"])


def _host_name(host: str) -> str:
    """The name or address of a Host header, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_address(name: str) -> bool:
    # A page cannot be rebound to a number: the browser asks no name server for it.
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _given_key(authorization: str) -> str:
    """The key of a Bearer header, or the password of a Basic one, which a browser asks its user for."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("utf-8", "replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _too_long(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
