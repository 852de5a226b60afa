"""`open_checkpoint`: a file or folder -> configuration, weights under HF names, and the tokenizer's raw material.

What this leaves out: names of models (`hub.py`), and building tokenizers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minicpm.architecture import ModelConfig
from minicpm.errors import FormatError
from minicpm.formats.gguf_read import open_gguf
from minicpm.formats.gguf_weights import gguf_config_and_entries
from minicpm.formats.weight_map import LazyWeights, check_shapes


@dataclass(frozen=True)
class Checkpoint:
    """A whole model as it lies on disk.

    `weights` carries HF names and HF row order whatever the file; a tied head has no entry. `metadata` is the GGUF's,
    empty for folders.
    """

    path: Path
    config: ModelConfig
    weights: LazyWeights
    metadata: Mapping[str, Any]
    kind: Literal["gguf", "folder"]
    chat_template: str | None

    @property
    def dtype_summary(self) -> str:
        """The block types and how many tensors have each, as in "Q4_1 (210), F32 (61), Q8_0 (1)"."""
        return ", ".join(f"{name} ({count})" for name, count in self.weights.block_types().items())

    @property
    def num_bytes(self) -> int:
        """The bytes of all weights as stored."""
        return sum(weight.num_bytes for weight in self.weights.values())


def open_checkpoint(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Checkpoint:
    """Return the model at `path`: a GGUF file, or a folder with `config.json` and safetensors.

    Args:
        path: a file or folder.
        allow_pickle: whether a folder's `pytorch_model.bin` may be read (by torch, weights only).

    Raises:
        FormatError: no model, a broken one, or one of an unsupported kind.
        CheckpointError: tensors that do not fit the configuration; all of them are listed.
    """
    path = Path(path)
    if path.is_dir():
        raise FormatError(f"{path} is not a model folder: it has no config.json")
    return _open_gguf(path)


def _open_gguf(path: Path) -> Checkpoint:
    file = open_gguf(path)
    config, entries = gguf_config_and_entries(file)
    check_shapes(entries, config, str(path))
    template = file.metadata.get("tokenizer.chat_template")
    return Checkpoint(
        path=path,
        config=config,
        weights=LazyWeights(entries),
        metadata=file.metadata,
        kind="gguf",
        chat_template=template if isinstance(template, str) else None,
    )
