"""Updates without float32 masters: 16-bit weights moved in place and rounded up or down by chance.

Rounded to nearest, an update smaller than half a step of bf16 (a 256th of the weight) would be lost every time; rounded
by chance in proportion it arrives on average. Values are float32 a few million at a time. Fused, a parameter moves as
soon as its gradient is there, within the backward pass, and its gradient is freed: no two layers' gradients exist at
once. What this leaves out: float32 masters (`optim`).

Source: stochastic rounding as in Gupta et al. (arXiv 1502.02551) §3; updates within the backward pass as in LOMO
(arXiv 2306.09782) §3.1; factored second moments, clipped updates: Adafactor (arXiv 1804.04235) §3 and §6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minicpm.errors import ConfigError
from minicpm.train.blockwise import BLOCK, Codebook
from minicpm.train.moments import copy_all
from minicpm.train.optim import Optimizer
from minicpm.train.optimizer_config import OptimizerConfig

# Values that are float32 at a time; a multiple of the codes' blocks.
CHUNK = 1 << 22
# Adafactor's bound on the root mean square of an update, and what it adds to squares.
_CLIP_UPDATE, _SQUARE_EPS = 1.0, 1e-30


def make_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    shares: Mapping[str, float],
    masters: Mapping[str, Tensor],
    *,
    is_half: bool = False,
) -> Optimizer:
    """Return the optimizer that `config` asks for.

    Raises:
        ConfigError: weights without masters in float16, whose steps are too coarse below 6e-5.
    """
    if config.masters == "none" and is_half:
        raise ConfigError("optimizer.masters none needs loop.dtype bfloat16; float16 needs float32 masters")
    kind = LeanOptimizer if config.masters == "none" else Optimizer
    return kind(model, config, shares, masters, is_half=is_half)


class LeanOptimizer(Optimizer):
    """Moves the model's own parameters; `masters` is empty."""

    def _make_moments(self, masters: Mapping[str, Tensor]) -> Any:
        self._lr, self._norms = 0.0, [torch.zeros(())]
        # The gradient norm of the step before, by which fused gradients are clipped; 0 before the first.
        self.last_norm = torch.zeros(())
        is_factored = self.config.states == "factored"
        self.rule = (FactoredRule if is_factored else AdamRule)(self.parameters, self.config)
        return self.rule

    def _collector(self, name: str) -> Any:
        collect = super()._collector(name)
        if not self.config.is_fused:
            return collect

        def update(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            parameter.grad = None
            self._norms.append(torch.linalg.vector_norm(grad, dtype=torch.float32))
            rate = self._lr * self.shares[name]
            with torch.no_grad():
                self.rule.update_one(name, parameter, grad, rate, self.clip_factor(float(self.last_norm)))

        return update

    def begin(self, lr: float) -> None:
        """Take notice of the rate; fused, the update begins here."""
        self._lr = lr
        if self.config.is_fused:
            self._norms = []
            self.rule.count()

    def ready_grads(self) -> dict[str, Tensor]:
        """Return the gradients collected since the last update; fused, they are gone."""
        return {} if self.config.is_fused else super().ready_grads()

    @torch.no_grad()
    def update(self, lr: float) -> float:
        """Move every parameter and return the norm; fused, all has moved and the norm is what it was."""
        if not self.config.is_fused:
            return super().update(lr)
        norm = float(torch.linalg.vector_norm(torch.stack(self._norms))) if self._norms else 0.0
        self.last_norm.fill_(norm)
        return norm

    def move(self, grads: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Move every parameter by its clipped gradient."""
        self.rule.count()
        for name, parameter in self.parameters.items():
            self.rule.update_one(name, parameter, grads[name], rates[name], 1.0)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs besides the model's own weights, sharing memory."""
        return {**super().tensors(), "last_norm": self.last_norm}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors()` gave."""
        super().load(tensors)
        self.last_norm.copy_(tensors["last_norm"])


class AdamRule:
    """AdamW whose moments are 8-bit blocks or float32, applied to one parameter at a time."""

    def __init__(self, parameters: Mapping[str, Tensor], config: OptimizerConfig) -> None:
        self.config = config
        device = next(iter(parameters.values())).device
        self.step = torch.zeros((), dtype=torch.float32)
        self.codebooks = {"exp_avg": Codebook.build(True, device), "exp_avg_sq": Codebook.build(False, device)}
        self.state: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            for kind, codebook in self.codebooks.items():
                count = parameter.numel()
                if config.states == "float32":
                    self.state[f"{kind}.{name}"] = torch.zeros(count, device=device)
                    continue
                zero = int(codebook.encode(torch.zeros(1, device=device))[0])
                self.state[f"{kind}.{name}.codes"] = torch.full((count,), zero, dtype=torch.uint8, device=device)
                self.state[f"{kind}.{name}.scales"] = torch.zeros(-(-count // BLOCK), device=device)

    def count(self) -> None:
        """Begin the next update."""
        self.step += 1

    def update_one(self, name: str, parameter: Tensor, grad: Tensor, rate: float, factor: float) -> None:
        """Move one parameter by `factor` times its gradient."""
        config, count = self.config, float(self.step)
        first, second = 1 - config.beta1**count, 1 - config.beta2**count
        for part in parts(parameter):
            slope = grad.reshape(-1)[part].float() * factor
            mean = self._load("exp_avg", name, part).lerp_(slope, 1 - config.beta1)
            square = self._load("exp_avg_sq", name, part)
            square.mul_(config.beta2).addcmul_(slope, slope, value=1 - config.beta2)
            value = parameter.view(-1)[part].float().mul_(1 - rate * config.weight_decay)
            value.addcdiv_(mean, (square / second).sqrt_().add_(config.eps), value=-rate / first)
            store(parameter.view(-1)[part], value)
            self._store("exp_avg", name, part, mean)
            self._store("exp_avg_sq", name, part, square)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name, sharing memory."""
        return {**self.state, "step": self.step}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state over."""
        copy_all(self.tensors(), {name: tensors[name] for name in self.tensors()})

    def _load(self, kind: str, name: str, part: slice) -> Tensor:
        if self.config.states == "float32":
            return self.state[f"{kind}.{name}"][part]
        codes, scales = self.state[f"{kind}.{name}.codes"], self.state[f"{kind}.{name}.scales"]
        return self.codebooks[kind].decode(codes[part], scales[_blocks(part)])

    def _store(self, kind: str, name: str, part: slice, values: Tensor) -> None:
        if self.config.states == "float32":
            return  # `_load` gave the state itself
        codes, scales = self.codebooks[kind].encode(values)
        self.state[f"{kind}.{name}.codes"][part] = codes
        self.state[f"{kind}.{name}.scales"][_blocks(part)] = scales


class FactoredRule:
    """Adafactor without a first moment: a row and a column of second moments of each matrix."""

    def __init__(self, parameters: Mapping[str, Tensor], config: OptimizerConfig) -> None:
        self.config = config
        self.step = torch.zeros((), dtype=torch.float32)
        self.state: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            if parameter.ndim == 2:
                self.state[f"row.{name}"] = torch.zeros(parameter.shape[0], device=parameter.device)
                self.state[f"column.{name}"] = torch.zeros(parameter.shape[1], device=parameter.device)
            else:
                self.state[f"square.{name}"] = torch.zeros(parameter.shape, device=parameter.device)

    def count(self) -> None:
        """Begin the next update."""
        self.step += 1

    def update_one(self, name: str, parameter: Tensor, grad: Tensor, rate: float, factor: float) -> None:
        """Move one parameter by its gradient; `factor` does not matter, since the update does not know its size."""
        # The decay of §7.2: the mean of all squares so far at first, a moving one later.
        keep = 1 - float(self.step) ** -0.8
        if parameter.ndim != 2:
            square = self.state[f"square.{name}"]
            square.mul_(keep).add_(grad.float().square() + _SQUARE_EPS, alpha=1 - keep)
            update = grad.float() / square.sqrt()
            update /= max(1.0, float(update.square().mean().sqrt()) / _CLIP_UPDATE)
            value = parameter.float().mul_(1 - rate * self.config.weight_decay).sub_(update, alpha=rate)
            store(parameter, value)
            return
        row, column = self.state[f"row.{name}"], self.state[f"column.{name}"]
        pieces = [slice(start, start + rows) for rows in [max(CHUNK // grad.shape[1], 1)]
                  for start in range(0, grad.shape[0], rows)]  # fmt: skip
        sums = torch.zeros_like(column)
        for piece in pieces:
            squares = grad[piece].float().square() + _SQUARE_EPS
            row[piece].mul_(keep).add_(squares.mean(dim=1), alpha=1 - keep)
            sums += squares.sum(dim=0)
        column.mul_(keep).add_(sums / grad.shape[0], alpha=1 - keep)
        across = (row / row.mean()).rsqrt()
        down = column.rsqrt()

        def update_of(piece: slice) -> Tensor:
            return grad[piece].float() * across[piece, None] * down

        size = math.sqrt(sum(float(update_of(piece).square_().sum()) for piece in pieces) / grad.numel())
        for piece in pieces:
            value = parameter[piece].float().mul_(1 - rate * self.config.weight_decay)
            value.sub_(update_of(piece), alpha=rate / max(1.0, size / _CLIP_UPDATE))
            store(parameter[piece], value)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name, sharing memory."""
        return {**self.state, "step": self.step}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state over."""
        copy_all(self.tensors(), {name: tensors[name] for name in self.tensors()})


def store(into: Tensor, value: Tensor) -> None:
    """Write float32 `value` into `into`: bf16 rounded up or down by chance in proportion, float32 as it is."""
    into.copy_(round_by_chance(value) if into.dtype == torch.bfloat16 else value)


def round_by_chance(value: Tensor) -> Tensor:
    """Return float32 `value` as bf16 of which the mean over many draws is `value`."""
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    # Sign and magnitude: adding to the bits moves away from zero, and cutting the lower half off towards it.
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def parts(parameter: Tensor) -> Iterator[slice]:
    """Yield slices that cover the flat parameter, a few million values each."""
    for start in range(0, parameter.numel(), CHUNK):
        yield slice(start, min(start + CHUNK, parameter.numel()))


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))
