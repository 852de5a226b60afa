"""Views of mapped files are told from copies, and give their memory back without losing a byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.reference import random_weights
from tests.unit.formats.model_files import as_llama, entries_of, vocabulary

from minicpm.architecture import ModelConfig
from minicpm.engine.decoder import Decoder
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.gguf_write import write_gguf_model
from minicpm.formats.mapped_file import is_mapped, map_file, release, release_file

needs_smaps = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="what is resident is read from /proc")


def resident_bytes(path: Path) -> int:
    """Bytes of the mappings of `path` that are in the memory of this process."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_ours = words[-1] == str(path)
        elif is_ours and words[0] == "Rss:":
            total += int(words[1]) * 1024
    return total


@needs_smaps
def test_released_bytes_leave_the_memory_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = np.random.default_rng(0).integers(0, 256, 3_000_001, np.uint8)
    path.write_bytes(content.tobytes())
    whole = map_file(path)
    part = whole[1_000_001:2_000_001].reshape(1000, 1000)
    assert is_mapped(whole)
    assert is_mapped(part)
    assert whole.sum() == content.sum()
    before = resident_bytes(path)
    release(part)
    # A page at either end is shared with what is kept.
    assert before - resident_bytes(path) >= part.nbytes - 8192
    np.testing.assert_array_equal(whole, content)
    release_file(part)
    assert resident_bytes(path) == 0
    np.testing.assert_array_equal(whole, content)


def test_copies_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678" * 4096)
    copy = map_file(path)[::2].copy()
    assert not is_mapped(copy)
    before = copy.copy()
    release(copy)
    release_file(copy)
    np.testing.assert_array_equal(copy, before)


@needs_smaps
@pytest.mark.parametrize("is_llama", [False, True], ids=["views", "reordered"])
def test_a_file_leaves_the_memory_as_its_weights_are_repacked(
    tmp_path: Path, tiny_config: ModelConfig, is_llama: bool
) -> None:
    config = tiny_config.replace(hidden_size=384, intermediate_size=1024, vocab_size=1600)
    config = as_llama(config) if is_llama else config
    path = tmp_path / "model.gguf"
    write_gguf_model(path, config, entries_of(random_weights(config), "Q8_0"), vocabulary(config.vocab_size))
    checkpoint = open_checkpoint(path)
    assert checkpoint.num_bytes > 7_000_000
    Decoder(config, checkpoint.weights, num_blocks=1, num_threads=2)
    assert resident_bytes(path) < checkpoint.num_bytes // 10
    weight = checkpoint.weights["model.embed_tokens.weight"]
    # What was given back is not lost: the same decoder can be made again.
    assert weight.decode().std() > 0
