"""The torch model against transformers: Granite on unchanged weights, Llama on folded ones.

Ours divides the hidden state before the head and Granite the logits after it, and our rotary frequencies are rounded
once from float64: hence errors of rounding size, and never zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from minicpm.architecture import PRESETS, ModelConfig, RopeScaling
from minicpm.model import MiniCPM, initialize

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5


def seeded_ids(config: ModelConfig, batch: int = 7, length: int = 11) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def hf_arguments(config: ModelConfig, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "attn_implementation": "eager",
        **more,
    }


def granite_logits(config: ModelConfig, state: dict[str, Tensor], ids: Tensor, **more: Any) -> Tensor:
    granite = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            **hf_arguments(config, **more),
            embedding_multiplier=config.scale_emb,
            residual_multiplier=config.residual_scale,
            attention_multiplier=config.attention_scale,
            logits_scaling=config.logit_divisor,
        )
    ).eval()
    result = granite.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    with torch.no_grad():
        logits: Tensor = granite(ids).logits
    return logits


def randomized(config: ModelConfig) -> MiniCPM:
    """The start of training, with norms that are not 1 so that their weight matters."""
    model = initialize(MiniCPM(config), seed=3)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


def our_logits(model: MiniCPM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("is_tied", [True, False])
def test_granite_computes_the_same_on_unchanged_weights(tiny_config: ModelConfig, is_tied: bool) -> None:
    config = tiny_config.replace(tie_word_embeddings=is_tied)
    model, ids = randomized(config), seeded_ids(config)
    difference = our_logits(model, ids) - granite_logits(config, model.state_dict(), ids)
    assert difference.abs().max() <= TOLERANCE  # measured 4.8e-7 tied, 2.4e-7 untied


@pytest.mark.parametrize(
    "change",
    [
        {"scale_emb": 1.0},
        {"scale_depth": 1.0},
        {"dim_model_base": 96.0},
        {"attention_multiplier": 1 / 16},
        {"rope_theta": 1e6},
        {"rms_norm_eps": 1e-2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_missing_factor_is_seen(tiny_config: ModelConfig, change: dict[str, float]) -> None:
    model, ids = randomized(tiny_config), seeded_ids(tiny_config)
    wrong = MiniCPM(dataclasses.replace(tiny_config, **change))
    wrong.load_state_dict(model.state_dict())
    difference = our_logits(wrong, ids) - granite_logits(tiny_config, model.state_dict(), ids)
    assert difference.abs().max() > 100 * TOLERANCE  # measured at least 7.9e-3


def fold(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Llama weights that compute the same: every scale multiplied into a matrix."""
    folded = dict(state)
    folded["lm_head.weight"] = state.get("lm_head.weight", state["model.embed_tokens.weight"]) / config.logit_divisor
    folded["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] * config.scale_emb
    for name in state:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            folded[name] = state[name] * config.residual_scale
    return folded


@pytest.mark.parametrize("is_tied", [True, False])
def test_llama_computes_the_same_on_folded_weights(tiny_config: ModelConfig, is_tied: bool) -> None:
    config = tiny_config.replace(tie_word_embeddings=is_tied)
    model, ids = randomized(config), seeded_ids(config)
    arguments = hf_arguments(config) | {"tie_word_embeddings": False}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**arguments)).eval()
    llama.load_state_dict(fold(config, model.state_dict()))
    with torch.no_grad():
        difference = our_logits(model, ids) - llama(ids).logits
    assert difference.abs().max() <= TOLERANCE  # measured 4.8e-7 tied, 3.0e-7 untied


def test_two_full_width_layers_of_the_2b_equal_granite() -> None:
    # 2 of the 40 layers and 1,024 of the 122,753 tokens; every other size is the released model's.
    config = PRESETS["minicpm-2b"].replace(num_hidden_layers=2, vocab_size=1024)
    model, ids = randomized(config), seeded_ids(config, 2, 64)
    ours, theirs = our_logits(model, ids), granite_logits(config, model.state_dict(), ids)
    assert (ours - theirs).abs().max() <= TOLERANCE  # measured 3.1e-6 on logits up to 5.9


SCALINGS = {
    "linear": (RopeScaling("linear", 3.0), {"rope_type": "linear", "factor": 3.0}, 40),
    "dynamic, short": (RopeScaling("dynamic", 3.0), {"rope_type": "dynamic", "factor": 3.0}, 20),
    "dynamic, long": (RopeScaling("dynamic", 3.0), {"rope_type": "dynamic", "factor": 3.0}, 90),
    "llama3": (
        RopeScaling("llama3", 8.0, 24, 1.0, 4.0),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 24,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        40,
    ),
    # NTK-by-parts is the same ramp with wider borders; transformers' yarn rounds its ramp to whole dimensions.
    "ntk_by_parts": (
        RopeScaling("ntk_by_parts", 8.0, 300, 1.0, 32.0),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 300,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        40,
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scalings_equal_transformers(tiny_config: ModelConfig, name: str) -> None:
    scaling, theirs, length = SCALINGS[name]
    config = tiny_config.replace(rope_scaling=scaling, max_position_embeddings=32)
    model, ids = randomized(config), seeded_ids(config, 2, length)
    expected = granite_logits(config, model.state_dict(), ids, rope_scaling=dict(theirs))
    assert (our_logits(model, ids) - expected).abs().max() <= TOLERANCE  # measured at most 7.2e-7
    plain = MiniCPM(config.replace(rope_scaling=None))
    plain.load_state_dict(model.state_dict())
    if name != "dynamic, short":
        assert (our_logits(plain, ids) - expected).abs().max() > 100 * TOLERANCE


def test_gradients_equal_granite(tiny_config: ModelConfig) -> None:
    model, ids = randomized(tiny_config), seeded_ids(tiny_config)
    granite = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            **hf_arguments(tiny_config),
            embedding_multiplier=tiny_config.scale_emb,
            residual_multiplier=tiny_config.residual_scale,
            attention_multiplier=tiny_config.attention_scale,
            logits_scaling=tiny_config.logit_divisor,
        )
    )
    granite.load_state_dict(model.state_dict(), strict=False)
    loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    granite(ids, labels=ids).loss.backward()
    theirs = dict(granite.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        scale = expected.abs().max()
        assert (parameter.grad - expected).abs().max() <= 1e-5 * scale, name  # measured 5.3e-7 of the largest
