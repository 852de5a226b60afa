"""A load client for OpenAI-compatible servers: requests that all arrive at once, streamed, over plain sockets.

The same for every server. It reads as little as a client can (lines that begin with `data:`), so that on a machine with
few cores it takes little from what it measures.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What came of one request; seconds count from the moment at which all were sent."""

    status: int
    text: str
    num_tokens: int
    first_seconds: float
    seconds: float

    @property
    def is_whole(self) -> bool:
        """Whether all of it came."""
        return self.status == 200 and self.num_tokens > 0


async def ask(port: int, body: dict[str, Any], *, leave_after: float | None = None) -> Answer:
    """Send one request to /v1/completions and read its stream, or leave after so many seconds in the middle of it."""
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        async with asyncio.timeout(leave_after):
            return await _read(reader, begin)
    except TimeoutError:
        return Answer(0, "", 0, 0.0, time.perf_counter() - begin)
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, begin: float) -> Answer:
    status = int((await reader.readline()).split()[1])
    first, text, num_tokens, last = 0.0, "", 0, begin
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if usage := event.get("usage"):
            num_tokens = usage["completion_tokens"]
        if event.get("choices"):
            last = time.perf_counter()
            if piece := event["choices"][0].get("text"):
                first = first or last - begin
                text += piece
    return Answer(status, text, num_tokens, first, last - begin)


def ask_at_once(port: int, bodies: Sequence[dict[str, Any]]) -> tuple[list[Answer], float]:
    """Return all answers, and the seconds until the last one was whole."""

    async def run() -> tuple[list[Answer], float]:
        begin = time.perf_counter()
        answers = await asyncio.gather(*(ask(port, body) for body in bodies))
        return list(answers), time.perf_counter() - begin

    return asyncio.run(run())
