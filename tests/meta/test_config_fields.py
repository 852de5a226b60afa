"""A setting that nobody reads would be dropped in silence: every field of every run configuration is read somewhere."""

from __future__ import annotations

import ast
import dataclasses
import typing
from pathlib import Path

from minicpm.train.pretrain_config import PretrainConfig
from minicpm.train.tune_config import TuneConfig

SOURCES = sorted((Path(__file__).parents[2] / "src" / "minicpm").rglob("*.py"))


def sections(cls: type, seen: dict[str, type]) -> dict[str, type]:
    seen[cls.__name__] = cls
    for hint in typing.get_type_hints(cls).values():
        for member in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(member) and isinstance(member, type) and member.__name__ not in seen:
                sections(member, seen)
    return seen


def test_every_field_is_read() -> None:
    read = {
        node.attr
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    found = sections(TuneConfig, sections(PretrainConfig, {}))
    assert {"ModelConfig", "ScheduleConfig", "BatchConfig", "LoopConfig", "OptimizerConfig", "Mix"} <= set(found)
    unread = [f"{n}.{f.name}" for n, cls in found.items() for f in dataclasses.fields(cls) if f.name not in read]
    assert not unread
