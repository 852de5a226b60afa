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
from typing import Any

import torch
from torch import Tensor, nn

from minicpm.errors import CheckpointError, ConfigError
from minicpm.train.moments import Float32Moments, Int8Moments, Moments, copy_all
from minicpm.train.optimizer_config import OptimizerConfig

__all__ = ["Optimizer", "OptimizerConfig", "global_norm"]

# Of half precision: where it begins, after how many good steps it is doubled, and below which the run is broken.
_FIRST_SCALE, _GROWS_AFTER, _LEAST_SCALE = 2.0**16, 2000, 2.0**-10


class Optimizer:
    """Updates `model`'s trainable parameters; its gradients arrive by themselves during `backward()`.

    Where the model is in 16 bits, a float32 master is kept of every parameter, the micro-batches' gradients are summed
    in float32 as soon as they are made, and the model's copy is written once after each update.

    `shares` are the parameters' shares of the rate; a name that it lacks (an adapter's) has the full rate. `masters`
    are the unrounded weights where the model's have been rounded already. `is_half` scales the loss, since float16
    gradients would vanish: `scale` is what the loss has to be multiplied by.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        shares: Mapping[str, float],
        masters: Mapping[str, Tensor] | None = None,
        *,
        is_half: bool = False,
    ) -> None:
        self.config, self.is_half = config, is_half
        self.scale, self._good_steps = (_FIRST_SCALE if is_half else 1.0), 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigError("the model has no trainable parameter")
        self.shares = {name: shares.get(name, 1.0) if config.is_mup else 1.0 for name in self.parameters}
        self.masters: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        self._is_fresh: set[str] = set()
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(self._collector(name))
        self.moments = self._make_moments(masters or {})

    def _make_moments(self, masters: Mapping[str, Tensor]) -> Moments:
        for name, parameter in self.parameters.items():
            self.masters[name] = masters.get(name, parameter.detach()).to(torch.float32)
        make = Float32Moments if self.config.states == "float32" else Int8Moments
        return make(self.masters, self.config)

    @property
    def has_masters(self) -> bool:
        """Whether the float32 weights are other tensors than the model's."""
        return any(m.data_ptr() != self.parameters[n].data_ptr() for n, m in self.masters.items())

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
        for name, parameter in self.parameters.items():
            if name not in self._is_fresh:
                self.grads[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return {name: self.grads[name] for name in self.parameters}

    def collected(self) -> dict[str, Tensor]:
        """Return the gradients that have arrived since the last update."""
        return {name: self.grads[name] for name in self.parameters if name in self._is_fresh}

    def forget(self) -> None:
        """Drop the gradients that have arrived since the last update."""
        self._is_fresh.clear()

    def begin(self, lr: float) -> None:
        """Take notice of the rate of the update whose gradients come next."""

    def shrink_scale(self) -> bool:
        """Halve the scale of the loss and forget the gradients; False where that cannot be what was wrong."""
        if not self.is_half or self.scale <= _LEAST_SCALE:
            return False
        self.scale, self._good_steps = self.scale / 2, 0
        self.forget()
        return True

    @torch.no_grad()
    def update(self, lr: float) -> float:
        """Clip, move every parameter, forget the gradients, and return the norm before clipping.

        A norm that is not finite is returned before anything has moved: the caller must stop, or shrink the scale.
        """
        grads = self.ready_grads()
        norm = global_norm(list(grads.values())) / self.scale
        if not math.isfinite(norm):
            return norm
        factor = self.clip_factor(norm) / self.scale
        if factor != 1.0:
            torch._foreach_mul_(list(grads.values()), factor)
        self.move(grads, {name: lr * share for name, share in self.shares.items()})
        self._is_fresh.clear()
        self._good_steps += 1
        if self.is_half and self._good_steps >= _GROWS_AFTER:
            self.scale, self._good_steps = self.scale * 2, 0
        return norm

    def clip_factor(self, norm: float) -> float:
        """Return what gradients of this norm are multiplied by."""
        return self.config.clip_grad / norm if self.config.clip_grad and norm > self.config.clip_grad else 1.0

    def move(self, grads: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Move every parameter by its clipped gradient."""
        self.moments.update(grads, rates)
        if self.has_masters:
            torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs besides the model's own weights, sharing memory."""
        masters = {f"master.{name}": t for name, t in self.masters.items()} if self.has_masters else {}
        scale = {"loss_scale": torch.tensor([self.scale, self._good_steps])} if self.is_half else {}
        return {**masters, **scale, **self.moments.tensors()}

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
        copy_all({n: t for n, t in ours.items() if n.startswith("master.")}, tensors)
        if self.is_half:
            self.scale, self._good_steps = float(tensors["loss_scale"][0]), int(tensors["loss_scale"][1])
        self.moments.load({n: t for n, t in tensors.items() if n != "loss_scale" and not n.startswith("master.")})
        if self.has_masters:
            torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))


def global_norm(tensors: list[Tensor]) -> float:
    """Return the L2 norm of all values together, in float32 of float32 partial norms."""
    norms = torch._foreach_norm(tensors, 2, torch.float32)
    return float(torch.linalg.vector_norm(torch.stack(list(norms))))
