"""`minicpm data clean|tokenizer|tokenize|show`: from text to what a model is trained on."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from minicpm.cli.group import Group
from minicpm.cli.parser import Parser, UsageError
from minicpm.cli.terminal import note, out, suggest, table
from minicpm.cli.tokenizer_argument import add_tokenizer, open_tokenizer

_SOURCE_HELP = (
    "a file (.txt .jsonl .json .parquet and source code; also .gz .xz .zst .bz2), folder, glob, stdlib: or "
    "hf:owner/name[@revision][:config][#split]"
)
_FIELD_HELP = "field of a row that holds the text, or a template such as '{en} = {zh}' (default: text)"


def parser() -> Group:
    """Return the parser of this verb."""
    group = Group("data", "Clean text, learn a vocabulary, turn text into token shards, look at what a model will see.")
    group.add("clean", _clean_parser(), _clean)
    group.add("tokenizer", _tokenizer_parser(), _tokenizer)
    group.add("tokenize", _tokenize_parser(), _tokenize)
    group.add("show", _show_parser(), _show)
    return group


def run(options: argparse.Namespace) -> None:
    """Run the chosen verb."""
    options.run(options)


def _clean_parser() -> Parser:
    verb = Parser(
        "data clean",
        "Clean corpora: NFC, rules of quality, language, decontamination, exact and near copies within and across. "
        "Writes NAME.jsonl.gz and cleaning-report.json, which counts why rows went.",
        [
            "minicpm data clean web=crawl/ books=books.jsonl.xz --out cleaned --language en,zh",
            "minicpm data clean code=src/ --quality code --out cleaned --against eval/",
        ],
    )
    verb.add_argument("sources", metavar="NAME=SOURCE", nargs="+", help=_SOURCE_HELP + "; of copies the first stays")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    verb.add_argument("--field", default="text", help=_FIELD_HELP)
    verb.add_argument("--quality", choices=("text", "code", "off"), default="text", help="which rules (default: text)")
    verb.add_argument("--min-characters", type=int, default=50, metavar="N", help="shorter documents go (default: 50)")
    verb.add_argument("--language", default="", metavar="L,L", help="keep these alone: zh ja ko en ru ar latin other")
    verb.add_argument("--near", type=float, default=0.7, metavar="J", help="Jaccard similarity of copies; 0 keeps them")
    verb.add_argument("--against", nargs="*", default=[], metavar="EVAL", help="evaluation sets that must not occur")
    verb.add_argument(
        "--ngram", type=int, default=13, metavar="N", help="words in common that betray one (default: 13)"
    )
    _add_workers(verb)
    return verb


def _tokenizer_parser() -> Parser:
    verb = Parser(
        "data tokenizer",
        "Learn a vocabulary: SentencePiece BPE in MiniCPM's settings. Writes tokenizer.model, tokenizer.json and "
        "tokenizer_config.json.",
        [
            "minicpm data tokenizer stdlib: --vocab-size 4096 --out tok",
            "minicpm data tokenizer cleaned/ --vocab-size 32000 --out tok",
        ],
    )
    verb.add_argument("sources", metavar="SOURCE", nargs="+", help=_SOURCE_HELP)
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    verb.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="number of ids (default: 32000)")
    verb.add_argument("--field", default="text", help=_FIELD_HELP)
    verb.add_argument("--coverage", type=float, default=0.9995, help="share of characters with ids (default: 0.9995)")
    verb.add_argument(
        "--control", nargs="*", default=[], metavar="TOKEN", help="control tokens, such as '<|im_start|>'"
    )
    verb.add_argument(
        "--max-characters", type=int, default=200_000_000, metavar="N", help="text to learn from, at most"
    )
    return verb


def _tokenize_parser() -> Parser:
    verb = Parser(
        "data tokenize",
        "Turn text into memory-mapped token shards, whole or not at all.",
        [
            "minicpm data tokenize cleaned/books.jsonl.gz --tokenizer tok --out shards/books",
            "minicpm data tokenize chats.jsonl --rows --tokenizer tok --out shards/chats",
        ],
    )
    verb.add_argument("sources", metavar="SOURCE", nargs="+", help=_SOURCE_HELP)
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add_tokenizer(verb)
    verb.add_argument("--field", default="text", help=_FIELD_HELP)
    verb.add_argument("--heldout", type=float, default=0.0, metavar="SHARE", help="set aside into DIR.heldout")
    verb.add_argument("--max-tokens", type=int, default=0, metavar="N", help="stop there (default: all)")
    verb.add_argument("--rows", action="store_true", help="conversations: answers alone are targets")
    verb.add_argument(
        "--turns", choices=("last", "all"), default="last", help="which answers of --rows (default: last)"
    )
    verb.add_argument("--drop-bad", action="store_true", help="drop and count bad rows of --rows")
    verb.add_argument("--replace", action="store_true", help="replace DIR if it is there")
    _add_workers(verb)
    return verb


def _show_parser() -> Parser:
    verb = Parser(
        "data show",
        "Show what a model will see: borders of documents, supervised tokens in green (or in ⟦ ⟧).",
        [
            "minicpm data show shards/books --tokenizer tok --length 512 --row 1000",
            "minicpm data show chats.jsonl --rows --tokenizer tok",
        ],
    )
    verb.add_argument("source", metavar="SHARDS|SOURCE", help="a folder of token shards, or " + _SOURCE_HELP)
    add_tokenizer(verb)
    verb.add_argument("--number", type=int, default=3, metavar="N", help="how many rows (default: 3)")
    verb.add_argument("--row", type=int, default=0, metavar="N", help="the first of them, of shards")
    verb.add_argument("--length", type=int, default=512, metavar="T", help="tokens of a row, of shards (default: 512)")
    verb.add_argument("--seed", type=int, default=1234, help="of the order, of shards (default: 1234)")
    verb.add_argument("--rows", action="store_true", help="the source holds conversations, not text")
    verb.add_argument("--turns", choices=("last", "all"), default="last", help="which answers are targets")
    verb.add_argument("--field", default="text", help=_FIELD_HELP)
    return verb


def _add_workers(verb: Parser) -> None:
    cores = os.cpu_count() or 1
    verb.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (default: all {cores} cores)")


def _clean(options: argparse.Namespace) -> None:
    from minicpm.data.cleaning import CleanConfig, clean
    from minicpm.data.quality import QualityConfig
    from minicpm.data.sources import CLEANING_REPORT

    sources: dict[str, str] = {}
    for pair in options.sources:
        name, separator, source = pair.partition("=")
        if not separator or not name or not source:
            raise UsageError(f"{pair!r} is not of the form NAME=SOURCE")
        if name in sources:
            raise UsageError(f"the name {name!r} is given twice; names must be unique")
        sources[name] = source
    config = CleanConfig(
        field=options.field,
        quality=QualityConfig(kind=options.quality, min_characters=options.min_characters),
        languages=tuple(name for name in options.language.split(",") if name),
        near=options.near,
        ngram=options.ngram,
        workers=options.workers,
    )
    meter = _Meter("rows read", "kept")
    report = clean(sources, options.out, config, options.against, meter)
    meter.close()
    rows = [
        [n, f"{s['num_rows']:,}", f"{s['num_kept']:,}", _counts(s["dropped"])] for n, s in report["sources"].items()
    ]
    out(table(["corpus", "rows", "kept", "went"], rows, right=[1, 2]))
    kept = f"{report['num_kept']:,} of {report['num_rows']:,} rows kept"
    out(f"\n{kept}; why the others went: {options.out / CLEANING_REPORT}")
    suggest(f"minicpm data tokenizer {options.out} --out {options.out}-tokenizer")


def _tokenizer(options: argparse.Namespace) -> None:
    from minicpm.data.atomic import new_folder
    from minicpm.data.sources import read_documents
    from minicpm.tokenizer.training import VocabularyConfig, train_vocabulary

    # Each source gives its share, so that a large first one does not leave the others out.
    share = max(options.max_characters // len(options.sources), 1)
    config = VocabularyConfig(
        vocab_size=options.vocab_size,
        control=tuple(options.control),
        character_coverage=options.coverage,
        max_characters=options.max_characters,
    )
    learned_bytes = 0

    def texts() -> Iterator[str]:
        nonlocal learned_bytes
        for source in options.sources:
            taken = 0
            for document in read_documents(source, options.field):
                taken += len(document.text)
                learned_bytes += len(document.text.encode("utf-8", "replace"))
                yield document.text
                if taken >= share:
                    break

    began = time.perf_counter()
    with new_folder(options.out) as folder:
        tokenizer = train_vocabulary(texts(), folder, config)
    seconds = time.perf_counter() - began
    out(f"{tokenizer.vocab_size:,} ids learned from {learned_bytes:,} bytes in {seconds:.0f} s: {options.out}")
    suggest(f"minicpm data tokenize {options.sources[0]} --tokenizer {options.out} --out {options.out}-shards")


def _tokenize(options: argparse.Namespace) -> None:
    from minicpm.data.supervised import tokenize_rows
    from minicpm.data.tokenization import TokenizeConfig, tokenize_documents

    tokenizer = open_tokenizer(options.tokenizer)
    if options.rows:
        manifest = tokenize_rows(
            options.sources,
            tokenizer,
            options.out,
            trained_turns=options.turns,
            drops_bad=options.drop_bad,
            replaces=options.replace,
        )
    else:
        config = TokenizeConfig(
            field=options.field,
            heldout_share=options.heldout,
            max_tokens=options.max_tokens,
            workers=options.workers,
            replaces=options.replace,
        )
        meter = _Meter("documents", "tokens", "bytes")
        manifest = tokenize_documents(options.sources, tokenizer, options.out, config, meter)
        meter.close()
    dropped = manifest.get("num_dropped_rows")
    out(
        f"{manifest['num_documents']:,} documents, {manifest['num_tokens']:,} tokens"
        + (f", {manifest['num_targets']:,} of them targets" if "num_targets" in manifest else "")
        + (f", {dropped} bad rows dropped" if dropped else "")
        + f", {manifest['text_bytes'] / manifest['num_tokens']:.2f} bytes a token"
        + f", {manifest['tokens_per_second']:,} tokens/s: {options.out}"
    )
    suggest(f"minicpm data show {options.out} --tokenizer {options.tokenizer}")


def _show(options: argparse.Namespace) -> None:
    from minicpm.data.preview import preview_rows, preview_shards, preview_text
    from minicpm.data.shards import MANIFEST

    tokenizer, number = open_tokenizer(options.tokenizer), options.number
    has_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    if (Path(options.source) / MANIFEST).exists():
        where = (options.length, options.seed, options.row, number)
        texts = preview_shards(tokenizer, Path(options.source), *where, has_colour=has_colour)
    elif options.rows:
        texts = preview_rows(tokenizer, options.source, options.turns, number, has_colour=has_colour)
    else:
        texts = preview_text(tokenizer, options.source, options.field, number, has_colour=has_colour)
    for text in texts:
        out(text)


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {fault}" for fault, count in dropped.items()) or "none"


class _Meter:
    """A line of counts every two seconds: in place at a terminal, plain lines elsewhere."""

    def __init__(self, *names: str) -> None:
        self._names, self._last, self._shown = names, time.perf_counter(), False

    def __call__(self, *counts: int) -> None:
        if time.perf_counter() - self._last < 2:
            return
        self._last = time.perf_counter()
        line = ", ".join(f"{count:,} {name}" for count, name in zip(counts, self._names, strict=True))
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
            self._shown = True
        else:
            note(line)

    def close(self) -> None:
        """End the line."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
