from __future__ import annotations

import numpy as np
import pytest
import torch

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.formats import blocks
from minicpm.formats.weight import Weight
from minicpm.model import MiniCPM, initialize, load_model
from minicpm.model.lora import LoRASettings, adapters, fuse, wrap
from minicpm.model.quantized import QuantizedLinear, decode, load_quantized


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_1"])
def test_decoding_is_that_of_the_formats(kind: str) -> None:
    data = blocks.encode(kind, np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32))
    assert torch.equal(decode(torch.from_numpy(data), kind, torch.float32), torch.from_numpy(blocks.decode(kind, data)))


def test_a_model_in_blocks_computes_and_trains_as_the_decoded_one(tiny_config: ModelConfig) -> None:
    start = initialize(MiniCPM(tiny_config), seed=5)
    weights = {name: Weight.from_array(t.numpy()) for name, t in start.state_dict().items()}
    kinds = {name: "Q4_1" if "_proj" in name else "F32" for name in weights}
    coded = {name: weight.encode(kinds[name]) for name, weight in weights.items()}
    found = []
    ids = torch.randint(331, (3, 11), generator=torch.Generator().manual_seed(4))
    for model in (
        load_model(tiny_config, coded, dtype=torch.float32),
        load_quantized(tiny_config, weights, "Q4_1", torch.float32),
        load_quantized(tiny_config, coded, "Q8_0", torch.float32),  # blocks stay what they are
    ):
        wrap(model, LoRASettings(rank=3), seed=2)
        for adapter in adapters(model).values():
            torch.nn.init.normal_(adapter.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
        logits = model(ids)
        logits.square().mean().backward()
        found.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    for logits, slopes in found[1:]:
        assert (logits - found[0][0]).abs().max() <= 1e-5
        assert slopes.keys() == found[0][1].keys()
        for name, slope in slopes.items():
            expected = found[0][1][name]
            assert slope is not None
            assert expected is not None
            assert (slope - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    assert all(isinstance(adapter.base, QuantizedLinear) for adapter in adapters(model).values())
    with pytest.raises(CheckpointError, match="would lose it"):
        fuse(model)
