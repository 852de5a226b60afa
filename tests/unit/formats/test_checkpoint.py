"""`open_checkpoint` on every kind of file and folder, right and wrong."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.reference import random_weights
from tests.unit.formats.model_files import as_llama, entries_of, random_entries, vocabulary

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, ConfigError, FormatError
from minicpm.formats import names
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.gguf_read import open_gguf
from minicpm.formats.gguf_write import write_gguf, write_gguf_model
from minicpm.formats.hf_config import config_to_hf
from minicpm.formats.safetensors_write import write_safetensors_model
from minicpm.formats.weight_map import WeightEntry

HEAD = "lm_head.weight"


def save(folder: Path, config: ModelConfig, entries: dict[str, WeightEntry] | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_safetensors_model(folder, random_entries(config) if entries is None else entries)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config) | changes))
    return folder


def holds(path: Path, weights: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.weights) == set(weights)
    for name, array in weights.items():
        assert np.array_equal(checkpoint.weights[name].decode(), array), name


@pytest.mark.parametrize("model_type", ["minicpm", "granite", "llama"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_gguf_gives_hf_names_and_hf_rows(
    tmp_path: Path, tiny_config: ModelConfig, model_type: str, is_tied: bool
) -> None:
    config = (as_llama(tiny_config) if model_type == "llama" else tiny_config).replace(
        model_type=model_type, tie_word_embeddings=is_tied, torch_dtype="float32", initializer_range=0.1
    )
    weights = random_weights(config)
    write_gguf_model(tmp_path / "a.gguf", config, entries_of(weights), vocabulary(331))
    holds(tmp_path / "a.gguf", weights)
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert checkpoint.config == config
    assert checkpoint.kind == "gguf"
    assert checkpoint.hf_config == {}
    assert checkpoint.dtype_summary == f"F32 ({len(weights)})"
    assert checkpoint.num_bytes == 4 * config.num_parameters().total
    stored = open_gguf(tmp_path / "a.gguf").weight("blk.1.attn_k.weight").decode()
    assert not np.array_equal(stored, weights["model.layers.1.self_attn.k_proj.weight"])


@pytest.mark.parametrize("model_type", ["minicpm", "granite", "llama"])
def test_a_folder(tmp_path: Path, tiny_config: ModelConfig, model_type: str) -> None:
    config = (as_llama(tiny_config) if model_type == "llama" else tiny_config).replace(model_type=model_type)
    weights = random_weights(config)
    save(tmp_path, config.replace(torch_dtype="float32"), entries_of(weights, "BF16"))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config  # the dtype is that of the files, whatever config.json says
    assert checkpoint.hf_config["model_type"] == model_type
    assert (checkpoint.kind, dict(checkpoint.metadata), checkpoint.chat_template) == ("folder", {}, None)
    assert len(checkpoint.weights) == len(weights)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert open_checkpoint(tmp_path).config.eos_token_id == (2, 7)


def test_where_a_folder_keeps_its_template(tmp_path: Path, tiny_config: ModelConfig) -> None:
    save(tmp_path, tiny_config)
    lists = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    for name, content, expected in [
        ("tokenizer_config.json", json.dumps({"chat_template": 3}), None),
        ("tokenizer_config.json", json.dumps({"chat_template": lists}), "d"),
        ("tokenizer_config.json", json.dumps({"chat_template": "one"}), "one"),
        ("chat_template.jinja", "two\n", "two\n"),
    ]:
        (tmp_path / name).write_text(content)
        assert open_checkpoint(tmp_path).chat_template == expected


def test_a_tied_head_that_is_a_copy_goes(tmp_path: Path, tiny_config: ModelConfig) -> None:
    weights = random_weights(tiny_config)
    save(tmp_path, tiny_config, entries_of(weights | {HEAD: weights["model.embed_tokens.weight"]}))
    holds(tmp_path, weights)


def test_a_tied_head_that_differs_is_never_dropped_in_silence(tmp_path: Path, tiny_config: ModelConfig) -> None:
    weights = random_weights(tiny_config)
    head = weights["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    save(tmp_path, tiny_config, entries_of(weights | {HEAD: head}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight, but"):
        open_checkpoint(tmp_path)
    save(tmp_path, tiny_config, entries_of(weights | {HEAD: head}), tie_word_embeddings=False)
    holds(tmp_path, weights | {HEAD: head})


def test_old_rotary_buffers_are_passed_over(tmp_path: Path, tiny_config: ModelConfig) -> None:
    weights = random_weights(tiny_config)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(5)}
    save(tmp_path, tiny_config, entries_of(weights | buffers))
    holds(tmp_path, weights)


DRAGONFLY = {
    "dim_model": 96, "dim_ff": 160, "dim_head": 16, "num_heads": 6, "num_kv_heads": 2, "num_layers": 5, "eps": 1e-5,
    "init_std": 0.1, "base": 10000.0, "max_length": 512, "orig_max_length": 512, "scale": True, "scale_emb": 12.0,
    "scale_depth": 1.4, "dim_model_base": 24, "qk_norm": False, "dtype": "bf16", "activate_fn": "silu",
}  # fmt: skip


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_folder_of_the_training_code(tmp_path: Path, tiny_config: ModelConfig, is_tied: bool) -> None:
    config = tiny_config.replace(tie_word_embeddings=is_tied, torch_dtype="float32")
    weights = random_weights(config)
    theirs = {str(names.translate(name, names.HF_TO_DRAGONFLY)): array for name, array in weights.items()}
    write_safetensors_model(tmp_path, entries_of(theirs))
    (tmp_path / "config.json").write_text(json.dumps(DRAGONFLY))
    holds(tmp_path, weights)
    assert open_checkpoint(tmp_path).config == config
    for changes, message in [
        ({"qk_norm": True}, "qk_norm true is not supported"),
        ({"activate_fn": "gelu"}, "activate_fn 'gelu' is not supported; known: silu"),
        ({"num_experts": 8}, "mixtures of experts"),
        ({"rope_scaling_type": "yarn"}, "rope_scaling_type 'yarn' is not supported"),
        ({"dim_ff": None}, "dim_ff is missing"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(DRAGONFLY | changes))
        with pytest.raises(ConfigError, match=message):
            open_checkpoint(tmp_path)


def test_an_hf_config_over_dragonfly_names(tmp_path: Path, tiny_config: ModelConfig) -> None:
    weights = random_weights(tiny_config)
    save(
        tmp_path,
        tiny_config,
        entries_of({str(names.translate(n, names.HF_TO_DRAGONFLY)): w for n, w in weights.items()}),
    )
    holds(tmp_path, weights)


def test_every_missing_extra_and_misshapen_tensor_is_listed(tmp_path: Path, tiny_config: ModelConfig) -> None:
    weights = random_weights(tiny_config)
    del weights["model.norm.weight"], weights["model.layers.3.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.weight"] = weights["model.layers.0.self_attn.q_proj.weight"][:, :32]
    weights["model.layers.4.input_layernorm.weight"] = np.ones(95, np.float32)
    weights["model.layers.5.input_layernorm.weight"] = np.ones(96, np.float32)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(save(tmp_path, tiny_config, entries_of(weights)))
    for part in (
        "model.norm.weight is missing",
        "model.layers.3.mlp.up_proj.weight is missing",
        "model.layers.0.self_attn.q_proj.weight has shape (96, 32), expected (96, 96)",
        "model.layers.4.input_layernorm.weight has shape (95,), expected (96,)",
        "model.layers.5.input_layernorm.weight does not belong to the model",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_of_a_billion_layers(tmp_path: Path, tiny_config: ModelConfig) -> None:
    save(tmp_path, tiny_config, num_hidden_layers=1 << 30)
    with pytest.raises(CheckpointError, match="has 1073741824 layers, the file 47 tensors"):
        open_checkpoint(tmp_path)


def test_a_wrong_vocabulary_size(tmp_path: Path, tiny_config: ModelConfig) -> None:
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \(331, 96\), expected \(330, 96\)"):
        open_checkpoint(save(tmp_path, tiny_config, vocab_size=330))
    write_gguf_model(tmp_path / "a.gguf", tiny_config, random_entries(tiny_config), vocabulary(330))
    with pytest.raises(FormatError, match="the vocabulary has 330 tokens, the embedding 331 rows"):
        open_checkpoint(tmp_path / "a.gguf")


def test_a_pickle_is_never_opened_unasked(tmp_path: Path, tiny_config: ModelConfig) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(tiny_config)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(
        FormatError, match=r"has its weights in pickles \(pytorch_model.bin\), which are read only where"
    ):
        open_checkpoint(tmp_path)


def break_gguf(
    change: Callable[[dict[str, Any], dict[str, WeightEntry]], None], path: Path, config: ModelConfig
) -> Path:
    write_gguf_model(path, config, random_entries(config))
    file = open_gguf(path)
    metadata = dict(file.metadata)
    entries = {
        name: WeightEntry(info.shape, info.block_type, lambda name=name: file.weight(name))
        for name, info in file.tensors.items()
    }
    change(metadata, entries)
    write_gguf(path, metadata, entries)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m, t: m.update({"general.architecture": "gemma3"}),
            "architecture 'gemma3' is not supported; known: minicpm",
        ),
        (lambda m, t: t.pop("token_embd.weight"), "the tensor token_embd.weight is missing"),
        (lambda m, t: t.pop("blk.0.attn_q.weight"), "model.layers.0.self_attn.q_proj.weight is missing"),
        (
            lambda m, t: t.update({"blk.0.attn_q.bias": t["output_norm.weight"]}),
            r"blk.0.attn_q.bias, 1 in all \(biases are not",
        ),
        (lambda m, t: t.update({"blk.7.attn_norm.weight": t["output_norm.weight"]}), "does not belong to the model"),
        (lambda m, t: m.update({"minicpm.block_count": 1 << 30}), "has 1073741824 layers, the file 47 tensors"),
        (
            lambda m, t: m.update({"minicpm.attention.head_count": 3, "minicpm.attention.head_count_kv": 1}),
            "head width 32",
        ),
    ],
)
def test_a_gguf_that_does_not_fit(tmp_path: Path, tiny_config: ModelConfig, change: Any, message: str) -> None:
    with pytest.raises((FormatError, CheckpointError), match=message) as caught:
        open_checkpoint(break_gguf(change, tmp_path / "a.gguf", tiny_config))
    assert "\n" not in str(caught.value)
    assert "a.gguf" in str(caught.value)


def test_what_is_no_model(tmp_path: Path, tiny_config: ModelConfig) -> None:
    with pytest.raises(FormatError, match=r"is not a model folder: it has no config.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(FormatError, match="No such file"):
        open_checkpoint(tmp_path / "none.gguf")
    (tmp_path / "text").write_text("hello, world")
    with pytest.raises(FormatError, match="is not a GGUF file: it starts with b'hell'"):
        open_checkpoint(tmp_path / "text")
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(tiny_config)))
    with pytest.raises(FormatError, match=r"it has no model.safetensors and no index"):
        open_checkpoint(tmp_path)
    for content in ("{", "[]", '{"a": Infinity}', "{" * 99):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(FormatError, match=r"config\.json"):
            open_checkpoint(tmp_path)


def test_many_threads_read_one_checkpoint(tmp_path: Path, tiny_config: ModelConfig) -> None:
    weights = random_weights(tiny_config)
    write_gguf_model(tmp_path / "a.gguf", tiny_config, entries_of(weights), vocabulary(331))
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    wrong: list[str] = []

    def read() -> None:
        if checkpoint.metadata["tokenizer.ggml.tokens"][:2] != ["<unk>", "<s>"]:
            wrong.append("tokens")
        wrong.extend(n for n, w in checkpoint.weights.items() if not np.array_equal(w.decode(), weights[n]))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
