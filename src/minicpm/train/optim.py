"""AdamW with muP groups, float32 masters under a 16-bit model, and gradients summed in float32.

    m = β₁ m + (1 − β₁) g      v = β₂ v + (1 − β₂) g²
    p ← p − lr · m̂ / (√v̂ + eps) − lr · wd · p         for every parameter, norms and embedding included

`lr` is the parameter's own: the schedule's rate times its share from `model.init.parameter_rules` (1/(d/d_base) for
matrices), so the effective decay of matrices has that share too, as in the released run. What this leaves out: the
schedule, and states that are spread over several machines.

Source: MiniCPM technical report (arXiv 2404.06395) table 7; BMTrain's Adam kernel; Loshchilov & Hutter (1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from minicpm.errors import CheckpointError, ConfigError
from minicpm.train.blockwise import Codebook


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam's numbers. `clip_grad` bounds the L2 norm of all gradients together; 0 leaves them alone.

    `is_mup` false gives every parameter the full rate. `states` int8 keeps the moments in 2 instead of 8 bytes a
    parameter.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    is_mup: bool = True
    states: Literal["float32", "int8"] = "float32"

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.eps > 0:
            raise ConfigError(f"eps must be positive, got {self.eps}")
        for name in ("weight_decay", "clip_grad"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")


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
        _copy_all(self.tensors(), tensors)


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
        _copy_all(self.tensors(), tensors)

    def _load(self, name: str, kind: str) -> Tensor:
        return self.codebooks[kind].decode(self.state[name + ".codes"], self.state[name + ".scales"])

    def _store(self, name: str, codes: Tensor, scales: Tensor) -> None:
        self.state[name + ".codes"], self.state[name + ".scales"] = codes, scales


class Optimizer:
    """Updates `model`'s trainable parameters; its gradients arrive by themselves during `backward()`.

    Where the model is in 16 bits, a float32 master is kept of every parameter, the micro-batches' gradients are summed
    in float32 as soon as they are made, and the model's copy is written once after each update.

    `shares` are the parameters' shares of the rate; a name that it lacks (an adapter's) has the full rate. `masters`
    are the unrounded weights where the model's have been rounded already.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        shares: Mapping[str, float],
        masters: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigError("the model has no trainable parameter")
        self.shares = {name: shares.get(name, 1.0) if config.is_mup else 1.0 for name in self.parameters}
        self.masters: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        self._is_fresh: set[str] = set()
        for name, parameter in self.parameters.items():
            self.masters[name] = (masters or {}).get(name, parameter.detach()).to(torch.float32)
            parameter.register_post_accumulate_grad_hook(self._collector(name))  # type: ignore[no-untyped-call]
        make = Float32Moments if config.states == "float32" else Int8Moments
        self.moments: Moments = make(self.masters, config)

    @property
    def has_masters(self) -> bool:
        """Whether the float32 weights are other tensors than the model's."""
        return any(self.masters[n].data_ptr() != p.data_ptr() for n, p in self.parameters.items())

    def _collector(self, name: str) -> Any:
        def collect(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            parameter.grad = None
            if name not in self.grads and grad.dtype == torch.float32:
                self.grads[name] = grad
            elif name not in self.grads:
                self.grads[name] = grad.to(torch.float32)
            elif name in self._is_fresh:
                self.grads[name].add_(grad)
            else:
                self.grads[name].copy_(grad)
            self._is_fresh.add(name)

        return collect

    def ready_grads(self) -> dict[str, Tensor]:
        """Return the gradients collected since the last update; a parameter that got none has zeros."""
        for name, master in self.masters.items():
            if name not in self._is_fresh:
                self.grads[name] = torch.zeros_like(master)
        return {name: self.grads[name] for name in self.masters}

    def collected(self) -> dict[str, Tensor]:
        """Return the gradients that have arrived since the last update."""
        return {name: self.grads[name] for name in self.masters if name in self._is_fresh}

    def forget(self) -> None:
        """Drop the gradients that have arrived since the last update."""
        self._is_fresh.clear()

    @torch.no_grad()
    def update(self, lr: float) -> float:
        """Clip, move every parameter, forget the gradients, and return the norm before clipping.

        A norm that is not finite is returned before anything has moved: the caller must stop.
        """
        grads = self.ready_grads()
        norm = global_norm(list(grads.values()))
        if not math.isfinite(norm):
            return norm
        if self.config.clip_grad and norm > self.config.clip_grad:
            torch._foreach_mul_(list(grads.values()), self.config.clip_grad / norm)
        self.moments.update(grads, {name: lr * share for name, share in self.shares.items()})
        self._is_fresh.clear()
        if self.has_masters:
            torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs besides the model's own weights, sharing memory."""
        masters = {f"master.{name}": t for name, t in self.masters.items()} if self.has_masters else {}
        return {**masters, **self.moments.tensors()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors()` gave.

        Raises:
            CheckpointError: missing, surplus or misshapen tensors.
        """
        ours = self.tensors()
        problems = [f"missing {n}" for n in ours if n not in tensors] + [
            f"surplus {n}" for n in tensors if n not in ours
        ]
        problems += [
            n for n, t in ours.items() if n in tensors and (t.shape, t.dtype) != (tensors[n].shape, tensors[n].dtype)
        ]
        if problems:
            raise CheckpointError(f"the optimizer state does not fit the model: {'; '.join(problems[:5])}")
        _copy_all({n: t for n, t in ours.items() if n.startswith("master.")}, tensors)
        self.moments.load({n: t for n, t in tensors.items() if not n.startswith("master.")})
        if self.has_masters:
            torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))


def global_norm(tensors: list[Tensor]) -> float:
    """Return the L2 norm of all values together, in float32 of float32 partial norms."""
    norms = torch._foreach_norm(tensors, 2, torch.float32)
    return float(torch.linalg.vector_norm(torch.stack(list(norms))))


def _copy_all(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])
