"""What must not change the torch model's answer: caching, chunking, packing, recomputing, compiling, rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minicpm.architecture import ModelConfig, RopeScaling
from minicpm.model import KVCache, MiniCPM, generate, initialize

ROUNDING = 5e-6


@pytest.fixture
def model(tiny_config: ModelConfig) -> MiniCPM:
    return initialize(MiniCPM(tiny_config), seed=5)


@pytest.fixture
def ids(tiny_config: ModelConfig) -> Tensor:
    return torch.randint(tiny_config.vocab_size, (7, 11), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 11, [11], [4, 7], [3, 1, 5, 1, 1]], ids=str)
def test_cached_and_chunked_equal_whole(model: MiniCPM, ids: Tensor, chunks: list[int]) -> None:
    cache = KVCache(model.config, 16, 7)
    parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
    assert cache.length == 11
    assert (torch.cat(parts, dim=1) - model(ids)).abs().max() <= ROUNDING


@torch.no_grad()
def test_a_truncated_cache_forgets(model: MiniCPM, ids: Tensor) -> None:
    cache = KVCache(model.config, 16, 7)
    model(ids.flip(1), cache=cache)
    cache.truncate(0)
    model(ids[:, :6], cache=cache)
    assert (model(ids[:, 6:], cache=cache) - model(ids)[:, 6:]).abs().max() <= ROUNDING


@torch.no_grad()
def test_a_cache_beyond_the_trained_context_stays_one_dynamic_rope(tiny_config: ModelConfig, ids: Tensor) -> None:
    config = tiny_config.replace(rope_scaling=RopeScaling("dynamic", 2.0), max_position_embeddings=6)
    model = initialize(MiniCPM(config), seed=5)
    cache = KVCache(config, 11, 7)
    parts = [model(part, cache=cache) for part in ids.split([4, 7], dim=1)]
    assert (torch.cat(parts, dim=1) - model(ids)).abs().max() <= ROUNDING


def documents() -> tuple[list[int], Tensor]:
    """Lengths of four documents in a row; the last one bears the first one's id again."""
    lengths = [3, 1, 5, 2]
    return lengths, torch.tensor([0, 1, 2, 0]).repeat_interleave(torch.tensor(lengths))


def gradients(model: MiniCPM, logits: list[Tensor], targets: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    total = sum(len(t) for t in targets)
    torch.stack([F.cross_entropy(a, t, reduction="sum") for a, t in zip(logits, targets, strict=True)]).sum().div(
        total
    ).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_documents_equal_separate_ones(model: MiniCPM, ids: Tensor) -> None:
    lengths, document_ids = documents()
    row, targets = ids[:1], ids[1]
    packed = model(row, document_ids=document_ids[None])[0].split(lengths)
    separate = [model(part)[0] for part in row.split(lengths, dim=1)]
    for a, b in zip(packed, separate, strict=True):
        assert (a - b).abs().max() <= ROUNDING
    ours = gradients(model, list(packed), list(targets.split(lengths)))
    theirs = gradients(model, separate, list(targets.split(lengths)))
    assert ours.keys() == dict(model.named_parameters()).keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).abs().max() <= 1e-5 * theirs[name].abs().max(), name
    unpacked = model(row)[0].split(lengths)
    assert max((a - b).abs().max().item() for a, b in zip(unpacked, separate, strict=True)) > 1e-2


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_activations_change_nothing(model: MiniCPM, ids: Tensor, every: int) -> None:
    plain = gradients(model, [model(ids)[:, :-1].flatten(0, 1)], [ids[:, 1:].flatten()])
    model.checkpoint_every = every
    recomputed = gradients(model, [model(ids)[:, :-1].flatten(0, 1)], [ids[:, 1:].flatten()])
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_recomputing_keeps_fewer_activations(model: MiniCPM, ids: Tensor) -> None:
    def saved_bytes() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            model.hidden_states(ids)
        return sum(sizes)

    everything = saved_bytes()
    model.checkpoint_every = 1
    assert saved_bytes() < everything / 5


def test_the_training_forward_is_one_graph(tiny_config: ModelConfig, ids: Tensor) -> None:
    # Traced with its backward pass but not lowered: what matters is that no graph break hides in it.
    model = initialize(MiniCPM(tiny_config.replace(num_hidden_layers=2)), seed=5)
    document_ids = documents()[1].expand(7, 11)
    model.checkpoint_every = 2
    compiled = torch.compile(model.hidden_states, fullgraph=True, backend="aot_eager")
    hidden = compiled(ids, document_ids=document_ids)
    hidden.sum().backward()
    assert (hidden - model.hidden_states(ids, document_ids=document_ids)).abs().max() <= ROUNDING
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_head_in_pieces_equals_forward(model: MiniCPM, ids: Tensor) -> None:
    hidden = model.hidden_states(ids)
    pieces = torch.cat([model.head(part) for part in hidden.flatten(0, 1).split(13)])
    assert (pieces.view(7, 11, -1) - model(ids)).abs().max() <= ROUNDING


@torch.no_grad()
def test_embeddings_given_are_not_scaled(model: MiniCPM, ids: Tensor) -> None:
    assert torch.equal(model(inputs_embeds=model.embed(ids)), model(ids))
    unscaled = model.model.embed_tokens(ids)
    assert (model(inputs_embeds=unscaled) - model(ids)).abs().max() > 1e-2
    assert torch.equal(model.embed(ids), unscaled * 12.0)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float16, 0.0015)])
def test_sixteen_bits_are_close_to_float32(model: MiniCPM, ids: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    exact = model(ids)
    rounded = MiniCPM(model.config)
    rounded.load_state_dict(model.state_dict())
    logits = rounded.to(dtype)(ids)
    assert logits.dtype == torch.float32
    divergence = F.kl_div(logits.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert (logits - exact).abs().max() <= tolerance * exact.abs().max()
    # Measured: bf16 0.0034 of the largest logit, KL 2.5e-6; fp16 0.0004, 5.1e-7.
    assert divergence.max() <= tolerance / 1000


@torch.no_grad()
def test_tied_and_untied_save_and_load(tiny_config: ModelConfig, ids: Tensor) -> None:
    tied = initialize(MiniCPM(tiny_config), seed=5)
    untied = MiniCPM(tiny_config.replace(tie_word_embeddings=False))
    assert "lm_head.weight" not in tied.state_dict()
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.model.embed_tokens.weight})
    assert torch.equal(untied(ids), tied(ids))
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head\.weight"):
        untied.load_state_dict(tied.state_dict())


def test_greedy_generation_equals_the_best_of_every_full_pass(model: MiniCPM, ids: Tensor) -> None:
    new = generate(model, ids[:3, :5], 8, stop_ids=())
    sequence = ids[:3, :5]
    for _ in range(8):
        sequence = torch.cat((sequence, model(sequence)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(new, sequence[:, 5:])
