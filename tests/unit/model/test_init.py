"""The muP table: initial deviations and learning-rate kinds."""

from __future__ import annotations

import math

import pytest
import torch

from minicpm.architecture import PRESETS, ModelConfig
from minicpm.model import MiniCPM, initialize, parameter_rules


def test_every_parameter_has_a_rule_in_order(tiny_config: ModelConfig) -> None:
    for config in (tiny_config, tiny_config.replace(tie_word_embeddings=False)):
        names = [name for name, _ in MiniCPM(config).named_parameters()]
        assert list(parameter_rules(config)) == names


def test_the_rules_of_the_released_2b() -> None:
    rules = parameter_rules(PRESETS["minicpm-2b"].replace(tie_word_embeddings=False))
    kinds = {name.removeprefix("model.").replace("layers.39.", ""): rule for name, rule in rules.items()}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rule = kinds[f"self_attn.{name}.weight"]
        assert (rule.kind, rule.lr_scale) == ("scaled", pytest.approx(1 / 9))
        assert rule.init_std == pytest.approx(0.1 / 3)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert kinds[f"mlp.{name}.weight"].kind == "scaled"
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert (kinds[name].kind, kinds[name].init_std, kinds[name].lr_scale) == ("base", 0.1, 1.0)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"):
        assert (kinds[name].kind, kinds[name].init_std, kinds[name].lr_scale) == ("base", None, 1.0)


def test_initialize_follows_the_table(tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(tie_word_embeddings=False)
    for name, parameter in initialize(MiniCPM(config), seed=1).named_parameters():
        std = parameter_rules(config)[name].init_std
        if std is None:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        error = 1 / math.sqrt(parameter.numel())
        assert parameter.std().item() == pytest.approx(std, rel=5 * error), name
        assert abs(parameter.mean().item()) <= 5 * std * error, name


def test_the_start_depends_on_seed_and_name_only(tiny_config: ModelConfig) -> None:
    one = initialize(MiniCPM(tiny_config), seed=1).state_dict()
    torch.manual_seed(99)
    deeper = initialize(MiniCPM(tiny_config.replace(num_hidden_layers=6)), seed=1).state_dict()
    other_seed = initialize(MiniCPM(tiny_config), seed=2).state_dict()
    half = initialize(MiniCPM(tiny_config).to(torch.bfloat16), seed=1).state_dict()
    for name, tensor in one.items():
        assert torch.equal(tensor, deeper[name])
        assert torch.equal(tensor.to(torch.bfloat16), half[name])
        assert tensor.ndim == 1 or not torch.equal(tensor, other_seed[name])
    assert not torch.equal(one["model.layers.0.self_attn.k_proj.weight"], one["model.layers.0.self_attn.v_proj.weight"])


@pytest.mark.parametrize(
    ("preset", "total", "untied"),
    [("minicpm-2b", 2_724_880_896, 3_007_703_808), ("minicpm-1b", 1_360_246_272, 1_473_050_112)],
)
def test_the_released_models_have_their_parameters(preset: str, total: int, untied: int) -> None:
    for config, count in (
        (PRESETS[preset], total),
        (PRESETS[preset].replace(tie_word_embeddings=False), untied),
    ):
        with torch.device("meta"):
            model = MiniCPM(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert sum(math.prod(shape) for shape in shapes.values()) == count
        assert list(shapes.items()) == list(config.weight_shapes().items())
