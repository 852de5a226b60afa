"""What a tuning run reads: rows validated wholly, labelled, set aside in part; a batch for every place of the run.

What this leaves out: the shapes of rows and their labels (`data`, `tokenizer`), and the reference's log-probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minicpm.data.answers import AnswerSet, build_answers
from minicpm.data.batches import BatchStream
from minicpm.data.identity import identity_examples
from minicpm.data.mixture import Mix, Span, StageMixture
from minicpm.data.row_formats import Example, Kind
from minicpm.data.rows import read_examples
from minicpm.data.shards import TokenShards
from minicpm.data.supervised import write_rows
from minicpm.data.tokenization import TokenizeConfig, is_set_aside, shard_facts
from minicpm.errors import DataError
from minicpm.formats.checkpoint import Checkpoint
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.exports import hf_settings
from minicpm.tokenizer.fingerprint import fingerprint
from minicpm.train.corpus import TOKENIZER_FILES
from minicpm.train.tune_config import TuneConfig

ROWS, HELDOUT = "rows", "heldout"


@dataclass(frozen=True)
class TuneCorpus:
    """What a run reads.

    Attributes:
        tokenizer: the model's.
        tokenizer_hash: its fingerprint.
        tokenizer_files: what each checkpoint carries.
        stream: packed conversations by row number, of supervised tuning.
        shards: of the conversations, and of those set aside, by name.
        answers: of preference tuning, and those set aside.
        heldout_answers: the latter, None where none are.
    """

    tokenizer: Tokenizer
    tokenizer_hash: str
    tokenizer_files: dict[str, bytes]
    stream: BatchStream | None = None
    shards: dict[str, TokenShards] | None = None
    answers: AnswerSet | None = None
    heldout_answers: AnswerSet | None = None

    @property
    def identity(self) -> dict[str, str]:
        """Content hash of every source."""
        if self.answers is not None:
            return {ROWS: self.answers.content_hash}
        assert self.shards is not None
        return {ROWS: str(self.shards[ROWS].manifest["content_hash"])}

    @property
    def heldout(self) -> dict[str, TokenShards]:
        """The conversations set aside, by name."""
        return {n: s for n, s in (self.shards or {}).items() if n == HELDOUT}

    @property
    def num_rows(self) -> int:
        """Rows of one epoch: packed ones, pairs, or judged answers."""
        if self.answers is not None:
            return self.answers.num_items
        assert self.stream is not None
        return self.stream.order.plans[0].num_rows


def open_tune_corpus(config: TuneConfig, base: Checkpoint, run: Path, say: Callable[[str], None]) -> TuneCorpus:
    """Return the run's rows; conversations become shards in the run's folder.

    Raises:
        DataError: rows that cannot be used (file, line, field), that are cut to nothing, or none at all.
    """
    tokenizer, files = open_base_tokenizer(base)
    hashed = fingerprint(tokenizer)
    kind = kind_of(config)
    examples, heldout = read_rows(config, kind, say)
    if kind == "conversation":
        shards = {ROWS: _shards(config, examples, tokenizer, run / "data" / ROWS)}
        if heldout:
            shards[HELDOUT] = _shards(config, heldout, tokenizer, run / "data" / HELDOUT)
        mixture = StageMixture((Mix(ROWS, 1.0),))
        length = config.batch.sequence_length
        stream = BatchStream([Span(0, mixture)], {ROWS: shards[ROWS]}, length, seed=config.loop.seed)
        plan = stream.order.plans[0]
        targets = int(shards[ROWS].manifest["num_targets"])
        say(
            f"{shards[ROWS].num_documents:,} rows, {shards[ROWS].num_tokens:,} tokens, {targets:,} supervised "
            f"({100 * targets / shards[ROWS].num_tokens:.0f} %); {plan.num_rows:,} packed rows of {length}, "
            f"{plan.num_cut} cut, {plan.num_dropped} dropped since no answer was left"
        )
        return TuneCorpus(tokenizer, hashed, files, stream, shards)
    made = build_answers(examples, kind, tokenizer, config.batch.sequence_length, config.loop.seed)
    aside = build_answers(heldout, kind, tokenizer, config.batch.sequence_length, config.loop.seed) if heldout else None
    name = "pairs" if kind == "preference" else "judged answers"
    say(
        f"{made.num_items:,} {name}, {aside.num_items if aside else 0:,} held out; {made.num_cut} cut to "
        f"{config.batch.sequence_length} tokens, {made.num_dropped} dropped since no answer was left"
    )
    return TuneCorpus(tokenizer, hashed, files, answers=made, heldout_answers=aside)


def kind_of(config: TuneConfig) -> Kind:
    """Return what every row of the run must be."""
    if config.goal == "sft":
        return "conversation"
    return "judged" if config.preference.loss == "kto" else "preference"


def read_rows(config: TuneConfig, kind: Kind, say: Callable[[str], None]) -> tuple[list[Example], list[Example]]:
    """Return the rows to learn from and those set aside.

    Raises:
        DataError: rows that cannot be used, or none.
    """
    rows = config.rows
    examples: list[Example] = []
    if rows.sources:
        examples, report = read_examples(rows.sources, kind, drops_bad=rows.drops_bad)
        say(report.summary())
    heldout: list[Example] = []
    if rows.heldout:
        heldout, _ = read_examples([rows.heldout], kind, drops_bad=rows.drops_bad)
    elif rows.heldout_share:
        is_aside = [is_set_aside(example.text.encode("utf-8", "replace"), rows.heldout_share) for example in examples]
        heldout = [example for example, aside in zip(examples, is_aside, strict=True) if aside]
        examples = [example for example, aside in zip(examples, is_aside, strict=True) if not aside]
    examples += identity_examples(rows.identity) * rows.identity_copies
    if not examples:
        raise DataError(f"rows.heldout_share {rows.heldout_share} sets every row aside; lower it, or give more rows")
    return examples, heldout


def open_base_tokenizer(base: Checkpoint) -> tuple[Tokenizer, dict[str, bytes]]:
    """Return a model's tokenizer, and the files that make it one for every reader of model folders.

    Raises:
        FormatError: there is none, or it is broken.
    """
    if base.kind == "gguf":
        tokenizer = Tokenizer.from_gguf(base.metadata)
        files: dict[str, bytes] = {}
    else:
        tokenizer = Tokenizer.from_folder(base.path)
        names = (*TOKENIZER_FILES, "generation_config.json")
        files = {name: (base.path / name).read_bytes() for name in names if (base.path / name).is_file()}
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = tokenizer.to_json().encode()
    if "tokenizer_config.json" not in files:
        settings = hf_settings(tokenizer, base.config.max_position_embeddings, base.chat_template)
        files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n"
    return tokenizer, files


def _shards(config: TuneConfig, examples: Sequence[Example], tokenizer: Tokenizer, folder: Path) -> TokenShards:
    folder.parent.mkdir(parents=True, exist_ok=True)
    sources = [*config.rows.sources, *([config.rows.heldout] if config.rows.heldout else [])]
    facts = shard_facts(sources, tokenizer, TokenizeConfig())
    write_rows(examples, tokenizer, folder, facts, trained_turns=config.rows.turns, replaces=True)
    return TokenShards.open(folder, facts["tokenizer_hash"])
