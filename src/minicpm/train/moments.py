"""Adam's moments in float32 or in 8-bit blocks, and the update of float32 masters by them.

What this leaves out: masters that are not kept (`lean_optim`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from minicpm.train.blockwise import Codebook
from minicpm.train.optimizer_config import OptimizerConfig


class Moments(Protocol):
    """What keeps Adam's moments and applies the update to the masters."""

    def update(self, grads: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Move every master by its gradient."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name, sharing memory."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state over."""


class Float32Moments:
    """Both moments in float32, updated by PyTorch's fused kernel, whose arithmetic is the formula above."""

    def __init__(self, masters: Mapping[str, Tensor], config: OptimizerConfig) -> None:
        self.masters = masters
        groups = [{"params": [master]} for master in masters.values()]
        self.adam = torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        for master in masters.values():
            self.adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def update(self, grads: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Move every master by its gradient."""
        for (name, master), group in zip(self.masters.items(), self.adam.param_groups, strict=True):
            master.grad = grads[name]
            group["lr"] = rates[name]
        self.adam.step()
        for master in self.masters.values():
            master.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name, sharing memory."""
        return {
            f"{kind}.{name}": self.adam.state[master][kind]
            for name, master in self.masters.items()
            for kind in ("exp_avg", "exp_avg_sq", "step")
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state over."""
        copy_all(self.tensors(), tensors)


class Int8Moments:
    """Both moments in blocks of 8-bit codes; one parameter at a time is float32."""

    def __init__(self, masters: Mapping[str, Tensor], config: OptimizerConfig) -> None:
        self.masters, self.config = masters, config
        device = next(iter(masters.values())).device
        self.codebooks = {"exp_avg": Codebook.build(True, device), "exp_avg_sq": Codebook.build(False, device)}
        self.step = torch.zeros((), dtype=torch.float32)
        self.state: dict[str, Tensor] = {}
        for name, master in masters.items():
            for kind, codebook in self.codebooks.items():
                self._store(f"{kind}.{name}", *codebook.encode(torch.zeros(master.numel(), device=device)))

    def update(self, grads: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Move every master by its gradient."""
        self.step += 1
        config, count = self.config, float(self.step)
        first, second = 1 - config.beta1**count, 1 - config.beta2**count
        for name, master in self.masters.items():
            grad, rate = grads[name].reshape(-1).float(), rates[name]
            mean = self._load(f"exp_avg.{name}", "exp_avg").lerp_(grad, 1 - config.beta1)
            square = self._load(f"exp_avg_sq.{name}", "exp_avg_sq")
            square.mul_(config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
            denominator = (square / second).sqrt_().add_(config.eps)
            master.mul_(1 - rate * config.weight_decay)
            master.view(-1).addcdiv_(mean, denominator, value=-rate / first)
            self._store(f"exp_avg.{name}", *self.codebooks["exp_avg"].encode(mean))
            self._store(f"exp_avg_sq.{name}", *self.codebooks["exp_avg_sq"].encode(square))

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name, sharing memory."""
        return {**self.state, "step": self.step}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state over."""
        copy_all(self.tensors(), tensors)

    def _load(self, name: str, kind: str) -> Tensor:
        return self.codebooks[kind].decode(self.state[name + ".codes"], self.state[name + ".scales"])

    def _store(self, name: str, codes: Tensor, scales: Tensor) -> None:
        self.state[name + ".codes"], self.state[name + ".scales"] = codes, scales


def copy_all(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy each of `values` into the tensor of its name."""
    for name, tensor in into.items():
        tensor.copy_(values[name])
