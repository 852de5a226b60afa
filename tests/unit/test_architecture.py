"""Parameter counts of the released models, defaults that their files leave out, and sizes that cannot be."""

import pytest

from minicpm.architecture import PRESETS, ModelConfig, RopeScaling
from minicpm.errors import ConfigError

# linear, norms, embedding, total tied, total untied: OpenBMB's released checkpoints, counted to the unit.
RELEASED = {
    "minicpm-2b": (2_441_871_360, 186_624, 282_822_912, 2_724_880_896, 3_007_703_808),
    "minicpm-1b": (1_247_281_152, 161_280, 112_803_840, 1_360_246_272, 1_473_050_112),
}
# Table 8 of the technical report gives non-embedding parameters in billions, to three digits.
WIND_TUNNEL = {
    "wind-9m": 0.009,
    "wind-30m": 0.036,
    "wind-70m": 0.066,
    "wind-0.1b": 0.109,
    "wind-0.17b": 0.166,
    "wind-0.2b": 0.241,
    "wind-0.5b": 0.499,
}


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts_equal_the_released_models(name: str) -> None:
    linear, norms, embedding, tied, untied = RELEASED[name]
    counts = PRESETS[name].num_parameters()
    assert (counts.linear, counts.norms, counts.embedding) == (linear, norms, embedding)
    assert counts.total == tied
    assert PRESETS[name].replace(tie_word_embeddings=False).num_parameters().total == untied


@pytest.mark.parametrize("name", WIND_TUNNEL)
def test_wind_tunnel_sizes_equal_the_report(name: str) -> None:
    config = PRESETS[name]
    # The report rounds down for the 9M model (9.83e6) and to the nearest elsewhere.
    assert config.num_parameters().non_embedding / 1e9 == pytest.approx(WIND_TUNNEL[name], abs=0.001)
    assert config.head_dim == 64
    assert config.intermediate_size == 2.5 * config.hidden_size


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_equal_the_sum_of_the_shapes(name: str, tied: bool) -> None:
    config = PRESETS[name].replace(tie_word_embeddings=tied)
    total = 0
    for shape in config.weight_shapes().values():
        size = 1
        for extent in shape:
            size *= extent
        total += size
    assert total == config.num_parameters().total


def test_scales_of_the_2b() -> None:
    config = PRESETS["minicpm-2b"]
    assert config.residual_scale == pytest.approx(0.221359, abs=1e-6)
    assert config.logit_divisor == 9
    assert config.attention_scale == 0.125
    assert config.kv_cache_bytes() == 368_640
    assert PRESETS["minicpm-1b"].residual_scale == pytest.approx(0.194145, abs=1e-6)
    assert PRESETS["minicpm-1b"].kv_cache_bytes() == 106_496


def test_what_the_released_files_leave_out() -> None:
    config = PRESETS["minicpm-2b"]
    assert config.rope_theta == 10000.0
    assert config.tie_word_embeddings is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 7}, "no multiple of num_attention_heads"),
        ({"num_key_value_heads": 4}, "no multiple of num_key_value_heads"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"model_type": "gpt2"}, "known: minicpm, llama, granite"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1"),
    ],
)
def test_sizes_that_cannot_be(tiny_config: ModelConfig, changes: dict[str, object], message: str) -> None:
    if "num_attention_heads" in changes:
        changes = {**changes, "head_dim": 0}
    with pytest.raises(ConfigError, match=message):
        tiny_config.replace(**changes)


def test_rope_scaling_names_what_it_knows() -> None:
    with pytest.raises(ConfigError, match="known: linear, dynamic"):
        RopeScaling("yarnish", 2.0)
    with pytest.raises(ConfigError, match="at least 1"):
        RopeScaling("linear", 0.5)
