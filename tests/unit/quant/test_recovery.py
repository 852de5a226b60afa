"""The loss of recovery against PyTorch's, the memory that it announces, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minicpm.architecture import PRESETS, ModelConfig
from minicpm.errors import ConfigError
from minicpm.quant import recovery
from minicpm.quant.precision import uniform_types
from minicpm.quant.recovery import check_memory, divergence, memory_bytes


def test_divergence_and_its_slope_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(recovery, "_PIECE_LOGITS", 50 * 3)  # seven states take three pieces
    states, teacher = torch.randn(7, 12, requires_grad=True), torch.randn(7, 12)
    head, teacher_head = torch.randn(50, 12), torch.randn(50, 12)
    wanted = F.kl_div(
        F.log_softmax(states @ head.T, -1), F.log_softmax(teacher @ teacher_head.T, -1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    (slope,) = torch.autograd.grad(wanted, states)
    found, found_slope = divergence(states.detach(), head, teacher, teacher_head)
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(found_slope, slope, rtol=1e-4, atol=1e-6)
    assert divergence(teacher, head, teacher, head)[0] == pytest.approx(0, abs=1e-6)


def test_memory_is_announced_and_too_little_refused(tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS["minicpm-2b"]
    types = uniform_types(config, "Q4_0")
    # Levels of a byte, five float32 for every block of 32, and two heads of float32.
    least = config.num_parameters().linear * (1 + 20 / 32) + 2 * 4 * config.num_parameters().embedding
    assert least < memory_bytes(config, types) < least + 2**30
    monkeypatch.setattr(recovery, "available_bytes", lambda: 2**30)
    with pytest.raises(ConfigError, match=r"takes about \d\.\d GiB and 1\.0 are free"):
        check_memory(config, types)
    check_memory(tiny_config, uniform_types(tiny_config, "Q4_0"))
