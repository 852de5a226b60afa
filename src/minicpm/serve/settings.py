"""What a server is told at its start: where it listens, who may use it, and how much it takes."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from minicpm.errors import ServeError


@dataclass(frozen=True)
class Caps:
    """The most that one request or connection may ask for; beyond it there is an error, never a silent cut.

    Attributes:
        body_bytes: of a request.
        messages: of a conversation.
        prompts: of one completion or embedding request.
        choices: `n`, times the number of prompts.
        stops: stop texts.
        stop_characters: of one stop text.
        logit_bias: entries.
        top_logprobs: likeliest tokens told at each place.
        tools: of one request.
        schema_bytes: of all schemas, regular expressions and grammars of a request.
        grammar_seconds: to compile them.
        header_bytes: of a request's head.
        header_seconds: from a connection's start, or the last answer's end, to the whole head of a request.
        body_seconds: from there to its whole body.
        write_seconds: that a client may not read while something waits for it.
        connections: open at once.
    """

    body_bytes: int = 8 << 20
    messages: int = 1024
    prompts: int = 128
    choices: int = 128
    stops: int = 16
    stop_characters: int = 256
    logit_bias: int = 1024
    top_logprobs: int = 20
    tools: int = 64
    schema_bytes: int = 1 << 16
    grammar_seconds: float = 5.0
    header_bytes: int = 1 << 15
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    connections: int = 512


@dataclass(frozen=True)
class ServeSettings:
    """Where a server listens and for whom.

    Attributes:
        model_name: what clients call the model.
        host: the address to listen on.
        port: 0 takes a free one.
        api_keys: any of them opens every route; without one, all of this machine may ask.
        allowed_hosts: names in a Host header beside `localhost`, `host` and numeric addresses.
        allowed_origins: web pages of other origins (`https://app.example`) that may ask.
        drain_seconds: for requests under way when the server is told to end.
        caps: see `Caps`.

    Raises:
        ServeError: others could reach the server and there is no key, or a setting has no meaning.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    drain_seconds: float = 30.0
    caps: Caps = field(default_factory=Caps)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ServeError(f"port must be 0 to 65535, got {self.port}")
        if any(len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise ServeError("an API key needs at least 8 printable ASCII characters without spaces")
        if not self.api_keys and not is_loopback(self.host):
            raise ServeError(
                f"host {self.host} can be reached by others, and without a key anyone could use this server; "
                "give --api-key (or set MINICPM_API_KEY), or listen on 127.0.0.1"
            )
        for origin in self.allowed_origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ServeError(f"an origin is scheme and host, such as https://app.example, got {origin!r}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
