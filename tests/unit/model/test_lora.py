"""Wrapping, fusing and the adapter files' refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minicpm.architecture import PRESETS, ModelConfig
from minicpm.errors import CheckpointError, ConfigError, FormatError
from minicpm.model import MiniCPM, initialize
from minicpm.model.adapter_files import adapter_tensors, load_adapter, save_adapter
from minicpm.model.lora import LoRASettings, adapters, fuse, unwrap, wrap

IDS = torch.tensor([[5, 9, 200, 17], [1, 2, 3, 330]])


def trained(config: ModelConfig, settings: LoRASettings) -> MiniCPM:
    model = initialize(MiniCPM(config), seed=5)
    wrap(model, settings)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return model


def test_only_adapters_are_trained(tiny_config: ModelConfig) -> None:
    model = initialize(MiniCPM(tiny_config), seed=5)
    names = wrap(model, LoRASettings(rank=4, targets=("q_proj", "v_proj")))
    assert names == [f"model.layers.{i}.self_attn.{p}_proj" for i in range(5) for p in "qv"]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [f"{name}.{part}" for name in names for part in ("lora_A", "lora_B")]


def test_upstreams_adapter_of_the_2b_has_the_printed_size() -> None:
    with torch.device("meta"):
        model = MiniCPM(PRESETS["minicpm-2b"])
    wrap(model, LoRASettings(rank=8, alpha=32.0, targets=("q_proj", "v_proj")))
    # What peft printed for the published fine-tuning script.
    assert sum(tensor.numel() for tensor in adapter_tensors(model).values()) == 2_949_120


def test_scalings() -> None:
    assert LoRASettings(rank=16, alpha=8.0).scaling == 0.5
    assert LoRASettings(rank=16, alpha=8.0, use_rslora=True).scaling == 2.0


def test_the_start_depends_on_seed_and_name(tiny_config: ModelConfig) -> None:
    def start(seed: int, targets: tuple[str, ...]) -> dict[str, Tensor]:
        model = initialize(MiniCPM(tiny_config), seed=5)
        wrap(model, LoRASettings(targets=targets), seed)
        return adapter_tensors(model)

    one, more, other = start(1, ("q_proj",)), start(1, ("q_proj", "k_proj")), start(2, ("q_proj",))
    assert all(torch.equal(tensor, more[name]) for name, tensor in one.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@torch.no_grad()
def test_unwrapping_brings_the_base_back(tiny_config: ModelConfig) -> None:
    model = trained(tiny_config, LoRASettings())
    base = initialize(MiniCPM(tiny_config), seed=5)
    assert (model(IDS) - base(IDS)).abs().max() > 1e-3
    unwrap(model)
    assert torch.equal(model(IDS), base(IDS))
    assert model.state_dict().keys() == base.state_dict().keys()


@torch.no_grad()
def test_fusing_beside_a_tied_head_unties_it(tiny_config: ModelConfig) -> None:
    model = trained(tiny_config, LoRASettings(rank=4, targets=("embed_tokens",)))
    expected = model(IDS)
    old_head = model.head_weight.clone()
    fuse(model)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.head_weight, old_head)
    assert (model(IDS) - expected).abs().max() <= 1e-5
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == model.config.weight_shapes()


@torch.no_grad()
def test_a_16_bit_base_is_fused_in_float32_and_rounded_once(tiny_config: ModelConfig) -> None:
    model = initialize(MiniCPM(tiny_config), seed=5).to(torch.bfloat16)
    wrap(model, LoRASettings(rank=4))
    name = "model.layers.2.mlp.up_proj"
    adapter = adapters(model)[name]
    adapter.lora_B.normal_(std=1e-2, generator=torch.Generator().manual_seed(1))
    base = adapter.base.weight.double()
    exact = base + adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double()
    fuse(model)
    fused = model.get_submodule(name).weight
    assert fused.dtype == torch.bfloat16
    # Rounding float64 and float32 sums to bf16 can differ only at a tie.
    assert (fused != exact.to(torch.bfloat16)).float().mean() < 1e-3


def test_dropout_is_of_training_only(tiny_config: ModelConfig) -> None:
    model = trained(tiny_config, LoRASettings(dropout=0.5))
    assert not torch.equal(model(IDS), model(IDS))
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


class Blocks(nn.Module):
    """A stand-in for a projection that holds its weight quantized."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.levels = (linear.weight.detach() * 64).round().to(torch.int8)

    @property
    def weight(self) -> Tensor:
        return self.levels.float() / 64

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_quantized_bases_are_adapted_and_not_merged(tiny_config: ModelConfig) -> None:
    model = initialize(MiniCPM(tiny_config), seed=5)
    name = "model.layers.1.mlp.down_proj"
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    model.set_submodule(name, Blocks(linear))
    wrap(model, LoRASettings(targets=("down_proj", "q_proj"), use_dora=True))
    model(IDS).sum().backward()
    gradient = adapters(model)[name].lora_B.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    before = model.get_submodule("model.layers.0.self_attn.q_proj").base.weight.clone()
    with pytest.raises(CheckpointError, match=r"down_proj holds its weight as Blocks.*merge, and quantize the result"):
        fuse(model)
    assert torch.equal(model.get_submodule("model.layers.0.self_attn.q_proj").base.weight, before)


def test_targets_that_cannot_be_are_refused(tiny_config: ModelConfig) -> None:
    model = MiniCPM(tiny_config)
    with pytest.raises(ConfigError, match=r"'w_proj' names no module; known: down_proj, embed_tokens, gate_proj"):
        wrap(model, LoRASettings(targets=("q_proj", "w_proj")))
    with pytest.raises(ConfigError, match="'lm_head' names no module"):
        wrap(model, LoRASettings(targets=("lm_head",)))
    with pytest.raises(ConfigError, match="DoRA is for projections"):
        wrap(model, LoRASettings(targets=("embed_tokens",), use_dora=True))
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters())
    wrap(model, LoRASettings())
    with pytest.raises(ConfigError, match="has adapters already"):
        wrap(model, LoRASettings())
    for change in ({"rank": 0}, {"targets": ()}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match="LoRA needs rank"):
            LoRASettings(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern cannot be applied here"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save cannot be applied here"),
        ({"bias": "all"}, "bias cannot be applied here"),
        ({"brand_new": True}, "brand_new cannot be applied here"),
        ({"r": "many"}, "are needed as numbers and names"),
        ({"r": 5}, r"lora_A.weight is \(8, 96\), expected \(5, 96\)"),
        ({"use_dora": True}, "missing base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tiny_config: ModelConfig, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    save_adapter(trained(tiny_config, LoRASettings()), LoRASettings(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = initialize(MiniCPM(tiny_config), seed=5)
    with pytest.raises((FormatError, CheckpointError), match=message):
        load_adapter(model, tmp_path)
    assert not adapters(model)


def test_broken_files_are_refused(tiny_config: ModelConfig, tmp_path: Path) -> None:
    model = trained(tiny_config, LoRASettings())
    with pytest.raises(FormatError, match="not a readable adapter configuration"):
        load_adapter(unwrap(model), tmp_path)
    with pytest.raises(CheckpointError, match="no adapters to save"):
        save_adapter(model, LoRASettings(), tmp_path)
    save_adapter(trained(tiny_config, LoRASettings()), LoRASettings(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    assert weights.stat().st_mode & 0o044 == 0o044
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        load_adapter(model, tmp_path)
