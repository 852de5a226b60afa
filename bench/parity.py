"""What each known cause of "the same model answers differently elsewhere" costs, on real weights.

Every row is the divergence of one variant from float32 arithmetic on the same weights and text: bf16 and fp16 compute,
rope rounded to bf16 in the two ways that have shipped, the engine. The last rows say what a silent `top_k = 50` does
to the distribution that is sampled from. Peer: the same weights in `transformers`, bf16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from minicpm.exchange.agreement import Scores, agreement
from minicpm.exchange.backends import Backend, EngineBackend, TorchBackend, TransformersBackend
from minicpm.exchange.convert import convert
from minicpm.exchange.source import open_source
from minicpm.hub import resolve
from minicpm.model import attention, minicpm, rope

BLOCKS = ((0, 256), (256, 1024), (1024, 2048))


def rotate_in_bf16(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first HF file: tables cast to bf16, products in bf16."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def table_of_bf16_angles(frequencies: tuple[float, ...], positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`model.to(bfloat16)` on a buffer of frequencies: positions and angles have 8 bits."""
    rates = torch.tensor(frequencies).bfloat16()
    angles = (positions[:, None, :, None].bfloat16() * rates).float()
    return angles.cos(), angles.sin()


def score(make: Callable[[], Backend], windows: list[list[int]]) -> list[Scores]:
    backend = make()
    return [backend.score(ids) for ids in windows]


def cost(truth: list[Scores], variant: list[Scores], start: int, stop: int) -> tuple[float, float]:
    parts = [
        agreement(Scores(a.logprobs[start:stop]), Scores(b.logprobs[start:stop]))
        for a, b in zip(truth, variant, strict=True)
    ]
    return float(np.mean([p.mean_kl for p in parts])), float(np.mean([p.top1 for p in parts]))


def top_k_rows(truth: list[Scores], temperature: float, top_p: float) -> tuple[float, float]:
    """Return the share of positions that `top_k = 50` changes, and the mean probability that it moves."""
    moved = []
    for scores in truth:
        p = np.exp(scores.logprobs.astype(np.float64) / temperature)
        p = -np.sort(-p / p.sum(1, keepdims=True), axis=1)
        before = np.cumsum(p, axis=1) - p
        kept = p * (before < top_p)
        kept /= kept.sum(1, keepdims=True)
        moved.append(kept[:, 50:].sum(1))
    mass = np.concatenate(moved)
    return float((mass > 0).mean()), float(mass.mean())


def variants(folder: str) -> dict[str, list[Scores] | Callable[[list[list[int]]], list[Scores]]]:
    def bf16_rotation(windows: list[list[int]]) -> list[Scores]:
        with mock.patch.object(attention, "rotate", rotate_in_bf16):
            return score(lambda: TorchBackend(folder, "bf16"), windows)

    def bf16_angles(windows: list[list[int]]) -> list[Scores]:
        with mock.patch.object(minicpm, "rotation_table", table_of_bf16_angles):
            return score(lambda: TorchBackend(folder, "bf16"), windows)

    return {
        "engine": lambda w: score(lambda: EngineBackend(folder), w),
        "torch-fp16": lambda w: score(lambda: TorchBackend(folder, "fp16"), w),
        "torch-bf16": lambda w: score(lambda: TorchBackend(folder, "bf16"), w),
        "torch-bf16-rotation-bf16": bf16_rotation,
        "torch-bf16-angles-bf16": bf16_angles,
        "transformers-fp32": lambda w: score(lambda: TransformersBackend(folder, "fp32"), w),
        "transformers-bf16": lambda w: score(lambda: TransformersBackend(folder, "bf16"), w),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, help="what is read (default: this installation's documentation strings)")
    parser.add_argument("--windows", type=int, default=4, help="how many windows of 2,048 tokens")
    parser.add_argument("--quick", action="store_true", help="one window of 512 tokens")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    assert rope.rotate is attention.rotate
    source = resolve(options.model)
    text = options.text.read_text(encoding="utf-8") if options.text else (np.__doc__ or "") * 40
    length = 512 if options.quick else 2048
    tokenizer = open_source(source).tokenizer
    ids = tokenizer.encode(text)
    windows = [ids[i * length : (i + 1) * length] for i in range(1 if options.quick else options.windows)]
    windows = [tokenizer.add_bos(window)[:length] for window in windows if window]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(convert(source, Path(temporary) / "model", to="llama", dtype="bf16", is_verified=False).path)
        truth = score(lambda: TorchBackend(folder, "fp32"), windows)
        measured = {name: run(windows) for name, run in variants(folder).items()}
    peer = measured["transformers-bf16"]
    blocks = [block for block in BLOCKS if block[0] < length]
    print(f"{'variant':28}" + "".join(f"{f'KL {a}–{min(b, length)}':>18}{'top-1':>8}" for a, b in blocks))
    for name, scores in measured.items():
        cells = [cost(truth, scores, *block) for block in blocks]
        print(f"{name:28}" + "".join(f"{kl:18.2e}{top1:8.1%}" for kl, top1 in cells))
        ours, theirs = cost(truth, scores, 0, length)[0], cost(truth, peer, 0, length)[0]
        rows.append(
            {
                "name": name,
                "ours": ours,
                "peer": theirs,
                "peer_name": "transformers-bf16",
                "unit": "mean KL to fp32, nats",
                "ratio": theirs / max(ours, 1e-12),
                "must": None,
            }
        )
    for temperature, top_p in ((0.8, 0.8), (0.8, 1.0), (1.0, 1.0)):
        share, mass = top_k_rows(truth, temperature, top_p)
        print(
            f"top_k=50 at temperature {temperature}, top_p {top_p}: changes {share:.1%} of positions, moves {mass:.4f}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
