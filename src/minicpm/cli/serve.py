"""`minicpm serve [MODEL]`: an OpenAI-compatible server and a chat page, on this machine unless told otherwise."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from minicpm.cli.parser import Parser, UsageError, add_model
from minicpm.cli.sampling import add_kv_type
from minicpm.cli.terminal import note
from minicpm.hub import DEFAULT_MODEL

KEY_VARIABLE = "MINICPM_API_KEY"


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "serve",
        "Serve a model under OpenAI's API, with a chat page at /. Only this machine reaches it unless --host says "
        "otherwise, which needs a key. SIGTERM and Ctrl-C let requests under way end first.",
        [
            "minicpm serve",
            "minicpm serve model.gguf --port 8080 --name mine",
            "MINICPM_API_KEY=… minicpm serve smollm2 --host 0.0.0.0 --allow-host box.example",
        ],
    )
    add_model(verb, nargs="?", default=DEFAULT_MODEL)
    verb.add_argument("--name", metavar="NAME", help="what clients call the model (default: MODEL without its folder)")
    group = verb.add_argument_group("who may ask")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help=f"asked of every request but /health; may be given again (default: ${KEY_VARIABLE}, which `ps` does not "
        "show)",
    )
    group.add_argument("--allow-host", action="append", metavar="NAME", help="a further name that browsers may call it")
    group.add_argument("--allow-origin", action="append", metavar="ORIGIN", help="a web page elsewhere that may ask")
    group = verb.add_argument_group("how much")
    group.add_argument("--parallel", type=int, default=16, metavar="N", help="sequences that run at once (default: 16)")
    group.add_argument("--max-queue", type=int, default=256, metavar="N", help="sequences that may wait (default: 256)")
    group.add_argument(
        "--max-queue-tokens", type=int, default=1 << 18, metavar="N", help="tokens of all of them (default: 262,144)"
    )
    group.add_argument("--ctx", type=int, metavar="N", help="context in tokens; default: what the model was trained on")
    group.add_argument("--kv-cache-tokens", type=int, metavar="N", help="tokens of all sequences that memory holds")
    group.add_argument("--threads", type=int, metavar="N", help="processor threads; default: every physical core")
    group.add_argument("--draft", metavar="MODEL", help="a smaller model with the same vocabulary that writes ahead")
    group.add_argument(
        "--drain-seconds", type=float, default=30, metavar="N", help="what runs may take to end (default: 30)"
    )
    add_kv_type(group)
    return verb


def run(options: argparse.Namespace) -> None:
    """Serve until told to end."""
    try:
        from minicpm.serve import ServeSettings, run_server
    except ImportError as error:
        raise UsageError(f"the server needs {error.name}; install it: pip install 'minicpm[serve]'") from error
    settings = ServeSettings(
        model_name=options.name or _name_of(options.model),
        host=options.host,
        port=options.port,
        api_keys=tuple(options.api_key or filter(None, [os.environ.get(KEY_VARIABLE, "")])),
        allowed_hosts=tuple(options.allow_host or ()),
        allowed_origins=tuple(options.allow_origin or ()),
        drain_seconds=options.drain_seconds,
    )
    import minicpm

    with minicpm.load(
        options.model,
        context_length=options.ctx,
        num_threads=options.threads,
        max_parallel=options.parallel,
        kv_cache_tokens=options.kv_cache_tokens,
        kv_type=options.kv_type,
        draft=options.draft,
        max_waiting=options.max_queue,
        max_waiting_tokens=options.max_queue_tokens,
    ) as model:
        # A server has time before its first request.
        model.engine.prepare()
        run_server(model, settings, lambda url: _announce(url, settings.model_name, bool(settings.api_keys)))


def _name_of(model: str) -> str:
    """`smollm2` as it is, `/models/mine.gguf` as `mine`."""
    path = Path(model.rstrip("/"))
    return path.stem if path.suffix == ".gguf" else path.name or model


def _announce(url: str, name: str, has_key: bool) -> None:
    note(f"{name} at {url}" + (" (a key is asked for)" if has_key else " (this machine only)"))
    note(f"chat page: {url}/    API: {url}/v1    metrics: {url}/metrics")
    if not has_key:
        note("to share it: --host 0.0.0.0 with a key in MINICPM_API_KEY")
    note(
        f"try: curl {url}/v1/chat/completions -H 'Content-Type: application/json' "
        f"""-d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'"""
    )
