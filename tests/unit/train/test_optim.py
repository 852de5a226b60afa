"""AdamW by hand in float64, muP groups, masters, 8-bit states, and state that comes back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, ConfigError
from minicpm.model import MiniCPM, initialize, parameter_rules
from minicpm.train.blockwise import BLOCK, Codebook
from minicpm.train.optim import Optimizer, OptimizerConfig, global_norm


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(7, 5, generator=generator))
        self.vector = nn.Parameter(torch.randn(3, generator=generator))

    def loss(self, factor: float = 1.0) -> Tensor:
        return factor * (self.matrix.float().pow(3).sum() + (self.vector.float() * 2).exp().sum())


def by_hand(start: Tensor, grads: list[Tensor], rates: list[float], config: OptimizerConfig) -> Tensor:
    """BMTrain's formula, in float64."""
    p, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), 1):
        g = grad.double()
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g * g
        m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
        p = p - rate * m_hat / (v_hat.sqrt() + config.eps) - rate * config.weight_decay * p
    return p


@pytest.mark.parametrize(("states", "tolerance"), [("float32", 2e-5), ("int8", 3e-2)])
def test_updates_are_those_of_the_formula(states: str, tolerance: float) -> None:
    config = OptimizerConfig(states=states, weight_decay=0.3, clip_grad=0.0, eps=1e-3)
    model = Pair()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, config, {"matrix": 0.25})
    rates = [0.01, 0.03, 0.02, 0.02, 0.005]
    seen: dict[str, list[Tensor]] = {"matrix": [], "vector": []}
    for rate in rates:
        model.loss().backward()
        for name, grad in optimizer.ready_grads().items():
            seen[name].append(grad.clone())
        optimizer.update(rate)
    for name, share in (("matrix", 0.25), ("vector", 1.0)):
        expected = by_hand(start[name], seen[name], [r * share for r in rates], config)
        moved = (expected - start[name].double()).norm()
        error = (dict(model.named_parameters())[name].detach().double() - expected).norm()
        assert error <= tolerance * moved, name


def test_groups_are_the_reports(tiny_config: ModelConfig) -> None:
    model = initialize(MiniCPM(tiny_config))
    shares = {name: rule.lr_scale for name, rule in parameter_rules(tiny_config).items()}
    optimizer = Optimizer(model, OptimizerConfig(), shares)
    ratio = tiny_config.dim_model_base / tiny_config.hidden_size
    assert ratio != 1
    for name, parameter in model.named_parameters():
        is_scaled = parameter.ndim == 2 and not any(part in name for part in ("layernorm", "embed", "lm_head"))
        assert optimizer.shares[name] == (pytest.approx(ratio) if is_scaled else 1.0), name
    plain = Optimizer(model, OptimizerConfig(is_mup=False), shares)
    assert set(plain.shares.values()) == {1.0}


def test_clipping_bounds_the_whole_norm_and_reports_the_unclipped_one() -> None:
    model = Pair()
    optimizer = Optimizer(model, OptimizerConfig(clip_grad=0.5), {})
    model.loss().backward()
    true = math.sqrt(sum(float((g.double() ** 2).sum()) for g in optimizer.ready_grads().values()))
    norm = optimizer.update(0.01)
    assert norm == pytest.approx(true, rel=1e-6)
    assert norm > 0.5
    assert global_norm(list(optimizer.grads.values())) == pytest.approx(0.5, rel=1e-5)


def test_not_finite_gradient_moves_nothing() -> None:
    model = Pair()
    optimizer = Optimizer(model, OptimizerConfig(), {})
    before = model.matrix.detach().clone()
    model.loss(float("nan")).backward()
    assert not math.isfinite(optimizer.update(0.01))
    assert torch.equal(model.matrix, before)


def test_masters_keep_what_bf16_would_lose() -> None:
    model = Pair().to(torch.bfloat16)
    optimizer = Optimizer(model, OptimizerConfig(weight_decay=0.0), {})
    assert optimizer.has_masters
    start = optimizer.masters["matrix"].clone()
    for _ in range(20):
        model.loss().backward()
        optimizer.update(1e-5)
    moved = (optimizer.masters["matrix"] - start).abs()
    # Each update is far below half a bf16 unit of most weights, so only the master can have added them up.
    assert moved.mean() > 1e-4
    assert torch.equal(model.matrix, optimizer.masters["matrix"].to(torch.bfloat16))


def test_accumulated_bf16_gradients_are_summed_in_float32() -> None:
    model = Pair().to(torch.bfloat16)
    optimizer = Optimizer(model, OptimizerConfig(), {})
    for _ in range(300):
        model.loss(1 / 300).backward()
    reference = Pair().to(torch.bfloat16)
    reference.loss().backward()
    assert reference.matrix.grad is not None
    torch.testing.assert_close(optimizer.ready_grads()["matrix"], reference.matrix.grad.float(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("states", ["float32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_comes_back_to_the_bit(states: str, dtype: torch.dtype) -> None:
    config = OptimizerConfig(states=states)
    model = Pair().to(dtype)
    optimizer = Optimizer(model, config, {})
    for _ in range(3):
        model.loss().backward()
        optimizer.update(0.01)
    saved = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.loss().backward()
    optimizer.update(0.01)
    again = Pair().to(dtype)
    again.load_state_dict(weights)
    second = Optimizer(again, config, {})
    second.load(saved)
    again.loss().backward()
    second.update(0.01)
    for name, tensor in optimizer.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    assert torch.equal(model.matrix, again.matrix)


def test_foreign_state_is_refused() -> None:
    optimizer = Optimizer(Pair(), OptimizerConfig(), {})
    state = dict(optimizer.tensors())
    state["exp_avg.other"] = state.pop("exp_avg.matrix")
    with pytest.raises(CheckpointError, match=r"missing exp_avg\.matrix"):
        optimizer.load(state)


def test_codebook_is_even_over_seven_decades() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(1000, generator=generator) * torch.logspace(-5, 0, 1000)
    for is_signed in (True, False):
        book = Codebook.build(is_signed, torch.device("cpu"))
        given = values if is_signed else values.abs()
        codes, scales = book.encode(given)
        assert codes.dtype == torch.uint8
        assert (codes.numel(), scales.numel()) == (1000, -(-1000 // BLOCK))
        back = book.decode(codes, scales)
        large = given.abs() > scales.repeat_interleave(BLOCK)[:1000] * 1e-5
        # Half a step of 5 decades in 126 codes, and of 8 in 254.
        assert ((back - given).abs()[large] / given.abs()[large]).max() < (0.048 if is_signed else 0.038)
        if not is_signed:
            assert (back[given > 0] > 0).all()
        # What was decoded encodes to itself: saving and loading does not drift.
        assert torch.equal(book.encode(back)[0], codes)
    zeros = torch.zeros(300)
    assert torch.equal(book.decode(*book.encode(zeros)), zeros)


@pytest.mark.parametrize("fields", [{"beta1": 1.0}, {"eps": 0.0}, {"weight_decay": -1.0}, {"clip_grad": float("nan")}])
def test_impossible_numbers_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        OptimizerConfig(**fields)
