"""The tokenizer files of a model folder: which there are, and what the settings among them say.

Read are `tokenizer.json` or `tokenizer.model`, `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`,
`generation_config.json`, `config.json`, `chat_template.jinja` and `additional_chat_templates/`. Never code.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm.errors import FormatError
from minicpm.tokenizer.backend import build_backend
from minicpm.tokenizer.sentencepiece import read_sentencepiece
from minicpm.tokenizer.vocabulary import TokenType, Vocabulary, ending_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MAX_FILE_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class AddedEntry:
    """A token that the settings add to the vocabulary, or rename in it."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the files beside a vocabulary say; None or empty where they say nothing."""

    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    adds_bos: bool | None = None
    adds_eos: bool | None = None
    prepends_space: bool = True
    added: dict[int, AddedEntry] = dataclasses.field(default_factory=dict)
    template: str | dict[str, str] | None = None


def read_folder(path: Path) -> tuple[Backend, Vocabulary, str | dict[str, str] | None]:
    """The machine, the vocabulary and the chat template of a model folder.

    Raises:
        FormatError: there is no tokenizer, or it is broken or of an unsupported kind.
    """
    from minicpm.tokenizer.json_vocabulary import read_tokenizer_json

    settings = read_settings(path)
    if (path / "tokenizer.json").is_file():
        backend, vocabulary = read_tokenizer_json(path / "tokenizer.json", settings)
    elif (path / "tokenizer.model").is_file():
        plain = read_sentencepiece(
            path / "tokenizer.model", prepends_space=settings.prepends_space, adds_bos=settings.adds_bos
        )
        vocabulary = apply_settings(plain, settings)
        backend = build_backend(vocabulary, ())
    else:
        raise FormatError(f"{path} has neither tokenizer.json nor tokenizer.model; one of them is needed")
    return backend, vocabulary, settings.template


def read_settings(path: Path) -> Settings:
    """What the files of the folder say about its tokenizer.

    Raises:
        FormatError: a file is broken; names the field.
    """
    config = read_json(path / "tokenizer_config.json")
    fallback = read_json(path / "special_tokens_map.json")
    model = read_json(path / "config.json")
    generation = read_json(path / "generation_config.json")
    ids = {key: generation.get(key, model.get(key)) for key in ("bos_token_id", "eos_token_id")}
    llama = str(config.get("tokenizer_class", "")).startswith(("LlamaTokenizer", "CodeLlamaTokenizer"))
    bos = _integers(ids["bos_token_id"], "bos_token_id")
    return Settings(
        bos_token=_token_text(config, fallback, "bos_token"),
        eos_token=_token_text(config, fallback, "eos_token"),
        pad_token=_token_text(config, fallback, "pad_token"),
        bos_id=bos[0] if bos else None,
        eos_ids=_integers(ids["eos_token_id"], "eos_token_id"),
        adds_bos=_flag(config, "add_bos_token", True if llama else None),
        adds_eos=_flag(config, "add_eos_token", None),
        prepends_space=_flag(config, "add_prefix_space", None) is not False,
        added=_read_added(config, read_json(path / "added_tokens.json")),
        template=_read_template(path, config),
    )


def apply_settings(vocabulary: Vocabulary, settings: Settings) -> Vocabulary:
    """A SentencePiece vocabulary with the tokens and special ids that the files beside it name.

    Raises:
        FormatError: an added token's id leaves a gap behind the vocabulary.
    """
    pieces, types = list(vocabulary.pieces), list(vocabulary.types)
    scores = list(vocabulary.scores or [0.0] * len(pieces))
    for token_id in sorted(settings.added):
        entry = settings.added[token_id]
        if token_id > len(pieces):
            raise FormatError(
                f"the added token {entry.content!r} has id {token_id}, but the vocabulary ends at {len(pieces) - 1}"
            )
        if token_id == len(pieces):
            pieces.append("")
            types.append(0)
            scores.append(0.0)
        if types[token_id] != TokenType.UNKNOWN:
            types[token_id] = int(TokenType.CONTROL if entry.special else TokenType.USER_DEFINED)
        pieces[token_id] = entry.content

    def find(text: str | None, otherwise: int | None) -> int | None:
        return pieces.index(text) if text in pieces else otherwise

    eos = find(settings.eos_token, vocabulary.eos_id)
    return dataclasses.replace(
        vocabulary,
        pieces=pieces,
        types=types,
        scores=scores,
        bos_id=find(settings.bos_token, vocabulary.bos_id),
        eos_id=eos,
        added_ids=frozenset(i for i, entry in settings.added.items() if not entry.special),
        pad_id=find(settings.pad_token, vocabulary.pad_id),
        end_ids=ending_ids(pieces, types) | frozenset(settings.eos_ids),
        adds_eos=bool(settings.adds_eos) and eos is not None,
    )


def read_limited(path: Path) -> str:
    """The text of a file that is not absurdly large.

    Raises:
        FormatError: it is too large, or not UTF-8.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise FormatError(f"{path} has {size} bytes; at most {MAX_FILE_BYTES} are accepted")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        FormatError: it is not JSON, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_limited(path))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}; a JSON object is expected")
    return value


def _read_template(path: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    value = config.get("chat_template")
    named: dict[str, str] = {}
    if isinstance(value, str):
        named["default"] = value
    elif isinstance(value, list):
        named = {
            str(i["name"]): str(i["template"])
            for i in value
            if isinstance(i, dict) and {"name", "template"} <= i.keys()
        }
    elif value is not None:
        raise FormatError(f"tokenizer_config.json: chat_template is a {type(value).__name__}; text is expected")
    # A file of its own wins over the settings: it is the newer form.
    if (path / "chat_template.jinja").is_file():
        named["default"] = read_limited(path / "chat_template.jinja")
    for extra in sorted((path / "additional_chat_templates").glob("*.jinja")):
        named[extra.stem] = read_limited(extra)
    return named["default"] if named.keys() == {"default"} else (named or None)


def _read_added(config: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[int, AddedEntry]:
    added = {
        token_id: AddedEntry(content, special=False)
        for content, token_id in plain.items()
        if isinstance(token_id, int) and token_id >= 0
    }
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        if not key.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise FormatError(f"tokenizer_config.json: added_tokens_decoder[{key!r}] is not a token with an id")
        flags = {name: bool(entry.get(name)) for name in ("special", "lstrip", "rstrip")}
        added[int(key)] = AddedEntry(entry["content"], **flags)
    return added


def _token_text(config: Mapping[str, Any], fallback: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key) or fallback.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise FormatError(f"tokenizer_config.json: {key} is {value!r}; the text of a token is expected")
    return value


def _flag(config: Mapping[str, Any], key: str, default: bool | None) -> bool | None:
    value = config.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise FormatError(f"tokenizer_config.json: {key} is {value!r}; true or false is expected")
    return value


def _integers(value: Any, key: str) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in values):
        raise FormatError(f"generation_config.json or config.json: {key} is {value!r}; token ids are expected")
    return tuple(values)
