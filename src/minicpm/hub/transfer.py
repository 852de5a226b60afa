"""Bytes over HTTPS with the standard library: resume, retry, exact size, and a token that stays where it belongs."""

from __future__ import annotations

import email.message
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from minicpm.errors import HubError
from minicpm.hub.progress import Report

_TIMEOUT_SECONDS = 30.0
_NUM_ATTEMPTS = 5
_CHUNK_BYTES = 1 << 18
_MAX_JSON_BYTES = 32 << 20
_PASSING_CODES = {408, 416, 429, 500, 502, 503, 504}
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Access:
    """Where a hub is, which setting says so, and the token for it."""

    endpoint: str
    setting: str
    token: str | None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow a redirect without carrying the token to another host or leaving HTTPS."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Return the next request."""
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if old.scheme == "https" and new.scheme != "https":
            raise HubError(f"{old.hostname} redirects to {new.scheme}://{new.hostname}, which is not HTTPS; refused")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            request.remove_header("Authorization")
        return request


def read_json(url: str, access: Access) -> Any:
    """Return the JSON document at `url`.

    Raises:
        HubError: it cannot be reached, is refused, or is not JSON.
    """
    for attempt in range(_NUM_ATTEMPTS):
        try:
            with _open(url, access, {}) as response:
                text = response.read(_MAX_JSON_BYTES + 1)
            break
        except urllib.error.HTTPError as error:
            raise _refusal(error, url, access) from error
        except _BROKEN as error:
            if attempt == _NUM_ATTEMPTS - 1 or not _is_passing(error):
                raise _unreachable(error, url, access) from error
            time.sleep(0.2 * 2**attempt)
    if len(text) > _MAX_JSON_BYTES:
        raise HubError(f"{url} answers with more than {_MAX_JSON_BYTES} bytes; it is no model listing")
    try:
        return json.loads(text)
    except ValueError as error:
        raise HubError(f"{url} does not answer with JSON; check {access.setting}") from error


def download(url: str, part: Path, size_bytes: int, access: Access, report: Report, what: str) -> None:
    """Make `part` hold the `size_bytes` bytes of `url`, going on after the bytes that it holds already.

    A connection that breaks is taken up again, as long as each attempt or two brings bytes; what is there stays for
    the next call.

    Raises:
        HubError: refused, unreachable, or of another size.
    """
    failures = 0
    while True:
        before = _held_bytes(part, size_bytes)
        report.advance(what, before, size_bytes)
        if before == size_bytes:
            return
        cause = _attempt(url, part, before, size_bytes, access, report, what)
        now = _held_bytes(part, size_bytes)
        failures = 0 if now > before else failures + 1
        if failures == _NUM_ATTEMPTS:
            raise HubError(
                f"the connection to {urlsplit(url).hostname} broke at {now} of {size_bytes} bytes of {what}"
                f" ({cause}); run the same command to go on from there"
            )
        if now < size_bytes:
            time.sleep(0.2 * 2**failures)


def _held_bytes(part: Path, size_bytes: int) -> int:
    """Return how many bytes `part` holds; makes it when absent, empties it when it is too long."""
    with part.open("ab") as file:
        if file.tell() > size_bytes:
            file.truncate(0)
        return file.seek(0, os.SEEK_END)


def _attempt(url: str, part: Path, offset: int, size_bytes: int, access: Access, report: Report, what: str) -> str:
    """Append to `part` until the connection ends, and return why it ended."""
    try:
        _append(url, part, offset, size_bytes, access, report, what)
    except urllib.error.HTTPError as error:
        if error.code not in _PASSING_CODES:
            raise _refusal(error, url, access) from error
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            os.truncate(part, 0)
        return f"HTTP status {error.code}"
    except _BROKEN as error:
        if not _is_passing(error):
            raise _unreachable(error, url, access) from error
        return _reason(error)
    return "it ended early"


def _append(url: str, part: Path, offset: int, size_bytes: int, access: Access, report: Report, what: str) -> None:
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    with _open(url, access, headers) as response:
        # A server that knows no ranges sends all of it again.
        is_range = response.status == 206 and _range_start(response.headers) == offset
        if not is_range:
            offset = 0
        with part.open("ab" if is_range else "wb") as file:
            while chunk := _read_some(response):
                offset += len(chunk)
                if offset > size_bytes:
                    file.close()
                    part.unlink()
                    raise HubError(f"{url} sends more than the {size_bytes} bytes that its listing states; deleted")
                file.write(chunk)
                report.advance(what, offset, size_bytes)
            file.flush()
            os.fsync(file.fileno())


def _read_some(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK_BYTES)
    except OSError as error:
        # Told from an error of the disk, which is an OSError too and must not be tried again.
        raise ConnectionError(str(error)) from error


def _open(url: str, access: Access, headers: dict[str, str]) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    if parts.scheme not in {"https", "http"} or not parts.hostname:
        raise HubError(f"{access.setting} is {access.endpoint!r}; it must be an address like https://huggingface.co")
    headers = {"User-Agent": "minicpm", "Accept-Encoding": "identity"} | headers
    if access.token and (parts.scheme == "https" or parts.hostname in _LOOPBACK):
        headers["Authorization"] = f"Bearer {access.token}"
    request = urllib.request.Request(url, headers=headers)
    opener = urllib.request.build_opener(_Redirects)
    response: http.client.HTTPResponse = opener.open(request, timeout=_TIMEOUT_SECONDS)
    return response


def _range_start(headers: email.message.Message) -> int | None:
    unit, _, rest = headers.get("Content-Range", "").partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdigit() else None


def _is_passing(error: Exception) -> bool:
    """Return whether trying again may help: not where the name or the certificate is wrong."""
    import socket
    import ssl

    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return not isinstance(reason, socket.gaierror | ssl.SSLCertVerificationError | ConnectionRefusedError | str)


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(reason) or type(reason).__name__


def _unreachable(error: Exception, url: str, access: Access) -> HubError:
    return HubError(
        f"cannot reach {urlsplit(url).hostname}: {_reason(error)}; check the network, or set {access.setting}"
        " to a mirror"
    )


def _refusal(error: urllib.error.HTTPError, url: str, access: Access) -> HubError:
    said = error.headers.get("X-Error-Message", "")[:200]
    text = f"{url} answers {error.code} {error.reason}" + (f" ({said})" if said else "")
    error.close()
    if error.code == 404:
        return HubError(f"{text}: no such model, revision or file; check the name")
    if error.code in {401, 403}:
        # The hub answers so for names that do not exist, too.
        advice = "it must open this model" if access.token else "set HF_TOKEN to a token that opens it"
        return HubError(f"{text}: the model does not exist, is private, or asks for consent on its page; {advice}")
    return HubError(f"{text}; try again later, or set {access.setting} to a mirror")
