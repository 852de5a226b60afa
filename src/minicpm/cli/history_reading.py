"""`minicpm history ls|show|verify|diff`: what only reads."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from minicpm.cli.parser import Parser, UsageError
from minicpm.cli.terminal import note, out, suggest, table
from minicpm.errors import CheckpointError
from minicpm.hub.progress import megabytes

if TYPE_CHECKING:
    from minicpm.history.reading import History, Snapshot


def ls_parser() -> Parser:
    """Return the parser of `ls`."""
    verb = Parser(
        "history ls",
        "List the checkpoints: step, tokens, stage, lr, losses, and the bytes that each takes.",
        ["minicpm history ls runs/nano", "minicpm history ls https://example.org/nano/history --stage decay"],
    )
    verb.add_argument("source", metavar="RUN", help="a run's folder, a history's folder, or a URL")
    verb.add_argument("--stage", metavar="S", help="only this one: warmup, stable, decay or tail")
    verb.add_argument("--json", action="store_true", help="as JSON, with every measurement")
    return verb


def ls(options: argparse.Namespace) -> None:
    """List."""
    from minicpm.history.naming import open_history

    history = open_history(options.source)
    rows = [row for row in history.rows if options.stage in (None, row.stage)]
    if options.stage and not rows:
        history.stage(options.stage)  # says which there are
    if options.json:
        out(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    from minicpm.history.scores import by_setting, current_scores

    raw = history.config.num_parameters().total * 2
    series = by_setting(current_scores(history))
    found = [{score.step: f"{score.value:.4f}" for score in scores} for scores in series.values()]
    lines = [
        [
            str(row.step), f"{row.tokens:,}", row.stage, f"{row.lr:.3g}", _loss(row.losses, "train"),
            _loss(row.losses, "heldout_loss"), megabytes(row.num_bytes), f"{row.num_bytes / raw:.0%}",
            ", ".join(
                word for word, holds in (
                    ("key", row.is_key), ("published", row.is_published), ("base only", row.precision == "base")
                ) if holds
            ),
            *(values.get(row.step, "") for values in found),
        ]
        for row in rows
    ]  # fmt: skip
    header = ["step", "tokens", "stage", "lr", "loss", "held-out", "bytes", "of bf16", "", *series]
    out(table(header, lines, right=[0, 1, 3, 4, 5, 6, 7, *range(9, len(header))]))
    note(f"{len(rows)} checkpoints, {megabytes(sum(row.num_bytes for row in rows))} together")
    if rows:
        suggest(f"minicpm chat {options.source}@{rows[-1].step}")


def _loss(losses: Any, name: str) -> str:
    return f"{losses[name]:.4f}" if name in losses else ""


def show_parser() -> Parser:
    """Return the parser of `show`."""
    verb = Parser(
        "history show",
        "Say what a history is of, or where one checkpoint stands and how each tensor lies in it.",
        ["minicpm history show runs/nano", "minicpm history show runs/nano@500 --tensors"],
    )
    verb.add_argument("name", metavar="RUN[@STEP]", help="a run, or a checkpoint of it")
    verb.add_argument("--tensors", action="store_true", help="also list every tensor")
    verb.add_argument("--json", action="store_true", help="as JSON; of a run with its whole configuration")
    return verb


def show(options: argparse.Namespace) -> None:
    """Print the facts."""
    from minicpm.history.naming import open_history, parse_step

    name = parse_step(options.name)
    facts: dict[str, Any]
    lines: list[list[str]] = []
    if name is None:
        history = open_history(options.name)
        about = history.about
        stages = list(dict.fromkeys(row.stage for row in history.rows))
        facts = {
            "place": history.place.name,
            "checkpoints": len(history),
            "steps": f"{history.steps[0]} … {history.steps[-1]}" if history.steps else "none",
            "stages": ", ".join(stages),
            "bytes": sum(row.num_bytes for row in history.rows),
            "parameters": about.config.num_parameters().total,
            "tokenizer_sha256": about.tokenizer_sha256,
            "files": ", ".join(about.files),
            "base_error": about.base_error,
            "max_reads": about.max_reads,
            "code_version": about.code_version,
        }
        if options.json:
            facts["run"] = dict(about.run)
    else:
        history = open_history(name.run)
        snapshot = history.at(name.step, precision=name.precision)
        manifest = snapshot.manifest
        facts = dataclasses.asdict(manifest.facts) | {
            "coded_from": manifest.previous,
            "bytes": snapshot.row.num_bytes,
            "manifest_sha256": snapshot.row.manifest_sha256,
            "code_version": manifest.code_version,
            "scores": _scores_of(history, name.step, options.json),
        }
        lines = _tensor_lines(snapshot)
    if options.json:
        tensors = [dict(zip(_TENSOR_HEADER, line, strict=True)) for line in lines]
        out(json.dumps(facts | ({"tensors": tensors} if options.tensors else {}), indent=2, ensure_ascii=False))
        return
    width = max(map(len, facts))
    out("\n".join(f"{key:{width}}  {_text(value)}" for key, value in facts.items()))
    if options.tensors and lines:
        out("\n" + table(_TENSOR_HEADER, lines, right=[3, 4]))


def _scores_of(history: History, step: int, is_json: bool) -> dict[str, Any]:
    from minicpm.history.scores import by_setting, current_scores

    found = by_setting([score for score in current_scores(history) if score.step == step])
    return {label: dict(scores[0].figures) if is_json else scores[0].text for label, scores in found.items()}


_TENSOR_HEADER = ["tensor", "type", "shape", "frames", "bytes read", "sha256"]


def _tensor_lines(snapshot: Snapshot) -> list[list[str]]:
    lines = []
    for name, entry in snapshot.manifest.tensors.items():
        is_exact = snapshot.precision == "exact"
        read = sum(extent.num_bytes for part in entry.parts for extent in part.extents(is_exact))
        shape = "×".join(map(str, entry.shape))
        depth = max(len(part.frames) for part in entry.parts)
        lines.append([name, entry.block_type, shape, str(depth), f"{read:,}", entry.sha256[:16]])
    return lines


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items()) or "none"
    return f"{value:,}" if type(value) is int else str(value)


def verify_parser() -> Parser:
    """Return the parser of `verify`."""
    verb = Parser(
        "history verify",
        "Check everything: every object's hash, every tensor of every step, and that no step repeats another and no "
        "tensor is another's. Names each problem; exit code 2 if there is one.",
        ["minicpm history verify runs/nano", "minicpm history verify runs/nano --quick"],
    )
    verb.add_argument("source", metavar="RUN", help="a run's folder, a history's folder, or a URL")
    verb.add_argument("--quick", action="store_true", help="hash the files only; decode nothing")
    return verb


def verify(options: argparse.Namespace) -> None:
    """Check, and name every problem.

    Raises:
        CheckpointError: there are problems; they stand on standard output.
    """
    from minicpm.history.naming import open_history
    from minicpm.history.verification import verify as find_problems

    history = open_history(options.source)
    problems = find_problems(history, is_deep=not options.quick, on_progress=note)
    for problem in problems:
        out(problem.text)
    if problems:
        raise CheckpointError(
            f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'} in {history.place.name}, listed above; "
            "fetch what is damaged again from where it is whole, or drop it"
        )
    how = "every object is whole" if options.quick else "every tensor of every step is what was trained"
    out(f"{history.place.name}: {len(history)} checkpoints, {how}")


def diff_parser() -> Parser:
    """Return the parser of `diff`."""
    verb = Parser(
        "history diff",
        "Say how far two checkpoints are from each other, layer by layer: relative change, cosine, largest step.",
        ["minicpm history diff runs/nano@500 runs/nano@1000", "minicpm history diff runs/a@100 runs/b@100 --tensors"],
    )
    verb.add_argument("a", metavar="RUN@STEP", help="from this checkpoint")
    verb.add_argument("b", metavar="RUN@STEP", help="to this one")
    verb.add_argument("--tensors", action="store_true", help="by tensor instead of by layer")
    verb.add_argument("--json", action="store_true", help="as JSON")
    return verb


def diff(options: argparse.Namespace) -> None:
    """Compare."""
    from minicpm.history.difference import by_layer, by_tensor
    from minicpm.history.naming import open_history, parse_step

    names = []
    for text in (options.a, options.b):
        name = parse_step(text)
        if name is None:
            raise UsageError(f"{text!r} is not of the form RUN@STEP, such as runs/nano@500")
        names.append(name)
    a, b = (open_history(name.run).at(name.step, precision=name.precision) for name in names)
    found = (by_tensor if options.tensors else by_layer)(a, b)
    if options.json:
        out(json.dumps([dataclasses.asdict(item) for item in found], indent=2))
        return
    lines = [
        [d.name, f"{d.num_weights:,}", f"{d.norm:.4g}", f"{d.change:.3%}", f"{d.cosine:.6f}", f"{d.largest:.3g}"]
        for d in found
    ]
    out(table(["", "weights", "norm", "change", "cosine", "largest"], lines, right=[1, 2, 3, 4, 5]))


def lineage_parser() -> Parser:
    """Return the parser of `lineage`."""
    verb = Parser(
        "history lineage",
        "Say what a model comes from: the chain of pretraining, tuning and merging that its folders remember.",
        ["minicpm history lineage merged", "minicpm history lineage runs/chat-dpo@200"],
    )
    text = "a model's folder, an adapter's, RUN@STEP, or RUN for its newest checkpoint"
    verb.add_argument("model", metavar="MODEL", help=text)
    return verb


def lineage(options: argparse.Namespace) -> None:
    """Print the chain, the oldest first."""
    from minicpm.history.naming import resolve
    from minicpm.train.lineage import lineage as chain

    try:
        found = list(chain(resolve(options.model)))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{options.model} has a note of its origin that cannot be read: {error}") from error
    for depth, ancestor in enumerate(reversed(found)):
        mark = f"{'   ' * (depth - 1)}└─ " if depth else ""
        out(f"{mark}{ancestor.name}: {ancestor.made_by} ({ancestor.folder})")
