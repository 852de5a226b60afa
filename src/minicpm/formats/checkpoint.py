"""`open_checkpoint`: a file or folder -> configuration, weights under HF names, and the tokenizer's raw material.

What this leaves out: names of models (`hub.py`), and building tokenizers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minicpm.architecture import ModelConfig
from minicpm.errors import FormatError
from minicpm.formats.dragonfly_config import config_from_dragonfly, is_dragonfly
from minicpm.formats.folder_weights import EMBEDDING, HEAD, folder_entries, without_tied_copy
from minicpm.formats.gguf_read import open_gguf
from minicpm.formats.gguf_weights import gguf_config_and_entries
from minicpm.formats.hf_config import config_from_hf
from minicpm.formats.int4_folder import Int4Layout
from minicpm.formats.json_file import read_json, read_limited
from minicpm.formats.typed_fields import TypedFields
from minicpm.formats.weight_map import LazyWeights, WeightEntry, check_shapes

_TORCH_DTYPES: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Checkpoint:
    """A whole model as it lies on disk.

    `weights` carries HF names and HF row order whatever the file; a tied head has no entry. `metadata` is the GGUF's,
    `hf_config` the folder's parsed `config.json`; the other one is empty.
    """

    path: Path
    config: ModelConfig
    weights: LazyWeights
    metadata: Mapping[str, Any]
    kind: Literal["gguf", "folder"]
    chat_template: str | None
    hf_config: Mapping[str, Any]

    @property
    def dtype_summary(self) -> str:
        """The block types and how many tensors have each, as in "Q4_1 (210), F32 (61), Q8_0 (1)"."""
        return ", ".join(f"{name} ({count})" for name, count in self.weights.block_types().items())

    @property
    def num_bytes(self) -> int:
        """The bytes of all weights as stored."""
        return sum(entry.num_bytes for entry in self.weights.entries.values())


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
    return _open_folder(path, allow_pickle) if path.is_dir() else _open_gguf(path)


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
        hf_config={},
    )


def _open_folder(path: Path, allow_pickle: bool) -> Checkpoint:
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise FormatError(
            f"{path} is an adapter, which changes a model and is none; `minicpm merge {path} OUT` makes one of both"
        )
    if not (path / "config.json").is_file():
        raise FormatError(f"{path} is not a model folder: it has no config.json")
    hf_config = read_json(path / "config.json")
    where = str(path / "config.json")
    packing = hf_config.get("quantization_config")
    layout = Int4Layout.parse(packing, where) if isinstance(packing, dict) else None
    entries = folder_entries(path, allow_pickle=allow_pickle, layout=layout)
    if is_dragonfly(hf_config):
        config = config_from_dragonfly(hf_config, vocab_size=_num_rows(entries), has_head=HEAD in entries, where=where)
    else:
        # Packed matrices are read as blocks: what remains describes the network.
        config = config_from_hf({k: v for k, v in hf_config.items() if k != "quantization_config" or not layout}, where)
    config = config.replace(
        eos_token_id=tuple(dict.fromkeys((*config.eos_token_id, *_generation_ends(path)))),
        torch_dtype=_saved_dtype(entries) or config.torch_dtype,
    )
    entries = without_tied_copy(entries, config, str(path))
    check_shapes(entries, config, str(path))
    return Checkpoint(
        path=path,
        config=config,
        weights=LazyWeights(entries),
        metadata={},
        kind="folder",
        chat_template=_folder_template(path),
        hf_config=hf_config,
    )


def _num_rows(entries: Mapping[str, WeightEntry]) -> int:
    embedding = entries.get(EMBEDDING)
    return embedding.shape[0] if embedding is not None else 0


def _saved_dtype(entries: Mapping[str, WeightEntry]) -> str | None:
    """Return the dtype of most matrices if it is a float: what files hold counts, not their configuration."""
    types = Counter(entry.block_type for entry in entries.values() if len(entry.shape) > 1)
    return _TORCH_DTYPES.get(types.most_common(1)[0][0]) if types else None


def _generation_ends(folder: Path) -> tuple[int, ...]:
    """Return the end tokens of `generation_config.json`, where chat models often name one more than `config.json`."""
    path = folder / "generation_config.json"
    return TypedFields(read_json(path), str(path)).token_ids("eos_token_id", ()) if path.is_file() else ()


def _folder_template(folder: Path) -> str | None:
    """Return the chat template from wherever transformers keeps it."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return read_limited(path).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{path} is not valid UTF-8: {error.reason} at byte {error.start}") from error
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, list):  # several named ones
                named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
                template = named.get("default")
            if isinstance(template, str):
                return template
    return None
