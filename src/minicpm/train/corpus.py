"""A run's text, tokenizer and batches: opened or made once, then a batch for every step.

What this leaves out: how text becomes rows (`data`), and tensors (`pretrain`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from minicpm.data.atomic import new_folder
from minicpm.data.batches import BatchStream
from minicpm.data.mixture import Mix
from minicpm.data.opening import data_identity, open_heldout, open_sources, sources_of
from minicpm.data.shards import TokenShards
from minicpm.data.sources import read_documents
from minicpm.data.tokenization import Progress, TokenizeConfig
from minicpm.errors import ConfigError, DataError
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.fingerprint import fingerprint
from minicpm.tokenizer.training import VocabularyConfig, tokenizer_settings, train_vocabulary
from minicpm.train.pretrain_config import PretrainConfig
from minicpm.train.settings import BatchConfig, Ranks

B = TypeVar("B")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Corpus:
    """What a run reads.

    Attributes:
        tokenizer: the run's.
        tokenizer_hash: its fingerprint.
        tokenizer_files: what each checkpoint carries, so that it opens as a model.
        shards: by mixture name.
        heldout: the parts that were set aside, for the names that have one.
        stream: the rows of the run, by number.
    """

    tokenizer: Tokenizer
    tokenizer_hash: str
    tokenizer_files: dict[str, bytes]
    shards: dict[str, TokenShards]
    heldout: dict[str, TokenShards]
    stream: BatchStream

    @property
    def identity(self) -> dict[str, str]:
        """Content hash of every source."""
        return data_identity(self.shards)


def open_corpus(
    config: PretrainConfig, run: Path, say: Callable[[str], None], on_progress: Progress | None = None
) -> Corpus:
    """Return the run's corpus; a tokenizer or shards that are missing are made in the run's folder.

    Raises:
        DataError, ConfigError: text that cannot be read or is empty, shards of another tokenizer, a vocabulary that is
            larger than the model's, a source that would be seen more often than it may.
    """
    tokenizer, files = _open_tokenizer(config, run / "tokenizer", say)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model room for {config.model.vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size}"
        )
    cache = Path(config.corpus.cache) if config.corpus.cache else run / "data"
    settings = TokenizeConfig(
        heldout_share=config.corpus.heldout_share,
        max_tokens=config.corpus.max_tokens,
        workers=max(config.corpus.workers, 1),
    )
    shards = open_sources(config.stages, tokenizer, cache, settings, on_progress)
    tokenizer_hash = fingerprint(tokenizer)
    heldout = {}
    for name, mix in sources_of(config.stages).items():
        part = open_heldout(mix, cache, tokenizer_hash)
        if part is not None and part.num_documents:
            heldout[name] = part
    stream = BatchStream(config.spans(), shards, config.batch.sequence_length, seed=config.loop.seed)
    stream.order.check_epochs(config.batch.sequences_before(config.schedule.total_steps + 1))
    return Corpus(tokenizer, tokenizer_hash, files, shards, heldout, stream)


def _open_tokenizer(
    config: PretrainConfig, kept: Path, say: Callable[[str], None]
) -> tuple[Tokenizer, dict[str, bytes]]:
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(kept) as folder:
            if config.tokenizer.path:
                _copy_tokenizer(Path(config.tokenizer.path).expanduser(), folder)
            else:
                say(f"learning a vocabulary of {config.model.vocab_size:,} ids from the run's text …")
                settings = VocabularyConfig(
                    vocab_size=config.model.vocab_size, max_characters=config.tokenizer.train_characters
                )
                try:
                    train_vocabulary(_texts(config), folder, settings)
                except DataError as error:
                    paths = ", ".join(mix.path for mix in sources_of(config.stages).values())
                    raise DataError(f"{error} (the text is that of {paths})") from error
    tokenizer = Tokenizer.from_folder(kept)
    if config.tokenizer.path:
        given = fingerprint(read_tokenizer(Path(config.tokenizer.path).expanduser()))
        if given != fingerprint(tokenizer):
            raise DataError(f"{kept} holds another tokenizer than {config.tokenizer.path}; begin a new run")
    return tokenizer, {name: (kept / name).read_bytes() for name in TOKENIZER_FILES if (kept / name).is_file()}


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in a folder, `tokenizer.json` or `tokenizer.model`.

    Raises:
        FormatError: there is none, or it is broken.
    """
    if path.suffix == ".model":
        return Tokenizer.from_sentencepiece(path)
    return Tokenizer.from_json(path) if path.suffix == ".json" else Tokenizer.from_folder(path)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    tokenizer = read_tokenizer(source)
    if source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    elif source.suffix == ".model":
        shutil.copyfile(source, folder / "tokenizer.model")
    if not (folder / "tokenizer.json").exists():
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    if not (folder / "tokenizer_config.json").exists():
        settings = json.dumps(tokenizer_settings(), indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")


def _texts(config: PretrainConfig) -> Iterator[str]:
    # Each source gives its share, so that a large first one does not leave the others out.
    mixes: Mapping[str, Mix] = {n: m for n, m in sources_of(config.stages).items() if m.kind == "text"}
    share = max(config.tokenizer.train_characters // max(len(mixes), 1), 1)
    for mix in mixes.values():
        taken = 0
        for document in read_documents(mix.path, mix.field):
            taken += len(document.text)
            yield document.text
            if taken >= share:
                break


class StepBatches(Generic[B]):
    """The micro-batches of a step, made ahead by threads; what is made depends on (seed, step, rank, world) alone.

    `make_rows` returns some rows of the run, by the first one's number and their count.
    """

    def __init__(
        self,
        make_rows: Callable[[int, int], B],
        batch: BatchConfig,
        total_steps: int,
        ranks: Ranks,
        workers: int = 0,
    ) -> None:
        self.make_rows, self.batch, self.total_steps = make_rows, batch, total_steps
        self.ranks, self.workers = ranks, workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="batches") if workers else None
        self._ahead: dict[int, Future[list[B]]] = {}

    def __call__(self, step: int) -> list[B]:
        """Return the micro-batches of update `step` that this process computes."""
        if self._pool is None:
            return self.make(step)
        last = min(step + self.workers, self.total_steps)
        for wanted in range(step, last + 1):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._pool.submit(self.make, wanted)
        return self._ahead.pop(step).result()

    def make(self, step: int) -> list[B]:
        """Return the same, made now."""
        before = self.batch.sequences_before(step)
        parts = self.batch.split(step, self.ranks.rank, self.ranks.world, self.batch.micro_sequences)
        return [self.make_rows(before + first, rows) for first, rows in parts]

    def close(self) -> None:
        """Drop what was made ahead."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
