"""The numbers of the optimizer, and what it keeps of each parameter. What this leaves out: the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minicpm.errors import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam's numbers. `clip_grad` bounds the L2 norm of all gradients together; 0 leaves them alone.

    `is_mup` false gives every parameter the full rate. `states` int8 keeps the moments in 2 instead of 8 bytes a
    parameter; factored (with `masters` none) keeps a row and a column of second moments of each matrix and no first.
    `masters` none updates 16-bit weights in place, rounded up or down by chance in proportion, instead of keeping
    float32 ones in 4 bytes a parameter. `is_fused` (with `masters` none and one micro-batch a step) updates each
    parameter as soon as its gradient is there and frees that: gradients are then clipped by the norm of the step
    before.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    is_mup: bool = True
    states: Literal["float32", "int8", "factored"] = "float32"
    masters: Literal["float32", "none"] = "float32"
    is_fused: bool = False

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.eps > 0:
            raise ConfigError(f"eps must be positive, got {self.eps}")
        for name in ("weight_decay", "clip_grad"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.masters == "float32" and (self.is_fused or self.states == "factored"):
            raise ConfigError("is_fused and states factored need masters none")
