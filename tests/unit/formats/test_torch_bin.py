"""Pickles of others: plain tensors come through bit by bit, anything else is refused without being run."""

import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.reference import random_weights

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, FormatError
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.hf_config import config_to_hf
from minicpm.formats.torch_bin import load_torch_bins

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_folder_with_a_pickle(tmp_path: Path, tiny_config: ModelConfig, dtype: str, is_zip: bool) -> None:
    state = {name: torch.from_numpy(w).to(getattr(torch, dtype)) for name, w in random_weights(tiny_config).items()}
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    torch.save(OrderedDict(state | buffers), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(tiny_config)))
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert checkpoint.config == tiny_config.replace(torch_dtype=dtype)
    for name, tensor in state.items():
        assert np.array_equal(checkpoint.weights[name].decode(), tensor.float().numpy()), name


def test_shards_and_nested_state(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(3, 2)}}, tmp_path / "one.bin")
    torch.save({"b": torch.arange(4.0).reshape(2, 2).T}, tmp_path / "two.bin")
    table = {"a": "one.bin", "b": "two.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    weights = load_torch_bins(tmp_path)
    assert weights["b"].decode().tolist() == [[0, 2], [1, 3]]
    assert weights["a"].shape == (3, 2)
    (tmp_path / "one.bin").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing: one.bin"):
        load_torch_bins(tmp_path)


class Trap:
    """Leaves a trace if it is ever unpickled for real."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    state = {"a": torch.ones(2), "b": Trap(tmp_path / "trace")}
    if writer == "torch":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(state, protocol=2))
    with pytest.raises(FormatError, match="does not hold plain tensors") as caught:
        load_torch_bins(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.ones(2)], "must hold a dictionary of tensors, got list"),
        ({}, "must hold a dictionary of tensors"),
        ({"a": 3}, "'a' is a int, no tensor"),
        ({"a": torch.ones(2, dtype=torch.int64)}, r"a is torch.int64 of shape \(2,\)"),
        ({"a": torch.tensor(1.0)}, r"a is torch.float32 of shape \(\)"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, state: Any, message: str) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=message):
        load_torch_bins(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04broken"])
def test_a_broken_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(FormatError, match="does not hold plain tensors"):
        load_torch_bins(tmp_path)
