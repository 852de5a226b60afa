"""Which block type each tensor of a file gets. What this leaves out: rounding (`recast.py`, `minicpm.quant`)."""

from __future__ import annotations

from collections.abc import Mapping

from minicpm.errors import ConfigError
from minicpm.formats.blocks import BLOCK_TYPES

# What the command line calls a type.
DTYPES: Mapping[str, str] = {
    "bf16": "BF16",
    "fp16": "F16",
    "fp32": "F32",
    **{name.lower(): name for name in BLOCK_TYPES if name not in ("BF16", "F16", "F32")},
}
FLOAT_DTYPES = ("bf16", "fp16", "fp32")
TORCH_NAMES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
FLOAT_OF_TORCH: Mapping[str, str] = {torch: name for name, torch in TORCH_NAMES.items()}
# A row that is no multiple of 256 cannot hold super-blocks; llama.cpp falls back likewise.
_FALLBACKS: Mapping[str, str] = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def parse_dtype(name: str) -> str:
    """Return the block type that `name` means.

    Raises:
        ConfigError: an unknown name.
    """
    found = DTYPES.get(name.lower())
    if found is None:
        raise ConfigError(f"dtype {name!r} is not known; known: {', '.join(DTYPES)}")
    return found


def gguf_block_type(shape: tuple[int, ...], block_type: str) -> str:
    """Return the type that a tensor of `shape` has in a GGUF of `block_type`.

    Vectors stay F32, as every reader of GGUF expects. Rows that are no multiple of a super-block fall back to the next
    finer type of 32, and rows that are no multiple of 32 to F16.
    """
    if len(shape) == 1:
        return "F32"
    for candidate in (block_type, _FALLBACKS.get(block_type, "F16"), "F16"):
        if shape[-1] % BLOCK_TYPES[candidate].block_size == 0:
            return candidate
    raise AssertionError("F16 has blocks of one")
