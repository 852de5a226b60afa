"""A whole model onto grids, layer by layer, each layer's inputs being those that the quantized layers before it give.

What this leaves out: which type each weight gets (`precision.py`), and the file that is written (`minicpm.exchange`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minicpm.architecture import ModelConfig
from minicpm.formats.folder_weights import EMBEDDING, HEAD
from minicpm.formats.mapped_file import release
from minicpm.formats.weight import Weight
from minicpm.model.layers import DecoderLayer
from minicpm.quant.awq import fold_layer
from minicpm.quant.layer import PROJECTIONS, LayerRounding, RoundingSettings, round_matrix, second_moment
from minicpm.quant.stream import Context, Weights, embed, final_states, layer_names, load_layer, run_layer
from minicpm.quant.windows import Windows
from minicpm.quant.work import WorkFolder

Progress = Callable[[str, int, int], None]
# Rows of the head that are rounded together: every one of them passes through all columns at once.
_HEAD_ROWS = 8192
_ENDS = "ends"


@dataclass(frozen=True)
class QuantizeSettings:
    """What is done to every layer: `is_folded` lets AWQ scale it first, `rounding` says the rest."""

    rounding: RoundingSettings = field(default_factory=RoundingSettings)
    is_folded: bool = False


class ModelRounding:
    """Rounds a model part by part into a work folder."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        block_types: Mapping[str, str],
        settings: QuantizeSettings,
        work: WorkFolder,
    ) -> None:
        """Prepare.

        Args:
            config: the model's.
            weights: under HF names.
            block_types: a type for every matrix, by HF name.
            settings: how.
            work: where finished parts are, and go.
        """
        self.config, self.weights, self.block_types = config, weights, block_types
        self.settings, self.work = settings, work

    def run(self, windows: Windows, progress: Progress = lambda name, done, total: None) -> None:
        """Make every part that the work folder lacks.

        Raises:
            CheckpointError: a weight or a Hessian that is not finite.
        """
        total = self.config.num_hidden_layers + 1
        context = Context(self.config, windows)
        hidden = embed(self.config, self.weights, windows)
        for index in range(self.config.num_hidden_layers):
            self._layer(index, hidden, context)
            progress(f"layer {index}", index + 1, total)
        if not self.work.has(_ENDS):
            states = final_states(self.config, self.weights, hidden)
            self._ends(states.reshape(-1, states.shape[-1]))
        progress("embedding and head", total, total)

    def quantized(self) -> dict[str, Weight]:
        """Return every weight of the result under its HF name; views of the work folder's files."""
        weights = self.work.weights(_ENDS)
        for index in range(self.config.num_hidden_layers):
            weights |= self.work.weights(_part(index))
        return {name: weights[name] for name in self.config.weight_shapes()}

    def errors(self) -> dict[str, float]:
        """Return the relative error that rounding left in the outputs of each matrix, by HF name."""
        errors: dict[str, float] = {}
        for index in range(self.config.num_hidden_layers):
            errors |= self.work.errors(_part(index))
        return errors | self.work.errors(_ENDS)

    def _layer(self, index: int, hidden: Tensor, context: Context) -> None:
        part, names = _part(index), layer_names(self.config, index)
        if self.work.has(part):
            run_layer(load_layer(self.config, self.work.weights(part), index), hidden, context)
            return
        layer = load_layer(self.config, self.weights, index)
        types = {name: self.block_types[names[f"{name}.weight"]] for name in PROJECTIONS}
        if self.settings.is_folded:
            fold_layer(layer, hidden, context, types)
        rounding = LayerRounding(f"model.layers.{index}", layer, types, self.settings.rounding)
        rounding.run(hidden, context)
        made = {names[f"{name}.weight"]: result.weight for name, result in rounding.done.items()}
        errors = {names[f"{name}.weight"]: result.error for name, result in rounding.done.items()}
        self.work.put(part, made | _norms(layer, names), errors)

    def _ends(self, states: Tensor) -> None:
        """Round the embedding and the head, both for the inputs of the head where they are one."""
        made, errors = {"model.norm.weight": self.weights["model.norm.weight"].encode("F32")}, {}
        hessian = second_moment(states)
        for name in (EMBEDDING,) if self.config.tie_word_embeddings else (EMBEDDING, HEAD):
            is_head = name == HEAD or self.config.tie_word_embeddings
            made[name], errors[name] = self._round_rows(name, hessian if is_head else torch.eye(len(hessian)))
        self.work.put(_ENDS, made, errors)

    def _round_rows(self, name: str, hessian: Tensor) -> tuple[Weight, float]:
        weight, block_type = self.weights[name], self.block_types[name]
        if weight.block_type == block_type:
            return weight, 0.0
        settings = self.settings.rounding
        upper = settings.inverse_factor(name, hessian) if settings.method == "gptq" else None
        parts = [
            round_matrix(
                name, torch.from_numpy(weight.decode_rows(start, start + _HEAD_ROWS)), hessian, block_type, settings,
                upper,
            )
            for start in range(0, weight.num_rows, _HEAD_ROWS)
        ]  # fmt: skip
        release(weight.data)
        data = torch.cat([torch.from_numpy(part.weight.data) for part in parts]).numpy()
        return Weight(block_type, weight.shape, data), sum(part.error for part in parts) / len(parts)


def _part(index: int) -> str:
    return f"layer_{index:05d}"


def _norms(layer: DecoderLayer, names: Mapping[str, str]) -> dict[str, Weight]:
    return {
        name: Weight.from_array(layer.get_parameter(short).numpy())
        for short, name in names.items()
        if short.endswith("layernorm.weight")
    }
