"""Initial weights and learning-rate groups by muP, every parameter named.

Two kinds of parameters: `scaled` ones (the matrices between hidden sizes) start with a standard deviation that
shrinks as √width and learn with a rate that shrinks as width; `base` ones (embedding, untied head, norms) do not
know the width. So what is found on a narrow model holds for a wide one.

Source: MiniCPM technical report (arXiv 2404.06395) table 7.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch

from minicpm.architecture import ModelConfig
from minicpm.model.minicpm import MiniCPM

Kind = Literal["scaled", "base"]


@dataclass(frozen=True)
class ParameterRule:
    """How one parameter starts and learns.

    `init_std` is the standard deviation of its normal start, None for ones; `lr_scale` multiplies the base rate.
    """

    kind: Kind
    init_std: float | None
    lr_scale: float


def parameter_rules(config: ModelConfig) -> dict[str, ParameterRule]:
    """Return the rule of every parameter, in the order of `config.weight_shapes()`."""
    width = config.logit_divisor
    scaled = ParameterRule("scaled", config.initializer_range / math.sqrt(width), 1 / width)
    vocabulary = ParameterRule("base", config.initializer_range, 1.0)
    norm = ParameterRule("base", None, 1.0)
    rules = {}
    for name, shape in config.weight_shapes().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rules[name] = vocabulary
        else:
            rules[name] = scaled if len(shape) == 2 else norm
    return rules


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator whose draws depend on `seed` and `name` only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@torch.no_grad()
def initialize(model: MiniCPM, seed: int = 0) -> MiniCPM:
    """Set every parameter by its rule and return the model.

    Each parameter draws from its own generator, seeded with (seed, name), on the CPU in float32: the start is the
    same for any device, any dtype up to rounding, and whatever else the model has.
    """
    parameters = dict(model.named_parameters())
    for name, rule in parameter_rules(model.config).items():
        parameter = parameters[name]
        if rule.init_std is None:
            parameter.fill_(1.0)
            continue
        start = torch.empty(parameter.shape, device="cpu").normal_(
            0.0, rule.init_std, generator=named_generator(seed, name)
        )
        parameter.copy_(start)
    return model
