"""Parts of the network: masks, positions, rope, norm, cache, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from minicpm.architecture import ModelConfig
from minicpm.errors import ConfigError
from minicpm.model import KVCache, MiniCPM, initialize
from minicpm.model.attention import chunk_mask, document_mask, document_starts
from minicpm.model.layers import RMSNorm
from minicpm.model.rope import rotate, rotation_table


def test_documents_are_unbroken_runs() -> None:
    starts = document_starts(torch.tensor([[7, 7, 7, 3, 7, 7], [1, 2, 3, 3, 3, 3]]))
    assert starts.tolist() == [[0, 0, 0, 3, 4, 4], [0, 1, 2, 2, 2, 2]]
    mask = document_mask(starts)[0, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_a_chunk_sees_what_came_before() -> None:
    assert chunk_mask(2, 4, torch.device("cpu")).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_rotation_is_exact_far_out() -> None:
    frequencies = (1.0, 0.3, 0.0001)
    cos, sin = rotation_table(frequencies, torch.tensor([[0, 1, 4095]]))
    assert cos.shape == (1, 1, 3, 3)
    for row, position in enumerate((0, 1, 4095)):
        for column, rate in enumerate(frequencies):
            # A float32 angle of 4,095 radians is known to 1.2e-4.
            assert cos[0, 0, row, column].item() == pytest.approx(math.cos(position * rate), abs=3e-4)
            assert sin[0, 0, row, column].item() == pytest.approx(math.sin(position * rate), abs=3e-4)


def test_rope_pairs_the_halves() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = rotation_table((math.pi / 2, 0.0), torch.tensor([[1]]))
    assert rotate(x, cos, sin).flatten().tolist() == pytest.approx([-3.0, 2.0, 1.0, 4.0], abs=1e-6)


def recorded_cosines(model: MiniCPM) -> list[torch.Tensor]:
    """The cosines that every pass from now on hands to the first layer."""
    seen: list[torch.Tensor] = []

    def record(module: nn.Module, args: tuple[object, ...]) -> None:
        rotation = args[1]
        assert isinstance(rotation, tuple)
        seen.append(rotation[0])

    model.model.layers[0].register_forward_pre_hook(record)
    return seen


@torch.no_grad()
def test_positions_restart_in_every_document(tiny_config: ModelConfig) -> None:
    model = MiniCPM(tiny_config)
    seen = recorded_cosines(model)
    model(torch.ones(2, 5, dtype=torch.long), document_ids=torch.tensor([[1, 1, 2, 2, 2], [4, 4, 4, 4, 1]]))
    expected = [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert torch.equal(seen[0][:, 0, :, 0], torch.tensor(expected).float().cos())


@torch.no_grad()
def test_a_16_bit_model_rotates_in_float32(tiny_config: ModelConfig) -> None:
    model = initialize(MiniCPM(tiny_config)).to(torch.bfloat16)
    seen = recorded_cosines(model)
    model(torch.tensor([[5, 6]]), positions=torch.tensor([[300, 4095]]))
    assert seen[0].dtype == torch.float32
    assert seen[0][0, 0, :, 0].tolist() == pytest.approx([math.cos(300), math.cos(4095)], abs=3e-4)


def test_the_norm_casts_back_before_its_weight() -> None:
    norm = RMSNorm(64, 1e-5).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator).to(torch.bfloat16)
    nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), exact.to(torch.bfloat16) * norm.weight)
    assert not torch.equal(norm(x), (exact * norm.weight.float()).to(torch.bfloat16))


@pytest.mark.parametrize("kwargs", [{}, {"input_ids": torch.tensor([[1]]), "inputs_embeds": torch.zeros(1, 1, 96)}])
def test_exactly_one_input_is_asked_for(tiny_config: ModelConfig, kwargs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match="exactly one of input_ids and inputs_embeds"):
        MiniCPM(tiny_config)(**kwargs)


def test_documents_with_a_cache_are_refused(tiny_config: ModelConfig) -> None:
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ConfigError, match="packed documents run without a cache"):
        MiniCPM(tiny_config)(ids, document_ids=ids, cache=KVCache(tiny_config, 4))


@torch.no_grad()
def test_a_cache_says_when_it_is_full(tiny_config: ModelConfig) -> None:
    model, cache = MiniCPM(tiny_config), KVCache(tiny_config, 4)
    model(torch.tensor([[1, 2, 3]]), cache=cache)
    with pytest.raises(ConfigError, match="room for 4 positions, 3 are filled and 2 more"):
        model(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ConfigError, match="holds 1 sequences and got a batch of 2"):
        model(torch.tensor([[1], [2]]), cache=cache)
    with pytest.raises(ConfigError, match="cannot truncate"):
        cache.truncate(4)
    with pytest.raises(ConfigError, match="needs room for 1 position"):
        KVCache(tiny_config, 0)
    assert sum(t.nbytes for t in cache.keys + cache.values) == tiny_config.kv_cache_bytes(4, bytes_per_value=4)


def test_no_parameter_is_left_over_from_pytorchs_start(tiny_config: ModelConfig) -> None:
    with torch.device("meta"):
        empty = MiniCPM(tiny_config)
    assert not dict(empty.named_buffers())
    model = initialize(empty.to_empty(device="cpu"))
    expected = initialize(MiniCPM(tiny_config))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids), expected(ids))


@torch.no_grad()
def test_the_network_makes_no_tensor_on_another_device(tiny_config: ModelConfig) -> None:
    # Operations that mix the meta device with the CPU raise, as those that mix a GPU with it do.
    with torch.device("meta"):
        model = MiniCPM(tiny_config)
    ids = torch.ones(2, 5, dtype=torch.long, device="meta")
    assert model(ids, document_ids=ids).is_meta
    assert model(inputs_embeds=model.embed(ids), positions=ids).is_meta
    cache = KVCache(tiny_config, 11, 2, device="meta")
    for _ in range(2):
        assert model(ids, cache=cache).is_meta
    assert model(ids[:, :1], cache=cache).is_meta
