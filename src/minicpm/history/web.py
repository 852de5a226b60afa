"""A history on a static file server, read by HTTP range requests with the standard library.

Several ranges are fetched at once; ranges that touch are one request. What this leaves out: writing, and tokens of
private servers (fsspec knows those).
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from urllib.parse import quote, urlsplit

from minicpm.errors import CheckpointError
from minicpm.history.place import MAX_TEXT_BYTES, MissingFileError, cut_short

T = TypeVar("T")

_TIMEOUT_SECONDS = 30.0
_NUM_ATTEMPTS = 4
_NUM_CONNECTIONS = 8
_PASSING_CODES = {408, 429, 500, 502, 503, 504}
_BROKEN = (http.client.HTTPException, ConnectionError, TimeoutError)


class Web:
    """A folder below a URL."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        if not urlsplit(self._url).hostname:
            raise CheckpointError(f"{url!r} is no address; write one like https://example.org/run/history")

    @property
    def name(self) -> str:
        """The URL."""
        return self._url

    def read(self, path: str) -> bytes:
        """Return a whole small file."""
        return self._fetch(path, None, MAX_TEXT_BYTES)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return the bytes of every range."""
        merged = merge_ranges(ranges)
        with ThreadPoolExecutor(min(_NUM_CONNECTIONS, max(len(merged), 1))) as pool:
            fetched = list(pool.map(lambda r: self._fetch(r[0], (r[1], r[2]), r[2]), merged))
        return cut_ranges(ranges, merged, fetched)

    def size(self, path: str) -> int:
        """Return a file's length."""
        request = urllib.request.Request(self._address(path), method="HEAD", headers=_HEADERS)
        length = self._try(path, lambda: self._open(request).headers.get("Content-Length"))
        if length is None or not length.isdigit():
            raise CheckpointError(f"{self._address(path)}: the server does not tell its length")
        return int(length)

    def _address(self, path: str) -> str:
        return f"{self._url}/{quote(path)}"

    def _fetch(self, path: str, span: tuple[int, int] | None, max_bytes: int) -> bytes:
        address = self._address(path)
        headers = dict(_HEADERS)
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[0] + span[1] - 1}"
        request = urllib.request.Request(address, headers=headers)

        def attempt() -> bytes:
            with self._open(request) as response:
                if span is not None and response.status != 206:
                    raise CheckpointError(
                        f"the server of {self._url} answers range requests with whole files, so that one tensor would "
                        "cost an object: use a server that knows ranges, or fetch it with `minicpm history pull`"
                    )
                content = response.read(max_bytes)
                left = response.length or 0
            if left and span is None and len(content) < max_bytes:
                raise ConnectionError(f"the connection broke {left} bytes early")
            if span is not None and len(content) < span[1]:
                raise cut_short(address, *span, len(content))
            return content

        return self._try(path, attempt)

    def _open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
        return response

    def _try(self, path: str, attempt: Callable[[], T]) -> T:
        address = self._address(path)
        reason = ""
        for number in range(_NUM_ATTEMPTS):
            if number:
                time.sleep(0.1 * 4**number)
            try:
                return attempt()
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in (404, 410):
                    raise MissingFileError(f"{address} is missing (HTTP status {error.code})") from error
                if error.code == 416:
                    raise CheckpointError(
                        f"{address} is truncated: it ends before the range that was asked for"
                    ) from error
                reason = f"HTTP status {error.code} {error.reason}"
                if error.code not in _PASSING_CODES:
                    break
            except urllib.error.URLError as error:
                reason = str(error.reason)
                if not isinstance(error.reason, TimeoutError):
                    break
            except _BROKEN as error:
                reason = str(error) or type(error).__name__
        raise CheckpointError(f"cannot read {address}: {reason}; check the address and the network")


_HEADERS = {"User-Agent": "minicpm", "Accept-Encoding": "identity"}


def merge_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Return as few ranges as cover `ranges`; those that touch or overlap are one."""
    merged: list[tuple[str, int, int]] = []
    for path, first, length in sorted(ranges):
        if merged and merged[-1][0] == path and first <= merged[-1][1] + merged[-1][2]:
            start = merged[-1][1]
            merged[-1] = (path, start, max(merged[-1][2], first + length - start))
        else:
            merged.append((path, first, length))
    return merged


def cut_ranges(
    ranges: Sequence[tuple[str, int, int]], merged: Sequence[tuple[str, int, int]], contents: Sequence[bytes]
) -> list[bytes]:
    """Return the bytes of `ranges` out of the contents of `merged`, which cover them."""
    found = []
    for path, first, length in ranges:
        index = next(i for i, (p, f, n) in enumerate(merged) if p == path and f <= first and first + length <= f + n)
        start = first - merged[index][1]
        found.append(contents[index][start : start + length])
    return found
