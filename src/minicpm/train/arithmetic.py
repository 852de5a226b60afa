"""What a run computes on and in: the device, compiled layers or not, and the dtype of products.

What this leaves out: the arithmetic itself (`fused`, `losses`), and the plan that follows from the choice.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable

import torch

from minicpm.errors import ConfigError
from minicpm.train.flops import measure_peak
from minicpm.train.settings import LoopConfig
from minicpm.train.state import DTYPES

# Below so many steps, compiling takes longer than it saves.
_STEPS_WORTH_COMPILING = 200
# Widening the factors takes passes over memory; a rate that is higher by less than this does not pay for them.
_WORTH_WIDENING = 1.2


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What was chosen; `peak_flops` is the rate of a plain product in the chosen dtype."""

    is_compiled: bool
    is_widened: bool
    peak_flops: float

    def decide(self, loop: LoopConfig) -> LoopConfig:
        """Return `loop` with nothing left open."""
        return dataclasses.replace(
            loop,
            compile="on" if self.is_compiled else "off",
            products="float32" if self.is_widened else loop.dtype,
        )


def choose_device(name: str) -> torch.device:
    """Return the device that `name` means; `auto` is a GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"loop.device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def choose_arithmetic(
    loop: LoopConfig, total_steps: int, device: torch.device, say: Callable[[str], None]
) -> Arithmetic:
    """Return how the run computes; what `loop` leaves open is measured here.

    Raises:
        ConfigError: what is wanted cannot be had.
    """
    is_compiled = chooses_compiling(loop, total_steps, device, say)
    own = measure_peak(DTYPES[loop.dtype], device)
    can_widen = is_compiled and loop.dtype == "bfloat16" and device.type == "cpu"
    if loop.products not in ("auto", loop.dtype) and not can_widen:
        raise ConfigError(
            f"loop.products {loop.products} needs loop.dtype bfloat16, compiled layers and a CPU; "
            "leave it on auto, or set loop.compile=on"
        )
    if not can_widen or loop.products == "bfloat16":
        return Arithmetic(is_compiled, False, own)
    wide = measure_peak(torch.float32, device)
    is_widened = loop.products == "float32" or wide > _WORTH_WIDENING * own
    if is_widened and loop.products == "auto":
        say(f"this processor multiplies float32 {wide / own:.1f} times as fast as bfloat16: products are float32")
    return Arithmetic(is_compiled, is_widened, wide if is_widened else own)


def chooses_compiling(loop: LoopConfig, total_steps: int, device: torch.device, say: Callable[[str], None]) -> bool:
    """Return whether the layers are compiled.

    Raises:
        ConfigError: it is wanted and there is no compiler.
    """
    if loop.compile == "off":
        return False
    is_possible = device.type == "cuda" or any(shutil.which(name) for name in ("g++", "c++", "clang++"))
    if loop.compile == "on" and not is_possible:
        raise ConfigError("loop.compile is on and there is no C++ compiler (g++); install one or set loop.compile=off")
    if loop.compile == "auto" and not is_possible:
        say("no C++ compiler (g++) found: the layers run uncompiled, about 20 % slower")
    return is_possible and (loop.compile == "on" or total_steps >= _STEPS_WORTH_COMPILING)
