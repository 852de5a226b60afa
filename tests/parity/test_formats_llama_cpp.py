"""Against llama.cpp: it runs our files to the reference's log-probabilities, and our K-quants err as little as its."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from tests.reference import ReferenceDecoder, log_softmax, random_weights
from tests.unit.formats.model_files import as_llama, entries_of, vocabulary

from minicpm.architecture import ModelConfig, RopeScaling
from minicpm.formats import blocks
from minicpm.formats.blocks import BLOCK_TYPES
from minicpm.formats.gguf_write import write_gguf_model

xllamacpp = pytest.importorskip("xllamacpp")
PROMPT = [1, 300, 17, 280, 290, 5, 301, 302, 40, 299, 311, 312]


def logprobs(path: Path, ids: list[int]) -> dict[int, float]:
    """llama.cpp's next-token log-probabilities after `ids`."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 128, 1, False, -1
    params.cpuparams.n_threads = 1
    for name in ("cache_type_k", "cache_type_v"):
        setattr(params, name, xllamacpp.ggml_type.GGML_TYPE_F32)
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # computes in fp16
    server = xllamacpp.Server(params)
    # It tells no probabilities of half a character or of an end; the bias picks a word and leaves the numbers alone.
    request = {"prompt": ids, "n_predict": 1, "n_probs": 331, "temperature": 0.0, "logit_bias": [[300, 1000.0]]}
    reply = server.handle_completions(request)
    return {item["id"]: item["logprob"] for item in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


def worst(path: Path, decoder: ReferenceDecoder) -> float:
    """The largest difference in log-probability among tokens likelier than e^-12."""
    truth = log_softmax(decoder.full_logits(PROMPT, last_only=True)[0])
    found = logprobs(path, PROMPT)
    seen = [token for token in range(len(truth)) if truth[token] > -12]
    assert len(seen) > 20
    return max(abs(found[token] - truth[token]) for token in seen)


def family(config: ModelConfig, model_type: str) -> ModelConfig:
    if model_type == "granite":
        return config.replace(model_type="granite", attention_multiplier=0.4)
    # Not the scales that llama.cpp takes for granted in a MiniCPM.
    return as_llama(config) if model_type == "llama" else config.replace(scale_emb=7.0, scale_depth=1.1)


# Measured: 2e-6; without logit_scale 0.4, with unpermuted rows 0.9.
@pytest.mark.parametrize("model_type", ["minicpm", "granite", "llama"])
def test_it_runs_our_f32_files(tmp_path: Path, tiny_config: ModelConfig, model_type: str) -> None:
    config = family(tiny_config, model_type)
    weights = random_weights(config)
    write_gguf_model(tmp_path / "a.gguf", config, entries_of(weights), vocabulary(331))
    assert worst(tmp_path / "a.gguf", ReferenceDecoder(config, weights)) < 1e-4


@pytest.mark.parametrize(
    "scaling",
    [RopeScaling("linear", 4.0), RopeScaling("ntk_by_parts", 8.0, 64), RopeScaling("llama3", 8.0, 64, 1.0, 4.0)],
)
def test_rope_scaling_means_the_same_to_it(tmp_path: Path, tiny_config: ModelConfig, scaling: RopeScaling) -> None:
    config = tiny_config.replace(rope_scaling=scaling)
    weights = random_weights(config)
    write_gguf_model(tmp_path / "a.gguf", config, entries_of(weights), vocabulary(331))
    assert worst(tmp_path / "a.gguf", ReferenceDecoder(config, weights)) < 1e-4
    assert worst(tmp_path / "a.gguf", ReferenceDecoder(config.replace(rope_scaling=None), weights)) > 0.1


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_it_reads_our_block_types(tmp_path: Path, tiny_config: ModelConfig, name: str) -> None:
    """Measured: 0.05 to 0.13, because it rounds activations to 8 bits per block; a wrong level moves them by nats."""
    config = tiny_config.replace(hidden_size=256, head_dim=32, num_attention_heads=8, intermediate_size=512)
    config = config.replace(num_hidden_layers=2, dim_model_base=64.0)
    entries = entries_of(random_weights(config), name)
    write_gguf_model(tmp_path / "a.gguf", config, entries, vocabulary(331))
    decoder = ReferenceDecoder(config, {n: entry.make() for n, entry in entries.items()})
    assert worst(tmp_path / "a.gguf", decoder) < 0.3


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """The quantizers inside the package's extension module."""
    found = sorted(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    library = ctypes.CDLL(str(found[0])) if found else None
    if not hasattr(library, "ggml_quantize_chunk"):
        pytest.skip("this build of xllamacpp does not export ggml_quantize_chunk")
    assert library is not None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantized(library: ctypes.CDLL, name: str, values: np.ndarray) -> np.ndarray:
    data = np.empty((values.shape[0], BLOCK_TYPES[name].row_bytes(values.shape[1])), np.uint8)
    size = library.ggml_quantize_chunk(
        BLOCK_TYPES[name].ggml_id, values.ctypes.data, data.ctypes.data, 0, values.shape[0], values.shape[1], None
    )
    assert size == data.size
    return data


DISTRIBUTIONS = {
    "normal": lambda rng: rng.standard_normal((64, 1024)),
    "heavy tails": lambda rng: 0.02 * rng.standard_t(3, (64, 1024)),
    "positive": lambda rng: np.abs(rng.standard_normal((64, 1024))),
    "around -1": lambda rng: -1 - 0.01 * rng.random((64, 1024)),
    "sparse": lambda rng: rng.standard_normal((64, 1024)) * (rng.random((64, 1024)) < 0.05),
}


# Measured: 0.96 to 1.006, and 1.019 for Q6_K around -1.
@pytest.mark.parametrize("case", DISTRIBUTIONS)
@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_err_as_little(library: ctypes.CDLL, name: str, case: str) -> None:
    values = DISTRIBUTIONS[case](np.random.default_rng(0)).astype(np.float32)
    ours, theirs = (
        blocks.decode(name, data) for data in (blocks.encode(name, values), quantized(library, name, values))
    )
    assert np.square(ours - values).sum() <= 1.03 * np.square(theirs - values).sum()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_the_simple_types_are_its_own_to_the_bit(library: ctypes.CDLL, name: str) -> None:
    values = DISTRIBUTIONS["heavy tails"](np.random.default_rng(0)).astype(np.float32)
    assert np.mean(blocks.encode(name, values) != quantized(library, name, values)) < 1e-4
