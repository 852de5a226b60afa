"""Recovery: the scales of a rounded model and its norms are tuned until its answers are nearer to the original's.

The teacher is the unquantized model, whose last hidden states are made beforehand, one layer in memory at a time; the
loss is the divergence of the student's distributions from the teacher's at every position. Levels, types and sizes
stay. What this leaves out: embedding and head, which stay as they were rounded, and interrupted runs, which begin
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, ConfigError
from minicpm.formats.folder_weights import EMBEDDING, HEAD
from minicpm.formats.weight import Weight
from minicpm.model.loading import fill
from minicpm.model.minicpm import MiniCPM
from minicpm.quant.grid import GRIDS
from minicpm.quant.judge import final_hidden
from minicpm.quant.layer import PROJECTIONS
from minicpm.quant.stream import Weights, head_matrix
from minicpm.quant.tunable import HALVES, TunableLinear
from minicpm.quant.windows import Windows
from minicpm.train.plan import available_bytes

Progress = Callable[[str, int, int], None]
_WARMUP = 0.1
_PIECE_LOGITS = 1 << 24


@dataclass(frozen=True)
class RecoverySettings:
    """How long and how fast.

    Attributes:
        steps: updates of Adam, one window each.
        lr: the peak rate, relative to each scale; it rises for a tenth of the steps and then falls to 0 in a line.
        seed: orders the windows.
    """

    steps: int
    lr: float = 1e-3
    seed: int = 0


def recover(
    config: ModelConfig,
    original: Weights,
    rounded: Mapping[str, Weight],
    groups: Mapping[str, int],
    windows: Windows,
    settings: RecoverySettings,
    progress: Progress = lambda name, done, total: None,
) -> dict[str, Weight]:
    """Return the weights that differ from `rounded` after tuning, under their HF names.

    Args:
        config: the shape of both.
        original: the teacher; read, never changed.
        rounded: the student.
        groups: how many blocks of each matrix share a scale, by HF name; see `blocks_per_group`.
        windows: what both read.
        settings: how.
        progress: called after every step.

    Raises:
        CheckpointError: a divergence that is not finite.
    """
    teacher = final_hidden(config, original, windows).split(windows.is_scored.sum(1).tolist())
    teacher_head, head = head_matrix(config, original), head_matrix(config, rounded)
    student = build_student(config, rounded, groups)
    student.checkpoint_every = 1
    optimizer, schedule = _optimizer(student, settings)
    for step, index in enumerate(_order(len(windows.ids), settings)):
        here = slice(index, index + 1)
        hidden = student.hidden_states(windows.ids[here], document_ids=windows.document_ids[here])
        scored = hidden[:, :-1][windows.is_scored[here]]
        kl, slope = divergence(scored.detach() / config.logit_divisor, head, teacher[index], teacher_head)
        if not math.isfinite(kl):
            raise CheckpointError(f"recovery's divergence was {kl} at step {step}; take fewer steps")
        scored.backward(slope / config.logit_divisor)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        progress(f"recovery, KL {kl:.4f}", step + 1, settings.steps)
    return _tuned(student)


def memory_bytes(config: ModelConfig, types: Mapping[str, str]) -> int:
    """Return about the most memory that recovery takes: both heads, the student, its tuned numbers with Adam's sums."""
    shapes = config.weight_shapes()
    ends = 4 * sum(math.prod(shapes[name]) for name in (EMBEDDING, HEAD) if name in shapes)
    tuned = {name: kind for name, kind in types.items() if name not in (EMBEDDING, HEAD)}
    numbers = levels = 0
    for name, kind in tuned.items():
        grid = GRIDS[kind]
        count, size = len(HALVES[grid.block_type]), math.prod(shapes[name])
        numbers += 5 * 4 * count * size // grid.block_size
        levels += count * size * (2 if grid.code_range else 1)
    largest = max(math.prod(shapes[name]) for name in tuned)
    return ends + 4 * math.prod(shapes[EMBEDDING]) + numbers + levels + 4 * 4 * largest + 6 * 4 * _PIECE_LOGITS


def check_memory(config: ModelConfig, types: Mapping[str, str]) -> None:
    """Return if recovery of a model with such types fits this machine.

    Raises:
        ConfigError: it does not, or there is nothing to tune.
    """
    untuned = {kind for name, kind in types.items() if name not in (EMBEDDING, HEAD) and kind not in GRIDS}
    if untuned:
        raise ConfigError(f"recovery tunes the scales of blocks; {', '.join(sorted(untuned))} has none")
    needed, there = memory_bytes(config, types), available_bytes()
    if there and needed > there:
        raise ConfigError(
            f"recovery of this model takes about {needed / 2**30:.1f} GiB and {there / 2**30:.1f} are free; "
            "leave --recover out, or use a larger machine"
        )


def build_student(config: ModelConfig, rounded: Mapping[str, Weight], groups: Mapping[str, int]) -> MiniCPM:
    """Return a float32 model of `rounded` in which only blocks' numbers and norms have gradients."""
    with torch.device("meta"):
        model = MiniCPM(config)
    for index in range(config.num_hidden_layers):
        for short in PROJECTIONS:
            name = f"model.layers.{index}.{short}"
            weight = rounded[f"{name}.weight"]
            if weight.block_type in HALVES:
                model.set_submodule(name, TunableLinear(weight, groups.get(f"{name}.weight", 1)))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            filled = nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.dim() == 1)
            fill(filled, rounded[name])
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, filled)
    return model


def divergence(states: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> tuple[float, Tensor]:
    """Return the mean KL(teacher ‖ student) in nats and its gradient (N, E) by `states`.

    Args:
        states: (N, E), divided for the head.
        head: (V, E), the student's.
        teacher: (N, E), divided too.
        teacher_head: (V, E).
    """
    slope = torch.empty_like(states)
    step = max(1, _PIECE_LOGITS // len(head))
    total = 0.0
    for start in range(0, len(states), step):
        here = slice(start, start + step)
        logprobs = torch.log_softmax(states[here] @ head.T, dim=-1)
        wanted = torch.log_softmax(teacher[here] @ teacher_head.T, dim=-1)
        target = wanted.exp()
        total += float((target * (wanted - logprobs)).sum())
        slope[here] = (logprobs.exp_() - target) @ head / len(states)
    return total / len(states), slope


def _optimizer(
    student: MiniCPM, settings: RecoverySettings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return Adam with rates that are relative to what is learned, and their schedule."""
    groups = [
        {
            "params": [parameter],
            "lr": settings.lr * (1.0 if parameter.dim() > 1 else float(parameter.detach().abs().mean())),
        }
        for parameter in student.parameters()
        if parameter.requires_grad
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    warmup = max(1, round(_WARMUP * settings.steps))

    def share(step: int) -> float:
        return min((step + 1) / warmup, (settings.steps - step) / max(1, settings.steps - warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _order(num_windows: int, settings: RecoverySettings) -> Iterator[int]:
    """Yield the window of each step: all of them in a new order, again and again."""
    generator = torch.Generator().manual_seed(settings.seed)
    left: list[int] = []
    for _ in range(settings.steps):
        left = left or torch.randperm(num_windows, generator=generator).tolist()
        yield left.pop()


def _tuned(student: MiniCPM) -> dict[str, Weight]:
    made = {
        f"{name}.weight": module.to_weight()
        for name, module in student.named_modules()
        if isinstance(module, TunableLinear)
    }
    norms = {name: parameter for name, parameter in student.named_parameters() if name.endswith("norm.weight")}
    return made | {name: Weight.from_array(norm.detach().numpy()) for name, norm in norms.items()}
