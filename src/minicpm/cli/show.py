"""`minicpm show MODEL`: what is in a model file, and how much memory it takes to run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import Counter
from typing import Any

from minicpm.architecture import ModelConfig
from minicpm.cli.parser import Parser, add_model
from minicpm.cli.terminal import out, suggest, table
from minicpm.formats.blocks import block_type
from minicpm.formats.checkpoint import Checkpoint, open_checkpoint
from minicpm.history.naming import resolve
from minicpm.hub.progress import megabytes


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser("show", "Say what is in a model: architecture, parameters, tensor types, template, memory.")
    add_model(verb)
    verb.add_argument("--json", action="store_true", help="as JSON, with every field of the configuration")
    verb.add_argument("--template", action="store_true", help="print the chat template alone")
    verb.add_argument("--tensors", action="store_true", help="also list every tensor")
    return verb


def run(options: argparse.Namespace) -> None:
    """Print the facts as a person or a program reads them."""
    checkpoint = open_checkpoint(resolve(options.model))
    if options.template:
        out(checkpoint.chat_template or "", end="")
        return
    facts = describe(checkpoint, with_tensors=options.tensors)
    if options.json:
        out(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    out(_as_text(facts, checkpoint.config))
    suggest(f"minicpm chat {options.model}")


def describe(checkpoint: Checkpoint, with_tensors: bool = False) -> dict[str, Any]:
    """Return the facts about `checkpoint` as plain data."""
    config, counts = checkpoint.config, checkpoint.config.num_parameters()
    types: Counter[str] = Counter()
    bytes_of_type: Counter[str] = Counter()
    tensors = []
    # From the entries, not the weights: no byte of a weight needs to be read.
    for name, entry in checkpoint.weights.entries.items():
        num_bytes = block_type(entry.block_type).row_bytes(entry.shape[-1]) * math.prod(entry.shape[:-1])
        types[entry.block_type] += 1
        bytes_of_type[entry.block_type] += num_bytes
        tensors.append({"name": name, "type": entry.block_type, "shape": entry.shape, "bytes": num_bytes})
    facts: dict[str, Any] = {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "name": checkpoint.metadata.get("general.name"),
        "architecture": config.model_type,
        "config": dataclasses.asdict(config),
        "parameters": dataclasses.asdict(counts) | {"non_embedding": counts.non_embedding, "total": counts.total},
        "weight_bytes": sum(bytes_of_type.values()),
        "tensor_types": [
            {"type": name, "tensors": count, "bytes": bytes_of_type[name]} for name, count in types.most_common()
        ],
        "context_tokens": config.max_position_embeddings,
        "kv_cache_bytes_per_token": config.kv_cache_bytes(),
        "kv_cache_bytes_full_context": config.kv_cache_bytes(config.max_position_embeddings),
        "chat_template": checkpoint.chat_template,
    }
    return facts | {"tensors": tensors} if with_tensors else facts


def _as_text(facts: dict[str, Any], config: ModelConfig) -> str:
    counts, context = facts["parameters"], facts["context_tokens"]
    template = facts["chat_template"]
    weights, per_token, full = (
        megabytes(facts[name]) for name in ("weight_bytes", "kv_cache_bytes_per_token", "kv_cache_bytes_full_context")
    )
    head = "tied to the embedding" if config.tie_word_embeddings else "of its own"
    lines = [
        ["name", str(facts["name"] or "not stated")],
        ["path", facts["path"]],
        ["architecture", f"{config.model_type}: {config.num_hidden_layers} layers, hidden {config.hidden_size},"
                         f" feed-forward {config.intermediate_size}"],
        ["attention", f"{config.num_attention_heads} heads, {config.num_key_value_heads} key/value heads,"
                      f" width {config.head_dim}, rope base {config.rope_theta:g}"],
        ["scales", f"scale_emb {config.scale_emb:g}, scale_depth {config.scale_depth:g},"
                   f" dim_model_base {config.dim_model_base:g}"],
        ["vocabulary", f"{config.vocab_size:,} tokens, head {head}"],
        ["parameters", f"{counts['total']:,} ({counts['non_embedding']:,} without embedding)"],
        ["context", f"{context:,} tokens"],
        ["memory", f"{weights} of weights; KV cache at 16 bits: {per_token} per token, {full} for the whole context"],
        ["template", f"{len(template)} characters; see --template" if template else "none: this model does not chat"],
    ]  # fmt: skip
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name:{width}}  {value}" for name, value in lines)
    rows = [[t["type"], str(t["tensors"]), f"{t['bytes']:,}"] for t in facts["tensor_types"]]
    text += "\n\n" + table(["type", "tensors", "bytes"], rows, right=[1, 2])
    if "tensors" in facts:
        rows = [[t["name"], t["type"], "×".join(map(str, t["shape"])), f"{t['bytes']:,}"] for t in facts["tensors"]]
        text += "\n\n" + table(["tensor", "type", "shape", "bytes"], rows, right=[3])
    return text
