"""Every checkpoint of a history as a revision: transformers' from_pretrained finds it, offline, and computes alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.history.conftest import facts_at, weights_at

from minicpm.architecture import ModelConfig
from minicpm.errors import ConfigError
from minicpm.exchange.hub_layout import write_hub_layout
from minicpm.history import About, History, HistoryWriter
from minicpm.tokenizer.training import VocabularyConfig, train_vocabulary

transformers = pytest.importorskip("transformers")


@pytest.fixture
def history(tmp_path: Path, tiny_config: ModelConfig) -> History:
    words = tmp_path / "words"
    words.mkdir()
    train_vocabulary(["the quick brown fox jumps over the lazy dog\n" * 40], words, VocabularyConfig(vocab_size=320))
    files = {path.name: path.read_bytes() for path in words.iterdir()}
    with HistoryWriter(tmp_path / "history", About(tiny_config, "0" * 64), files) as writer:
        for step in (50, 100, 150):
            writer.append(facts_at(step), weights_at(tiny_config, step))
    return History(tmp_path / "history")


def test_revisions_load_offline(history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What HF_HUB_OFFLINE=1 sets; without it transformers asks the hub for an adapter, even with local_files_only.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path / "cache"
    assert write_hub_layout(history, [50, 100], cache, "tiny") == "local/tiny"
    # Once more, with another step: what is there stays.
    assert write_hub_layout(history, [100, 150], cache, "tiny") == "local/tiny"
    assert len(list((cache / "models--local--tiny" / "snapshots").iterdir())) == 3
    settings = {"cache_dir": str(cache)}
    ids = torch.arange(3, 40)[None]
    for step in (50, 100, 150):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            "local/tiny", revision=f"step{step}", dtype=torch.float32, **settings
        ).eval()
        ours = history.load_model(step, dtype=torch.float32).eval()
        with torch.no_grad():
            difference = (model(ids).logits - ours(ids)).abs().max()
        # Measured: 1e-6; another step's weights are 0.3 away.
        assert difference < 2e-5, (step, difference)
    tokenizer = transformers.AutoTokenizer.from_pretrained("local/tiny", revision="step50", **settings)
    assert tokenizer.decode(tokenizer("the quick fox")["input_ids"], skip_special_tokens=True) == "the quick fox"
    last = transformers.AutoConfig.from_pretrained("local/tiny", **settings)
    assert last.model_type == "granite"
    with pytest.raises(OSError, match="cached files"):
        transformers.AutoConfig.from_pretrained("local/tiny", revision="step51", **settings)


def test_names_that_the_hub_does_not_allow(history: History, tmp_path: Path) -> None:
    for name in ("a/b", "", "..", "a--b"):
        with pytest.raises(ConfigError, match="is no repository name"):
            write_hub_layout(history, [50], tmp_path / "cache", name)
    assert not (tmp_path / "cache").exists()
