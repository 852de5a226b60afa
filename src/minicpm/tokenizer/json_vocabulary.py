"""`tokenizer.json` of the library `tokenizers`: the machine as it is, and the facts of its vocabulary.

Left out: models other than BPE.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm.errors import FormatError
from minicpm.tokenizer.folder import AddedEntry, Settings, read_limited
from minicpm.tokenizer.pretokenizers import describe, members
from minicpm.tokenizer.token_bytes import BYTE_PIECE
from minicpm.tokenizer.vocabulary import Kind, TokenType, Vocabulary, ending_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


def read_tokenizer_json(path: Path, settings: Settings) -> tuple[Backend, Vocabulary]:
    """The machine and the vocabulary of a `tokenizer.json`.

    Args:
        path: the file.
        settings: what the files beside it say.

    Raises:
        FormatError: it is broken, or of an unsupported kind.
    """
    backend = _load(path)
    _add_missing(backend, settings.added, path)
    kind = _find_kind(backend, path)
    pieces, types = _list_pieces(backend, kind)
    unknown = backend.token_to_id(backend.model.unk_token) if backend.model.unk_token else None
    first, last = _sequence_ends(describe(backend.post_processor))

    def find(token: str | None, from_settings: int | None, otherwise: str | None) -> int | None:
        found = backend.token_to_id(token) if token else None
        if found is None:
            found = from_settings
        return backend.token_to_id(otherwise) if found is None and otherwise else found

    bos = find(settings.bos_token, settings.bos_id, first)
    eos = find(settings.eos_token, settings.eos_ids[0] if settings.eos_ids else None, last)
    added = backend.get_added_tokens_decoder()
    adds_bos = settings.adds_bos if settings.adds_bos is not None else first is not None
    adds_eos = settings.adds_eos if settings.adds_eos is not None else last is not None
    vocabulary = Vocabulary(
        kind=kind,
        pieces=pieces,
        types=types,
        bos_id=bos,
        eos_id=eos,
        end_ids=ending_ids(pieces, types) | frozenset(settings.eos_ids),
        added_ids=frozenset(i for i, token in added.items() if not token.special),
        pad_id=find(settings.pad_token, None, None),
        unk_id=unknown,
        adds_bos=adds_bos and bos is not None,
        adds_eos=adds_eos and eos is not None,
        prepends_space=kind == "llama" and _strips_space(describe(backend.decoder)),
    )
    return backend, vocabulary


def _load(path: Path) -> Backend:
    from tokenizers import Tokenizer as Backend

    text = read_limited(path)
    try:
        return Backend.from_str(text)
    except BaseException as error:
        # A broken file can make the library panic, which Python sees as a BaseException of its own.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error


def _add_missing(backend: Backend, added: dict[int, AddedEntry], path: Path) -> None:
    from tokenizers import AddedToken

    for token_id in sorted(added):
        entry = added[token_id]
        if backend.token_to_id(entry.content) is None:
            token = AddedToken(
                entry.content, special=entry.special, normalized=False, lstrip=entry.lstrip, rstrip=entry.rstrip
            )
            backend.add_tokens([token])
        found = backend.token_to_id(entry.content)
        if found != token_id:
            raise FormatError(
                f"{path} has {entry.content!r} as token {found}, tokenizer_config.json as {token_id}; they must agree"
            )


def _find_kind(backend: Backend, path: Path) -> Kind:
    from tokenizers import models

    model = backend.model
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        raise FormatError(
            f"{path} holds a {type(model).__name__} model; byte-level BPE and SentencePiece BPE are supported"
        )
    steps = members(describe(backend.decoder), "decoders")
    steps += members(describe(backend.pre_tokenizer), "pretokenizers")
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return "gpt2"
    if model.byte_fallback or kinds & {"Metaspace", "ByteFallback"}:
        return "llama"
    raise FormatError(
        f"{path} is neither byte-level BPE nor SentencePiece BPE (its steps are {sorted(map(str, kinds))})"
    )


def _list_pieces(backend: Backend, kind: Kind) -> tuple[list[str], list[int]]:
    ids = backend.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    if size > 2 * len(ids) + 1024:
        raise FormatError(f"the tokenizer.json has {len(ids)} tokens but ids up to {size - 1}; most ids are missing")
    # Ids without a token get the names that llama.cpp's converter gives them.
    pieces, types = [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
    has_bytes = kind == "llama" and bool(backend.model.byte_fallback)
    for piece, i in ids.items():
        pieces[i] = piece
        types[i] = int(TokenType.BYTE if has_bytes and BYTE_PIECE.fullmatch(piece) else TokenType.NORMAL)
    for i, token in backend.get_added_tokens_decoder().items():
        types[i] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
        if token.special and token.content == backend.model.unk_token:
            types[i] = int(TokenType.UNKNOWN)
    return pieces, types


def _strips_space(decoder: dict[str, Any]) -> bool:
    for step in members(decoder, "decoders"):
        if step.get("type") == "Strip" and step.get("content") == " " and step.get("start"):
            return True
        if step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def _sequence_ends(processor: dict[str, Any]) -> tuple[str | None, str | None]:
    """The control tokens that the post-processor puts before and after a sequence."""
    for step in members(processor, "processors"):
        single = step.get("single") if step.get("type") == "TemplateProcessing" else None
        if single:
            ends = [part.get("SpecialToken", {}).get("id") for part in (single[0], single[-1])]
            return ends[0], ends[1]
    return None, None
