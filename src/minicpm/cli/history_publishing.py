"""`minicpm history publish`: a run to where others read it."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.cli.history_writing import add_steps, choose_steps, run_name
from minicpm.cli.parser import Parser, UsageError
from minicpm.cli.terminal import note, out, suggest
from minicpm.hub.progress import TerminalReport, megabytes

if TYPE_CHECKING:
    from minicpm.history.catalogue import Row
    from minicpm.history.reading import History


def publish_parser() -> Parser:
    """Return the parser of `publish`."""
    verb = Parser(
        "history publish",
        "Copy checkpoints to a folder for any static server, to a store that fsspec writes (s3://, gs://, …), or to a "
        "repository of the Hugging Face hub (hf://OWNER/NAME), each a commit and a named revision there. Base layers "
        "go first, each checkpoint is listed once it is whole, an interrupted copy goes on; in the end everything is "
        "read back and a card is written. What was published is never thinned. Without DEST they are only marked as "
        "published.",
        [
            "minicpm history publish runs/nano public/nano",
            "minicpm history publish runs/nano s3://bucket/nano --steps decay",
            "minicpm history publish runs/nano hf://me/nano",
            "minicpm history publish runs/nano --steps 1000,2000",
        ],
    )
    verb.add_argument("source", metavar="RUN", help="a run's folder, a history's, or a URL")
    verb.add_argument("destination", metavar="DEST", nargs="?", default="", help="a folder or URL, new or of this run")
    add_steps(verb, "all")
    verb.add_argument("--precision", choices=("exact", "base"), default="exact", help="base keeps refinements back")
    verb.add_argument(
        "--models", choices=("granite", "minicpm", "llama"),
        help="of the hub: let each revision also hold the checkpoint as a model folder, whole, for from_pretrained",
    )  # fmt: skip
    verb.add_argument("--name", default="", metavar="N", help="for the card (default: RUN's)")
    verb.add_argument("--licence", default="", metavar="L", help="for the card, such as apache-2.0")
    return verb


def publish(options: argparse.Namespace) -> None:
    """Copy and check, or only mark."""
    from minicpm.history.destination import open_destination
    from minicpm.history.naming import open_history
    from minicpm.history.publishing import publish as send
    from minicpm.history.transfer import check_own

    source = open_history(options.source)
    steps = choose_steps(source, options.steps)
    if not options.destination:
        _mark(source, steps)
        out(f"{source.place.name}: {len(steps)} checkpoints are published")
        return
    if options.models and not options.destination.startswith("hf://"):
        raise UsageError(f"--models is for revisions of the hub, hf://OWNER/NAME, not {options.destination}")

    def make_model(row: Row, path: Path) -> None:
        from minicpm.exchange.hub_layout import write_revision

        note(f"writing the model of step {row.step}")
        write_revision(source, source.at(row.step, precision=row.precision), path, options.models)

    report = TerminalReport()
    maker = make_model if options.models else None
    with contextlib.closing(open_destination(options.destination, maker)) as destination:
        # Before anything is marked.
        check_own(source, destination)
        if "://" not in options.source:
            _mark(source, steps)
        try:
            sent = send(
                source, destination, steps, options.name or run_name(options.source),
                precision=options.precision, licence=options.licence, on_progress=report.advance, say=note,
            )  # fmt: skip
        finally:
            report.close()
    out(f"{options.destination}: {len(steps)} checkpoints, {megabytes(sent)} sent, all read back")
    suggest(f"minicpm history ls {options.destination}")


def _mark(source: History, steps: list[int]) -> None:
    """Keep thinning from the checkpoints, for as long as anyone may read them."""
    from minicpm.history.store import HistoryWriter
    from minicpm.history.thinning import publish as mark

    with HistoryWriter(Path(source.place.name)) as writer:
        mark(writer, steps)
    source.refresh()
