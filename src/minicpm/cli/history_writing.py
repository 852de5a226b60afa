"""`minicpm history get|thin|pull|import`: what writes files."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.cli.parser import Parser, UsageError
from minicpm.cli.terminal import note, out, suggest, table
from minicpm.hub.progress import TerminalReport, megabytes

if TYPE_CHECKING:
    from minicpm.history.reading import History


def get_parser() -> Parser:
    """Return the parser of `get`."""
    verb = Parser(
        "history get",
        "Write checkpoints out: as model folders, or in the layout of the Hugging Face cache, where "
        'from_pretrained("local/NAME", revision="step500") then works offline.',
        [
            "minicpm history get runs/nano --steps 500 --out nano-500",
            "minicpm history get runs/nano --layout hf-cache --steps all --out hf-cache",
        ],
    )
    verb.add_argument("source", metavar="RUN", help="a run's folder, a history's folder, or a URL")
    add_steps(verb, "last")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder; of hf-cache the cache")
    verb.add_argument("--layout", choices=("folder", "hf-cache"), default="folder", help="(default: folder)")
    verb.add_argument("--precision", choices=("exact", "base"), default="exact", help="(default: exact)")
    verb.add_argument("--name", default="", metavar="N", help="of hf-cache: the name after local/ (default: RUN's)")
    verb.add_argument(
        "--to", choices=("granite", "minicpm", "llama"), default="granite",
        help="of hf-cache: granite is the same arithmetic in classes that transformers has (default)",
    )  # fmt: skip
    return verb


def get(options: argparse.Namespace) -> None:
    """Write."""
    from minicpm.history.model_folder import write_model_folder
    from minicpm.history.naming import open_history

    history = open_history(options.source)
    steps = choose_steps(history, options.steps)
    if options.layout == "hf-cache":
        from minicpm.exchange.hub_layout import write_hub_layout

        name = options.name or run_name(options.source)
        repository = write_hub_layout(history, steps, options.out, name, options.to, options.precision, note)
        out(f"{options.out}: {repository}, revisions {', '.join(f'step{step}' for step in steps)}")
        load = f'AutoModelForCausalLM.from_pretrained("{repository}", revision="step{steps[-1]}"'
        note(f'in Python, with HF_HUB_OFFLINE=1: {load}, cache_dir="{options.out}")')
        return
    for step in steps:
        path = options.out if len(steps) == 1 else options.out / f"step_{step:06d}"
        write_model_folder(history, history.at(step, precision=options.precision), path)
        out(str(path))
    suggest(f"minicpm chat {path}")


def thin_parser() -> Parser:
    """Return the parser of `thin`."""
    verb = Parser(
        "history thin",
        "Keep fewer checkpoints. What stays is coded anew where it depended on what goes; the last one and all that "
        "was published stay in any case, to the byte.",
        ["minicpm history thin runs/nano --every 10000 --all-of decay --early --dry-run"],
    )
    verb.add_argument("source", metavar="RUN", type=Path, help="a run's folder, or a history's")
    verb.add_argument("--every", type=int, default=0, metavar="N", help="keep multiples of N")
    verb.add_argument("--all-of", action="append", default=[], metavar="STAGE", help="keep all of this stage")
    verb.add_argument("--early", action="store_true", help="keep step 0 and the powers of two")
    verb.add_argument("--keep", default="", metavar="S,S", help="keep these too")
    verb.add_argument("--dry-run", action="store_true", help="only say which would stay")
    return verb


def thin(options: argparse.Namespace) -> None:
    """Thin, or say what would happen."""
    from minicpm.history.store import HistoryWriter
    from minicpm.history.thinning import ThinRule
    from minicpm.history.thinning import thin as keep_fewer

    steps = tuple(_numbers(options.keep)) if options.keep else ()
    rule = ThinRule(options.every, tuple(options.all_of), options.early, steps)
    if rule == ThinRule() or options.every < 0:
        raise UsageError("say what stays: --every N (above 0), --all-of STAGE, --early or --keep STEP,STEP")
    with HistoryWriter(own_folder(options.source)) as writer:
        rows = writer.catalogue.rows
        kept = set(rule.kept(rows))
        stages = dict.fromkeys(row.stage for row in rows)
        if unknown := [stage for stage in options.all_of if stage not in stages]:
            raise UsageError(f"no checkpoint is of stage {unknown[0]!r}; there are {', '.join(stages)}")
        lines = [[str(r.step), r.stage, "stays" if r.step in kept else "goes", megabytes(r.num_bytes)] for r in rows]
        if options.dry_run:
            out(table(["step", "stage", "", "bytes"], lines, right=[0, 3]))
            note(f"{len(kept)} of {len(rows)} would stay")
            return
        gone, freed = keep_fewer(writer, rule, note)
    out(f"{len(gone)} checkpoints gone, {len(kept)} stay; {megabytes(freed)} freed")
    suggest(f"minicpm history verify {options.source}")


def pull_parser() -> Parser:
    """Return the parser of `pull`."""
    verb = Parser(
        "history pull",
        "Copy a history, or some steps of it, into a folder; every byte is held to its hash, and what is there "
        "already is not fetched again.",
        [
            "minicpm history pull https://example.org/nano/history nano-history",
            "minicpm history pull https://example.org/nano/history nano-history --steps 500,1000 --precision base",
        ],
    )
    verb.add_argument("source", metavar="RUN", help="a URL, a run's folder, or a history's")
    verb.add_argument("destination", metavar="DIR", type=Path, help="a folder, new or with an earlier pull")
    add_steps(verb, "all")
    verb.add_argument("--precision", choices=("exact", "base"), default="exact", help="base is a third of the bytes")
    return verb


def pull(options: argparse.Namespace) -> None:
    """Copy."""
    from minicpm.history.naming import open_history
    from minicpm.history.transfer import pull as copy

    source = open_history(options.source)
    steps = choose_steps(source, options.steps)
    report = TerminalReport()
    try:
        fetched = copy(source, options.destination, steps, options.precision, report.advance)
    finally:
        report.close()
    out(f"{options.destination}: {len(steps)} checkpoints, {megabytes(fetched)} fetched")
    suggest(f"minicpm history ls {options.destination}")


def import_parser() -> Parser:
    """Return the parser of `import`."""
    verb = Parser(
        "history import",
        "Bring checkpoints in: files pytorch_model.STEP in one folder, as MiniCPM-2B-history was published (tensors "
        "only; labelled with the released run's stage, rate and tokens); or model folders or a hub repository's cache "
        "with revisions named step1000, step1000-tokens4B, stage1-step1000-tokens4B; or what pretrain saved as "
        "step_001000.",
        [
            "minicpm history import MiniCPM-2B-history/ --out minicpm-2b-history",
            'minicpm history import models--x--y/ --only "stage1-*" --out y-history',
        ],
    )
    verb.add_argument("source", metavar="DIR", type=Path, help="with the files, the folders, or refs and snapshots")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="the history; steps that it has are kept")
    verb.add_argument("--only", default="*", metavar="PATTERN", help="of revisions: those whose names match")
    return verb


def import_(options: argparse.Namespace) -> None:
    """Bring in."""
    from minicpm.exchange.published_history import has_files, import_published
    from minicpm.exchange.revision_folders import import_revisions

    if has_files(options.source):
        rows = import_published(options.source, options.out, note)
    else:
        rows = import_revisions(options.source, options.out, options.only, note)
    out(f"{options.out}: {len(rows)} checkpoints, {megabytes(sum(row.num_bytes for row in rows))}")
    suggest(f"minicpm history verify {options.out}")


def add_steps(verb: Parser, default: str) -> None:
    """Add the option `--steps`, which `choose_steps` reads."""
    verb.add_argument(
        "--steps",
        default=default,
        metavar="S,S",
        help="steps; or FIRST:LAST[:EVERY], those from the one to the other, both included; or `all`, `last`, or a "
        f"stage's name (default: {default})",
    )


def choose_steps(history: History, text: str) -> list[int]:
    """Return the steps that `--steps` names.

    Raises:
        CheckpointError: the history has no such step or stage.
        UsageError: neither.
    """
    if not history.steps:
        history.at(tokens=0)  # says that it is empty
    if text == "all" or text == "last":
        return history.steps if text == "all" else history.steps[-1:]
    if text.isalpha():
        return [snapshot.step for snapshot in history.stage(text)]
    if ":" in text:
        return _range(history, text)
    steps = _numbers(text)
    for step in steps:
        history.row(step)
    return steps


def _range(history: History, text: str) -> list[int]:
    """The steps that FIRST:LAST[:EVERY] means: multiples of EVERY counted from FIRST, where there are checkpoints."""
    match = re.fullmatch(r"(\d*):(\d*)(?::(\d+))?", text)
    if match is None or match[3] == "0":
        raise UsageError(f"{text!r} is no range of steps; write FIRST:LAST or FIRST:LAST:EVERY, such as 0:10000:500")
    first, last, every = int(match[1] or 0), int(match[2] or history.steps[-1]), int(match[3] or 1)
    steps = [step for step in history.steps if first <= step <= last and (step - first) % every == 0]
    if not steps:
        raise UsageError(f"no checkpoint lies in {text!r}; there are {len(history)}, `minicpm history ls` shows them")
    return steps


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() for word in words):
        raise UsageError(f"{text!r} is no list of steps; write numbers with commas, such as 500,1000")
    return sorted({int(word) for word in words})


def run_name(run: str) -> str:
    """Return the name of a run: the last folder of its path that is not `history`."""
    parts = [part for part in run.replace("\\", "/").rstrip("/").split("/") if part not in ("", ".", "history")]
    return parts[-1] if parts else "run"


def own_folder(path: Path) -> Path:
    """Return the folder of a run's history, given that or the run's."""
    own = path / "history"
    return own if (own / "history.json").is_file() else path
