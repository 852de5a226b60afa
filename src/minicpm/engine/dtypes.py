"""What a decoder computes in what: the default of its cache, and one line that tells.

Left out: the arithmetic (`native/`).
"""

from __future__ import annotations

from collections.abc import Mapping

from minicpm.formats.weight import Weight


def default_kv_type(weights: Mapping[str, Weight]) -> str:
    """Return how keys and values are kept unless asked otherwise: exactly where the weights are exact."""
    first = weights.get("model.layers.0.self_attn.k_proj.weight")
    return "f32" if first is not None and first.block_type in ("F32", "F16", "BF16") else "f16"


def describe_dtypes(weights: Mapping[str, Weight], kv_type: str) -> str:
    """Return one line about what the file holds and what is computed in what, so that no dtype is silent."""
    first = weights.get("model.layers.0.self_attn.k_proj.weight")
    held = first.block_type if first is not None else "F32"
    inputs = "fp32" if held in ("F32", "F16", "BF16") else "16-bit integers"
    return f"file {held.lower()}, activations {inputs}, KV cache {kv_type}, rope/norm/softmax/logits fp32"
