"""A torch model from named weights of any block type, with a dtype that is never silent.

The weights come from `minicpm.formats` with HF names and HF row order. What this leaves out: opening files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, ConfigError
from minicpm.formats.mapped_file import release
from minicpm.formats.weight import Weight
from minicpm.model.minicpm import MiniCPM

FLOAT_TYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# Values that are copied at a time.
_PIECE = 1 << 20
_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def parse_dtype(name: str) -> torch.dtype:
    """Return the torch dtype that `name` (bf16, bfloat16, …) means.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def saved_dtype(config: ModelConfig, weights: Mapping[str, Weight]) -> torch.dtype:
    """Return the float dtype of most saved values; where most are quantized, the one that the config names."""
    block_type = _most_common_type(weights)
    return FLOAT_TYPES[block_type] if block_type in FLOAT_TYPES else parse_dtype(config.torch_dtype)


def describe_dtypes(weights: Mapping[str, Weight], compute: torch.dtype) -> str:
    """Return one line such as `file bf16, compute bf16, rope/norm/logits fp32`."""
    block_type = _most_common_type(weights)
    file = _SHORT[FLOAT_TYPES[block_type]] if block_type in FLOAT_TYPES else block_type.lower()
    return f"file {file}, compute {_SHORT[compute]}, rope/norm/logits fp32"


def load_model(
    config: ModelConfig,
    weights: Mapping[str, Weight],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> MiniCPM:
    """Return the model with `weights`, one tensor in flight at a time.

    16- and 32-bit floats are copied bit for bit where the dtype is theirs, never by way of float32; quantized blocks
    are decoded. A head that is saved beside a tied config is taken only if it equals the embedding.

    Args:
        config: the shape; its parameters and the weights must match exactly.
        weights: HF names to weights.
        dtype: of the parameters; None keeps the saved one (`saved_dtype`; `describe_dtypes` says which).
        device: where the parameters live.

    Raises:
        CheckpointError: missing or surplus names, other shapes (all of them listed), or a tied head that differs.
    """
    weights = without_equal_head(config, weights)
    check_names_and_shapes(config, weights)
    dtype = dtype if dtype is not None else saved_dtype(config, weights)
    with torch.device("meta"):
        model = MiniCPM(config)
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(parameter, weights[name])
    return model


@torch.no_grad()
def fill(parameter: Tensor, weight: Weight) -> None:
    """Copy a weight into a parameter of its shape, a few million values at a time, and give its file's memory back."""
    flat = parameter.view(-1, parameter.shape[-1])
    step = max(_PIECE // parameter.shape[-1], 1)
    for start in range(0, len(flat), step):
        rows = weight.data[start : start + step]
        piece = Weight(weight.block_type, (len(rows), parameter.shape[-1]), rows)
        flat[start : start + step].copy_(read_tensor(piece))
        release(rows)


def read_tensor(weight: Weight) -> Tensor:
    """Return a tensor of the weight's own float dtype, or float32 of decoded blocks; a copy either way."""
    if weight.block_type not in FLOAT_TYPES:
        return torch.from_numpy(np.array(weight.decode(), dtype=np.float32)).reshape(weight.shape)
    # A mapped file is read-only, and torch has no read-only tensors: hence the copy.
    flat = torch.from_numpy(np.array(weight.data, dtype=np.uint8, order="C").reshape(-1))
    return flat.view(FLOAT_TYPES[weight.block_type]).reshape(weight.shape)


def _most_common_type(weights: Mapping[str, Weight]) -> str:
    sizes: Counter[str] = Counter()
    for weight in weights.values():
        sizes[weight.block_type] += int(np.prod(weight.shape))
    return sizes.most_common(1)[0][0] if sizes else "F32"


def without_equal_head(config: ModelConfig, weights: Mapping[str, Weight]) -> Mapping[str, Weight]:
    """Return the weights without a head that repeats a tied embedding.

    Raises:
        CheckpointError: the head differs from it.
    """
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if not config.tie_word_embeddings or head is None or embedding is None:
        return weights
    if head.shape != embedding.shape or not torch.equal(read_tensor(head), read_tensor(embedding)):
        raise CheckpointError(
            "the config ties the head to the embedding, but lm_head.weight differs from model.embed_tokens.weight; "
            "set tie_word_embeddings to false to use both"
        )
    return {name: weight for name, weight in weights.items() if name != "lm_head.weight"}


def check_names_and_shapes(config: ModelConfig, weights: Mapping[str, Weight]) -> None:
    """Return if names and shapes are the config's.

    Raises:
        CheckpointError: listing all problems.
    """
    expected = config.weight_shapes()
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"surplus {name}" for name in weights if name not in expected]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if problems:
        raise CheckpointError(f"the weights do not fit the config, {len(problems)} problems: {'; '.join(problems)}")
