"""Loss on text that is never trained on, in nats a token and in bits a byte, per source and together.

Bits a byte compare models with different tokenizers: nats a token, divided by ln 2, times the source's target tokens
for each byte of its text (over all of the held-out part, whose documents are whole). What this leaves out: benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from minicpm.data.batches import Batch, BatchStream
from minicpm.data.mixture import Mix, Span, StageMixture
from minicpm.data.shards import TokenShards
from minicpm.model.minicpm import MiniCPM
from minicpm.train.work import LossParts

LossFunction = Callable[[MiniCPM, Batch, float], LossParts]


class HeldoutText:
    """The first rows of each held-out part, the same at every measurement."""

    def __init__(self, parts: Mapping[str, TokenShards], sequence_length: int, sequences: int, seed: int) -> None:
        self.tokens_per_byte = {
            name: (shards.num_tokens - shards.num_documents) / max(int(shards.text_bytes.sum()), 1)
            for name, shards in parts.items()
        }
        self.streams: dict[str, BatchStream] = {}
        self.rows: dict[str, int] = {}
        for name, shards in parts.items():
            mixture = StageMixture(mix=(Mix(name, 1.0),))
            stream = BatchStream([Span(0, mixture)], {name: shards}, sequence_length, seed=seed)
            self.streams[name] = stream
            # More rows than there are would only repeat them.
            self.rows[name] = min(max(sequences // len(parts), 1), stream.order.plans[0].num_rows)

    @torch.no_grad()
    def measure(self, model: MiniCPM, loss: LossFunction, micro_sequences: int) -> dict[str, float]:
        """Return `heldout_loss`, `heldout_bits_per_byte`, and both for each source as `…/NAME`."""
        was_training = model.training
        model.eval()
        results: dict[str, float] = {}
        nats, tokens, byte_count = 0.0, 0, 0.0
        for name, stream in self.streams.items():
            source_nats, source_tokens = 0.0, 0
            for first in range(0, self.rows[name], micro_sequences):
                batch = stream.batch(first, min(micro_sequences, self.rows[name] - first))
                source_nats += float(loss(model, batch, 1.0).total)
                source_tokens += batch.num_targets
            mean = source_nats / max(source_tokens, 1)
            results[f"heldout_loss/{name}"] = mean
            results[f"heldout_bits_per_byte/{name}"] = mean / math.log(2) * self.tokens_per_byte[name]
            nats, tokens = nats + source_nats, tokens + source_tokens
            byte_count += source_tokens / self.tokens_per_byte[name]
        model.train(was_training)
        results["heldout_loss"] = nats / max(tokens, 1)
        results["heldout_bits_per_byte"] = nats / math.log(2) / max(byte_count, 1.0)
        return results
