"""Samples during a run: the same prompts at every time, continued by the likeliest tokens, kept in `samples.jsonl`.

What this leaves out: scoring them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from minicpm.model.generation import generate
from minicpm.tokenizer import Tokenizer
from minicpm.train.log import unwritten_is_said
from minicpm.train.loop import Hook, StepRecord
from minicpm.train.settings import LoopConfig
from minicpm.train.state import TrainState

SAMPLES = "samples.jsonl"


def sample_hook(tokenizer: Tokenizer, loop: LoopConfig, run: Path, say: Callable[[str], None]) -> Hook:
    """Return a hook that writes and shows a sample of every prompt each `loop.sample_every` steps."""

    def sample(state: TrainState, record: StepRecord) -> None:
        if not loop.sample_every or record.step % loop.sample_every:
            return
        state.model.eval()
        rows = []
        for prompt in loop.sample_prompts:
            # Greedy: a draw would move the run's random state, and the next step would be another.
            ids = torch.tensor([tokenizer.encode(prompt)], device=state.device)
            text = tokenizer.decode(generate(state.model, ids, loop.sample_tokens)[0].tolist())
            rows.append(json.dumps({"step": record.step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
            say(f"step {record.step}: {prompt}│{' '.join(text.split())}")
        state.model.train()
        path = run / SAMPLES
        with unwritten_is_said(str(path), say), path.open("a", encoding="utf-8") as file:
            file.writelines(rows)

    return sample
