from __future__ import annotations

import pytest
import torch

from minicpm.architecture import ModelConfig
from minicpm.errors import ConfigError
from minicpm.model import MiniCPM, initialize
from minicpm.train.lean_optim import LeanOptimizer, make_optimizer, round_by_chance
from minicpm.train.optim import Optimizer, OptimizerConfig


def test_rounding_by_chance_is_right_on_average() -> None:
    torch.manual_seed(0)
    value = torch.tensor([1.0 + 1 / 512, -3.0 - 1 / 640, 2.0, 0.0]).repeat(20_000, 1)
    rounded = round_by_chance(value)
    assert rounded.dtype == torch.bfloat16
    # Half a step of bf16 at 1 is 1/256: the mean of 20,000 draws is off by at most 1e-4.
    assert (rounded.float().mean(dim=0) - value[0]).abs().max() < 2e-4
    assert (rounded[:, 2:] == value[:, 2:]).all()
    assert len(rounded[:, 0].unique()) == 2


def step_of(model: MiniCPM, optimizer: Optimizer, seed: int) -> float:
    ids = torch.randint(331, (2, 11), generator=torch.Generator().manual_seed(seed))
    optimizer.begin(0.02)
    model(ids).square().mean().backward()
    return optimizer.update(0.02)


@pytest.mark.parametrize("states", ["float32", "int8", "factored"])
def test_fused_moves_as_unfused(states: str, tiny_config: ModelConfig) -> None:
    found = []
    for is_fused in (False, True):
        torch.manual_seed(1)
        model = initialize(MiniCPM(tiny_config), seed=5)
        config = OptimizerConfig(masters="none", states=states, is_fused=is_fused, clip_grad=0.0)
        optimizer = make_optimizer(model, config, {}, {})
        norms = [step_of(model, optimizer, seed) for seed in range(3)]
        assert not any(parameter.grad is not None for parameter in model.parameters())
        found.append((norms, {n: p.detach().clone() for n, p in model.named_parameters()}))
    (norms, weights), (fused_norms, fused_weights) = found
    assert fused_norms == pytest.approx(norms, rel=1e-5)
    for name, weight in weights.items():
        assert torch.equal(weight, fused_weights[name]), name


def test_without_masters_float32_moves_as_with_them(tiny_config: ModelConfig) -> None:
    found = []
    for masters in ("float32", "none"):
        model = initialize(MiniCPM(tiny_config), seed=5)
        optimizer = make_optimizer(model, OptimizerConfig(masters=masters), {}, {})
        for seed in range(3):
            step_of(model, optimizer, seed)
        found.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for name, weight in found[0].items():
        assert (weight - found[1][name]).abs().max() <= 1e-5, name


def test_factored_update_is_that_of_torch() -> None:
    torch.manual_seed(0)
    start, slopes = torch.randn(6, 10) * 0.01, [torch.randn(6, 10) for _ in range(3)]
    theirs = torch.nn.Parameter(start.clone())
    # Its step is max(eps2, rms of the weight) times the rate: 1 here.
    peer = torch.optim.Adafactor([theirs], lr=0.01, beta2_decay=-0.8, eps=(1e-30, 1.0), d=1.0, weight_decay=0.0)
    ours = torch.nn.Linear(10, 6, bias=False)
    ours.weight.data.copy_(start)
    config = OptimizerConfig(masters="none", states="factored", clip_grad=0.0, weight_decay=0.0)
    optimizer = LeanOptimizer(ours, config, {})
    for slope in slopes:
        theirs.grad = slope.clone()
        peer.step()
        (ours.weight * slope).sum().backward()
        optimizer.update(0.01)
    assert (ours.weight - theirs).abs().max() <= 1e-6


def test_half_precision_shrinks_its_scale_and_moves_nothing(tiny_config: ModelConfig) -> None:
    model = initialize(MiniCPM(tiny_config), seed=5)
    optimizer = make_optimizer(model, OptimizerConfig(), {}, {}, is_half=True)
    before, first = model.model.norm.weight.detach().clone(), optimizer.scale
    (model.model.norm.weight * float("inf")).sum().backward()
    assert not torch.isfinite(torch.tensor(optimizer.update(0.1)))
    assert torch.equal(model.model.norm.weight, before)
    assert optimizer.shrink_scale()
    assert optimizer.scale == first / 2
    # A scaled loss moves as an unscaled one.
    (model.model.norm.weight.sum() * optimizer.scale).backward()
    assert optimizer.update(0.1) == pytest.approx(96**0.5)
    with pytest.raises(ConfigError, match="float16 needs float32 masters"):
        make_optimizer(model, OptimizerConfig(masters="none"), {}, {}, is_half=True)
