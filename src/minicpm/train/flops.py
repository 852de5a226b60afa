"""Arithmetic of a step and what the machine can do: for model FLOPs utilisation and for the plan.

What this leaves out: vector work (norms, softmax, the optimizer), which MFU by convention does not count.
"""

from __future__ import annotations

import time

import torch

from minicpm.architecture import ModelConfig

# The product whose rate MFU is measured against.
PEAK_SHAPE = (8192, 512, 512)


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Return the floating-point operations of forward and backward for one token of a causal row.

    6 for each weight of a product (the head's too, the embedding is a lookup), and for attention per layer
    6 · T · query size, half of the full square.
    """
    counts = config.num_parameters()
    attention = 6 * config.num_hidden_layers * sequence_length * config.query_size
    return 6.0 * (counts.linear + config.vocab_size * config.hidden_size) + attention


def measure_peak(dtype: torch.dtype, device: torch.device, rounds: int = 8) -> float:
    """Return the FLOP/s of a plain product of `PEAK_SHAPE` in `dtype`, the best of `rounds`; well below a second."""
    rows, inner, columns = PEAK_SHAPE
    a = torch.ones(rows, inner, dtype=dtype, device=device)
    b = torch.ones(inner, columns, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * rows * inner * columns / best


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock reads what was done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
