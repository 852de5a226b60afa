"""Building a torch model from named weights: bits kept, dtype said, misfits listed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, ConfigError
from minicpm.formats.weight import Weight
from minicpm.model import MiniCPM, initialize, load_model
from minicpm.model.loading import describe_dtypes, parse_dtype, read_tensor, saved_dtype

BLOCK_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def to_weight(tensor: torch.Tensor) -> Weight:
    """The tensor as it lies in a mapped file: read-only bytes."""
    raw = tensor.contiguous().view(torch.uint8).numpy().reshape(-1, tensor.shape[-1] * tensor.element_size()).copy()
    raw.flags.writeable = False
    return Weight(BLOCK_TYPES[tensor.dtype], tuple(tensor.shape), raw)


def to_weights(model: MiniCPM) -> dict[str, Weight]:
    return {name: to_weight(parameter.detach()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", BLOCK_TYPES)
def test_float_weights_keep_their_bits_and_their_dtype(tiny_config: ModelConfig, dtype: torch.dtype) -> None:
    source = initialize(MiniCPM(tiny_config), seed=1).to(dtype)
    with torch.no_grad():
        # A subnormal and a NaN with a payload survive a view, not every conversion.
        bits = source.model.norm.weight.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
        bits[0] = 1
        bits[1] = -1
    loaded = load_model(tiny_config, to_weights(source))
    for name, tensor in source.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_loaded_model_owns_its_weights(tiny_config: ModelConfig) -> None:
    weights = to_weights(initialize(MiniCPM(tiny_config), seed=1))
    before = weights["model.norm.weight"].data.copy()
    model = load_model(tiny_config, weights)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert np.array_equal(weights["model.norm.weight"].data, before)


def test_quantized_weights_are_decoded_into_the_configs_dtype(tiny_config: ModelConfig) -> None:
    source = initialize(MiniCPM(tiny_config), seed=1)
    weights = to_weights(source)
    for name, parameter in source.named_parameters():
        if parameter.ndim == 2:
            weights[name] = Weight.from_array(parameter.detach().numpy(), "Q8_0")
    model = load_model(tiny_config, weights)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert describe_dtypes(weights, torch.bfloat16) == "file q8_0, compute bf16, rope/norm/logits fp32"
    exact = load_model(tiny_config, weights, dtype=torch.float32)
    for name, parameter in exact.named_parameters():
        assert torch.equal(parameter, torch.from_numpy(weights[name].decode())), name
    rounded = read_tensor(weights["model.layers.0.mlp.up_proj.weight"])
    assert (rounded - source.model.layers[0].mlp.up_proj.weight).abs().max() < 1e-3


def test_the_saved_dtype_is_that_of_most_values(tiny_config: ModelConfig) -> None:
    # GGUF files keep norms in float32 whatever the matrices are.
    model = initialize(MiniCPM(tiny_config), seed=1)
    weights = to_weights(model.to(torch.bfloat16))
    weights |= {name: to_weight(p.detach().float()) for name, p in model.named_parameters() if p.ndim == 1}
    assert saved_dtype(tiny_config, weights) == torch.bfloat16
    assert describe_dtypes(weights, torch.float32) == "file bf16, compute fp32, rope/norm/logits fp32"


def test_an_equal_saved_head_is_taken_for_tied_and_another_is_refused(tiny_config: ModelConfig) -> None:
    model = initialize(MiniCPM(tiny_config), seed=1)
    weights = to_weights(model)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    assert load_model(tiny_config, weights).lm_head is None
    weights["lm_head.weight"] = to_weight(model.model.embed_tokens.weight.detach() * 2)
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        load_model(tiny_config, weights)
    untied = load_model(tiny_config.replace(tie_word_embeddings=False), weights)
    assert torch.equal(untied.head_weight, model.model.embed_tokens.weight * 2)


def test_all_misfits_are_listed(tiny_config: ModelConfig) -> None:
    weights = to_weights(initialize(MiniCPM(tiny_config), seed=1))
    del weights["model.norm.weight"]
    weights["model.layers.5.mlp.up_proj.weight"] = weights["model.layers.4.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.k_proj.weight"] = weights["model.layers.0.self_attn.q_proj.weight"]
    weights["model.layers.1.self_attn.k_proj.weight"] = weights["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(CheckpointError) as caught:
        load_model(tiny_config, weights)
    message = str(caught.value)
    assert "4 problems" in message
    assert "missing model.norm.weight" in message
    assert "surplus model.layers.5.mlp.up_proj.weight" in message
    assert "model.layers.0.self_attn.k_proj.weight is (96, 96), expected (32, 96)" in message
    assert "model.layers.1.self_attn.k_proj.weight" in message


def test_dtype_names() -> None:
    assert parse_dtype("bf16") is parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="'int8' is not supported"):
        parse_dtype("int8")
