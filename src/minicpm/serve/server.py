"""`run_server`: uvicorn with our connections, until it is told to end; requests under way get their answers first."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from minicpm.engine import LanguageModel
from minicpm.errors import ServeError
from minicpm.serve.app import create_app
from minicpm.serve.connection import connection_class
from minicpm.serve.settings import ServeSettings


class _Server(uvicorn.Server):
    """Ends on SIGTERM and Ctrl-C with exit code 0, where uvicorn would raise the signal once more."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_server(model: LanguageModel, settings: ServeSettings, on_listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; no new connection is taken then, and what runs has `drain_seconds` to end.

    Args:
        model: stays the caller's to close.
        settings: where and for whom.
        on_listening: is told the address once connections are taken.

    Raises:
        ServeError: the address cannot be had.
    """
    listener = _listen(settings)
    caps = settings.caps
    config = uvicorn.Config(
        create_app(model, settings),
        http=connection_class(caps),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(caps.header_seconds),
        timeout_graceful_shutdown=int(settings.drain_seconds),
        h11_max_incomplete_event_size=caps.header_bytes,
        backlog=caps.connections,
    )
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    host, port = listener.getsockname()[:2]
    on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    server = _Server(config)
    with listener:
        asyncio.run(server.serve(sockets=[listener]))


def _listen(settings: ServeSettings) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(settings.caps.connections)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ServeError(
            f"{settings.host}:{settings.port} cannot be listened on: {error.strerror or error}; give another --port"
        ) from error
    return listener
