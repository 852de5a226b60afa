"""`minicpm history plot|data`: a run's curves as a picture, and the text behind any of its steps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minicpm.cli.history_writing import run_name
from minicpm.cli.parser import Parser, UsageError
from minicpm.cli.terminal import note, out
from minicpm.errors import ConfigError


def plot_parser() -> Parser:
    """Return the parser of `plot`."""
    verb = Parser(
        "history plot",
        "Draw losses, learning rate and bits a byte over the steps, the stages shaded, and how far every layer moved "
        "between checkpoints. PNG, SVG or PDF, by the name's ending.",
        [
            "minicpm history plot runs/nano",
            "minicpm history plot runs/nano --out nano.svg --no-updates",
            "minicpm history plot runs/nano --score arc_easy,lambada --out scores.png",
        ],
    )
    verb.add_argument("source", metavar="RUN", help="a run's folder, a history's folder, or a URL")
    verb.add_argument("--out", type=Path, metavar="FILE", help="(default: NAME.png, here)")
    verb.add_argument("--no-updates", action="store_true", help="curves alone: decodes no weights")
    verb.add_argument("--score", metavar="TASK,…", help="instead the scores that `history eval` kept; or `all`")
    return verb


def plot(options: argparse.Namespace) -> None:
    """Draw."""
    from minicpm.history.naming import open_history
    from minicpm.history.picture import draw

    path = options.out or Path(f"{run_name(options.source)}.png")
    history = open_history(options.source)
    if options.score:
        from minicpm.history.score_picture import choose_scores, draw_scores
        from minicpm.history.scores import by_setting, current_scores

        draw_scores(history, choose_scores(by_setting(current_scores(history)), options.score), path)
    else:
        draw(history, path, has_updates=not options.no_updates, say=note)
    out(str(path))


def data_parser() -> Parser:
    """Return the parser of `data`."""
    verb = Parser(
        "history data",
        "Show the documents of a step's batch, or export the order of the data. Nothing was logged for it: a batch is "
        "a pure function of seed and step, worked out again from the run's token shards.",
        [
            "minicpm history data runs/nano@300",
            "minicpm history data runs/nano@300 --export batch-300.jsonl",
            "minicpm history data runs/nano --export order.jsonl",
        ],
    )
    verb.add_argument("name", metavar="RUN[@STEP]", help="a run's folder; any step of it, saved or not")
    verb.add_argument("--rows", type=int, default=2, metavar="N", help="rows of the batch to show (default: 2)")
    verb.add_argument("--export", type=Path, metavar="FILE", help="write the order as JSON lines instead")
    return verb


def data(options: argparse.Namespace) -> None:
    """Show or export."""
    from minicpm.train.data_order import open_order

    folder, separator, step = options.name.rpartition("@")
    is_one = bool(separator) and step.isdigit()
    run = Path(folder if is_one else options.name)
    if not is_one and not options.export:
        raise UsageError(f"{options.name!r} names no step; write RUN@STEP, or --export FILE for all of them")
    if options.rows < 1:
        raise UsageError(f"--rows must be at least 1, got {options.rows}")
    if not run.is_dir():
        raise ConfigError(f"there is no run {str(run)!r}; the folder of `minicpm pretrain` is meant")
    order = open_order(run)
    if options.export:
        total = order.config.schedule.total_steps
        first, last = (int(step), int(step)) if is_one else (1, total)
        order.write(options.export, first, last)
        out(f"{options.export}: steps {first} to {last}" if first != last else f"{options.export}: step {first}")
        return
    from minicpm.data.batches import Batch
    from minicpm.data.preview import show_batch

    batch: Batch = order.batch(int(step))
    shown = min(options.rows, len(batch.input_ids))
    part = order.stream.batch(batch.first_row, shown)
    for line in show_batch(order.tokenizer, part, has_colour=sys.stdout.isatty()):
        out(line)
    counts = ", ".join(f"{name} {count:,}" for name, count in batch.tokens_by_source().items())
    note(f"step {step}: {shown} of {len(batch.input_ids)} rows shown; tokens by source: {counts}")
