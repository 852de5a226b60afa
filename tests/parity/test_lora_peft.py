"""Our adapters against peft's, both ways: what we save peft loads to the same logits, and the reverse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm.architecture import ModelConfig
from minicpm.model import MiniCPM, initialize
from minicpm.model.adapter_files import adapter_tensors, load_adapter, save_adapter
from minicpm.model.lora import PROJECTIONS, LoRASettings, adapters, fuse, wrap

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = 1e-5
# peft asks transformers by a name that the newest release deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

CASES = {
    "all projections": LoRASettings(rank=4, alpha=10.0),
    "rsLoRA on two": LoRASettings(rank=4, alpha=10.0, targets=("q_proj", "v_proj"), use_rslora=True),
    "DoRA": LoRASettings(rank=4, alpha=10.0, use_dora=True),
    "one layer": LoRASettings(rank=4, alpha=10.0, targets=("layers.3.mlp.up_proj", "layers.1.self_attn.k_proj")),
    "embedding and head": LoRASettings(rank=4, alpha=10.0, targets=("embed_tokens", "lm_head", "o_proj")),
}


def config_of(case: str, tiny_config: ModelConfig) -> ModelConfig:
    return tiny_config.replace(tie_word_embeddings=case != "embedding and head")


def granite(model: MiniCPM) -> Any:
    config = model.config
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    network = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            **{name: getattr(config, name) for name in names},
            embedding_multiplier=config.scale_emb,
            residual_multiplier=config.residual_scale,
            attention_multiplier=config.attention_scale,
            logits_scaling=config.logit_divisor,
        )
    ).eval()
    network.load_state_dict(model.state_dict(), strict=False)
    return network


def disturb(tensors: dict[str, torch.Tensor]) -> None:
    """Adapters as training leaves them: nothing zero, magnitudes off the norm."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(331, (7, 11), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_ours(case: str, tiny_config: ModelConfig, ids: torch.Tensor, tmp_path: Path) -> None:
    model = initialize(MiniCPM(config_of(case, tiny_config)), seed=5)
    network = granite(model)
    with torch.no_grad():
        base = model(ids)
        wrap(model, CASES[case])
        assert (model(ids) - base).abs().max() <= TOLERANCE  # nothing changes before training
        disturb(adapter_tensors(model))
        ours = model(ids)
        assert (ours - base).abs().max() > 1000 * TOLERANCE
        save_adapter(model, CASES[case], tmp_path, "tiny")
        theirs = peft.PeftModel.from_pretrained(network, tmp_path)(ids).logits
        assert (ours - theirs).abs().max() <= TOLERANCE  # measured at most 4.8e-7
        fused = fuse(model)
        assert not adapters(fused)
        assert (fused(ids) - ours).abs().max() <= TOLERANCE  # measured at most 9.5e-7


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_pefts(case: str, tiny_config: ModelConfig, ids: torch.Tensor, tmp_path: Path) -> None:
    model = initialize(MiniCPM(config_of(case, tiny_config)), seed=5)
    settings = CASES[case]
    theirs = peft.get_peft_model(
        granite(model),
        peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.targets),
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            task_type="CAUSAL_LM",
        ),
    ).eval()
    disturb({name: p for name, p in theirs.named_parameters() if "lora_" in name})
    # With embeddings among the targets peft writes the frozen base matrices too; ours takes no notice of them.
    theirs.save_pretrained(tmp_path, save_embedding_layers="embed_tokens" in settings.targets)
    loaded = load_adapter(model, tmp_path)
    assert dataclasses.replace(loaded, targets=settings.targets) == settings
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() <= TOLERANCE  # measured at most 1.2e-6


def test_gradients_equal_pefts(tiny_config: ModelConfig, ids: torch.Tensor, tmp_path: Path) -> None:
    for use_dora in (False, True):
        model = initialize(MiniCPM(tiny_config), seed=5)
        network = granite(model)
        settings = LoRASettings(rank=4, alpha=10.0, use_dora=use_dora)
        wrap(model, settings)
        disturb(adapter_tensors(model))
        save_adapter(model, settings, tmp_path)
        theirs = peft.PeftModel.from_pretrained(network, tmp_path, is_trainable=True)
        model(ids).square().mean().backward()
        theirs(ids).logits.square().mean().backward()
        expected = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
        expected = {name.removesuffix(".weight") if "magnitude" in name else name: g for name, g in expected.items()}
        ours = {name: tensor.grad for name, tensor in adapter_tensors(model).items()}
        assert ours.keys() == expected.keys()
        for name, gradient in ours.items():
            assert gradient is not None
            # Measured 1.1e-6 of the largest.
            assert (gradient - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert all("lora_" in name for name in trained)


def test_every_target_is_named_in_the_file(tiny_config: ModelConfig, tmp_path: Path) -> None:
    model = initialize(MiniCPM(tiny_config), seed=5)
    wrap(model, LoRASettings())
    save_adapter(model, LoRASettings(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 5 * len(PROJECTIONS)
