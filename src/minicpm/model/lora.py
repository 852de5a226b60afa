"""Low-rank adapters as wrap and fuse: the network never knows.

`wrap` puts an adapter around chosen projections and freezes everything else; `fuse` multiplies the adapters into the
weights and takes the wrappers off. A wrapped projection may hold its weight in any way (QLoRA: 4-bit blocks) as long
as it has `in_features`, `out_features` and `weight`. What this leaves out: files (`adapter_files`) and the training.

Source: LoRA (arXiv 2106.09685) §4.1; rsLoRA (arXiv 2312.03732) eq. 4; DoRA (arXiv 2402.09353) eq. 5 and §4.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm.errors import CheckpointError, ConfigError
from minicpm.model.init import named_generator
from minicpm.model.minicpm import MiniCPM

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRASettings:
    """What adapters are like and where they go.

    `targets` are names of modules or ends of them (`q_proj`, `layers.3.mlp.up_proj`); besides the seven projections
    they may be `embed_tokens` and, where the head is untied, `lm_head`.

    Raises:
        ConfigError: a rank below 1, no target, or a dropout outside [0, 1).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.targets or not 0 <= self.dropout < 1:
            raise ConfigError(
                "LoRA needs rank >= 1, at least one target and 0 <= dropout < 1; "
                f"got rank {self.rank}, targets {self.targets}, dropout {self.dropout}"
            )

    @property
    def scaling(self) -> float:
        """The factor on B·A: alpha/rank, with rsLoRA alpha/√rank."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRALinear(nn.Module):
    """A frozen projection plus `scaling` · B · A, with DoRA rescaled to a trained norm for every output.

    Adapters are float32 whatever the base is; results have the base's dtype.
    """

    def __init__(self, base: nn.Module, settings: LoRASettings) -> None:
        super().__init__()
        weight = cast(Tensor, base.weight)
        out_features, in_features = weight.shape
        self.base, self.scaling, self.dropout = base, settings.scaling, settings.dropout
        self.lora_A = _parameter(settings.rank, in_features, weight.device)
        self.lora_B = _parameter(out_features, settings.rank, weight.device)
        magnitude = weight.detach().float().norm(dim=1) if settings.use_dora else None
        self.lora_magnitude_vector = nn.Parameter(magnitude) if magnitude is not None else None

    def start(self, generator: torch.Generator) -> None:
        """Draw A, uniform within ±1/√in_features; B stays 0, so that the wrapped model starts as the base."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        with torch.no_grad():
            self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out_features) for (…, in_features)."""
        result: Tensor = self.base(x)
        dropped = F.dropout(x, self.dropout, self.training)
        low = F.linear(F.linear(dropped.to(self.lora_A.dtype), self.lora_A), self.lora_B) * self.scaling
        if self.lora_magnitude_vector is None:
            adapted: Tensor = (result + low).to(result.dtype)
            return adapted
        is_dropping = self.training and self.dropout > 0
        again = self.base(dropped) if is_dropping else result
        scale = self.lora_magnitude_vector / self.direction().norm(dim=1)  # (out_features,)
        rescaled: Tensor = (result + (scale - 1) * again + scale * low).to(result.dtype)
        return rescaled

    @torch.no_grad()
    def direction(self) -> Tensor:
        """Return W + scaling · B · A in float32; DoRA's norm of it takes no gradient (its §4.3)."""
        return cast(Tensor, self.base.weight).float() + self.scaling * (self.lora_B.float() @ self.lora_A.float())

    @torch.no_grad()
    def fused_weight(self) -> Tensor:
        """Return the float32 weight that computes the same as base and adapter."""
        return fused_projection(
            cast(Tensor, self.base.weight), dict(self.named_parameters(recurse=False)), self.scaling
        )


class LoRAEmbedding(nn.Module):
    """A frozen embedding plus `scaling` · B · A on the way in; a tied head goes on reading the frozen one."""

    def __init__(self, base: nn.Embedding, settings: LoRASettings) -> None:
        super().__init__()
        self.base, self.scaling = base, settings.scaling
        self.lora_embedding_A = _parameter(settings.rank, base.num_embeddings, base.weight.device)
        self.lora_embedding_B = _parameter(base.embedding_dim, settings.rank, base.weight.device)

    @property
    def weight(self) -> Tensor:
        """The frozen matrix (V, E)."""
        return self.base.weight

    def start(self, generator: torch.Generator) -> None:
        """Draw B from a unit normal; A stays 0, so that the wrapped model starts as the base."""
        with torch.no_grad():
            self.lora_embedding_B.copy_(torch.empty(self.lora_embedding_B.shape).normal_(generator=generator))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return (…, E) for ids."""
        result: Tensor = self.base(input_ids)
        low = F.embedding(input_ids, self.lora_embedding_A.T)  # (…, R)
        return (result + F.linear(low, self.lora_embedding_B) * self.scaling).to(result.dtype)

    @torch.no_grad()
    def fused_weight(self) -> Tensor:
        """Return the float32 matrix that embeds the same as base and adapter."""
        return fused_embedding(self.base.weight, dict(self.named_parameters(recurse=False)), self.scaling)


def fused_projection(weight: Tensor, parts: Mapping[str, Tensor], scaling: float) -> Tensor:
    """Return the float32 weight (out, in) that computes the same as `weight` and an adapter's `parts` by name."""
    fused = weight.float() + scaling * (parts["lora_B"].float() @ parts["lora_A"].float())
    magnitude = parts.get("lora_magnitude_vector")
    return fused if magnitude is None else fused * (magnitude.float() / fused.norm(dim=1))[:, None]


def fused_embedding(weight: Tensor, parts: Mapping[str, Tensor], scaling: float) -> Tensor:
    """Return the float32 matrix (V, E) that embeds the same as `weight` and an adapter's `parts` by name."""
    return weight.float() + scaling * (parts["lora_embedding_B"].float() @ parts["lora_embedding_A"].float()).T


Adapter = LoRALinear | LoRAEmbedding


def _parameter(rows: int, columns: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, columns, dtype=torch.float32, device=device))


def adapters(model: MiniCPM) -> dict[str, Adapter]:
    """Return the wrapped modules by name, without the prefix `base.` of what they hold."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear | LoRAEmbedding)}


def wrap(model: MiniCPM, settings: LoRASettings, seed: int = 0) -> list[str]:
    """Put adapters on every target, freeze all other parameters, and return the names of the wrapped modules.

    The answer of the model does not change by this. Every adapter draws from its own (seed, name).

    Raises:
        ConfigError: a target that names nothing, or a model that is wrapped already; the model is then unchanged.
    """
    if adapters(model):
        raise ConfigError("the model has adapters already; fuse or unwrap them before it is wrapped again")
    places = _find_targets(model, settings)
    model.requires_grad_(False)
    for name, base in places.items():
        wrapped = LoRAEmbedding(base, settings) if isinstance(base, nn.Embedding) else LoRALinear(base, settings)
        wrapped.start(named_generator(seed, name))
        model.set_submodule(name, wrapped)
    return list(places)


def unwrap(model: MiniCPM) -> MiniCPM:
    """Take all adapters off, without effect on the base weights, and return the model; parameters stay frozen."""
    for name, adapter in adapters(model).items():
        model.set_submodule(name, adapter.base)
    return model


@torch.no_grad()
def fuse(model: MiniCPM) -> MiniCPM:
    """Multiply all adapters into the weights, in float32 and rounded once, take them off, and return the model.

    Where an embedding was adapted beside a tied head, the head keeps the old matrix and is untied for that:
    `model.config` says so afterwards.

    Raises:
        CheckpointError: a base that is not a float projection; nothing is changed then.
    """
    found = adapters(model)
    for name, adapter in found.items():
        if not isinstance(adapter.base, nn.Linear | nn.Embedding):
            raise CheckpointError(
                f"{name} holds its weight as {type(adapter.base).__name__}; rounding a merged adapter to such blocks "
                "would lose it: load the unquantized base, attach the adapter, merge, and quantize the result"
            )
    for name, adapter in found.items():
        base = cast(nn.Linear | nn.Embedding, adapter.base)
        if isinstance(base, nn.Embedding) and model.lm_head is None:
            head = nn.Linear(base.embedding_dim, base.num_embeddings, False, device="meta")
            head.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            model.lm_head = head
            model.config = model.config.replace(tie_word_embeddings=False)
        base.weight.copy_(adapter.fused_weight())
        model.set_submodule(name, base)
    return model


def _find_targets(model: MiniCPM, settings: LoRASettings) -> dict[str, nn.Module]:
    eligible = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or (hasattr(module, "in_features") and hasattr(module, "out_features"))
    }
    for target in settings.targets:
        if not any(_matches(name, target) for name in eligible):
            known = sorted({name.rsplit(".", 1)[-1] for name in eligible})
            raise ConfigError(f"LoRA target {target!r} names no module; known: {', '.join(known)}")
    places = {name: m for name, m in eligible.items() if any(_matches(name, target) for target in settings.targets)}
    if settings.use_dora and any(isinstance(module, nn.Embedding) for module in places.values()):
        raise ConfigError("DoRA is for projections; take embed_tokens out of the targets or set use_dora to false")
    return places


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
