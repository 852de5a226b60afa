"""Every name table, one dict per format used in both directions, and the row order in GGUF files of the Llama family.

The key is the HF name, with `{}` for the layer's number; HF names are the only ones used elsewhere in the package.
What this leaves out: shapes (`ModelConfig.weight_shapes`) and files.

Source: OpenBMB/MiniCPM `convert_hf_to_vllmcpm.py` (dragonfly), llama.cpp `gguf-py/gguf/tensor_mapping.py` (GGUF).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from minicpm.architecture import ModelConfig

HF_TO_GGUF: Mapping[str, str] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.{}.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "model.layers.{}.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

HF_TO_DRAGONFLY: Mapping[str, str] = {
    "model.embed_tokens.weight": "input_embedding.weight",
    "model.layers.{}.input_layernorm.weight": "encoder.layers.{}.self_att.layernorm_before_attention.weight",
    "model.layers.{}.self_attn.q_proj.weight": "encoder.layers.{}.self_att.self_attention.project_q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "encoder.layers.{}.self_att.self_attention.project_k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "encoder.layers.{}.self_att.self_attention.project_v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "encoder.layers.{}.self_att.self_attention.attention_out.weight",
    "model.layers.{}.post_attention_layernorm.weight": "encoder.layers.{}.ffn.layernorm_before_ffn.weight",
    "model.layers.{}.mlp.gate_proj.weight": "encoder.layers.{}.ffn.ffn.w_in.w_0.weight",
    "model.layers.{}.mlp.up_proj.weight": "encoder.layers.{}.ffn.ffn.w_in.w_1.weight",
    "model.layers.{}.mlp.down_proj.weight": "encoder.layers.{}.ffn.ffn.w_out.weight",
    "model.norm.weight": "encoder.output_layernorm.weight",
    "lm_head.weight": "lm_head.weight",
}

GGUF_TO_HF: Mapping[str, str] = {theirs: ours for ours, theirs in HF_TO_GGUF.items()}
DRAGONFLY_TO_HF: Mapping[str, str] = {theirs: ours for ours, theirs in HF_TO_DRAGONFLY.items()}

# Old checkpoints carry the rotary frequencies, which follow from the configuration.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# At most 5 digits without a leading zero, so that a name has one spelling.
_LAYER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,4})(?=\.)", re.ASCII)


def translate(name: str, table: Mapping[str, str]) -> str | None:
    """Return `name` in the table's other language, or None when the table does not know it."""
    match = _LAYER.search(name)
    if match is None:
        return table.get(name) if "{}" not in name else None
    other = table.get(name[: match.start()] + "{}" + name[match.end() :])
    return other.format(match.group()) if other is not None else None


def is_ignored(name: str) -> bool:
    """Whether a tensor of this name carries nothing that the configuration does not say."""
    return _IGNORED.search(name) is not None


def rotated_heads(name: str, config: ModelConfig) -> int:
    """Return how many heads the rows of the HF-named weight make if rope turns them, else 0."""
    if name.endswith(".self_attn.q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith(".self_attn.k_proj.weight") else 0


def interleaved_order(num_heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Return for each GGUF row of a q or k projection the HF row that it holds, intp (num_heads · head_dim,).

    GGUF files of the Llama family (also MiniCPM and Granite) rotate neighbouring pairs (2j, 2j+1), HF models rotate
    (j, j + head_dim/2); the rows are stored in the order that makes both the same function.
    """
    rows = np.arange(num_heads * head_dim, dtype=np.intp).reshape(num_heads, 2, head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)


def rotate_half_order(num_heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Return for each HF row of a q or k projection the GGUF row that holds it: the inverse of `interleaved_order`."""
    rows = np.arange(num_heads * head_dim, dtype=np.intp).reshape(num_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)
