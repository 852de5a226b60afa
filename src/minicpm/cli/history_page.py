"""`minicpm history serve`: a run's page in the browser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minicpm.cli.parser import Parser
from minicpm.cli.terminal import note, out

if TYPE_CHECKING:
    from minicpm.history.study import Generate

_SAMPLE_TOKENS = 40


def serve_parser() -> Parser:
    """Return the parser of `serve`."""
    verb = Parser(
        "history serve",
        "Show a run in the browser: curves, samples and layers at every step, branches, manifests. Only this machine "
        "reaches it, and it only reads; Ctrl-C ends it.",
        ["minicpm history serve runs/nano", "minicpm history serve https://example.org/nano/history --port 8001"],
    )
    verb.add_argument("source", metavar="RUN", help="a run's folder, a history's folder, or a URL")
    verb.add_argument("--port", type=int, default=0, metavar="N", help="where to listen (default: a free one)")
    return verb


def serve(options: argparse.Namespace) -> None:
    """Serve until told to end."""
    from minicpm.history.page_server import PageServer
    from minicpm.history.study import Study

    study = Study(options.source, _generator(options.source))
    with PageServer(study, options.port) as server:
        out(server.url)
        note(f"{len(study.history)} checkpoints of {options.source}; Ctrl-C ends")
        server.serve_forever()


def _generator(source: str) -> Generate:
    def generate(step: int, prompts: Sequence[str]) -> list[str]:
        import minicpm

        with minicpm.load(f"{source}@{step}", max_parallel=len(prompts)) as model:
            made = model.generate(list(prompts), temperature=0.0, max_new_tokens=_SAMPLE_TOKENS)
            return [completion.text for completion in made]

    return generate
