"""What is known at the moment a loss or gradient stops being finite, as plain data for a file.

What this leaves out: repairing it. A run that skips bad steps in silence trains on for hours and is lost.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minicpm.train.state import TrainState


def describe_tensor(tensor: Tensor) -> dict[str, Any]:
    """Return the root mean square, largest magnitude and number of values that are not finite."""
    values = tensor.detach().float()
    finite = torch.isfinite(values)
    bad = int((~finite).sum())
    kept = values[finite] if bad else values
    rms = float(kept.square().mean().sqrt()) if kept.numel() else math.nan
    return {"rms": rms, "max": float(kept.abs().max()) if kept.numel() else math.nan, "not_finite": bad}


def dump_failure(state: TrainState, step: int, reason: str, batches: list[Any]) -> dict[str, Any]:
    """Return step, reason, the batches' identities, and statistics of every weight and gradient in order of depth."""
    grads = state.optimizer.collected()
    return {
        "step": step,
        "reason": reason,
        "batches": batches,
        "first_bad_weight": _first_bad(dict(state.model.named_parameters())),
        "first_bad_gradient": _first_bad(grads),
        "weights": {name: describe_tensor(p) for name, p in state.model.named_parameters()},
        "gradients": {name: describe_tensor(g) for name, g in grads.items()},
    }


def _first_bad(tensors: dict[str, Tensor]) -> str | None:
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)


def write_failure(run: Path, facts: dict[str, Any]) -> Path:
    """Write the dump into the run's folder and return its path."""
    path = run / f"failure_step_{facts['step']:06d}.json"
    path.write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")
    return path
