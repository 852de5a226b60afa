"""A field is declared once; everything else about it is derived, and a mistake names the field."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from minicpm import config
from minicpm.errors import ConfigError


@dataclass(frozen=True)
class Source:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Inner:
    lr: float = 0.01
    steps: int = 10
    kind: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Run:
    name: str = "run"
    out: Path | None = None
    fast: bool = False
    train: Inner = field(default_factory=Inner)
    mix: tuple[Source, ...] = ()
    widths: tuple[int, ...] = (1, 2)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, 'name = "a"\n[train]\nlr = 1\nsteps = 5\n[[mix]]\nname = "en"\n[[mix]]\nname = "zh"\n')
    run = config.load(Run, path, ["train.lr=3e-4", "out=runs/a", "name=b", "widths=[3]"])
    assert run == Run(
        name="b",
        out=Path("runs/a"),
        train=Inner(lr=3e-4, steps=5),
        mix=(Source("en"), Source("zh")),
        widths=(3,),
    )
    assert isinstance(config.load(Run, path).train.lr, float)


def test_dump_holds_every_field() -> None:
    data = json.loads(config.dump(Run(out=Path("x"))))
    assert data["out"] == "x"
    assert data["train"] == {"lr": 0.01, "steps": 10, "kind": "linear"}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("[train]\nlearning = 1\n", [], "unknown field train.learning; known: kind, lr, steps"),
        ("[train]\nstep = 1\n", [], "unknown field train.step; did you mean train.steps?"),
        ("[train]\nsteps = 1.5\n", [], "train.steps must be int, got 1.5"),
        ("[train]\nsteps = 0\n", [], "train.steps must be at least 1, got 0"),
        ("fast = 1\n", [], "fast must be bool, got 1"),
        ('train = "x"\n', [], "train must be a section, got 'x'"),
        ("[[mix]]\nweight = 1\n", [], "mix"),
        ('[[mix]]\nname = "a"\nshare = 1\n', [], "unknown field mix\\[0\\].share"),
        ("[train]\nkind = 'poly'\n", [], "train.kind must be one of 'linear', 'cosine', got 'poly'"),
        ("x = [\n", [], "is not valid TOML"),
        ("", ["train.lr"], "is not of the form section.field=value"),
        ("", ["name.x=1", "name=2"], "name"),
        ("widths = 3\n", [], "widths must be a list"),
    ],
)
def test_mistakes_name_the_field(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(Run, write(tmp_path, text), overrides)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        config.load(Run, tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("text", "overrides", "place"),
    [
        ("name = 'a'\n\n[train]\nlr = 1\nstep = 1\n", [], r"run.toml:5: unknown field train.step; did you"),
        ("[train]\nlr = 1.0\nsteps = 0\n", [], "run.toml:3: train.steps must be at least 1, got 0"),
        ("[train]\nlr = 1.0\n", ["train.steps=0"], "override 'train.steps=0': train.steps must be at least 1"),
        ("[train]\nlr = 1.0\nsteps = 5\n", ["train.steps=0"], "override 'train.steps=0': train.steps must be"),
        ("[[mix]]\nname = 'a'\n\n[[mix]]\nweight = 1\n", [], r"run.toml:4: mix\[1\]: .*'name'"),
        ("[[mix]]\nname = 'a'\n[[mix]]\nname = 1\n", [], r"run.toml:4: mix\[1\].name must be str, got 1"),
    ],
)
def test_mistakes_say_the_line(tmp_path: Path, text: str, overrides: list[str], place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        config.load(Run, write(tmp_path, text), overrides)


def test_fields_of_nested_sections_have_lines() -> None:
    text = "a = 1\n[b]\nc.d = 2\n[[e]]\nf = 3\n[[e.g]]\nh = 4\n[[e]]\n[[e.g]]\n[[e.g]]\nh = 5\n[e.i]\nj=6\n"
    assert config.field_lines(text) == {
        "a": 1, "b": 2, "b.c.d": 3, "e[0]": 4, "e[0].f": 5, "e[0].g[0]": 6, "e[0].g[0].h": 7, "e[1]": 8,
        "e[1].g[0]": 9, "e[1].g[1]": 10, "e[1].g[1].h": 11, "e[1].i": 12, "e[1].i.j": 13,
    }  # fmt: skip
