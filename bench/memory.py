"""Tuning the 2.7 B shape: the peak resident set of one full step by each method, beside the plan's figure.

    python -m bench.memory [full] [lora] [qlora]       each in a process of its own; full takes about 14 GiB

Weights are random; what they are does not change what they take. They come as mapped files do, a piece at a time, so
that the peak is the run's own. Upstream's figures: LoRA 10,619 MiB and QLoRA 5,500 MiB on one GPU, full tuning four
GPUs of 30,245 MiB each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from bench.rows import Row, arguments, finish

from minicpm.train.allocator import tuned_environment

METHODS = {
    "full": [
        "optimizer.masters=none", "optimizer.states=int8", "optimizer.is_fused=true", "schedule.lr=1e-3",
    ],
    "lora": [],
    "qlora": [],
}  # fmt: skip
# GiB: the most that may be taken, and what upstream takes.
MUST = {"full": 20.0, "lora": 8.0, "qlora": 4.0}
UPSTREAM = {"full": 4 * 30245 / 1024, "lora": 10619 / 1024, "qlora": 5500 / 1024}


def random_checkpoint(preset: str) -> object:
    """Return an open model of this shape whose rows are windows of one random buffer: as many bytes as one piece."""
    from minicpm.architecture import PRESETS
    from minicpm.formats.checkpoint import Checkpoint
    from minicpm.formats.weight import Weight
    from minicpm.formats.weight_map import LazyWeights, WeightEntry

    config = PRESETS[preset]
    values = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * 0.03
    buffer = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)

    def make(shape: tuple[int, ...]) -> Weight:
        rows, row_bytes = (1 if len(shape) == 1 else shape[0]), 2 * shape[-1]
        starts = np.lib.stride_tricks.sliding_window_view(buffer, row_bytes)[::14]
        # Rows beyond the buffer's end begin it again.
        repeats = -(-rows // len(starts))
        if repeats == 1:
            return Weight("BF16", shape, starts[:rows])
        return Weight("BF16", shape, starts[np.arange(rows) % len(starts)])

    entries = {
        name: WeightEntry(shape, "BF16", lambda shape=shape: make(shape))
        for name, shape in config.weight_shapes().items()
    }
    return Checkpoint(Path(preset), config, LazyWeights(entries), {}, "folder", None, {})


def measure(method: str, preset: str, length: int) -> dict[str, float]:
    """Make one update in this process; return its peak and the plan's figure in bytes, its seconds and its loss."""
    import torch

    from minicpm import config as configuration
    from minicpm.data.batches import Batch
    from minicpm.train.log import peak_bytes
    from minicpm.train.loop import update_once
    from minicpm.train.pretrain import pretraining_loss
    from minicpm.train.settings import Ranks
    from minicpm.train.tune import make_tune_state
    from minicpm.train.tune_config import TuneConfig
    from minicpm.train.tune_plan import Base, make_tune_plan
    from minicpm.train.work import Work

    words = [
        "name=bench", "schedule.total_steps=1", "base=random",
        'rows.sources=["none"]', f"method={method}", f"batch.sequence_length={length}",
        "batch.sequences=[1]", "batch.micro_sequences=1", "loop.recompute_every=1", "loop.compile=off",
        *METHODS[method],
    ]  # fmt: skip
    config = configuration.load(TuneConfig, None, words)
    base = random_checkpoint(preset)
    plan = make_tune_plan(Base(base.config), config)
    state = make_tune_state(config, base, torch.device("cpu"))
    loaded = peak_bytes()
    ids = np.random.default_rng(1).integers(0, base.config.vocab_size, (1, length + 1))
    documents, positions = np.zeros((1, length), np.int32), np.arange(length, dtype=np.int32)[None]
    batch = Batch(0, ids[:, :-1], ids[:, 1:], documents, positions, np.zeros(1, np.int32), ("random",), ())
    loss = pretraining_loss(torch.device("cpu"), False)
    work = Work(lambda step: [batch], lambda b: float(b.num_targets), loss, lambda b: b.input_ids.size, lambda b: {})
    start = time.perf_counter()
    record = update_once(state, work, config.schedule, 1, lambda state, facts: "", Ranks())
    return {
        "peak": peak_bytes(), "plan": plan.total_bytes, "loaded": loaded,
        "seconds": time.perf_counter() - start, "loss": record.loss,
    }  # fmt: skip


def main() -> None:
    """Measure each method in a process of its own."""
    parser = arguments(__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="full, lora, qlora (default: all)")
    parser.add_argument("--preset", default="minicpm-2b", help="the shape (default: minicpm-2b)")
    parser.add_argument("--length", type=int, default=512, help="tokens of the row (default: 512)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    methods = options.methods or list(METHODS)
    if options.inside:
        print(json.dumps(measure(methods[0], options.preset, options.length)))
        return
    preset = "wind-30m" if options.quick else options.preset
    # As the command line starts its runs.
    environment = tuned_environment(os.environ, platform.libc_ver()[0]) or dict(os.environ)
    rows = []
    for method in methods:
        command = [sys.executable, "-m", "bench.memory", method, "--inside", "--preset", preset]
        done = subprocess.run(
            [*command, "--length", str(options.length)],
            stdout=subprocess.PIPE, text=True, timeout=1200, check=True, env=environment,
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        gib = found["peak"] / 2**30
        is_real = preset == "minicpm-2b"
        must = MUST[method] if is_real else None
        print(
            f"{method}: peak {gib:.2f} GiB (after loading {found['loaded'] / 2**30:.2f}), plan "
            f"{found['plan'] / 2**30:.2f}, {found['seconds']:.0f} s, loss {found['loss']:.3f}",
            flush=True,
        )
        peer = UPSTREAM[method] if is_real else gib
        rows.append(Row(f"{method}", gib, peer, "upstream", "GiB", peer / gib, peer / must if must else None))
        ratio = min(found["plan"] / found["peak"], found["peak"] / found["plan"])
        rows.append(
            Row(f"plan of {method}", found["plan"] / 2**30, gib, "measured", "GiB", ratio, 0.9 if is_real else None)
        )
    finish(rows, options)


if __name__ == "__main__":
    main()
