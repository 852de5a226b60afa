"""`minicpm bench [MODEL]`: how fast this machine runs a model, and what share of the machine that is."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from minicpm.cli.draft_gain import Gain, measure_gains
from minicpm.cli.llama_bench import LlamaBench
from minicpm.cli.measurement import Machine, Speed, Work, measure
from minicpm.cli.parser import Parser, UsageError, add_model
from minicpm.cli.sampling import add_kv_type
from minicpm.cli.terminal import dim, note, out, suggest, table
from minicpm.engine.decoder import Decoder, available_processors
from minicpm.engine.sizing import check_weights, free_memory, longest_context
from minicpm.engine.speed import blocks_for, streamed_bytes
from minicpm.errors import EngineError
from minicpm.formats.checkpoint import Checkpoint, open_checkpoint
from minicpm.history.naming import resolve
from minicpm.hub import DEFAULT_MODEL
from minicpm.hub.progress import megabytes

_EXAMPLES = (
    "minicpm bench",
    "minicpm bench model.gguf --contexts 0,4096 --batches 1,8 --json",
    "minicpm bench model.gguf --against /path/to/llama-bench",
    "minicpm bench --speculate ngram",
)

# Prompts, contexts and batches unless given.
_USUAL = ([128, 512], [0, 1024], [4, 16])


def parser() -> Parser:
    """Return the parser of this verb."""
    text = (
        "Say how fast this machine runs a model: tokens per second of prompts and of replies, the memory bandwidth and "
        "arithmetic reached, their share of what the machine can do, memory, and energy where the system counts it."
    )
    verb = Parser("bench", text, _EXAMPLES)
    add_model(verb, nargs="?", default=DEFAULT_MODEL)
    positive, natural = _lengths(least=1), _lengths(least=0)
    verb.add_argument("--against", metavar="PROGRAM", help="also time this llama-bench on the same file, taking turns")
    verb.add_argument("--prompts", type=positive, metavar="N,…", help="prompt lengths (128,512)")
    verb.add_argument("--contexts", type=natural, metavar="N,…", help="decode after (0,1024)")
    verb.add_argument("--batches", type=positive, metavar="N,…", help="sequences at once (4,16)")
    verb.add_argument("--tokens", type=_count, default=32, metavar="N", help="steps of a decode (%(default)s)")
    verb.add_argument("--rounds", type=_count, default=3, metavar="N", help="turns; medians count (%(default)s)")
    verb.add_argument("--threads", type=_count, metavar="N", help="default: every processor that this process may use")
    verb.add_argument("--speculate", choices=("ngram", "off"), default="off",
                      help="also time replies with drafts against replies without (%(default)s)")  # fmt: skip
    verb.add_argument("--draft", metavar="MODEL", help="the same with drafts by this smaller model")
    add_kv_type(verb)
    verb.add_argument("--json", action="store_true", help="as JSON")
    return verb


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    path = resolve(options.model)
    checkpoint = open_checkpoint(path)
    threads = options.threads or available_processors()
    peer = _peer(options.against, path, checkpoint, threads)
    works = _works(options, checkpoint)
    decoder = _decoder(checkpoint, works, threads, options.kv_type)
    machine, weight_bytes, speeds = Machine(threads), streamed_bytes(checkpoint.weights.entries), []
    for work in works:
        if sys.stderr.isatty():
            note(dim(f"timing {work.label}"))
        speeds.append(measure(work, decoder, weight_bytes, machine, peer, options.rounds))
    facts = _facts(checkpoint, decoder, machine, speeds)
    del decoder  # its memory is wanted
    gains = _gains(options, path, threads)
    facts["speculation"] = [asdict(gain) | {"ratio": gain.ratio} for gain in gains]
    if options.json:
        out(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    out(_as_text(facts, speeds) + _gains_as_text(gains))
    suggest("minicpm doctor")


def _gains(options: argparse.Namespace, path: Path, threads: int) -> list[Gain]:
    if options.draft is None and options.speculate == "off":
        return []
    draft = None if options.draft is None else resolve(options.draft)
    way: Literal["ngram", "draft"] = "ngram" if draft is None else "draft"
    return measure_gains(path, draft, way, threads, options.rounds, options.kv_type)


def _gains_as_text(gains: list[Gain]) -> str:
    if not gains:
        return ""
    rows = [
        [g.text, f"{g.plain_tokens_per_second:.1f}", f"{g.tokens_per_second:.1f}", f"{g.ratio:.2f}",
         f"{g.num_accepted_tokens} of {g.num_drafted_tokens}"]
        for g in gains
    ]  # fmt: skip
    return "\n\n" + table(["reply", "plain tokens/s", "with drafts", "ratio", "right"], rows, right=range(1, 5))


def _peer(program: str | None, path: Path, checkpoint: Checkpoint, threads: int) -> LlamaBench | None:
    if program is None:
        return None
    if checkpoint.kind != "gguf":
        raise UsageError(f"{path} is a folder; --against takes a GGUF file, which `minicpm convert` makes of it")
    return LlamaBench(program, path, threads)


def _works(options: argparse.Namespace, checkpoint: Checkpoint) -> list[Work]:
    longest = longest_context(checkpoint.config)
    lists = (options.prompts, options.contexts, options.batches)
    # Only what was asked for by name must fit; a short model leaves the others out.
    prompts, contexts, batches = (given or usual for given, usual in zip(lists, _USUAL, strict=True))
    works = [Work("prefill", n) for n in prompts if options.prompts or n <= longest]
    works += [
        Work("decode", options.tokens, context=n) for n in contexts if options.contexts or n + options.tokens <= longest
    ]
    # Batches after an empty context: filling many long ones would take minutes and say little more.
    works += [Work("decode", options.tokens, batch=n) for n in batches]
    for work in works:
        if work.context + work.num_tokens > longest:
            raise EngineError(f"{work.label} needs {work.context + work.num_tokens} positions; the model has {longest}")
    return list(dict.fromkeys(works))


def _decoder(checkpoint: Checkpoint, works: list[Work], threads: int, kv_type: str | None) -> Decoder:
    check_weights(checkpoint.num_bytes, free_memory())
    num_blocks = max(blocks_for(work.context + work.num_tokens, work.batch) for work in works)
    return Decoder(checkpoint.config, checkpoint.weights, num_threads=threads, num_blocks=num_blocks, kv_type=kv_type)


def _facts(checkpoint: Checkpoint, decoder: Decoder, machine: Machine, speeds: list[Speed]) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "dtypes": decoder.dtypes,
        "kernel": decoder.kernel,
        "threads": decoder.num_threads,
        "machine": {
            "read_bytes_per_second": machine.read_rate,
            "float32_product_operations_per_second": machine.product_rate,
        },
        "memory": {
            "file_weight_bytes": checkpoint.num_bytes,
            "weight_bytes": decoder.weight_bytes,
            "cache_bytes": decoder.cache_bytes,
            "resident_bytes": _resident_bytes(),
        },
        "speeds": [asdict(speed.work) | _without_work(speed) for speed in speeds],
    }


def _without_work(speed: Speed) -> dict[str, Any]:
    return {name: value for name, value in asdict(speed).items() if name != "work"} | {"ratio": speed.ratio}


def _resident_bytes() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)


def _as_text(facts: dict[str, Any], speeds: list[Speed]) -> str:
    has_joules = any(speed.joules_per_token is not None for speed in speeds)
    has_peer = any(speed.peer_tokens_per_second is not None for speed in speeds)
    header = ["work", "tokens/s", "GB/s", "of memory", "TOP/s", "of float32"]
    header += ["J/token"] * has_joules + ["llama.cpp", "ratio"] * has_peer
    rows = []
    for s in speeds:
        row = [
            s.work.label,
            f"{s.tokens_per_second:.1f}",
            f"{s.bytes_per_second / 1e9:.1f}",
            f"{s.bandwidth_share:.0%}",
        ]
        row += [f"{s.operations_per_second / 1e12:.3f}", f"{s.product_share:.0%}"]
        row += [_figure(s.joules_per_token, ".3f")] * has_joules
        row += [_figure(s.peer_tokens_per_second, ".1f"), _figure(s.ratio, ".2f")] * has_peer
        rows.append(row)
    machine, memory = facts["machine"], facts["memory"]
    read, product = machine["read_bytes_per_second"], machine["float32_product_operations_per_second"]
    resident = "" if memory["resident_bytes"] is None else f"; {megabytes(memory['resident_bytes'])} resident"
    lines = [
        ("model", f"{facts['path']}: {facts['dtypes']}"),
        ("kernel", f"{facts['kernel']}, {facts['threads']} threads"),
        ("machine", f"reads {read / 1e9:.1f} GB/s; numpy's float32 matrix product {product / 1e12:.3f} TOP/s"),
        ("memory", f"{megabytes(memory['weight_bytes'])} of weights, KV cache of at most "
                   f"{megabytes(memory['cache_bytes'])}{resident}"),
        ("energy", "of the whole processor package" if has_joules else "no counter that this user may read"),
    ]  # fmt: skip
    text = "\n".join(f"{name:7}  {value}" for name, value in lines)
    return text + "\n\n" + table(header, rows, right=range(1, len(header)))


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _count(text: str) -> int:
    return _whole(text, least=1)


def _lengths(least: int) -> Callable[[str], list[int]]:
    def read(text: str) -> list[int]:
        return [_whole(word, least) for word in text.split(",")]

    return read


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"takes whole numbers of at least {least}, got {text!r}")
    return value
