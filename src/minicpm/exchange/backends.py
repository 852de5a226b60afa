"""The runtimes that `compare` can put side by side, each as one function: token ids -> `Scores`.

A backend is named on the command line as `engine:PATH`, `torch:PATH`, `transformers:PATH`, `llama.cpp:FILE.gguf` or an
http(s) URL of an OpenAI-compatible server; a bare path or name means our engine. Each imports its library when opened.
What this leaves out: the comparison (`agreement.py`).
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from minicpm.errors import ConfigError, EngineError
from minicpm.exchange.agreement import Floats, Scores

NUM_LISTED_TOKENS = 200
URL_LISTED_TOKENS = 20
_TIMEOUT_SECONDS = 300


class Backend(Protocol):
    """A model in some runtime; `dtypes` says what is held and computed in what."""

    dtypes: str

    def score(self, ids: Sequence[int]) -> Scores:
        """Return the next-token log-probabilities after each of `ids`, T rows for T ids."""
        ...


def log_softmax(logits: Floats) -> Floats:
    """Return float32 log-probabilities of logits (T, V), summed in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted.astype(np.float32)


class TorchBackend:
    """Our torch model on weights of any format, in the dtype named (saved dtype when None)."""

    def __init__(self, path: str, dtype: str | None = None) -> None:
        from minicpm.formats.checkpoint import open_checkpoint
        from minicpm.model.loading import describe_dtypes, load_model, parse_dtype, saved_dtype

        checkpoint = open_checkpoint(path)
        config, weights = checkpoint.config, checkpoint.weights
        compute = parse_dtype(dtype) if dtype else saved_dtype(config, weights)
        self.dtypes = describe_dtypes(weights, compute)
        self.model = load_model(config, weights, dtype=compute)

    def score(self, ids: Sequence[int]) -> Scores:
        """Return the next-token log-probabilities after each of `ids`."""
        import torch

        with torch.inference_mode():
            logits = self.model(torch.tensor([list(ids)]))[0]
        return Scores(log_softmax(logits.float().numpy()))


class TransformersBackend:
    """The `transformers` library on a folder; code in the folder is never run."""

    def __init__(self, path: str, dtype: str | None = None) -> None:
        import torch
        import transformers

        from minicpm.model.loading import parse_dtype

        quiet: Any = transformers.utils.logging
        quiet.disable_progress_bar()
        kind: Any = parse_dtype(dtype) if dtype else "auto"
        try:
            self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=kind, trust_remote_code=False
            )
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"transformers cannot open {path}: {str(error).splitlines()[0]}; "
                "a folder in the granite or llama format needs no code of its own"
            ) from error
        self.dtypes = f"compute {str(self.model.dtype).removeprefix('torch.')}"
        self.torch = torch

    def score(self, ids: Sequence[int]) -> Scores:
        """Return the next-token log-probabilities after each of `ids`."""
        with self.torch.inference_mode():
            logits = self.model(input_ids=self.torch.tensor([list(ids)])).logits[0]
        return Scores(log_softmax(logits.float().numpy()))


class LlamaCppBackend:
    """llama.cpp through the package `xllamacpp`; it tells its likeliest tokens only."""

    def __init__(self, path: str, dtype: str | None = None) -> None:
        if dtype:
            raise ConfigError("llama.cpp computes in the file's own types; leave the dtype out")
        try:
            import xllamacpp
        except ImportError as error:
            raise ConfigError("comparing with llama.cpp needs the package xllamacpp: pip install xllamacpp") from error
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_parallel = 1
        params.warmup = False
        params.verbosity = -1
        self.server = xllamacpp.Server(params)
        self.dtypes = "as llama.cpp chooses"

    def score(self, ids: Sequence[int]) -> Scores:
        """Return the likeliest next tokens after each of `ids`; one request a position, the prefix stays cached."""
        return _listed([self._next(ids[: length + 1]) for length in range(len(ids))])

    def _next(self, prefix: Sequence[int]) -> dict[int, float]:
        request = {
            "prompt": list(prefix),
            "n_predict": 1,
            "n_probs": NUM_LISTED_TOKENS,
            "temperature": 0.0,
            "cache_prompt": True,
        }
        reply = self.server.handle_completions(request)
        if "choices" not in reply:
            raise EngineError(f"llama.cpp refused a prompt of {len(prefix)} tokens: {reply}")
        told = reply["choices"][0]["logprobs"]
        if told is None:
            return {}  # it chose to stop here, and then it tells nothing
        listed = told["content"][0]["top_logprobs"]
        return {item["id"]: item["logprob"] for item in listed}


class UrlBackend:
    """An OpenAI-compatible server that answers `/completions` with `echo` and `logprobs` (vLLM; `minicpm serve`)."""

    def __init__(self, url: str, dtype: str | None = None) -> None:
        if dtype:
            raise ConfigError("a server computes in its own dtype; leave the dtype out")
        self.url = url.rstrip("/")
        self.dtypes = "as the server chooses"

    def score(self, ids: Sequence[int]) -> Scores:
        """Return the likeliest next tokens after each of `ids`, from one request."""
        body = {
            "prompt": list(ids),
            "max_tokens": 1,
            "echo": True,
            "logprobs": URL_LISTED_TOKENS,
            "temperature": 0.0,
            # vLLM's switch for names that are ids; others ignore it, and then texts cannot be told apart.
            "return_tokens_as_token_ids": True,
        }
        models = self._call("/models", None)
        body["model"] = models["data"][0]["id"]
        rows = self._call("/completions", body)["choices"][0]["logprobs"]["top_logprobs"]
        if len(rows) != len(ids) + 1:
            raise EngineError(f"{self.url} scored {len(rows)} positions of {len(ids) + 1}; does it support echo?")
        return _listed([{_token_id(key): value for key, value in row.items()} for row in rows[1:]])

    def _call(self, route: str, body: Mapping[str, Any] | None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + route, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as reply:
                return json.load(reply)
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise EngineError(
                f"{self.url}{route} cannot be used: {error}; expected an OpenAI-compatible /v1"
            ) from error


def _token_id(key: str) -> int:
    name, _, number = key.partition(":")
    if name != "token_id" or not number.isdigit():
        raise EngineError(
            f"the server names tokens by text ({key!r}), which is not unique; it must honour return_tokens_as_token_ids"
        )
    return int(number)


def _listed(rows: Sequence[Mapping[int, float]]) -> Scores:
    """Return rows of {token: logprob} as arrays, likeliest first, short rows filled with −inf and token −1."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), -1, np.int64)
    logprobs = np.full((len(rows), width), -np.inf, np.float32)
    for i, row in enumerate(rows):
        ordered = sorted(row.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else math.inf)
        ids[i, : len(row)] = [token for token, _ in ordered]
        logprobs[i, : len(row)] = [value for _, value in ordered]
    return Scores(logprobs, ids)


class EngineBackend:
    """Our engine on weights of any format."""

    def __init__(self, path: str, dtype: str | None = None) -> None:
        from minicpm.engine.decoder import Decoder
        from minicpm.formats.checkpoint import open_checkpoint

        if dtype:
            raise ConfigError("the engine computes in the file's own types; leave the dtype out")
        checkpoint = open_checkpoint(path)
        self.dtypes = ""
        self.open: Callable[[int], Decoder] = lambda num_blocks: Decoder(
            checkpoint.config, checkpoint.weights, num_blocks=num_blocks, block_tokens=_BLOCK_TOKENS
        )

    def score(self, ids: Sequence[int]) -> Scores:
        """Return the next-token log-probabilities after each of `ids`, in chunks so that logits stay small."""
        num_blocks = -(-len(ids) // _BLOCK_TOKENS)
        decoder = self.open(num_blocks)
        self.dtypes = decoder.dtypes
        table = np.arange(num_blocks, dtype=np.int32)[None]
        rows = []
        for start in range(0, len(ids), _CHUNK_TOKENS):
            tokens = np.asarray(ids[start : start + _CHUNK_TOKENS], np.int32)
            count = len(tokens)
            logits = decoder.step(
                tokens,
                np.arange(start, start + count, dtype=np.int32),
                np.zeros(count, np.int32),
                table,
                np.arange(count, dtype=np.int32),
            )
            rows.append(log_softmax(logits))
        return Scores(np.concatenate(rows))


_BLOCK_TOKENS = 32
_CHUNK_TOKENS = 64

BACKENDS: Mapping[str, Callable[[str, str | None], Backend]] = {
    "engine": EngineBackend,
    "torch": TorchBackend,
    "transformers": TransformersBackend,
    "llama.cpp": LlamaCppBackend,
}


def open_backend(spec: str, dtype: str | None = None) -> Backend:
    """Return the backend that `spec` names: KIND:PATH, a URL, or a path for our engine.

    Raises:
        ConfigError: an unknown kind, or a runtime that is not installed.
        MiniCPMError: whatever opening the model raises.
    """
    if spec.startswith(("http://", "https://")):
        return UrlBackend(spec, dtype)
    kind, separator, path = spec.partition(":")
    if not separator:
        return EngineBackend(spec, dtype)
    if kind not in BACKENDS:
        raise ConfigError(f"backend {kind!r} is not known; known: {', '.join(BACKENDS)}, or a URL")
    return BACKENDS[kind](path, dtype)
