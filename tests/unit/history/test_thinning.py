"""Thinning: what stays is exact, what was published is untouched to the byte, and the rest frees its space."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.history.conftest import STEPS, facts_at, weights_at

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.history import History, HistoryWriter
from minicpm.history.thinning import ThinRule, publish, remove_unlisted, thin
from minicpm.history.verification import verify

Make = Callable[..., Path]


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def check_exact(path: Path, config: ModelConfig, steps: list[int]) -> None:
    history = History(path)
    assert history.steps == steps
    assert verify(history) == []
    for step in steps:
        for name, weight in weights_at(config, step).items():
            assert history[step].weight(name).data.tobytes() == weight.data.tobytes()


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (ThinRule(every=200), [0, 200, 400, 500]),
        (ThinRule(stages=("decay",)), [450, 500]),
        (ThinRule(is_early_kept=True), [0, 1, 500]),
        (ThinRule(every=250, stages=("warmup",), steps=(350, 7)), [0, 1, 250, 350, 500]),
    ],
)
def test_rules(make_history: Make, tiny_config: ModelConfig, rule: ThinRule, kept: list[int]) -> None:
    path = make_history()
    before = size(path)
    with HistoryWriter(path) as writer:
        gone, freed = thin(writer, rule)
        assert gone == [step for step in STEPS if step not in kept]
        assert freed > 0
        assert size(path) < before
        # The writer goes on from what it made.
        writer.append(facts_at(550), weights_at(tiny_config, 550))
    check_exact(path, tiny_config, [*kept, 550])


def test_what_was_published_is_never_touched(make_history: Make, tiny_config: ModelConfig) -> None:
    path = make_history(max_reads=8)
    with HistoryWriter(path) as writer:
        publish(writer, [150, 450])
        needed = {f"objects/{o}" for step in (150, 450) for o in writer.manifest(step).objects}
        needed |= {writer.rows[step].manifest for step in (150, 450)}
        before = {name: (path / name).read_bytes() for name in needed}
        gone, _ = thin(writer, ThinRule(every=500))
        with pytest.raises(CheckpointError, match="no checkpoint of step 151 to publish"):
            publish(writer, [151])
    assert set(gone) == set(STEPS) - {0, 150, 450, 500}
    for name, content in before.items():
        assert (path / name).read_bytes() == content
    check_exact(path, tiny_config, [0, 150, 450, 500])
    assert [row.step for row in History(path).rows if row.is_published] == [150, 450]


def test_a_failure_before_the_index_changes_nothing(
    make_history: Make, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_history(STEPS[:6])
    with HistoryWriter(path) as writer:

        def full(rows: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writer, "replace_rows", full)
        with pytest.raises(CheckpointError, match="No space left on device; it holds what it held before"):
            thin(writer, ThinRule(every=200))
    check_exact(path, tiny_config, list(STEPS[:6]))
    with HistoryWriter(path) as writer:
        assert remove_unlisted(writer) > 0
    check_exact(path, tiny_config, list(STEPS[:6]))
