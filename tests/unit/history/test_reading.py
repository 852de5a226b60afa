"""What is written comes back: exactly, in part, by step, by tokens, by stage, and beside a writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.history.conftest import STEPS, facts_at, weights_at

import minicpm
from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.formats.weight import Weight
from minicpm.history import About, History, HistoryWriter
from minicpm.history.background import BackgroundWriter
from minicpm.history.decoding import Decoder
from minicpm.history.verification import verify

NAME = "model.layers.3.mlp.up_proj.weight"
Make = Callable[..., Path]


def test_every_step_is_exact(make_history: Make, tiny_config: ModelConfig) -> None:
    history = minicpm.History(make_history())
    assert history.steps == list(STEPS)
    for step in (500, 0, 350, 1):
        expected = weights_at(tiny_config, step)
        state = history[step].state_dict()
        assert set(state) == set(expected)
        for name, weight in expected.items():
            assert history[step].weight(name).data.tobytes() == weight.data.tobytes()
            assert np.array_equal(state[name], weight.decode())


def test_the_base_layer_is_near(make_history: Make, tiny_config: ModelConfig) -> None:
    history = History(make_history())
    for step in STEPS:
        exact = weights_at(tiny_config, step)[NAME].decode()
        error = np.sqrt(np.mean((history.at(step, precision="base")[NAME] - exact) ** 2, axis=1)) / exact.std(axis=1)
        # The error is bounded at every step: what is lost does not add up from frame to frame.
        assert 0 < error.mean() < 0.09, step


def test_steps_are_found_by_tokens_and_stage(make_history: Make) -> None:
    history = History(make_history())
    assert history.at(tokens=120_000).step == 100
    assert [s.step for s in history.stage("decay")] == [450, 500]
    assert [s.step for s in history][:2] == [0, 1]
    assert 450 in history
    assert 451 not in history
    with pytest.raises(CheckpointError, match="no checkpoint of step 451; the nearest are 350, 400, 450, 500"):
        history[451]
    with pytest.raises(CheckpointError, match="stage 'tail'; there are warmup, stable, decay"):
        history.stage("tail")
    with pytest.raises(CheckpointError, match=r"there are model\.layers\.3\.mlp\.up_proj\.weight"):
        history[450].weight(NAME + "s")


def test_one_tensor_through_all_steps_decodes_each_frame_once(
    make_history: Make, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = History(make_history())
    fetched: list[int] = []
    real = Decoder._fetch

    def counting(self: Decoder, extents: list[object], where: str) -> object:
        fetched.append(len(extents))
        return real(self, extents, where)

    monkeypatch.setattr(Decoder, "_fetch", counting)
    for step, array in history.iter_tensor(NAME):
        assert np.array_equal(array, weights_at(tiny_config, step)[NAME].decode())
    assert fetched == [2] * len(STEPS)


def test_no_tensor_needs_more_reads_than_promised(make_history: Make) -> None:
    history = History(make_history(max_reads=6))
    depths = []
    for snapshot in history:
        for entry in snapshot.manifest.tensors.values():
            for part in entry.parts:
                assert len(part.extents(True)) <= 6
        depths.append(len(snapshot.manifest.tensors[NAME].parts[0].frames))
    assert depths == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    assert [row.step for row in history.rows if row.is_key] == [0, 200, 450]


def test_one_matrix_of_one_step_reads_little(make_history: Make) -> None:
    path = make_history()
    history = History(path)
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    entry = history[450].manifest.tensors[NAME]
    read = sum(extent.num_bytes for part in entry.parts for extent in part.extents(True))
    assert read < 0.03 * total


def test_frozen_tensors_cost_nothing(tmp_path: Path, tiny_config: ModelConfig) -> None:
    fixed = weights_at(tiny_config, 0)
    with HistoryWriter(tmp_path / "h", About(tiny_config)) as writer:
        first = writer.append(facts_at(0), fixed)
        rows = [writer.append(facts_at(step), fixed) for step in (1, 50)]
        changed = weights_at(tiny_config, 50)
        writer.append(facts_at(100), {name: changed[name] if name == NAME else fixed[name] for name in fixed})
    assert first.num_bytes > 0
    assert [row.num_bytes for row in rows] == [0, 0]
    history = History(tmp_path / "h")
    assert history[100].weight(NAME).data.tobytes() == changed[NAME].data.tobytes()
    assert len(history[100].manifest.tensors[NAME].parts[0].frames) == 2


def test_large_tensors_are_coded_in_parts(
    tmp_path: Path, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minicpm.history.coding.PART_BYTES", 5000)
    with HistoryWriter(tmp_path / "h", About(tiny_config)) as writer:
        for step in (0, 50, 100):
            writer.append(facts_at(step), weights_at(tiny_config, step))
    history = History(tmp_path / "h")
    assert len(history[100].manifest.tensors[NAME].parts) > 5
    for name, weight in weights_at(tiny_config, 100).items():
        assert history[100].weight(name).data.tobytes() == weight.data.tobytes()


def test_a_new_writer_goes_on_where_the_last_one_stopped(make_history: Make, tiny_config: ModelConfig) -> None:
    path = make_history(STEPS[:5])
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "index.json"}
    early = History(path)
    with HistoryWriter(path, About(tiny_config, "0" * 64)) as writer:
        for step in STEPS[5:]:
            writer.append(facts_at(step), weights_at(tiny_config, step))
        # A reader that opened earlier still reads, and finds what is new when it looks again.
        assert early[STEPS[4]][NAME].shape == (160, 96)
        assert STEPS[5] not in early
        early.refresh()
        assert STEPS[5] in early
    assert all(file.read_bytes() == content for file, content in before.items())
    straight = make_history(name="straight")
    for ours, theirs in zip(History(path).rows, History(straight).rows, strict=True):
        assert ours == theirs


def test_the_same_step_again_is_no_error_but_another_one_is(make_history: Make, tiny_config: ModelConfig) -> None:
    path = make_history(STEPS[:4])
    index = (path / "index.json").read_bytes()
    with HistoryWriter(path) as writer:
        writer.append(facts_at(50), weights_at(tiny_config, 50))
        assert (path / "index.json").read_bytes() == index
        with pytest.raises(CheckpointError, match="step 50 with another model"):
            writer.append(facts_at(50), weights_at(tiny_config, 100))
        writer.append(facts_at(75), weights_at(tiny_config, 150))
        assert writer.drop_after(75) == [100]
    history = History(path)
    assert history.steps == [0, 1, 50, 75]
    assert history[75].weight(NAME).data.tobytes() == weights_at(tiny_config, 150)[NAME].data.tobytes()


@pytest.mark.parametrize("block_type", ["F32", "F16"])
def test_other_dtypes_are_exact_too(tmp_path: Path, tiny_config: ModelConfig, block_type: str) -> None:
    steps = {
        step: {
            name: Weight.from_array(weight.decode() * np.float32(1.2345), block_type)
            for name, weight in weights_at(tiny_config, step).items()
        }
        for step in (0, 50)
    }
    with HistoryWriter(tmp_path / "h", About(tiny_config)) as writer:
        for step, weights in steps.items():
            writer.append(facts_at(step), weights)
    history = History(tmp_path / "h")
    for step, weights in steps.items():
        for name, weight in weights.items():
            assert history[step].weight(name).data.tobytes() == weight.data.tobytes()
            assert np.allclose(history.at(step, precision="base")[name], weight.decode(), atol=0.02)


def test_a_torch_model_on_demand(make_history: Make, tiny_config: ModelConfig) -> None:
    model = History(make_history(STEPS[:4])).load_model(100)
    parameters = dict(model.named_parameters())
    expected = weights_at(tiny_config, 100)
    for name, weight in expected.items():
        assert torch.equal(parameters[name].detach().float(), torch.from_numpy(weight.decode()))
    assert parameters[NAME].dtype == torch.bfloat16


def test_only_one_writes(make_history: Make, tiny_config: ModelConfig) -> None:
    path = make_history(STEPS[:2])
    with HistoryWriter(path), pytest.raises(CheckpointError, match="another process is writing"):
        HistoryWriter(path)
    with pytest.raises(CheckpointError, match="of another run: its config"):
        HistoryWriter(path, About(tiny_config.replace(vocab_size=332), "0" * 64))
    with pytest.raises(CheckpointError, match="is no history"):
        HistoryWriter(path.parent)
    with HistoryWriter(path) as writer, pytest.raises(CheckpointError, match="do not fit the history's model"):
        writer.append(facts_at(2), {NAME: weights_at(tiny_config, 0)[NAME]})


def test_a_resumed_run_that_comes_to_other_weights(make_history: Make, tiny_config: ModelConfig) -> None:
    path = make_history(STEPS[:6])
    said: list[str] = []
    background = BackgroundWriter(HistoryWriter(path), said.append)
    background.add(facts_at(100), weights_at(tiny_config, 100))
    background.add(facts_at(150), weights_at(tiny_config, 350))
    background.add(facts_at(200), {})
    background.close()
    assert said[0] == "step 150 came out otherwise than before: 2 checkpoints from there on left the history"
    assert "WARNING: step 200 is not in the history" in said[1]
    assert background.num_failed == 1
    history = History(path)
    assert history.steps == [0, 1, 50, 100, 150]
    assert history[150].weight(NAME).data.tobytes() == weights_at(tiny_config, 350)[NAME].data.tobytes()
    assert verify(history) == []
