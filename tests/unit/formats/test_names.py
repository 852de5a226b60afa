import numpy as np
import pytest

from minicpm.architecture import ModelConfig
from minicpm.formats import names

TABLES = [(names.HF_TO_GGUF, names.GGUF_TO_HF), (names.HF_TO_DRAGONFLY, names.DRAGONFLY_TO_HF)]


@pytest.mark.parametrize(("there", "back"), TABLES)
def test_every_weight_has_a_name_in_every_format(tiny_config: ModelConfig, there: dict, back: dict) -> None:
    for name in tiny_config.replace(tie_word_embeddings=False, num_hidden_layers=12).weight_shapes():
        other = names.translate(name, there)
        assert other is not None, name
        assert names.translate(other, back) == name
    assert len(back) == len(there)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.{}.mlp.up_proj.weight",
        "model.layers.01.mlp.up_proj.weight",
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.٣.mlp.up_proj.weight",
        "model.layers.123456.mlp.up_proj.weight",
        "model.layers.1.mlp.experts.0.w1.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "",
    ],
)
def test_what_no_table_knows(name: str) -> None:
    assert names.translate(name, names.HF_TO_GGUF) is None


def test_the_permutation_makes_both_rotations_one_function() -> None:
    """Rotating neighbours of the stored rows is rotating halves of the HF rows."""
    num_heads, head_dim = 3, 8
    query = np.random.default_rng(0).standard_normal(num_heads * head_dim)
    angles = np.arange(1, head_dim // 2 + 1) * 0.37
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = query.reshape(num_heads, 2, -1).swapaxes(0, 1)
    halves = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1).reshape(-1)
    order = names.interleaved_order(num_heads, head_dim)
    even, odd = np.moveaxis(query[order].reshape(num_heads, -1, 2), 2, 0)
    pairs = np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=2).reshape(-1)
    np.testing.assert_allclose(pairs[names.rotate_half_order(num_heads, head_dim)], halves)


def test_only_rotary_frequencies_are_ignored() -> None:
    assert names.is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not names.is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq.weight")
    assert not names.is_ignored("model.norm.weight")


def test_rotated_heads(tiny_config: ModelConfig) -> None:
    at = "model.layers.0.self_attn."
    counts = [names.rotated_heads(f"{at}{name}_proj.weight", tiny_config) for name in "qkvo"]
    assert counts == [6, 2, 0, 0]
