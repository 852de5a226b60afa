"""The muP coordinate check: how large activations are, and how far they move, at several widths.

With the right groups neither depends on the width; with one rate for all matrices they grow with it, and the best rate
of a narrow model is too large for a wide one. What this leaves out: sweeping rates.

Source: Yang et al., Tensor Programs V (arXiv 2203.03466) §D.1; MiniCPM technical report (arXiv 2404.06395) table 7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minicpm.architecture import ModelConfig
from minicpm.model.minicpm import MiniCPM
from minicpm.train.losses import linear_cross_entropy
from minicpm.train.optim import OptimizerConfig
from minicpm.train.state import new_state

# name → width → one value a step, the first before any update.
Coordinates = dict[str, dict[int, list[float]]]


def coordinate_check(
    widths: Sequence[int], *, steps: int = 4, lr: float = 0.01, is_mup: bool = True, seed: int = 0
) -> Coordinates:
    """Return the root mean square of what each part of a two-layer model gives, for each width and step.

    Parts: the stream after each layer, and the logits' distance from those of the start.
    """
    found: Coordinates = {}
    for width in widths:
        config = ModelConfig(
            hidden_size=width,
            intermediate_size=5 * width // 2,
            num_hidden_layers=2,
            num_attention_heads=width // 32,
            vocab_size=256,
            scale_emb=12.0,
            scale_depth=1.4,
            # Without muP, every width is its own base: the standard start and one rate.
            dim_model_base=128.0 if is_mup else 0.0,
        )
        for name, values in _one_width(config, steps, lr, is_mup, seed).items():
            found.setdefault(name, {})[width] = values
    return found


def _one_width(config: ModelConfig, steps: int, lr: float, is_mup: bool, seed: int) -> dict[str, list[float]]:
    state = new_state(config, OptimizerConfig(is_mup=is_mup), seed, "float32", torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (8, 33), generator=generator)
    found: dict[str, list[float]] = {}
    first: Tensor | None = None
    for _ in range(steps + 1):
        parts = _activations(state.model, ids[:, :-1])
        first = parts["logits"] if first is None else first
        parts["logits moved"] = parts.pop("logits") - first
        for name, values in parts.items():
            found.setdefault(name, []).append(float(values.square().mean().sqrt()))
        hidden = state.model.hidden_states(ids[:, :-1])
        total, _losses = linear_cross_entropy(
            hidden, state.model.head_weight, ids[:, 1:], divisor=config.logit_divisor, factor=1 / ids[:, 1:].numel()
        )
        total.backward()
        state.optimizer.update(lr)
    return found


@torch.no_grad()
def _activations(model: MiniCPM, ids: Tensor) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, index=index: parts.update({f"layer {index}": out}))
        for index, layer in enumerate(model.model.layers)
    ]
    parts["logits"] = model(ids)
    for hook in hooks:
        hook.remove()
    return parts


def slope(by_width: Mapping[int, Sequence[float]], step: int) -> float:
    """Return the exponent e of value ∝ width^e at `step`, by least squares over the logarithms."""
    points = [(math.log(width), math.log(values[step])) for width, values in by_width.items()]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def plot_coordinates(found: Mapping[str, Coordinates], path: Path) -> None:
    """Draw several checks, named by their titles, side by side in rows of parts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = list(next(iter(found.values())))
    figure = Figure(figsize=(4 * len(parts), 3 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(found), len(parts), squeeze=False)
    for row, (title, check) in enumerate(found.items()):
        for column, part in enumerate(parts):
            by_width = check[part]
            for step in range(len(next(iter(by_width.values())))):
                values = [values[step] for values in by_width.values()]
                if min(values) > 0:
                    # By the step: a part that begins at 0 has no line for it, and the others keep their colours.
                    line = {"label": f"step {step}", "color": f"C{step}"}
                    axes[row][column].loglog(list(by_width), values, "o-", base=2, **line)
            axes[row][column].set_title(f"{title}: {part}", fontsize=9)
            axes[row][column].set_xlabel("width")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
