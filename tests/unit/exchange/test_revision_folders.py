"""Folders and cached revisions named as Pythia and OLMo name theirs become a history that verifies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.history.conftest import weights_at

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.exchange.revision_folders import find_revisions, import_revisions, parse_revision
from minicpm.formats.hf_config import config_to_hf
from minicpm.formats.safetensors_write import write_safetensors_model
from minicpm.formats.weight_map import WeightEntry
from minicpm.history import History
from minicpm.history.verification import verify

Make = Callable[[Path, int], None]


@pytest.fixture
def make(tiny_config: ModelConfig) -> Make:
    def write(folder: Path, like: int) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config_to_hf(tiny_config)))
        weights = weights_at(tiny_config, like)
        write_safetensors_model(
            folder, {n: WeightEntry(w.shape, w.block_type, lambda w=w: w) for n, w in weights.items()}
        )

    return write


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step1000", (1000, "pretraining", 0)),
        ("step_000050", (50, "pretraining", 0)),
        ("step1000-tokens4B", (1000, "pretraining", 4_000_000_000)),
        ("stage1-step1000-tokens5B", (1000, "stage1", 5_000_000_000)),
        ("stage2-ingredient3-step11931-tokens50B", (11931, "stage2", 50_000_000_000)),
        ("step260000-tokens1.02T", (260_000, "pretraining", 1_020_000_000_000)),
        ("main", None),
        ("step10x", None),
    ],
)
def test_names(name: str, expected: tuple[int, str, int] | None) -> None:
    found = parse_revision(name, Path())
    assert (found and (found.step, found.stage, found.tokens)) == expected


def test_folders_and_the_hubs_cache(make: Make, tmp_path: Path, tiny_config: ModelConfig) -> None:
    source, cache = tmp_path / "olmo", tmp_path / "models--x--y"
    (cache / "refs").mkdir(parents=True)
    likes = {"stage1-step0-tokens0B": 0, "stage1-step1000-tokens4B": 50, "stage1-step10000-tokens42B": 100}
    for name, like in likes.items():
        make(source / name, like)
        shutil.copytree(source / name, cache / "snapshots" / f"hash{like}")
        (cache / "refs" / name).write_text(f"hash{like}")
    (cache / "refs" / "main").write_text("hash100")
    for place in (source, cache):
        out = tmp_path / f"{place.name}-history"
        rows = import_revisions(place, out)
        assert [(r.step, r.tokens, r.stage) for r in rows] == [
            (0, 0, "stage1"), (1000, 4 * 10**9, "stage1"), (10000, 42 * 10**9, "stage1"),
        ]  # fmt: skip
        history = History(out)
        assert verify(history) == []
        for like, row in zip(likes.values(), rows, strict=True):
            for name, weight in weights_at(tiny_config, like).items():
                assert history[row.step].weight(name).data.tobytes() == weight.data.tobytes()
    # A shard of another step, as in Pythia's step50000, is found by its jump.
    make(source / "stage1-step20000-tokens84B", 0)
    make(source / "stage1-step30000-tokens126B", 150)
    import_revisions(source, tmp_path / "olmo-history")
    problems = verify(History(tmp_path / "olmo-history"))
    assert any("step 20000 repeats step 0" in problem.text for problem in problems)


def test_what_cannot_be_brought_in(make: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        find_revisions(tmp_path / "nothing")
    make(tmp_path / "stage1-step5-tokens1B", 0)
    make(tmp_path / "stage2-step5-tokens9B", 50)
    with pytest.raises(CheckpointError, match=r'are both of step 5; take one kind with --only, such as "stage1-\*"'):
        find_revisions(tmp_path)
    assert [revision.tokens for revision in find_revisions(tmp_path, "stage2-*")] == [9 * 10**9]
    with pytest.raises(CheckpointError, match=r"holds no checkpoints: .* that match x"):
        find_revisions(tmp_path, "x")
    (tmp_path / "stage1-step5-tokens1B" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json; it is not whole"):
        find_revisions(tmp_path, "stage1-*")
