"""Folding and the way back: scales, ties and bits."""

import numpy as np
import pytest

from minicpm.architecture import ModelConfig
from minicpm.errors import ConfigError
from minicpm.exchange.family import EMBEDDING, HEAD, FoldNote, fold_factors, move
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry


def entries_of(config: ModelConfig, block_type: str) -> dict[str, WeightEntry]:
    rng = np.random.default_rng(3)
    weights = {
        name: Weight.from_array(rng.normal(size=shape).astype(np.float32), block_type)
        for name, shape in config.weight_shapes().items()
    }
    return {name: WeightEntry(w.shape, w.block_type, lambda w=w: w) for name, w in weights.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("block_type", ["BF16", "F16"])
def test_there_and_back_through_float32_is_exact(tiny_config: ModelConfig, tied: bool, block_type: str) -> None:
    torch_dtype = {"BF16": "bfloat16", "F16": "float16"}[block_type]
    config = tiny_config.replace(tie_word_embeddings=tied, torch_dtype=torch_dtype)
    source = entries_of(config, block_type)
    folded = move(config, source, "llama", None, "F32")
    assert folded.config.model_type == "llama"
    assert (folded.config.scale_emb, folded.config.residual_scale, folded.config.logit_divisor) == (1, 1, 1)
    assert not folded.config.tie_word_embeddings
    assert set(folded.entries) == set(folded.config.weight_shapes())
    assert folded.note == FoldNote.parse(FoldNote.of(config).to_dict())
    back = move(folded.config, folded.entries, "minicpm", folded.note, None)
    assert back.config == config
    assert set(back.entries) == set(source)
    for name, entry in back.entries.items():
        assert np.array_equal(entry.make().decode(), source[name].make().decode()), name


def test_every_scale_goes_where_it_belongs(tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(model_type="granite", attention_multiplier=0.3)
    source = entries_of(config, "F32")
    folded = move(config, source, "llama", None, None)
    expected = {
        EMBEDDING: 12.0,
        "model.layers.1.self_attn.o_proj.weight": config.residual_scale,
        "model.layers.1.mlp.down_proj.weight": config.residual_scale,
        "model.layers.1.self_attn.q_proj.weight": 0.3 * 4,
        "model.layers.1.self_attn.k_proj.weight": 1.0,
        "model.layers.1.mlp.up_proj.weight": 1.0,
        "model.norm.weight": 1.0,
    }
    for name, factor in expected.items():
        before, after = source[name].make().decode(), folded.entries[name].make().decode()
        np.testing.assert_allclose(after, before * np.float32(factor), rtol=1e-6)
    head = folded.entries[HEAD].make().decode()
    np.testing.assert_allclose(head, source[EMBEDDING].make().decode() / 4, rtol=1e-6)


def test_minicpm_and_granite_share_their_weights(tiny_config: ModelConfig) -> None:
    source = entries_of(tiny_config, "BF16")
    granite = move(tiny_config, source, "granite", None, None)
    assert granite.config == tiny_config.replace(model_type="granite")
    assert all(granite.entries[name] is source[name] for name in source)
    assert move(granite.config, granite.entries, "minicpm", None, None).config == tiny_config


def test_a_llama_stays_tied_where_no_scale_needs_a_head(tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(model_type="granite", scale_emb=1.0, dim_model_base=96.0)
    folded = move(config, entries_of(config, "BF16"), "llama", None, None)
    assert folded.config.tie_word_embeddings
    assert HEAD not in folded.entries
    assert fold_factors(config)[EMBEDDING] == 1.0


def test_minicpm_cannot_hold_an_attention_multiplier(tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(model_type="granite", attention_multiplier=0.3)
    with pytest.raises(ConfigError, match="minicpm has no attention_multiplier"):
        move(config, entries_of(config, "BF16"), "minicpm", None, None)
    with pytest.raises(ConfigError, match="known: minicpm, llama, granite"):
        move(config, {}, "gpt2", None, None)
