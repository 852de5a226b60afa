"""Foreign `pytorch_model.bin` files: pickles, read by torch with `weights_only=True`, only where the caller says so.

torch is imported when a file is opened. What this leaves out: writing such files, and anything in them but tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicpm.errors import CheckpointError, FormatError
from minicpm.formats.names import is_ignored
from minicpm.formats.safetensors_read import read_index
from minicpm.formats.weight import Weight

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
_BLOCK_TYPES: Mapping[str, str] = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def has_torch_bin(folder: Path) -> bool:
    """Whether `folder` holds torch's pickles."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def load_torch_bins(folder: Path) -> dict[str, Weight]:
    """Return every float tensor of the folder's `.bin` files, mapped where the files allow it.

    Raises:
        FormatError: a file that holds more than tensors, or an unsupported dtype.
        CheckpointError: torch is not installed, or shards are missing.
    """
    if (folder / SINGLE).exists():
        return _load(folder / SINGLE)
    shards = sorted(set(read_index(folder / INDEX).values()))
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}")
    weights: dict[str, Weight] = {}
    for shard in shards:
        weights |= _load(folder / shard)
    return weights


def _load(path: Path) -> dict[str, Weight]:
    # Both cost every start of the program milliseconds; few ever come here.
    import pickle
    import zipfile

    try:
        import torch
    except ImportError as error:
        raise CheckpointError(f"{path} can only be read by torch: pip install 'minicpm[train]'") from error
    try:
        # Files of before torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # The last four: torch's reader takes apart whatever bytes it is given, step by step.
    except (
        pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError,
        LookupError, AssertionError, TypeError, AttributeError,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{path} does not hold plain tensors: {reason[:200]}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise FormatError(f"{path} must hold a dictionary of tensors, got {type(state).__name__}")
    return {name: _weight(name, tensor, path) for name, tensor in state.items() if not is_ignored(str(name))}


def _weight(name: Any, tensor: Any, path: Path) -> Weight:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise FormatError(f"{path}: {str(name)[:80]!r} is a {type(tensor).__name__}, no tensor")
    block_type = _BLOCK_TYPES.get(str(tensor.dtype))
    if block_type is None or not tensor.ndim or not tensor.numel():
        raise FormatError(f"{path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, which no weight is")
    data = tensor.detach().contiguous().reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return Weight(block_type, tuple(tensor.shape), data.view(torch.uint8).numpy())
