"""Supervised loss and gradients of packed rows against trl's SFTTrainer on the same conversations, padded.

Both run on the same weights: ours as MiniCPM, theirs as transformers' Granite. trl's method runs on a trainer that was
never built, with its own head and its own collation.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minicpm.architecture import ModelConfig
from minicpm.data.batches import BatchStream
from minicpm.data.mixture import Mix, Span, StageMixture
from minicpm.data.shard_writer import ShardWriter
from minicpm.data.shards import TokenShards
from minicpm.model import MiniCPM, initialize
from minicpm.train.pretrain import pretraining_loss

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_supervised_loss_and_slopes(tiny_config: ModelConfig, tmp_path: Path) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from trl.trainer.utils import add_fused_lm_head

    random = np.random.default_rng(4)
    lengths, prompts = np.array([9, 17, 5, 12, 7, 15]), np.array([3, 11, 2, 4, 6, 8])
    ids = [random.integers(3, 331, n) for n in lengths]
    masks = [np.arange(n) >= prompt for n, prompt in zip(lengths, prompts, strict=True)]
    # The second one is a conversation of which a middle answer is learned too.
    masks[1][4:6] = True
    (tmp_path / "rows").mkdir()
    writer = ShardWriter(tmp_path / "rows", 331, is_supervised=True)
    writer.add(
        np.concatenate(ids).astype(np.uint32), lengths.astype(np.int64), lengths.astype(np.int64),
        np.concatenate(masks).astype(np.uint8),
    )  # fmt: skip
    writer.finish({"tokenizer_hash": "abc", "pad_id": 2})
    shards = {"rows": TokenShards.open(tmp_path / "rows", "abc")}
    stream = BatchStream([Span(0, StageMixture((Mix("rows", 1.0),)))], shards, 24, seed=3)
    batch = stream.batch(0, stream.order.plans[0].num_rows)
    assert batch.num_targets == sum(mask[1:].sum() for mask in masks)
    model = initialize(MiniCPM(tiny_config), 5)
    granite = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            vocab_size=331, hidden_size=96, intermediate_size=160, num_hidden_layers=5, num_attention_heads=6,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rms_norm_eps=tiny_config.rms_norm_eps,
            tie_word_embeddings=True, rope_theta=tiny_config.rope_theta, attn_implementation="eager",
            embedding_multiplier=tiny_config.scale_emb, residual_multiplier=tiny_config.residual_scale,
            attention_multiplier=tiny_config.attention_scale, logits_scaling=tiny_config.logit_divisor, pad_token_id=0,
        )
    )  # fmt: skip
    granite.load_state_dict(model.state_dict(), strict=False)
    add_fused_lm_head(granite, outputs=("log_probs", "entropy", "is_top1"))
    rows = [
        {"input_ids": row.tolist(), "labels": np.where(mask, row, -100).tolist()}
        for row, mask in zip(ids, masks, strict=True)
    ]
    peer = SimpleNamespace(
        model=granite, aux_loss_enabled=False, compute_loss_func=None, label_smoother=None, _tp_size=1,
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False), _total_train_tokens=0,
        accelerator=SimpleNamespace(gather_for_metrics=lambda t: t, parallelism_config=None, num_processes=1),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    expected = trl.SFTTrainer.compute_loss(peer, granite.train(), DataCollatorForLanguageModeling(0)(rows))
    parts = pretraining_loss(torch.device("cpu"), is_compiled=False)(model, batch, 1 / batch.num_targets)
    # Measured 5e-7 on a loss of about 6, and 1e-6 of each gradient's norm.
    assert abs(float(parts.total.detach()) - float(expected.detach())) <= 1e-5
    expected.backward()
    parts.total.backward()
    theirs = dict(granite.named_parameters())
    for name, parameter in model.named_parameters():
        slope = theirs[name].grad
        assert parameter.grad is not None
        assert slope is not None
        assert float(slope.norm()) > 1e-3, name
        assert (parameter.grad - slope).norm() <= 1e-5 * slope.norm(), name
