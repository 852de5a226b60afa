"""Sampling filters, stops and reproducibility."""

from __future__ import annotations

import pytest
import torch

from minicpm.architecture import ModelConfig
from minicpm.errors import ConfigError
from minicpm.model import MiniCPM, generate, initialize
from minicpm.model.generation import filter_logits


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_filters_keep_the_best() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.7, 0.1, 0.1, 0.1]]).log()
    assert kept(filter_logits(logits)) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept(filter_logits(logits, top_k=2))[0] == [1, 3]
    assert kept(filter_logits(logits, top_p=0.6)) == [[1, 3], [0]]
    assert kept(filter_logits(logits, top_p=0.76))[0] == [1, 2, 3]
    assert kept(filter_logits(logits, top_p=1e-9)) == [[1], [0]]
    # Of the two best the first has two thirds.
    assert kept(filter_logits(logits, top_k=2, top_p=0.6))[0] == [1]


def test_rows_stop_on_their_own(tiny_config: ModelConfig) -> None:
    model = initialize(MiniCPM(tiny_config), seed=5)
    prompts = torch.tensor([[7, 9, 11], [8, 20, 300]])
    free = generate(model, prompts, 6, temperature=5.0, stop_ids=(), generator=torch.Generator().manual_seed(3))
    assert free.shape == (2, 6)
    stop = int(free[0, 2])
    assert stop not in free[1].tolist()
    assert stop not in free[0, :2].tolist()
    ended = generate(model, prompts, 6, temperature=5.0, stop_ids={stop}, generator=torch.Generator().manual_seed(3))
    assert ended[0].tolist() == [*free[0, :3].tolist(), stop, stop, stop]
    assert torch.equal(ended[1], free[1])
    alone = generate(model, prompts[:1], 6, stop_ids=range(331))
    assert alone.shape == (1, 1)


def test_the_configs_eos_ends_by_default(tiny_config: ModelConfig) -> None:
    model = initialize(MiniCPM(tiny_config.replace(eos_token_id=tuple(range(331)))), seed=5)
    assert generate(model, torch.tensor([[1, 2]]), 5).shape == (1, 1)


def test_draws_follow_the_generator(tiny_config: ModelConfig) -> None:
    model = initialize(MiniCPM(tiny_config), seed=5)
    prompt = torch.tensor([[7, 9, 11]])

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        out: list[int] = generate(model, prompt, 8, temperature=3.0, stop_ids=(), generator=generator)[0].tolist()
        return out

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_16_bit_model_and_autocast_generate(tiny_config: ModelConfig) -> None:
    model = initialize(MiniCPM(tiny_config), seed=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, torch.tensor([[1, 2]]), 3, stop_ids=()).shape == (1, 3)
    assert generate(model.to(torch.bfloat16), torch.tensor([[1, 2]]), 3, stop_ids=()).shape == (1, 3)


@pytest.mark.parametrize(
    "change", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_settings_out_of_range_are_refused(tiny_config: ModelConfig, change: dict[str, float]) -> None:
    arguments = {"max_new_tokens": 1} | change
    with pytest.raises(ConfigError, match="generation needs"):
        generate(MiniCPM(tiny_config), torch.tensor([[1]]), **arguments)


def test_an_empty_prompt_is_refused(tiny_config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        generate(MiniCPM(tiny_config), torch.zeros((1, 0), dtype=torch.long), 1)
