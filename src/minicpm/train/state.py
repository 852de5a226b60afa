"""What a run carries from step to step: model, optimizer, random state, position; to tensors and back.

What this leaves out: files (`checkpoint`), and what the next batch is (a pure function of seed and step).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.model.adapter_files import CONFIG_NAME, adapter_config, adapter_tensors
from minicpm.model.init import initialize, parameter_rules
from minicpm.model.lora import LoRASettings, wrap
from minicpm.model.minicpm import MiniCPM
from minicpm.train.lean_optim import make_optimizer
from minicpm.train.optim import Optimizer, OptimizerConfig

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class TrainState:
    """The model and all that its next update depends on, besides the batch.

    `adapter` says that only adapters are trained, and how they were made; `base_name` is what they belong to.
    """

    model: MiniCPM
    optimizer: Optimizer
    step: int = 0
    adapter: LoRASettings | None = None
    base_name: str = ""

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.model.parameters()).device

    def weights(self) -> dict[str, Tensor]:
        """Return the model's weights under HF names, or the adapters' under PEFT's, sharing memory."""
        return adapter_tensors(self.model) if self.adapter is not None else dict(self.model.state_dict())

    def adapter_texts(self) -> dict[str, bytes]:
        """Return the file that makes the adapters' weights an adapter; none where the whole model is trained."""
        if self.adapter is None:
            return {}
        config = adapter_config(self.model, self.adapter, self.base_name)
        return {CONFIG_NAME: json.dumps(config, indent=2).encode() + b"\n"}

    def tensors(self) -> dict[str, Tensor]:
        """Return what a resumed run needs besides the weights, sharing memory."""
        random = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return {**self.optimizer.tensors(), **random}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take over what `weights()` and `tensors()` gave.

        Raises:
            CheckpointError: they belong to another model or optimizer.
        """
        if "random.cpu" not in state:
            raise CheckpointError("the checkpoint has no random state")
        self._copy_weights(weights)
        self.optimizer.load({n: t for n, t in state.items() if not n.startswith("random.")})
        torch.set_rng_state(state["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"], self.device)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights alone, as a history has them: masters become what they are, moments begin at zero.

        Raises:
            CheckpointError: they belong to another model.
        """
        self._copy_weights(weights)
        for name, master in self.optimizer.masters.items():
            master.copy_(weights[name])

    def _copy_weights(self, weights: Mapping[str, Tensor]) -> None:
        ours = self.weights()
        wrong = [n for n in {*ours, *weights} if n not in ours or n not in weights or ours[n].shape != weights[n].shape]
        if wrong:
            raise CheckpointError(f"the checkpoint's weights do not fit the model: {', '.join(sorted(wrong)[:5])}")
        for name, tensor in ours.items():
            tensor.copy_(weights[name])


def new_state(
    config: ModelConfig, optimizer: OptimizerConfig, seed: int, dtype: str, device: torch.device
) -> TrainState:
    """Return the state before the first update: weights by muP from `seed`, masters unrounded."""
    model = initialize(MiniCPM(config).to(device), seed)
    return wrap_state(model, optimizer, dtype, seed)


def wrap_state(model: MiniCPM, optimizer: OptimizerConfig, dtype: str, seed: int) -> TrainState:
    """Return the state around `model`, whose weights, if float32, become the masters before they are rounded."""
    torch.manual_seed(seed)
    masters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float32}
    model.to(DTYPES[dtype])
    shares = {name: rule.lr_scale for name, rule in parameter_rules(model.config).items()}
    return TrainState(model, make_optimizer(model, optimizer, shares, masters, is_half=dtype == "float16"))


def adapter_state(
    model: MiniCPM, optimizer: OptimizerConfig, settings: LoRASettings, dtype: str, seed: int, base_name: str
) -> TrainState:
    """Return the state of new adapters around `model`, which has `dtype` or blocks already and stays as it is."""
    torch.manual_seed(seed)
    wrap(model, settings, seed)
    made = make_optimizer(model, optimizer, {}, {}, is_half=dtype == "float16")
    return TrainState(model, made, adapter=settings, base_name=base_name)
