"""Speculation against plain decoding: tokens per second of replies with drafts and without, and whether they agree.

Rows compare the same model with itself, taking turns; the first token of a reply is not counted. `copy-…` rows are
summaries made of quotations and edits of code, `plain-…` rows are questions. `same-…` is the share of greedy replies
that drafts leave as they are, token by token. `verify8-…` is the speed of eight rows in one step to that of eight
steps: what drafts could gain at most.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.prompts import copying_prompts, plain_prompts
from bench.random_model import write_random_model
from bench.rows import Row, arguments, compare, finish, rounds_of, take_turns

from minicpm.architecture import PRESETS
from minicpm.engine import Completion, LanguageModel
from minicpm.engine.decoder import Decoder
from minicpm.engine.opening import open_language_model
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.hub import DEFAULT_MODEL, resolve

NEW_TOKENS = 96
GREEDY, CARD = {"temperature": 0.0}, {"temperature": 0.3, "top_p": 0.8, "top_k": 50, "seed": 1}
Prompts = Sequence[Sequence[int]]


class Subject:
    """One model and its prompts as token ids."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model: LanguageModel = open_language_model(resolve(options.model), max_parallel=4)
        self.rounds, self.is_quick = rounds_of(options), options.quick
        num_copying, num_plain = (options.prompts,) * 2 if options.prompts else (4, 4) if options.quick else (24, 26)
        self.copying = [self._ids(*item) for item in copying_prompts(num_copying)]
        self.plain = [self._ids(*item) for item in plain_prompts(num_plain)]

    def _ids(self, kind: str, prompt: str) -> Sequence[int]:
        tokenizer = self.model.tokenizer
        if kind == "quote":
            return tokenizer.add_bos(tokenizer.encode(prompt))
        return tokenizer.apply_chat([{"role": "user", "content": prompt}])

    def replies(self, prompts: Prompts, settings: dict[str, float], speculate: str, batch: int) -> list[Completion]:
        """The replies, `batch` at a time."""
        done: list[Completion] = []
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            done += self.model.generate(some, max_new_tokens=NEW_TOKENS, speculate=speculate, **settings)
        return done


def pace(replies: Sequence[Completion]) -> float:
    """Tokens per second after the first tokens, as if the replies had come one after the other."""
    tokens = sum(reply.num_new_tokens - 1 for reply in replies)
    return tokens / sum((reply.seconds or 0) - (reply.first_token_seconds or 0) for reply in replies)


def speed(subject: Subject, name: str, prompts: Prompts, settings: dict[str, float], must: float, batch: int) -> Row:
    last: dict[str, list[Completion]] = {}

    def run(speculate: str) -> Callable[[], float]:
        def once() -> float:
            last[speculate] = subject.replies(prompts, settings, speculate, batch)
            return pace(last[speculate])

        return once

    # From here on the prompts come from the cache.
    run("off")()
    contenders = {"ours": run("ngram"), "peer": run("off")}
    samples = take_turns(contenders, subject.rounds, attempts=1 if subject.is_quick else 2)
    drafted = sum(reply.num_drafted_tokens for reply in last["ngram"])
    accepted = sum(reply.num_accepted_tokens for reply in last["ngram"])
    tokens = sum(reply.num_new_tokens for reply in last["ngram"])
    ratios = [pace([ours]) / pace([peer]) for ours, peer in zip(last["ngram"], last["off"], strict=True)
              if min(ours.num_new_tokens, peer.num_new_tokens) > 1]  # fmt: skip
    told = f"{len(prompts)} prompts, {tokens} tokens, {drafted} drafted, {accepted} accepted"
    print(f"{name}: {told}; single prompts in the last round {min(ratios):.2f} to {max(ratios):.2f}")
    ours, peer = samples.median("ours"), samples.median("peer")
    return compare(name, ours, peer, "no drafts", "tokens/s", must, disturbed=samples.disturbed)


def agreement(subject: Subject, name: str, settings: dict[str, float], batch: int) -> Row:
    prompts = [*subject.copying, *subject.plain]
    pairs = zip(*(subject.replies(prompts, settings, mode, batch) for mode in ("ngram", "off")), strict=True)
    num_same = sum(ours.token_ids == peer.token_ids for ours, peer in pairs)
    return compare(name, num_same, len(prompts), "no drafts", "equal replies", 1.0)


def verification(name: str, path: Path, options: argparse.Namespace, num_rows: int = 8, context: int = 64) -> Row:
    """Tokens per second when all of `num_rows` drafts come true, to one token a step."""
    checkpoint = open_checkpoint(path)
    decoder = Decoder(checkpoint.config, checkpoint.weights, num_blocks=4)
    table, random = np.arange(4, dtype=np.int32)[None], np.random.default_rng(0)

    def step(count: int, start: int) -> None:
        tokens = random.integers(0, checkpoint.config.vocab_size, count, dtype=np.int32)
        rows = np.arange(count, dtype=np.int32)
        decoder.step(tokens, rows + start, np.zeros(count, np.int32), table, rows)

    def together() -> float:
        begin = time.perf_counter()
        step(num_rows, context)
        return num_rows / (time.perf_counter() - begin)

    def singly() -> float:
        begin = time.perf_counter()
        for i in range(num_rows):
            step(1, context + i)
        return num_rows / (time.perf_counter() - begin)

    step(context, 0)
    samples = take_turns({"ours": together, "peer": singly}, max(3, rounds_of(options)), attempts=1)
    ours, peer = samples.median("ours"), samples.median("peer")
    return compare(name, ours, peer, "one row a step", "tokens/s", disturbed=samples.disturbed)


# Name -> prompts, settings, replies at once, bar.
SPEEDS: dict[str, tuple[str, dict[str, float], int, float]] = {
    "copy-135m": ("copying", GREEDY, 1, 1.8),
    "plain-135m": ("plain", GREEDY, 1, 1.0),
    "copy-card-135m": ("copying", CARD, 1, 1.8),
    "plain-card-135m": ("plain", CARD, 1, 1.0),
    "copy-batch4-135m": ("copying", GREEDY, 4, 1.0),
    "plain-batch4-135m": ("plain", GREEDY, 4, 1.0),
}
SAMES = {"same-135m": (GREEDY, 1), "same-card-135m": (CARD, 1), "same-batch4-135m": (GREEDY, 4)}
VERIFICATIONS = ("verify8-135m", "verify8-2b")


def random_2b(folder: Path) -> Path:
    path = folder / "minicpm-2b-q4_0.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"making {path}")
        write_random_model(path, PRESETS["minicpm-2b"])
    return path


def main() -> None:
    parser = arguments(__doc__)
    names = [*SAMES, *SPEEDS, *VERIFICATIONS]
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="for the 135m rows (%(default)s)")
    parser.add_argument("--only", metavar="NAME,…", help=f"these rows: {', '.join(names)}")
    parser.add_argument("--prompts", type=int, metavar="N", help="of each kind (24 and 26; 4 with --quick)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "minicpm-bench",
                        help="where the random 2B model is kept (1.5 GB)")  # fmt: skip
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else names
    if set(wanted) - set(names):
        parser.error(f"--only knows no {', '.join(sorted(set(wanted) - set(names)))}; rows are {', '.join(names)}")
    rows = []
    if set(wanted) & {*SAMES, *SPEEDS}:
        subject = Subject(options)
        rows += [agreement(subject, name, *SAMES[name]) for name in SAMES if name in wanted]
        for name in SPEEDS:
            if name in wanted:
                kind, settings, batch, must = SPEEDS[name]
                rows.append(speed(subject, name, getattr(subject, kind), settings, must, batch))
        subject.model.close()
    for name in VERIFICATIONS:
        if name in wanted:
            path = random_2b(options.folder) if name.endswith("2b") else resolve(options.model)
            rows.append(verification(name, path, options))
    finish(rows, options)


if __name__ == "__main__":
    main()
