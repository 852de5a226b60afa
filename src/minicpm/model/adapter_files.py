"""Adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

Names of tensors are those of the HF model under `base_model.model.`. What changes the computation and is not known
here is refused, never dropped.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minicpm.errors import CheckpointError, FormatError
from minicpm.model.lora import LoRASettings, adapters, unwrap, wrap
from minicpm.model.minicpm import MiniCPM

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# How PEFT ends the names of what our wrappers hold.
_ENDINGS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
}
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "bias"}
# Say where an adapter comes from or how it started, not what it computes.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}


def adapter_tensors(model: MiniCPM) -> dict[str, Tensor]:
    """Return the adapters' parameters under PEFT's names, sharing memory with the model."""
    return {
        f"{_PREFIX}{name}.{_ENDINGS[part]}": parameter
        for name, adapter in adapters(model).items()
        for part, parameter in adapter.named_parameters(recurse=False)
    }


def adapter_config(model: MiniCPM, settings: LoRASettings, base_name: str = "") -> dict[str, Any]:
    """Return what `adapter_config.json` says of the adapters of `model`.

    Raises:
        CheckpointError: the model has no adapters.
    """
    names = adapters(model)
    if not names:
        raise CheckpointError("the model has no adapters to save; wrap it first")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(names),
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "bias": "none",
        "inference_mode": True,
    }


def save_adapter(model: MiniCPM, settings: LoRASettings, folder: Path, base_name: str = "") -> None:
    """Write the adapters of `model` into `folder` (made if absent); `base_name` is what they belong to.

    Each file appears whole or not at all, the configuration last.

    Raises:
        CheckpointError: the model has no adapters.
    """
    config = adapter_config(model, settings, base_name)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_tensors(model).items()}
    partial = folder / (WEIGHTS_NAME + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    # The library makes its files private to this user; others may serve what this user trained.
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod(0o666 & ~mask)
    partial.replace(folder / WEIGHTS_NAME)
    partial = folder / (CONFIG_NAME + ".partial")
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / CONFIG_NAME)


def read_settings(folder: Path) -> LoRASettings:
    """Return the settings that `folder` declares.

    Raises:
        FormatError: no readable configuration, another kind of adapter, or a feature that is not known here.
    """
    path = folder / CONFIG_NAME
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: not a readable adapter configuration ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise FormatError(f"{path}: peft_type must be LORA")
    unknown = sorted(name for name, value in config.items() if name not in _READ | _IGNORED and value)
    if config.get("bias", "none") != "none":
        unknown.append("bias")
    if unknown:
        raise FormatError(f"{path}: {', '.join(unknown)} cannot be applied here; merge the adapter with peft instead")
    try:
        targets = config["target_modules"]
        return LoRASettings(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=(targets,) if isinstance(targets, str) else tuple(targets),
            use_rslora=bool(config.get("use_rslora", False)),
            use_dora=bool(config.get("use_dora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: r, lora_alpha and target_modules are needed as numbers and names") from error


def read_base_name(folder: Path) -> str:
    """Return what the adapter in `folder` says it belongs to; empty where it does not.

    Raises:
        FormatError: no readable configuration.
    """
    try:
        return str(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError) as error:
        raise FormatError(f"{folder / CONFIG_NAME}: not a readable adapter configuration ({error})") from error


def read_tensors(folder: Path) -> tuple[LoRASettings, dict[str, dict[str, Tensor]]]:
    """Return the settings of the adapter in `folder`, and for each module that it changes its tensors by our names.

    Raises:
        FormatError: files that cannot be read or hold unknown tensors.
    """
    settings, tensors = _read(folder)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, part = _module_and_part(folder / WEIGHTS_NAME, name)
        found.setdefault(module, {})[part] = tensor
    return settings, found


def _read(folder: Path) -> tuple[LoRASettings, dict[str, Tensor]]:
    declared = read_settings(folder)
    path = folder / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: not a readable safetensors file ({error})") from error
    # PEFT writes adapted embeddings' frozen weights too; they are the base model's.
    return declared, {name: tensor for name, tensor in tensors.items() if not name.endswith(".base_layer.weight")}


def load_adapter(model: MiniCPM, folder: Path) -> LoRASettings:
    """Wrap `model` with the adapters of `folder` and return their settings, whose targets are the modules found.

    Which modules are adapted is read from the tensors: `target_modules` may be a pattern.

    Raises:
        FormatError: files that cannot be read or hold unknown tensors.
        CheckpointError: adapters that do not fit the model; it is then unwrapped again.
    """
    declared, tensors = _read(folder)
    path = folder / WEIGHTS_NAME
    modules = {_module_and_part(path, name)[0] for name in tensors}
    settings = dataclasses.replace(declared, targets=tuple(sorted(modules)))
    wrap(model, settings)
    problems = _misfits(adapter_tensors(model), tensors)
    if problems:
        unwrap(model)
        raise CheckpointError(f"{path}: the adapters do not fit the model: {'; '.join(problems)}")
    with torch.no_grad():
        for name, parameter in adapter_tensors(model).items():
            parameter.copy_(tensors[name])
    return settings


def _module_and_part(path: Path, name: str) -> tuple[str, str]:
    for part, ending in _ENDINGS.items():
        if name.startswith(_PREFIX) and name.endswith("." + ending):
            return name[len(_PREFIX) : -len(ending) - 1], part
    raise FormatError(f"{path}: tensor {name!r} belongs to no LoRA adapter")


def _misfits(expected: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"surplus {name}" for name in given if name not in expected]
    problems += [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    return problems
