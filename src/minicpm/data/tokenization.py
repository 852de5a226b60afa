"""Text to token shards with all cores: whole or not at all, the same bytes whatever the number of processes.

Each document is bos (where the model has one), its ids, and eos. What this leaves out: cleaning, and rows.

`tokenize_documents` is for text, `tokenize_rows` for conversations, whose tokens are only partly targets.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minicpm.data.atomic import new_folder
from minicpm.data.encoding import BatchEncoder
from minicpm.data.processes import map_in_order
from minicpm.data.shard_writer import SHARD_TOKENS, ShardWriter
from minicpm.data.sources import Document, read_documents, stamp
from minicpm.errors import ConfigError, DataError
from minicpm.tokenizer import Tokenizer, Vocabulary
from minicpm.tokenizer.fingerprint import fingerprint

_BATCH_CHARACTERS = 1 << 20
HELDOUT_SUFFIX = ".heldout"

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class TokenizeConfig:
    r"""How text becomes shards.

    Attributes:
        field: the field of a row that holds its text, or a template such as "{en}\n{zh}".
        heldout_share: documents set aside, chosen by their own hash, into a folder of their own beside the shards.
        max_tokens: stop after the document that reaches it; 0 is all.
        workers: processes that encode; 1 stays in this one.
        shard_tokens: a file ends with the document that reaches it.
        replaces: whether a folder that is there already is replaced.
    """

    field: str = "text"
    heldout_share: float = 0.0
    max_tokens: int = 0
    workers: int = 1
    shard_tokens: int = SHARD_TOKENS
    replaces: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_share < 1:
            raise ConfigError(f"heldout_share must be at least 0 and below 1, got {self.heldout_share}")
        if self.workers < 1 or self.max_tokens < 0 or self.shard_tokens < 1:
            raise ConfigError("workers and shard_tokens must be at least 1, max_tokens at least 0")


class _Part(NamedTuple):
    texts: list[str]
    text_bytes: NDArray[np.int64]
    is_heldout: NDArray[np.bool_]
    counts: dict[str, tuple[int, int]]


def tokenize_documents(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    out: Path,
    config: TokenizeConfig | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the documents of `sources` as shards to folder `out`, and return its manifest.

    Args:
        sources: see `sources`.
        tokenizer: whose ids.
        out: a new folder; with `heldout_share`, another one whose name ends with `.heldout`.
        config: see `TokenizeConfig`.
        on_progress: called now and then with documents, tokens and bytes of text so far.

    Raises:
        DataError: a source cannot be read, has no text, or `out` exists; nothing is left behind.
        ConfigError: the tokenizer has no eos.
    """
    config = config or TokenizeConfig()
    bos, eos = document_ends(tokenizer)
    began = time.perf_counter()
    text_hash = hashlib.sha256()
    counts: dict[str, list[int]] = {source: [0, 0] for source in sources}
    with ExitStack() as stack:
        # The folder of the held-out part is entered last, so it appears first: a reader never finds one without it.
        folders = [stack.enter_context(new_folder(path, replaces=config.replaces)) for path in _outputs(out, config)]
        writers = [ShardWriter(folder, tokenizer.vocab_size, shard_tokens=config.shard_tokens) for folder in folders]
        for writer in writers:
            stack.callback(writer.close)
        parts = _parts(sources, config, text_hash)
        begin_with = (tokenizer.to_json(), tokenizer.vocabulary, config.workers == 1)
        for part, ids, lengths in map_in_order(_encode_part, parts, config.workers, _begin_process, begin_with):
            for source, (documents, text_bytes) in part.counts.items():
                counts[source][0] += documents
                counts[source][1] += text_bytes
            framed, framed_lengths = frame(ids, lengths, bos, eos)
            for number, writer in enumerate(writers):
                keep = part.is_heldout == bool(number)
                if keep.any():
                    writer.add(framed[np.repeat(keep, framed_lengths)], framed_lengths[keep], part.text_bytes[keep])
            if on_progress is not None:
                on_progress(
                    sum(w.num_documents for w in writers),
                    sum(w.num_tokens for w in writers),
                    sum(size for _, size in counts.values()),
                )
            if config.max_tokens and writers[0].num_tokens >= config.max_tokens:
                break
        if not writers[0].num_documents:
            raise DataError(f"the corpus is empty: no document of {', '.join(sources)} has text")
        facts = shard_facts(sources, tokenizer, config)
        facts |= {
            "source_hash": text_hash.hexdigest(),
            "sources": [{"source": s, "documents": d, "text_bytes": b} for s, (d, b) in counts.items()],
        }
        total = sum(writer.num_tokens for writer in writers)
        facts["tokens_per_second"] = round(total / max(time.perf_counter() - began, 1e-9))
        if len(writers) > 1 and not writers[1].num_documents:
            raise DataError(f"heldout_share {config.heldout_share} sets no document aside; use a larger one, or 0")
        manifests = [writer.finish(facts) for writer in writers]
    return manifests[0]


def document_ends(tokenizer: Tokenizer) -> tuple[int | None, int]:
    """Return the ids that begin (or None) and end every document.

    Raises:
        ConfigError: the tokenizer names no eos token.
    """
    eos = tokenizer.vocabulary.eos_id
    if eos is None:
        raise ConfigError("the tokenizer names no eos token, so documents cannot end; set one in its configuration")
    return (tokenizer.bos_id if tokenizer.adds_bos else None), eos


def frame(
    ids: NDArray[np.uint32], lengths: NDArray[np.int64], bos: int | None, eos: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return the same documents with bos (unless None) before and eos behind each, and their lengths."""
    extra = 1 if bos is None else 2
    framed_lengths = lengths + extra
    ends = np.cumsum(framed_lengths)
    out = np.empty(int(framed_lengths.sum()), np.uint32)
    is_text = np.ones(len(out), dtype=bool)
    out[ends - 1] = eos
    is_text[ends - 1] = False
    if bos is not None:
        out[ends - framed_lengths] = bos
        is_text[ends - framed_lengths] = False
    out[is_text] = ids
    return out, framed_lengths


def shard_facts(sources: Sequence[str], tokenizer: Tokenizer, config: TokenizeConfig) -> dict[str, Any]:
    """Return what the manifest says of where shards come from; equal facts mean equal shards."""
    bos, eos = document_ends(tokenizer)
    return {
        "tokenizer_hash": fingerprint(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "bos_id": bos,
        "eos_id": eos,
        "pad_id": eos if tokenizer.pad_id is None else tokenizer.pad_id,
        "field": config.field,
        "heldout_share": config.heldout_share,
        "max_tokens": config.max_tokens,
        "source_stamp": stamp(sources),
    }


def _outputs(out: Path, config: TokenizeConfig) -> list[Path]:
    return [out, out.with_name(out.name + HELDOUT_SUFFIX)] if config.heldout_share else [out]


def _parts(sources: Sequence[str], config: TokenizeConfig, text_hash: Any) -> Iterator[_Part]:
    """Yield the documents in parts of about a million characters."""
    for source in sources:
        batch: list[Document] = []
        size = 0
        for document in read_documents(source, config.field):
            batch.append(document)
            size += len(document.text)
            if size >= _BATCH_CHARACTERS:
                yield _part(source, batch, config.heldout_share, text_hash)
                batch, size = [], 0
        if batch:
            yield _part(source, batch, config.heldout_share, text_hash)


def _part(source: str, batch: list[Document], heldout_share: float, text_hash: Any) -> _Part:
    encoded = [document.text.encode("utf-8", "replace") for document in batch]
    for text in encoded:
        text_hash.update(text)
        text_hash.update(b"\0")
    sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
    if heldout_share:
        is_heldout = np.array([is_set_aside(text, heldout_share) for text in encoded])
    else:
        is_heldout = np.zeros(len(encoded), dtype=bool)
    return _Part([d.text for d in batch], sizes, is_heldout, {source: (len(batch), int(sizes.sum()))})


def is_set_aside(text: bytes, share: float) -> bool:
    """Return whether a text belongs to the held-out `share`: decided by its own hash, so a copy goes the same way."""
    return int.from_bytes(hashlib.sha1(text, usedforsecurity=False).digest()[:4], "big") < share * 2**32


# ------------------------------------------------------------------ processes

_encoder: BatchEncoder | None = None


def _begin_process(state: str, vocabulary: Vocabulary, is_alone: bool) -> None:
    global _encoder
    import os

    from tokenizers import Tokenizer as Backend

    if not is_alone:
        # As many processes as cores already; threads on top of them would only wait for each other.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = BatchEncoder(Tokenizer(Backend.from_str(state), vocabulary))


def _encode_part(part: _Part) -> tuple[_Part, NDArray[np.uint32], NDArray[np.int64]]:
    assert _encoder is not None
    # The texts stay behind: what comes back is an eighth of what went.
    return part._replace(texts=[]), *_encoder.encode(part.texts)
