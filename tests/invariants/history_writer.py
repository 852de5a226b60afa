"""Forks writers of a history, so that a test need not start Python for each: `python history_writer.py`.

Each line of standard input is JSON, {"folder", "steps", "output", "settings"}: a child with these environment settings
appends checkpoints until it is done, fails or is killed, and writes a line to `output` after each that it was told is
there. Standard output gets the child's process id, and when it has ended its exit status (below 0: a signal).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.formats.weight import Weight
from minicpm.history import About, Facts, HistoryWriter

CONFIG = ModelConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=100, scale_emb=12.0, scale_depth=1.4, dim_model_base=16.0,
)  # fmt: skip


def weights_at(step: int) -> dict[str, Weight]:
    found = {}
    for index, (name, shape) in enumerate(CONFIG.weight_shapes().items()):
        start = np.random.default_rng(index).standard_normal(shape)
        moved = start + 0.1 * step * np.random.default_rng((index, step)).standard_normal(shape)
        found[name] = Weight.from_array((0.05 * moved).astype(np.float32), "BF16")
    return found


def write(folder: Path, steps: int, output: Path) -> int:
    with output.open("w", buffering=1) as told:
        try:
            with HistoryWriter(folder, About(CONFIG, max_reads=6), {"tokenizer.json": b"{}"}) as writer:
                for step in range(steps):
                    writer.append(Facts(step, tokens=step * 10), weights_at(step))
                    told.write(f"{step}\n")
        except CheckpointError as error:
            told.write(f"error: {error}\n")
            return 2
    return 0


def serve() -> None:
    for line in sys.stdin:
        task: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(task["settings"])
                code = write(Path(task["folder"]), task["steps"], Path(task["output"]))
            finally:
                os._exit(code)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
