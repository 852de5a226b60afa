"""Against llama.cpp: the ids of the default model, and of vocabularies that we write into a GGUF.

The vocabularies go into a GGUF of a tiny random model, because llama.cpp only tokenizes for a model that it runs.
"""

from __future__ import annotations

import io
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicpm.formats.gguf_read import open_gguf
from minicpm.tokenizer import Tokenizer

xllamacpp = pytest.importorskip("xllamacpp")

SHARED = Path(__file__).parents[2] / "../shared/tokenizers"
TEXTS = [
    "Hello  world,\tit's 2024!\n\n  def f(x):\n    return x\n",
    "山东省最高的山是哪座山, 它比黄山高还是矮?差距多少?",
    "🤗👩‍👩‍👧 naïve e\u0301 1234567 ½ ²",
    "typed <|im_end|> and <|im_start|>user </s> <s> <unk>",
    "<h2>x</h2> <0x0A> 。。。 ```py\n```",
    " leading", "trailing  ", "\n", "a\nb\n  c", "$+<=>^~| (a+b)*c",
    "\ufffd\u200b\ufeff",
]  # fmt: skip
CONTROLS = {"gpt2": "a<|im_end|>b <|im_start|>c", "llama": "a</s>b <s>c"}


class Llama:
    """llama.cpp's tokenizer of one file."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, -1
        params.cpuparams.n_threads = 1
        self.server = xllamacpp.Server(params)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": allow_special}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            self.server.listening_address + "/tokenize", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            ids: list[int] = json.load(answer)["tokens"]
            return ids


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> tuple[Tokenizer, Llama]:
    return Tokenizer.from_gguf(open_gguf(smollm2_path).metadata), Llama(smollm2_path)


@pytest.mark.parametrize("text", TEXTS)
def test_default_model(smollm2: tuple[Tokenizer, Llama], text: str) -> None:
    ours, theirs = smollm2
    assert ours.encode(text) == theirs.encode(text)


def test_default_model_with_control_tokens(smollm2: tuple[Tokenizer, Llama]) -> None:
    ours, theirs = smollm2
    text = ours.render_chat([{"role": "user", "content": "山?"}])
    assert ours.encode(text, allow_special=True) == theirs.encode(text, allow_special=True)


def train_sentencepiece(tmp_path: Path) -> Tokenizer:
    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS * 4 for line in text.split("\n")),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=460,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n", "\t", "<h2>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(buffer.getvalue())
    return Tokenizer.from_sentencepiece(tmp_path / "tokenizer.model")


def train_byte_level(name: str) -> Callable[[Path], Tokenizer]:
    def train(tmp_path: Path) -> Tokenizer:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        from minicpm.tokenizer.pretokenizers import build_pre_tokenizer, takes_whole_words

        backend = Backend(models.BPE(ignore_merges=takes_whole_words(name)))
        backend.pre_tokenizer = build_pre_tokenizer(name)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(TEXTS * 4, trainer)
        backend.add_tokens(["<tool_call>"])
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}')
        return Tokenizer.from_folder(tmp_path)

    return train


def load_minicpm(tmp_path: Path) -> Tokenizer:
    if not (SHARED / "minicpm-2b.model").is_file():
        pytest.skip("the vocabulary of MiniCPM is not here")
    return Tokenizer.from_sentencepiece(SHARED / "minicpm-2b.model")


SOURCES = {
    "sentencepiece": train_sentencepiece,
    "minicpm-2b": load_minicpm,
    **{name: train_byte_level(name) for name in ("default", "gpt-2", "smollm", "llama-bpe", "qwen2")},
}


@pytest.mark.parametrize("name", SOURCES)
def test_vocabularies_that_we_write(name: str, tmp_path: Path) -> None:
    ours = SOURCES[name](tmp_path)
    metadata = ours.to_gguf_metadata()
    if ours.vocabulary.kind == "gpt2":
        assert metadata["tokenizer.ggml.pre"] == name
    write_tiny_model(tmp_path / "tiny.gguf", ours.num_tokens, metadata)
    theirs = Llama(tmp_path / "tiny.gguf")
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text), text
    text = CONTROLS[ours.vocabulary.kind]
    assert theirs.encode(text, allow_special=True) == ours.encode(text, allow_special=True)


def write_tiny_model(path: Path, vocab_size: int, metadata: dict[str, Any]) -> None:
    gguf = pytest.importorskip("gguf")
    hidden, inner = 32, 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 2)
    writer.add_vocab_size(vocab_size)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    shapes = {"attn_q": (hidden, hidden), "attn_k": (hidden, hidden), "attn_v": (hidden, hidden)}
    shapes |= {"attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    shapes |= {"ffn_down": (hidden, inner), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (vocab_size, hidden), "output_norm.weight": (hidden,)}
    for name, shape in tensors.items():
        writer.add_tensor(name, np.full(shape, 0.01, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
