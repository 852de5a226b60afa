"""Run configuration: frozen dataclasses <- TOML file <- `section.field=value` overrides, in that order.

A field is declared once, in its dataclass. A name that no dataclass declares is an error with the nearest name in
the message, and the line of the file or the override where it stands. Fields are scalars, `Path`, tuples, optional
values, or other such dataclasses (also tuples of them, written `[[section]]` in TOML). What this leaves out: it knows
no particular configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from minicpm.errors import ConfigError

T = TypeVar("T")

_HEADER = re.compile(r"\s*(\[\[?)\s*([\w.-]+)\s*\]")
_KEY = re.compile(r"\s*([\w.-]+)\s*=")
_FIELD = re.compile(r"[\w-]+(?:\[\d+\])?(?:\.[\w-]+(?:\[\d+\])?)*")


def load(cls: type[T], path: Path | None = None, overrides: Iterable[str] = ()) -> T:
    """Return `cls` built from its defaults, then the TOML file at `path`, then `overrides`.

    Args:
        cls: a frozen dataclass.
        path: a TOML file; None means defaults only.
        overrides: strings like "train.lr=3e-4"; the value is read as TOML, else taken as a string.

    Raises:
        ConfigError: naming the file and line or the override, the dotted field, and what was expected.
    """
    data: dict[str, Any] = {}
    places: dict[str, str] = {}
    if path is not None:
        data = read_toml(path)
        places = {field: f"{path}:{number}" for field, number in field_lines(path.read_text(encoding="utf-8")).items()}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not of the form section.field=value")
        *parents, leaf = key.strip().split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node[leaf] = _parse(text)
        places[key.strip()] = f"override {override!r}"
    try:
        return build(cls, data)
    except ConfigError as error:
        where = _place(str(error), places) or path
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def field_lines(text: str) -> dict[str, int]:
    """Return the line, from 1, of every section and field of a TOML text by its name, such as `stage[0].mix[1].path`.

    It is for messages: fields of inline tables are left out.
    """
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            *parents, last = header[2].split(".")
            section = "".join(_numbered(parents, counts)) + last
            if header[1] == "[[":
                counts[section] = counts.get(section, 0) + 1
                section = f"{section}[{counts[section] - 1}]"
            lines.setdefault(section, number)
        elif key := _KEY.match(line):
            lines.setdefault(f"{section}.{key[1]}" if section else key[1], number)
    return lines


def _numbered(parents: list[str], counts: dict[str, int]) -> Iterable[str]:
    # A section below `[[stage]]` belongs to the last one so far.
    dotted = ""
    for parent in parents:
        dotted += parent
        number = f"[{counts[dotted] - 1}]" if dotted in counts else ""
        dotted += f"{number}."
        yield f"{parent}{number}."


def _place(message: str, places: dict[str, str]) -> str | None:
    """Return where the first field that a message names stands; a field that is missing stands where its section is."""
    for dotted in _FIELD.findall(message.partition(";")[0]):
        while dotted:
            if dotted in places:
                return places[dotted]
            dotted = dotted.rpartition(".")[0]
    return None


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table in the TOML file at `path`.

    Raises:
        ConfigError: the file cannot be read or is not TOML (with the line).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def build(cls: type[T], data: dict[str, Any], where: str = "") -> T:
    """Return an instance of the dataclass `cls` with the fields in `data`; `where` is the dotted prefix for messages.

    Raises:
        ConfigError: unknown or missing field, wrong type, or a constraint that `cls.__post_init__` rejects.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in data.items():
        dotted = f"{where}{name}"
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(sorted(hints))}"
            raise ConfigError(f"unknown field {dotted}; {hint}")
        values[name] = _coerce(hints[name], value, dotted)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}" if where else str(error)) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where.rstrip('.') or cls.__name__}: {error}") from error


def dump(config: Any) -> str:
    """Return the dataclass `config` as JSON text: every field present, paths as strings."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str)


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _coerce(hint: Any, value: Any, dotted: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(hint, value, dotted)
    if origin is tuple:
        item_hint = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{dotted} must be a list, got {value!r}")
        return tuple(_coerce(item_hint, item, f"{dotted}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{dotted} must be a section, got {value!r}")
        return build(typing.cast("type[Any]", hint), value, where=f"{dotted}.")
    return _coerce_scalar(hint, value, dotted)


def _coerce_scalar(hint: Any, value: Any, dotted: str) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{dotted} must be one of {', '.join(map(repr, typing.get_args(hint)))}, got {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not hint:
        raise ConfigError(f"{dotted} must be {getattr(hint, '__name__', hint)}, got {value!r}")
    return value


def _coerce_union(hint: Any, value: Any, dotted: str) -> Any:
    if value is None and type(None) in typing.get_args(hint):
        return None
    first: ConfigError | None = None
    for member in typing.get_args(hint):
        if member is type(None):
            continue
        try:
            return _coerce(member, value, dotted)
        except ConfigError as error:
            first = first or error
    raise first or ConfigError(f"{dotted} must be {hint}, got {value!r}")
