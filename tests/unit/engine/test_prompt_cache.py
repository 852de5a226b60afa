"""A prompt kept in a file is as good as one computed; any other file is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.reference import random_weights
from tests.unit.engine.tiny import tiny_tokenizer

from minicpm._native import features
from minicpm.architecture import ModelConfig
from minicpm.engine import Engine, LanguageModel
from minicpm.engine.decoder import Decoder
from minicpm.engine.prompt_cache import fingerprint_model
from minicpm.errors import CheckpointError, EngineError, FormatError, MiniCPMError
from minicpm.formats.weight import Weight

PROMPT = np.random.default_rng(4).integers(3, 331, 100).tolist()
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 5, "logprobs": 1}
Make = Callable[..., LanguageModel]


@pytest.fixture
def make_model(tiny_config: ModelConfig) -> Make:
    def make(seed: int = 0, num_blocks: int = 64, **options: Any) -> LanguageModel:
        weights = {n: Weight.from_array(a) for n, a in random_weights(tiny_config, seed).items()}
        decoder = Decoder(tiny_config, weights, num_threads=1, num_blocks=num_blocks, **options)
        context = min(512, 32 * num_blocks)
        tokenizer = tiny_tokenizer()
        engine = Engine(decoder, tiny_config, num_blocks=num_blocks, context_length=context, tokenizer=tokenizer)
        return LanguageModel(engine, tokenizer, fingerprint=lambda: fingerprint_model(tiny_config, weights))

    return make


@pytest.fixture
def path(make_model: Make, tmp_path: Path) -> Path:
    """The file of `PROMPT`."""
    model = make_model()
    model.generate([PROMPT], **GREEDY)
    assert model.save_prompt_cache(tmp_path / "prompt.cache", PROMPT) == 96
    return tmp_path / "prompt.cache"


@pytest.mark.parametrize("kv_type", ["f32", "q8"])
def test_a_prompt_from_the_file_is_one_computed(make_model: Make, tmp_path: Path, kv_type: str) -> None:
    writer, path = make_model(kv_type=kv_type), tmp_path / "prompt.cache"
    (computed,) = writer.generate([PROMPT], **GREEDY)
    assert writer.save_prompt_cache(path, PROMPT) == 96
    model = make_model(kv_type=kv_type)
    assert model.load_prompt_cache(path) == PROMPT[:96]
    (found,) = model.generate([PROMPT], **GREEDY)
    assert (computed.num_cached_tokens, found.num_cached_tokens) == (0, 96)
    assert model.engine.load.num_computed_tokens < 20
    assert (found.token_ids, found.logprobs) == (computed.token_ids, computed.logprobs)
    assert model.engine.load.num_held_blocks == 0


@pytest.mark.parametrize("kernel", features()["kernels"])
def test_every_kernel_reads_what_another_wrote(make_model: Make, path: Path, kernel: str) -> None:
    model = make_model(kernel=kernel)
    model.load_prompt_cache(path)
    (found,) = model.generate([PROMPT], **GREEDY)
    (computed,) = make_model(kernel="portable").generate([PROMPT], **GREEDY)
    assert found.num_cached_tokens == 96
    assert found.token_ids == computed.token_ids


def test_what_is_in_memory_already_stays_and_what_has_no_room_is_left_out(make_model: Make, path: Path) -> None:
    model = make_model()
    model.generate([[*PROMPT[:64], 5, 6]], **GREEDY)
    kept = model.engine.load.num_kept_blocks
    assert len(model.load_prompt_cache(path)) == 96
    assert model.engine.load.num_kept_blocks == kept + 1
    assert model.load_prompt_cache(path) == PROMPT[:96]
    small = make_model(num_blocks=2)
    assert small.load_prompt_cache(path) == PROMPT[:64]
    (found,) = small.generate([PROMPT[:60]], **GREEDY)
    assert found.num_cached_tokens == 32


def test_a_conversation_can_be_kept_with_its_reply(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    stream = model.continue_text(PROMPT, temperature=0.0, max_new_tokens=40)
    list(stream)
    assert len(stream.token_ids) == 140
    # The last token was chosen and not computed.
    assert model.save_prompt_cache(tmp_path / "x", stream.token_ids) == 128


def test_nothing_in_memory_is_nothing_to_keep(make_model: Make, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nothing of this prompt of 100 tokens is in memory"):
        make_model().save_prompt_cache(tmp_path / "x", PROMPT)
    assert not (tmp_path / "x").exists()


def test_files_of_others_are_refused(make_model: Make, path: Path) -> None:
    with pytest.raises(CheckpointError, match="of another model; the prompt must be computed anew"):
        make_model(seed=1).load_prompt_cache(path)
    with pytest.raises(CheckpointError, match="of another KV cache"):
        make_model(kv_type="f16").load_prompt_cache(path)


@pytest.mark.parametrize("content", [b"", b"Dear diary, ...", b'{"a": 1}', b"\x40" + bytes(7) + b"{" + bytes(80)])
def test_what_is_no_prompt_cache_is_said(make_model: Make, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(FormatError, match="is no prompt cache of this version"):
        make_model().load_prompt_cache(tmp_path / "other")
    with pytest.raises(FormatError, match="cannot read"):
        make_model().load_prompt_cache(tmp_path / "missing")


def test_a_file_cut_short_or_with_a_flipped_bit_is_refused(make_model: Make, path: Path) -> None:
    model, data = make_model(), path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for size in (start, start + 4, start + 4 * 96, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="computed anew"):
            model.load_prompt_cache(path)
    for place in (start, start + 4 * 96 + 1000, len(data) - 1):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged; the prompt must be computed anew"):
            model.load_prompt_cache(path)
    assert model.engine.load.num_kept_blocks == 0
    path.write_bytes(data)
    assert len(model.load_prompt_cache(path)) == 96


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_files_end_in_our_errors(make_model: Make, path: Path, data: st.DataObject) -> None:
    good = path.read_bytes()
    broken = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 500))
        broken[place] = data.draw(st.integers(0, 255))
    other = path.with_name("broken")
    other.write_bytes(broken[: data.draw(st.sampled_from([len(good), 300, 600]))])
    model = make_model(num_blocks=4)
    ids: list[int] | None = None
    message = ""
    try:
        ids = model.load_prompt_cache(other)
    except MiniCPMError as error:
        message = str(error)
    assert "\n" not in message
    assert ids == (None if message else PROMPT[:96])
    assert (model.engine.load.num_kept_blocks > 0) == (not message)


def test_a_file_that_cannot_be_written_leaves_what_was_there(make_model: Make, path: Path) -> None:
    model, before = make_model(), path.read_bytes()
    other = [*PROMPT[:50], *PROMPT[:50]]
    model.generate([other], **GREEDY)
    with pytest.raises(CheckpointError, match="cannot write"):
        model.save_prompt_cache(path / "x", other)
    assert path.read_bytes() == before
    model.save_prompt_cache(path, other)
    assert path.read_bytes() != before
    assert [p.name for p in path.parent.iterdir()] == ["prompt.cache"]


def test_fingerprints_tell_models_apart(tiny_config: ModelConfig) -> None:
    def fingerprint(change: Callable[[dict[str, Any]], None] = lambda arrays: None, kind: str = "F32") -> str:
        arrays = random_weights(tiny_config)
        change(arrays)
        weights = {n: Weight.from_array(a, kind if a.ndim == 2 else "F32") for n, a in arrays.items()}
        return fingerprint_model(tiny_config, weights)

    def nudge(arrays: dict[str, Any]) -> None:
        arrays["model.layers.3.mlp.up_proj.weight"] *= 1.0001

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(nudge), fingerprint(kind="F16")}) == 3


def test_blocks_of_another_size_or_number_are_refused(make_model: Make, tiny_config: ModelConfig) -> None:
    model = make_model()
    prefixes = model.engine.prefixes
    size = prefixes.block_bytes
    assert size == tiny_config.kv_cache_bytes(32, 4)
    with pytest.raises(EngineError, match="one row of block_bytes per block"):
        prefixes.write(PROMPT, np.zeros((2, size - 1), np.uint8))
    decoder: Any = model.engine._decoder
    for block in (-1, 64):
        with pytest.raises(EngineError, match=f"cache block {block} is none of 64"):
            decoder.read_blocks(np.array([0, block], np.int32))
        for source, target in ((0, block), (block, 0)):
            with pytest.raises(EngineError, match=f"cache block {block} is none of 64"):
                decoder.copy_block(source, target)
    assert model.engine.load.num_held_blocks == 0
    assert prefixes.read(PROMPT).shape == (0, size)
