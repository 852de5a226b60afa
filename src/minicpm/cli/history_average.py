"""`minicpm history average`: the mean of a window of checkpoints, beside the decay that it stands for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.cli.parser import Parser, UsageError
from minicpm.cli.terminal import note, out, suggest, table

if TYPE_CHECKING:
    from minicpm.history.reading import History


def average_parser() -> Parser:
    """Return the parser of `average`."""
    verb = Parser(
        "history average",
        "Write the mean of the last checkpoints of the stable stage as a model folder, and say its held-out loss "
        "beside that of the window's last checkpoint and, with --against, of a true decay.",
        [
            "minicpm history average runs/nano --last 8 --out nano-lawa",
            "minicpm history average runs/nano --until 950 --last 10 --method wsm --out nano-wsm "
            "--against runs/nano-decay-950@1250",
        ],
    )
    verb.add_argument("source", metavar="RUN", help="a run's folder, a history's folder, or a URL")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    verb.add_argument("--last", type=int, default=8, metavar="N", help="checkpoints of the window (default: 8)")
    verb.add_argument("--until", type=int, metavar="STEP", help="its last one (default: the stable stage's last)")
    verb.add_argument(
        "--method", choices=("lawa", "ema", "wsm"), default="lawa",
        help="lawa: plain mean (default); ema: exponential; wsm: the mean that stands for a decay of --shape",
    )  # fmt: skip
    verb.add_argument("--beta", type=float, default=0.8, metavar="B", help="of ema, a checkpoint (default: 0.8)")
    verb.add_argument("--shape", choices=("linear", "sqrt", "exp"), default="sqrt", help="of wsm (default: sqrt)")
    verb.add_argument("--against", metavar="RUN@STEP", help="a decayed checkpoint to compare with")
    verb.add_argument("--sequences", type=int, default=64, metavar="N", help="held-out rows (default: 64)")
    verb.add_argument("--no-score", action="store_true", help="only write")
    return verb


def average(options: argparse.Namespace) -> None:
    """Write and score."""
    from minicpm.history.averaging import choose_window, coefficients, write_average
    from minicpm.history.naming import open_history

    if options.sequences < 1:
        raise UsageError(f"--sequences must be at least 1, got {options.sequences}")
    history = open_history(options.source)
    steps = choose_window(history, options.until, options.last)
    shares = coefficients(options.method, len(steps), beta=options.beta, shape=options.shape)
    # What cannot be scored is said before anything is written.
    score = None if options.no_score else _prepare(options)
    write_average(history, steps, shares, options.out)
    out(f"{options.out}: {options.method} of {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}")
    if score is not None:
        _score(options, history, steps[-1], score)
    suggest(f"minicpm chat {options.out}")


def _prepare(options: argparse.Namespace) -> tuple[object, Path | None]:
    from minicpm.history.naming import resolve
    from minicpm.train.heldout_score import HeldoutScore

    against = resolve(options.against) if options.against else None
    return HeldoutScore(Path(options.source), options.sequences), against


def _score(options: argparse.Namespace, history: History, last: int, score: tuple[object, Path | None]) -> None:
    from minicpm.formats.checkpoint import open_checkpoint
    from minicpm.train.heldout_score import HeldoutScore

    measure, against = score
    assert isinstance(measure, HeldoutScore)
    note(f"measuring on {measure.num_rows} held-out rows")
    averaged = open_checkpoint(options.out)
    losses = {
        f"step {last}": measure(history.config, history[last].weights()),
        options.method: measure(averaged.config, averaged.weights),
    }
    if against is not None:
        decayed = open_checkpoint(against)
        losses[options.against] = measure(decayed.config, decayed.weights)
    start = losses[f"step {last}"]
    rows = [[name, f"{loss:.4f}", f"{loss - start:+.4f}"] for name, loss in losses.items()]
    out(table(["model", "held-out loss", "to the last"], rows, right=[1, 2]))
