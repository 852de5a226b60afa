"""Which block type each matrix gets: one for all, or the finer ones where they help most within a budget of bytes.

Sensitivity is measured, not guessed: attention and feed-forward network of every layer are rounded alone, and the
divergence of the model's output from the original's is taken. A finer type divides it by four for every bit, which
is how the square of a rounding error falls. What this leaves out: rounding for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minicpm.architecture import ModelConfig
from minicpm.errors import ConfigError
from minicpm.formats import blocks
from minicpm.formats.folder_weights import EMBEDDING, HEAD
from minicpm.formats.int4_folder import Int4Layout
from minicpm.formats.safetensors_read import DTYPE_BYTES
from minicpm.quant.grid import folder_type
from minicpm.quant.judge import compare_states
from minicpm.quant.layer import PROJECTIONS
from minicpm.quant.stream import Context, Weights, embed, final_states, head_matrix, load_layer, run_layer
from minicpm.quant.windows import Windows

Progress = Callable[[str, int, int], None]
# From coarse to fine; a super-block type stands before the types of 32 that rows without super-blocks fall back on.
LADDER = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SUPER_LADDER = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")
_FALLBACKS: Mapping[str, str] = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_HALVES: Mapping[str, Sequence[str]] = {"self_attn": PROJECTIONS[:4], "mlp": PROJECTIONS[4:]}


def fitting_type(block_type: str, num_columns: int) -> str:
    """Return `block_type`, or the finer one of 32 that rows of `num_columns` weights fall back on.

    Raises:
        ConfigError: rows that no block fills.
    """
    for candidate in (block_type, _FALLBACKS.get(block_type)):
        if candidate is not None and num_columns % blocks.block_type(candidate).block_size == 0:
            return candidate
    raise ConfigError(
        f"rows of {num_columns} weights cannot be stored as {block_type}: its blocks hold "
        f"{blocks.block_type(block_type).block_size} weights, which must divide the width"
    )


def uniform_types(config: ModelConfig, block_type: str, embedding_type: str | None = None) -> dict[str, str]:
    """Return a type for every matrix by HF name: `block_type`, and for embedding and head `embedding_type`.

    The default of the latter is what llama.cpp keeps them in: Q6_K, or Q8_0 where rows hold no super-blocks.
    """
    ends = fitting_type(embedding_type or "Q6_K", config.hidden_size)
    return {
        name: ends if name in (EMBEDDING, HEAD) else fitting_type(block_type, shape[-1])
        for name, shape in config.weight_shapes().items()
        if len(shape) > 1
    }


def folder_types(config: ModelConfig, layout: Int4Layout) -> dict[str, str]:
    """Return a type for every matrix of a GPTQ or AWQ folder: embedding and head stay in half precision.

    Raises:
        ConfigError: a matrix that the layout's groups or words do not divide.
    """
    types = {}
    for name, shape in config.weight_shapes().items():
        if len(shape) > 1:
            is_end = name in (EMBEDDING, HEAD)
            types[name] = "F16" if is_end else folder_type(layout.method, layout.group_size)
            if not is_end:
                layout.tensors(shape)
    return types


def tensor_bytes(config: ModelConfig, types: Mapping[str, str]) -> int:
    """Return the bytes of all tensors: of the matrices as they are stored, and of the norms.

    Those are float32 in GGUF and half precision in a folder.
    """
    shapes = config.weight_shapes()
    is_folder = not set(types.values()) <= blocks.BLOCK_TYPES.keys()
    matrices = sum(_matrix_bytes(kind, shapes[name]) for name, kind in types.items())
    return matrices + (2 if is_folder else 4) * sum(shape[0] for shape in shapes.values() if len(shape) == 1)


def _matrix_bytes(kind: str, shape: tuple[int, ...]) -> int:
    if kind in blocks.BLOCK_TYPES:
        return shape[0] * blocks.block_type(kind).row_bytes(shape[1])
    method, _, width = kind.lower().partition("-")
    return sum(math.prod(s) * DTYPE_BYTES[d] for d, s in Int4Layout.of(method, int(width)).tensors(shape).values())


@dataclass(frozen=True)
class Sensitivity:
    """The divergence, in nats, when only `names` (HF names) are rounded to `block_type` by nearest rounding."""

    names: tuple[str, ...]
    block_type: str
    kl: float


def measure_sensitivity(
    config: ModelConfig, weights: Weights, types: Mapping[str, str], windows: Windows, progress: Progress
) -> list[Sensitivity]:
    """Return the sensitivity of the two halves of every layer to `types`.

    Takes about L² layer passes over the windows, so these should be few; all layers' inputs are in memory.
    """
    context = Context(config, windows)
    inputs = [embed(config, weights, windows)]
    for index in range(config.num_hidden_layers):
        inputs.append(inputs[-1].clone())
        run_layer(load_layer(config, weights, index), inputs[-1], context)
    head = head_matrix(config, weights)
    states = _scored(config, weights, inputs.pop(), windows)
    halves = [(index, half) for index in range(config.num_hidden_layers) for half in _HALVES]
    found = []
    disturbed: list[Tensor] = []
    for index, half in halves:
        layer = load_layer(config, weights, index)
        names = tuple(f"model.layers.{index}.{name}.weight" for name in _HALVES[half])
        for short, name in zip(_HALVES[half], names, strict=True):
            matrix = layer.get_parameter(f"{short}.weight")
            matrix.copy_(torch.from_numpy(blocks.decode(types[name], blocks.encode(types[name], matrix.numpy()))))
        hidden = inputs[index].clone()
        run_layer(layer, hidden, context)
        disturbed.append(hidden)
        found.append(Sensitivity(names, types[names[0]], 0.0))
        if half == "mlp":
            # Both go through the later layers together as long as memory allows: each layer is decoded once for them.
            for later in range(index + 1, config.num_hidden_layers):
                following = load_layer(config, weights, later)
                for hidden in disturbed:
                    run_layer(following, hidden, context)
            for place, hidden in enumerate(disturbed, len(found) - len(disturbed)):
                kl = compare_states(
                    states, head, _scored(config, weights, hidden, windows), head,
                    windows.ids[:, 1:][windows.is_scored],
                ).kl  # fmt: skip
                found[place] = Sensitivity(found[place].names, found[place].block_type, kl)
            disturbed = []
        progress("sensitivity", len(found), len(halves))
    return found


def _scored(config: ModelConfig, weights: Weights, hidden: Tensor, windows: Windows) -> Tensor:
    return final_states(config, weights, hidden[:, :-1][windows.is_scored])


def allot(
    config: ModelConfig, types: Mapping[str, str], sensitivities: Sequence[Sensitivity], budget_bytes: int
) -> dict[str, str]:
    """Return `types` with steps up the ladder, the one that saves most divergence per byte first, within the budget.

    Raises:
        ConfigError: `types` alone take more.
    """
    chosen = dict(types)
    left = budget_bytes - tensor_bytes(config, chosen)
    if left < 0:
        raise ConfigError(
            f"{tensor_bytes(config, chosen) / 1e6:,.1f} MB is the least that these types take; "
            f"the budget is {budget_bytes / 1e6:,.1f} MB"
        )
    kl = {item.names: item.kl for item in sensitivities}
    while True:
        best: tuple[float, tuple[str, ...], dict[str, str], int, float] | None = None
        for names in kl:
            steps = {name: _finer(config, name, chosen[name]) for name in names}
            finer = {name: kind for name, kind in steps.items() if kind is not None}
            cost = tensor_bytes(config, chosen | finer) - tensor_bytes(config, chosen)
            if not finer or cost > left:
                continue
            remaining = kl[names] * 0.25 ** (_bits(finer) - _bits({name: chosen[name] for name in finer}))
            gain = (kl[names] - remaining) / max(cost, 1)
            if best is None or gain > best[0]:
                best = (gain, names, finer, cost, remaining)
        if best is None:
            return chosen
        _, names, finer, cost, remaining = best
        chosen |= finer
        kl[names] = remaining
        left -= cost


def _finer(config: ModelConfig, name: str, block_type: str) -> str | None:
    num_columns = config.weight_shapes()[name][-1]
    ladder = SUPER_LADDER if block_type in SUPER_LADDER[:-1] else LADDER
    place = ladder.index(block_type) if block_type in ladder else len(ladder)
    return next((kind for kind in ladder[place + 1 :] if num_columns % blocks.block_type(kind).block_size == 0), None)


def _bits(types: Mapping[str, str]) -> float:
    kinds = [blocks.block_type(kind) for kind in types.values()]
    return sum(8 * kind.block_bytes / kind.block_size for kind in kinds) / max(1, len(kinds))
