"""The vocabulary inside a GGUF's metadata (`tokenizer.ggml.*`), read and written as plain mappings.

Left out: reading and writing the file itself, which is the business of `minicpm.formats`.
Source: the GGUF specification (ggml docs/gguf.md) and llama.cpp's reader (src/llama-vocab.cpp) for the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minicpm.errors import FormatError
from minicpm.tokenizer.pretokenizers import BOS_NAMES
from minicpm.tokenizer.vocabulary import END_TEXTS, Kind, TokenType, Vocabulary, ending_ids, find_ids

PREFIX = "tokenizer.ggml."
TEMPLATE_KEY = "tokenizer.chat_template"
_KINDS: dict[str, Kind] = {"gpt2": "gpt2", "llama": "llama"}
# llama.cpp's converter gives this score to tokens that were added beside a SentencePiece model.
ADDED_SCORE = -1000.0
# What a 32-bit field holds when a converter had no such token.
_NO_TOKEN = 0xFFFFFFFF


def read_vocabulary(metadata: Mapping[str, Any]) -> tuple[Vocabulary, list[tuple[str, str]]]:
    """The vocabulary of a GGUF and its merges (empty for the kind `llama`, whose scores stand in for them).

    Raises:
        FormatError: a missing or malformed key, or a kind of tokenizer that is not supported.
    """
    kind = _read_kind(metadata)
    pieces = _array(metadata, "tokens", str)
    size = len(pieces)
    types = _array(metadata, "token_type", int) if PREFIX + "token_type" in metadata else [TokenType.NORMAL] * size
    spm = kind == "llama"
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if spm and size > 2 else {}
    bos = _token_id(metadata, "bos_token_id", defaults.get("bos"))
    eos = _token_id(metadata, "eos_token_id", defaults.get("eos"))
    pre = None if spm else _scalar(metadata, "pre", str, "default")
    scores = _array(metadata, "scores", float) if spm else None
    added = find_ids(types, TokenType.USER_DEFINED)
    if scores is not None and len(scores) == size:
        added = [i for i in added if scores[i] == ADDED_SCORE]
    named = [_token_id(metadata, key, None) for key in ("eot_token_id", "eom_token_id")]
    vocabulary = Vocabulary(
        kind=kind,
        pieces=pieces,
        types=types,
        scores=scores,
        pre=pre,
        bos_id=bos,
        eos_id=eos,
        end_ids=ending_ids(pieces, types) | {i for i in named if i is not None},
        added_ids=frozenset(added),
        pad_id=_token_id(metadata, "padding_token_id", None),
        unk_id=_token_id(metadata, "unknown_token_id", defaults.get("unknown")),
        adds_bos=_scalar(metadata, "add_bos_token", bool, bos is not None and (spm or pre in BOS_NAMES)),
        adds_eos=_scalar(metadata, "add_eos_token", bool, False),
        prepends_space=spm and _scalar(metadata, "add_space_prefix", bool, True),
        charsmap=_read_charsmap(metadata) if spm else b"",
    )
    return vocabulary, [] if spm else _read_merges(metadata)


def read_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template of a GGUF; a mapping where there are several named ones.

    Raises:
        FormatError: the value is not text.
    """
    template = _text(metadata, TEMPLATE_KEY)
    names = metadata.get("tokenizer.chat_templates")
    if not isinstance(names, (list, tuple)):
        return template
    found = {str(name): _text(metadata, f"{TEMPLATE_KEY}.{name}") for name in names}
    if template is not None:
        found["default"] = template
    named = {name: text for name, text in found.items() if text is not None}
    return named or None


def write_vocabulary(vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], template: str | None) -> dict[str, Any]:
    """The `tokenizer.ggml.*` keys for a vocabulary; absent facts have no key.

    A user-defined piece of a SentencePiece vocabulary is written as a normal one: llama.cpp cuts user-defined pieces
    out of the text and begins what follows with an extra `▁`, so that each line after a newline would get other ids
    than the tokenizer that the model was trained with gives it.

    Raises:
        FormatError: scores are missing for the kind `llama`.
    """
    keys: dict[str, Any] = {"model": vocabulary.kind, "tokens": list(vocabulary.pieces)}
    types = [int(kind) for kind in vocabulary.types]
    if vocabulary.kind == "llama":
        if vocabulary.scores is None:
            raise FormatError("a SentencePiece vocabulary needs scores to be written as GGUF; this one has none")
        scores = [float(score) for score in vocabulary.scores]
        for i, kind in enumerate(types):
            if i in vocabulary.added_ids:
                scores[i] = ADDED_SCORE
            elif kind == TokenType.USER_DEFINED:
                types[i] = int(TokenType.NORMAL)
        keys["scores"] = scores
        keys["add_space_prefix"] = vocabulary.prepends_space
        if vocabulary.charsmap:
            keys["precompiled_charsmap"] = list(vocabulary.charsmap)
    else:
        keys["pre"] = vocabulary.pre or "default"
        keys["merges"] = [" ".join(pair) for pair in merges]
    keys["token_type"] = types
    others = sorted(vocabulary.end_ids - {vocabulary.eos_id}, key=lambda i: (vocabulary.pieces[i] not in END_TEXTS, i))
    ids = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "unknown_token_id": vocabulary.unk_id,
        "padding_token_id": vocabulary.pad_id,
        "eot_token_id": others[0] if others else None,
        "eom_token_id": others[1] if len(others) > 1 else None,
    }
    keys |= {key: value for key, value in ids.items() if value is not None}
    keys |= {"add_bos_token": vocabulary.adds_bos, "add_eos_token": vocabulary.adds_eos}
    metadata = {PREFIX + key: value for key, value in keys.items()}
    if template is not None:
        metadata[TEMPLATE_KEY] = template
    return metadata


def _read_kind(metadata: Mapping[str, Any]) -> Kind:
    name = metadata.get(PREFIX + "model")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise FormatError(
            f"tokenizer.ggml.model is {name!r}; supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)"
        )
    return kind


def _read_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for i, line in enumerate(_array(metadata, "merges", str)):
        # The first character may itself be a space: only the space behind it separates.
        left, separator, right = line[1:].partition(" ")
        if not separator or not right:
            raise FormatError(f"tokenizer.ggml.merges[{i}] is {line!r}; a merge is two pieces with a space between")
        merges.append((line[:1] + left, right))
    return merges


def _read_charsmap(metadata: Mapping[str, Any]) -> bytes:
    value = metadata.get(PREFIX + "precompiled_charsmap", b"")
    if isinstance(value, bytes):
        return value
    try:
        return bytes(int(item) & 0xFF for item in value)
    except (TypeError, ValueError) as error:
        raise FormatError("tokenizer.ggml.precompiled_charsmap must be an array of bytes") from error


def _array(metadata: Mapping[str, Any], key: str, item: type) -> list[Any]:
    values = metadata.get(PREFIX + key)
    if values is None:
        raise FormatError(f"tokenizer.ggml.{key} is missing; this file has no complete vocabulary")
    if not isinstance(values, (list, tuple)):
        values = values.tolist() if hasattr(values, "tolist") else None
    wanted = (int, float) if item is float else item
    if values is None or not all(issubclass(kind, wanted) for kind in set(map(type, values))):
        raise FormatError(f"tokenizer.ggml.{key} must be an array of {item.__name__}")
    return list(values)


def _scalar(metadata: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = metadata.get(PREFIX + key, default)
    if not isinstance(value, kind):
        raise FormatError(f"tokenizer.ggml.{key} is {value!r}; a {kind.__name__} is expected")
    return value


def _token_id(metadata: Mapping[str, Any], key: str, default: int | None) -> int | None:
    value = metadata.get(PREFIX + key, default)
    if value is None or value == _NO_TOKEN:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise FormatError(f"tokenizer.ggml.{key} is {value!r}; a token id is expected")
    return value if value >= 0 else None


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{key} is of type {type(value).__name__}; text is expected")
    return value
