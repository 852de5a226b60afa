"""What a run computes in: chosen by what is faster, wanted explicitly, or refused."""

from __future__ import annotations

import pytest
import torch

from minicpm.errors import ConfigError
from minicpm.train import arithmetic
from minicpm.train.arithmetic import choose_arithmetic, choose_device
from minicpm.train.settings import LoopConfig

CPU = torch.device("cpu")


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, float]:
    """FLOP/s by dtype, in place of a measurement; and a compiler."""
    found = {torch.bfloat16: 1.0, torch.float32: 2.0}
    monkeypatch.setattr(arithmetic, "measure_peak", lambda dtype, device: found[dtype])
    monkeypatch.setattr(arithmetic.shutil, "which", lambda name: f"/usr/bin/{name}")
    return found


def test_the_faster_products_are_taken_and_written_down(rates: dict[torch.dtype, float]) -> None:
    lines: list[str] = []
    chosen = choose_arithmetic(LoopConfig(), 1000, CPU, lines.append)
    assert (chosen.is_compiled, chosen.is_widened, chosen.peak_flops) == (True, True, 2.0)
    assert "2.0 times" in lines[0]
    decided = chosen.decide(LoopConfig())
    assert (decided.compile, decided.products) == ("on", "float32")
    # Measured again, now the other way round: what was decided stays.
    rates[torch.bfloat16] = 4.0
    assert choose_arithmetic(decided, 1000, CPU, lines.append).is_widened
    assert not choose_arithmetic(LoopConfig(), 1000, CPU, lines.append).is_widened


def test_a_small_gain_does_not_pay(rates: dict[torch.dtype, float]) -> None:
    rates[torch.float32] = 1.1
    chosen = choose_arithmetic(LoopConfig(), 1000, CPU, print)
    assert (chosen.is_widened, chosen.peak_flops) == (False, 1.0)


@pytest.mark.parametrize(
    ("loop", "steps"), [(LoopConfig(compile="off"), 1000), (LoopConfig(dtype="float32"), 1000), (LoopConfig(), 10)]
)
def test_only_compiled_bf16_layers_widen(rates: dict[torch.dtype, float], loop: LoopConfig, steps: int) -> None:
    chosen = choose_arithmetic(loop, steps, CPU, print)
    assert not chosen.is_widened
    assert choose_arithmetic(chosen.decide(loop), steps, CPU, print) == chosen


def test_products_that_cannot_be_had_are_refused(rates: dict[torch.dtype, float]) -> None:
    with pytest.raises(ConfigError, match=r"loop\.products float32 needs .* compiled"):
        choose_arithmetic(LoopConfig(products="float32", compile="off"), 1000, CPU, print)
    with pytest.raises(ConfigError, match=r"loop\.products bfloat16 needs loop\.dtype bfloat16"):
        choose_arithmetic(LoopConfig(products="bfloat16", dtype="float32"), 1000, CPU, print)


def test_a_compiler_that_is_wanted_must_be_there(
    rates: dict[torch.dtype, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        choose_arithmetic(LoopConfig(compile="on"), 1000, CPU, print)
    lines: list[str] = []
    assert not choose_arithmetic(LoopConfig(), 1000, CPU, lines.append).is_compiled
    assert "uncompiled" in lines[0]


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ConfigError, match=r"loop\.device 'abacus'"):
        choose_device("abacus")
