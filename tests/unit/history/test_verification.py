"""Every kind of damage is found and named, and a sound history has none."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.history.conftest import STEPS, Weights, facts_at, weights_at

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.history import About, Facts, History, HistoryWriter
from minicpm.history.catalogue import ABOUT, INDEX
from minicpm.history.manifest import parse_manifest
from minicpm.history.verification import verify

NAME = "model.layers.3.mlp.up_proj.weight"
OTHER = "model.layers.1.mlp.up_proj.weight"
Make = Callable[..., Path]


def texts(path: Path, **settings: bool) -> list[str]:
    return [problem.text for problem in verify(History(path), **settings)]


def newest_object(path: Path, step: int) -> Path:
    """The file of the base layer that `step` added."""
    entry = History(path)[step].manifest.tensors[NAME]
    return path / "objects" / entry.parts[0].frames[-1].object


def write(path: Path, config: ModelConfig, steps: dict[int, Weights]) -> Path:
    with HistoryWriter(path, About(config)) as writer:
        for step, weights in steps.items():
            writer.append(facts_at(step), weights)
    return path


def test_a_sound_history_has_no_problem(make_history: Make) -> None:
    assert texts(make_history()) == []


@pytest.mark.parametrize("is_deep", [True, False])
def test_a_flipped_bit(make_history: Make, is_deep: bool) -> None:
    path = make_history()
    victim = newest_object(path, 300)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (text,) = texts(path, is_deep=is_deep)
    assert text.startswith(f"object {victim.name[:16]}… was changed: its hash is not its name;")
    assert "300" in text
    assert "250" not in text
    with pytest.raises(CheckpointError, match="step 300"):
        History(path)[300].state_dict()
    assert History(path)[250].state_dict()


def test_missing_truncated_and_swapped_objects(make_history: Make) -> None:
    path = make_history()
    missing, cut, one, two = (newest_object(path, step) for step in (1, 50, 100, 150))
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-3])
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    found = texts(path)
    assert len(found) == 4
    for name, reason in ((missing.name, "is missing"), (cut.name, "is truncated: "), (one.name, "")):
        assert any(text.startswith(f"object {name[:16]}… {reason}") for text in found), found


def test_a_duplicated_step(tmp_path: Path, tiny_config: ModelConfig) -> None:
    steps = {step: weights_at(tiny_config, step) for step in (0, 50, 100)}
    path = write(tmp_path / "h", tiny_config, {**steps, 150: steps[50]})
    assert texts(path) == ["step 150 repeats step 50: every tensor is the same"]


def test_a_shard_of_another_step(tmp_path: Path, tiny_config: ModelConfig) -> None:
    steps = {step: weights_at(tiny_config, step) for step in STEPS[2:]}
    wrong = {**steps[200], NAME: steps[50][NAME], OTHER: steps[50][OTHER]}
    found = texts(write(tmp_path / "h", tiny_config, {**steps, 200: wrong}))
    assert found == [f"step 200: {OTHER}, {NAME} as in step 50, and another in between"]


def test_two_tensors_of_a_step_swapped(tmp_path: Path, tiny_config: ModelConfig) -> None:
    steps = {step: weights_at(tiny_config, step) for step in STEPS[2:]}
    wrong = {**steps[200], NAME: steps[200][OTHER], OTHER: steps[200][NAME]}
    (text,) = texts(write(tmp_path / "h", tiny_config, {**steps, 200: wrong}))
    assert text.startswith(f"step 200: {OTHER}, {NAME} jump away")


@pytest.mark.parametrize("pair", [(200, 250), (100, 150), (400, 450)])
def test_two_neighbours_swapped_as_they_were_written(
    tmp_path: Path, tiny_config: ModelConfig, pair: tuple[int, int]
) -> None:
    """Every hash is right: only the way through the run shows it."""
    steps = {step: weights_at(tiny_config, step) for step in STEPS[2:]}
    one, two = pair
    steps |= {one: weights_at(tiny_config, two), two: weights_at(tiny_config, one)}
    path = write(tmp_path / "h", tiny_config, dict(sorted(steps.items())))
    (text,) = texts(path)
    assert text.startswith(f"steps {one} and {two} seem to stand in each other's place")
    assert texts(path, is_deep=False) == []


@pytest.mark.parametrize("pair", [(0, 1), (200, 250), (450, 500)])
@pytest.mark.parametrize("are_facts_kept", [True, False])
def test_two_neighbours_swapped_afterwards_with_their_manifests(
    make_history: Make, pair: tuple[int, int], are_facts_kept: bool
) -> None:
    """Manifests, index and hashes are written anew to fit; what each was coded after does not fit any more."""
    path = make_history()
    with HistoryWriter(path) as writer:
        rows = writer.rows
        found = [writer.manifest(step) for step in pair]
        for there, here in zip(found, found[::-1], strict=True):
            own = there if are_facts_kept else here
            moved = dataclasses.replace(
                own, facts=there.facts, objects=here.objects, tensors=here.tensors
            )  # fmt: skip
            rows[there.facts.step] = writer.write_manifest(moved, rows[there.facts.step].num_bytes)
        writer.replace_rows(rows)
    problems = texts(path, is_deep=False)
    assert any("one was exchanged" in text or "it was renamed" in text for text in problems), problems


def test_histories_of_earlier_versions_have_no_links(make_history: Make) -> None:
    path = make_history(STEPS[:5])
    with HistoryWriter(path) as writer:
        rows = {}
        for step, row in writer.rows.items():
            old = dataclasses.replace(writer.manifest(step), previous_weights_sha256=None)
            rows[step] = writer.write_manifest(old, row.num_bytes)
            value = json.loads((path / rows[step].manifest).read_text())
            del value["previous_weights_sha256"]
            assert parse_manifest(json.dumps(value).encode(), "m.json") == old
        writer.replace_rows(rows)
    assert texts(path) == []


def test_values_that_are_not_finite(tmp_path: Path, tiny_config: ModelConfig) -> None:
    weights = dict(weights_at(tiny_config, 50))
    data = weights[NAME].data.copy()
    data.reshape(-1)[:2] = (0x80, 0x7F)
    weights[NAME] = dataclasses.replace(weights[NAME], data=data)
    assert texts(write(tmp_path / "h", tiny_config, {50: weights})) == [
        f"step 50: {NAME} has values that are not finite"
    ]


def test_manifests_and_index(make_history: Make) -> None:
    path = make_history()
    rows = History(path).rows
    (path / rows[2].manifest).unlink()
    text = (path / rows[3].manifest).read_bytes()
    (path / rows[3].manifest).write_bytes(text.replace(b'"tokens":100000', b'"tokens":100001'))
    index = (path / INDEX).read_text()
    (path / INDEX).write_text(index.replace('"stage": "decay"', '"stage": "stable"'))
    found = texts(path)
    assert len(found) == 4
    assert re.search("step-000000050-.*is missing", found[0])
    assert "was changed: its hash is not the one in the index" in found[1]
    assert found[2:] == [f"step {step}: the index says another stage" for step in (450, 500)]
    about = (path / ABOUT).read_text()
    (path / ABOUT).write_text(about.replace('"name": "tiny"', '"name": "TINY"'))
    with pytest.raises(CheckpointError, match=r"history\.json was changed"):
        History(path)


@pytest.mark.parametrize("file", [ABOUT, INDEX])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(format_version=2), "has format version 2, this program reads up to 1; upgrade"),
        (lambda value: value.update(format_version="1"), "no format version"),
        (lambda value: value.clear(), "no (description|index) of a history|no format version"),
    ],
)
def test_other_files_and_newer_versions(
    make_history: Make, file: str, change: Callable[[dict[str, object]], None], message: str
) -> None:
    path = make_history(STEPS[:1])
    value = json.loads((path / file).read_text())
    change(value)
    (path / file).write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=message):
        History(path)


def test_manifests_that_lie_are_refused(make_history: Make) -> None:
    path = make_history(STEPS[:2])
    text = (path / History(path).rows[1].manifest).read_text()
    changes: list[Callable[[Any, list[Any]], object]] = [
        lambda value, part: part.__setitem__(0, 1 << 60),
        lambda value, part: part[1][0].__setitem__(1, 1 << 50),
        lambda value, part: part[1][0].__setitem__(0, -1),
        lambda value, part: part[1].clear(),
        lambda value, part: part[2].pop(),
        lambda value, part: value["tensors"][NAME].update(shape=[1 << 40, 1 << 40]),
        lambda value, part: value["tensors"][NAME].update(type="Q9"),
        lambda value, part: value["objects"].__setitem__(0, ["../../etc/passwd", 5]),
        lambda value, part: value.pop("step"),
    ]
    for change in changes:
        value = json.loads(text)
        change(value, value["tensors"][NAME]["parts"][0])
        with pytest.raises(CheckpointError, match="is no manifest of a checkpoint"):
            parse_manifest(json.dumps(value).encode(), "m.json")
    facts = Facts(3, losses={"train": 1.5}, data_cursor={"row": 7}, parent="a@1 ff", labels={"file": "x"})
    manifest = dataclasses.replace(parse_manifest(text.encode(), "m.json"), facts=facts)
    assert parse_manifest(manifest.to_json(), "m.json") == manifest
