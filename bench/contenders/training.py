"""One contender of `bench/train.py`, in a process of its own: reads N, makes N steps, answers in JSON.

    ours       the package's loop: compiled layers, chunked cross-entropy, masters, muP groups
    trainer    HF Trainer, bf16 by autocast, fused AdamW, its defaults otherwise
    compiled   a plain loop around the compiled HF model, autocast bf16, fused AdamW

All see the same shape, the same number of random tokens, and two threads.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

SHAPES = {"12m": (320, 800, 8, 5), "40m": (512, 1280, 12, 8)}
VOCABULARY, LENGTH = 8192, 512
Steps = Callable[[int], None]


def answer(seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


def serve(steps: Steps) -> None:
    for line in sys.stdin:
        start = time.perf_counter()
        steps(int(line))
        answer(time.perf_counter() - start)


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def ours(shape: tuple[int, int, int, int], rows: int) -> None:
    from minicpm.architecture import ModelConfig
    from minicpm.data.batches import Batch
    from minicpm.train.arithmetic import choose_arithmetic
    from minicpm.train.loop import update_once
    from minicpm.train.optim import OptimizerConfig
    from minicpm.train.pretrain import pretraining_loss
    from minicpm.train.schedule import ScheduleConfig
    from minicpm.train.settings import LoopConfig, Ranks
    from minicpm.train.state import new_state
    from minicpm.train.work import Work

    hidden, inner, layers, heads = shape
    config = ModelConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=VOCABULARY, scale_emb=12.0, scale_depth=1.4, dim_model_base=256.0,
    )  # fmt: skip
    cpu = torch.device("cpu")
    chosen = choose_arithmetic(LoopConfig(compile="on"), 1, cpu, lambda line: None)
    state = new_state(config, OptimizerConfig(), 0, "bfloat16", cpu)
    ids = tokens(rows).numpy()
    shape_ = (rows, LENGTH)
    batch = Batch(
        0, ids[:, :-1].copy(), ids[:, 1:].copy(), np.zeros(shape_, np.int32),
        np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape_).copy(), np.zeros(rows, np.int32), ("random",), (),
    )  # fmt: skip
    work = Work(
        lambda step: [batch],
        lambda b: float(b.num_targets),
        pretraining_loss(cpu, chosen.is_compiled, chosen.is_widened),
        lambda b: b.input_ids.size,
        lambda b: None,
    )
    schedule = ScheduleConfig(total_steps=10**6)

    def steps(count: int) -> None:
        for _ in range(count):
            update_once(state, work, schedule, state.step + 1, lambda state, facts: "", Ranks())

    serve(steps)


def hf_model(shape: tuple[int, int, int, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads = shape
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=LENGTH, use_cache=False,
        )
    )  # fmt: skip


def compiled(shape: tuple[int, int, int, int], rows: int) -> None:
    model = hf_model(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    run = torch.compile(model)
    ids = tokens(rows)[:, :-1].contiguous()

    def steps(count: int) -> None:
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16):
                loss = run(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    serve(steps)


def trainer(shape: tuple[int, int, int, int], rows: int) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ids = tokens(rows)[:, :-1].contiguous()

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            while True:
                for row in ids:
                    yield {"input_ids": row, "labels": row}

    class Turns(TrainerCallback):
        """Waits for its turn before a step; the time between two waits is the trainer's own."""

        def __init__(self) -> None:
            self.left, self.start = 0, 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.left == 0:
                if self.start:
                    answer(time.perf_counter() - self.start)
                line = sys.stdin.readline()
                if not line:
                    sys.exit(0)
                self.left, self.start = int(line), time.perf_counter()
            self.left -= 1

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=rows, max_steps=10**6, bf16=True, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True, optim="adamw_torch_fused", learning_rate=1e-3,
        )  # fmt: skip
        Trainer(hf_model(shape), settings, train_dataset=Rows(), callbacks=[Turns()]).train()


def main() -> None:
    contender, name, rows = sys.argv[1:]
    torch.set_num_threads(2)
    {"ours": ours, "trainer": trainer, "compiled": compiled}[contender](SHAPES[name], int(rows))


if __name__ == "__main__":
    main()
