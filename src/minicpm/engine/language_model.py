"""`LanguageModel`: text in, text out, over one engine; what `minicpm.load` returns.

Left out: finding and opening files (`opening.py`, `minicpm.load`), and terminals and servers (`cli`, `serve`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Self, Unpack

import numpy as np
import numpy.typing as npt

from minicpm.architecture import ModelConfig
from minicpm.engine.completion import Completion, describe
from minicpm.engine.engine import Engine
from minicpm.engine.runner import Runner, TextStream
from minicpm.engine.sequence import Pooling, Request, TokenLogprob
from minicpm.engine.settings import Settings, build_request
from minicpm.errors import EngineError

if TYPE_CHECKING:
    from minicpm.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]
Message = Mapping[str, str]
Prompt = str | Sequence[int]

_DEFAULT_NEW_TOKENS = 256


class LanguageModel:
    """A loaded model. Safe to share between threads, whose requests then run together.

    Every method that makes text takes the keywords of `Settings`: `max_new_tokens`, `temperature` (0 is greedy),
    `top_k`, `top_p`, `min_p`, `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `logit_bias`, `seed`,
    `stop` (a text or several), `logprobs` (how many likeliest tokens to tell at each place) and `speculate` ("ngram":
    guess the next tokens from what the text repeats; "draft": by the draft model that was loaded too; "off"), which
    changes the pace and nothing else. The defaults are the model card's: temperature 0.3, top_p 0.8, top_k 50. An
    unknown keyword is a TypeError.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        dtypes: str = "",
        fingerprint: Callable[[], str] | None = None,
    ) -> None:
        """Join an engine, which must have been given the same tokenizer, and a tokenizer.

        Args:
            engine: runs the model.
            tokenizer: of the same model.
            dtypes: what the file holds and what is computed in what, in one line, for people.
            fingerprint: tells the model from others; without it prompts cannot be kept in files.
        """
        self.dtypes = dtypes
        self._fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.config: ModelConfig = engine.config
        self.context_length = engine.context_length
        self._runner = Runner(engine)
        self.end_ids = tokenizer.eos_ids | frozenset(engine.config.eos_token_id)

    @property
    def engine(self) -> Engine:
        """The engine, for those who run its steps themselves.

        Raises:
            EngineError: the model is closed.
        """
        return self._runner.engine

    # ------------------------------------------------------------------ conversation

    def chat(
        self,
        message: str,
        history: Sequence[Message] | None = None,
        *,
        role: str = "user",
        system: str | None = None,
        **settings: Unpack[Settings],
    ) -> tuple[str, list[dict[str, str]]]:
        """Return the reply to `message` and the conversation with both, as a new list.

        Args:
            message: what is said now.
            history: what was said before, as {"role", "content"}; it is not changed.
            role: who says it.
            system: the system message, in the place of one that the history begins with.
            **settings: see the class; without `max_new_tokens` the reply may fill the context.

        Raises:
            EngineError: the conversation does not fit the context.
            ConfigError: a setting out of range.
            DataError: a message that the template cannot show.
        """
        with self.stream(message, history, role=role, system=system, **settings) as stream:
            for _ in stream:
                pass
        return stream.result.text, stream.history

    def stream(
        self,
        message: str,
        history: Sequence[Message] | None = None,
        *,
        role: str = "user",
        system: str | None = None,
        **settings: Unpack[Settings],
    ) -> TextStream:
        """Return the reply to `message` as pieces of text that come while it is made; else as `chat`."""
        messages = [dict(item) for item in history or ()]
        if system is not None:
            messages = [m for i, m in enumerate(messages) if i or m.get("role") != "system"]
            messages.insert(0, {"role": "system", "content": system})
        messages.append({"role": role, "content": message})
        prompt, stops = self.tokenizer.apply_chat(messages), self.tokenizer.turn_marks
        return TextStream(self._runner, build_request(prompt, settings, end_ids=self.end_ids, stops=stops), messages)

    # ------------------------------------------------------------------ plain text

    def generate(
        self, prompts: str | Sequence[str] | Sequence[Sequence[int]], **settings: Unpack[Settings]
    ) -> list[Completion]:
        """Return a continuation of each prompt, in order, made together; each as if it were alone.

        Args:
            prompts: plain texts or lists of token ids; no template is applied. A text gets bos where the model wants it
                and is read as text throughout; ids are taken as they are.
            **settings: see the class; `max_new_tokens` is 256 unless given. A `seed` holds for each prompt.

        Raises:
            EngineError: a prompt does not fit the context; nothing was generated.
            ConfigError: a setting out of range.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        requests = [self._continuation(prompt, settings) for prompt in prompts]
        for request in requests:
            self.engine.check(request)
        return [describe(sequence) for sequence in self._runner.run(requests)]

    def continue_text(self, prompt: Prompt, **settings: Unpack[Settings]) -> TextStream:
        """Return the continuation of one prompt as pieces of text that come while it is made; else as `generate`."""
        return TextStream(self._runner, self._continuation(prompt, settings), [])

    def _continuation(self, prompt: Prompt, settings: Settings) -> Request:
        defaults: Settings = {"max_new_tokens": _DEFAULT_NEW_TOKENS}
        return build_request(self.encode_prompt(prompt), {**defaults, **settings}, end_ids=self.end_ids)

    # ------------------------------------------------------------------ numbers

    def logprobs(self, text: Prompt, *, top: int = 0) -> list[TokenLogprob]:
        """Return each token of `text` with its log-probability after those before it; None at the first.

        The first is bos where the model wants one; the others then sum to the log-probability of the text.

        Args:
            text: plain text or token ids.
            top: how many of the likeliest tokens to tell at each place.

        Raises:
            EngineError: it does not fit the context.
        """
        request = Request(self.encode_prompt(text), max_new_tokens=0, prompt_logprobs=top)
        return self._runner.run([request])[0].prompt_logprobs

    def score(self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[list[TokenLogprob]]:
        """Return, for each (context, continuation), every token of the continuation with its log-probability.

        Contexts that begin alike are computed once as far as they agree. Each token's `top` holds the likeliest one.
        The pairs are token ids, bos included where the model wants one; neither part is empty.

        Raises:
            EngineError: a pair does not fit the context, or a part of it is empty; nothing was computed.
        """
        requests = []
        for context, tail in pairs:
            if not context or not tail:
                raise EngineError("a context and its continuation need at least one token each")
            requests.append(Request([*context, *tail], max_new_tokens=0, prompt_logprobs=1, first_scored=len(context)))
            self.engine.check(requests[-1])
        return [sequence.prompt_logprobs for sequence in self._runner.run(requests)]

    def next_logprobs(self, prompt: Prompt) -> Floats:
        """Return the log-probabilities (V,) of the token after `prompt`.

        Raises:
            EngineError: it does not fit the context.
        """
        request = Request(self.encode_prompt(prompt), max_new_tokens=0, wants_distribution=True)
        distribution = self._runner.run([request])[0].distribution
        assert distribution is not None, "a finished request has what it wanted"
        return distribution

    def embed(
        self, texts: str | Sequence[str], *, pooling: Pooling = "mean", normalize: bool = True
    ) -> npt.NDArray[np.float32]:
        """Return one vector per text (n, E), from the hidden states after the last norm.

        Args:
            texts: plain texts.
            pooling: "mean" of all positions, or the "last" one, which saw all of the text.
            normalize: whether each vector gets length 1, so that a dot product is the cosine.

        Raises:
            EngineError: a text does not fit the context; nothing was computed.
        """
        if pooling not in ("mean", "last"):
            raise EngineError(f"pooling must be 'mean' or 'last', got {pooling!r}")
        texts = [texts] if isinstance(texts, str) else texts
        requests = [Request(self.encode_prompt(text), max_new_tokens=0, pooling=pooling) for text in texts]
        for request in requests:
            self.engine.check(request)
        pooled = [sequence.pooled for sequence in self._runner.run(requests)]
        vectors = np.array(pooled, np.float64).reshape(len(requests), self.config.hidden_size)
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors.astype(np.float32)

    def encode_prompt(self, prompt: Prompt) -> Sequence[int]:
        """Return the ids of a plain text, bos before it where the model wants one; ids as they are."""
        return self.tokenizer.add_bos(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else list(prompt)

    # ------------------------------------------------------------------ prompts in files

    def save_prompt_cache(self, path: str | os.PathLike[str], prompt: Prompt) -> int:
        """Keep what was computed of `prompt` in a file, for `load_prompt_cache`, and return how many tokens it holds.

        Whole blocks of 32 tokens are kept, as far as they are still in memory. The file holds the prompt itself as ids.

        Args:
            path: written whole, or left as it was.
            prompt: plain text or ids that a reply was made for.

        Raises:
            EngineError: nothing of the prompt is in memory.
            CheckpointError: the file cannot be written.
        """
        from minicpm.engine.prompt_cache import write_prompt_cache

        ids, prefixes = self.encode_prompt(prompt), self.engine.prefixes
        blocks = prefixes.read(ids)
        if not len(blocks):
            raise EngineError(
                f"nothing of this prompt of {len(ids)} tokens is in memory; whole blocks of {prefixes.block_tokens} "
                "tokens are kept, after a reply was made for them"
            )
        num_tokens = len(blocks) * prefixes.block_tokens
        kept = np.array(ids[:num_tokens], np.int32)
        write_prompt_cache(path, kept, blocks, model=self._identity(), layout=prefixes.layout)
        return num_tokens

    def load_prompt_cache(self, path: str | os.PathLike[str]) -> list[int]:
        """Take in what `save_prompt_cache` kept, as far as there is room, and return the tokens that are in memory now.

        Prompts that begin with these tokens are then computed from there on.

        Raises:
            FormatError: the file is something else.
            CheckpointError: it is damaged, or of another model or KV cache type.
        """
        from minicpm.engine.prompt_cache import read_prompt_cache

        prefixes = self.engine.prefixes
        ids, blocks = read_prompt_cache(
            path,
            model=self._identity(),
            layout=prefixes.layout,
            block_tokens=prefixes.block_tokens,
            block_bytes=prefixes.block_bytes,
            vocab_size=self.config.vocab_size,
        )
        known: list[int] = ids.tolist()
        return known[: prefixes.write(known, blocks)]

    def _identity(self) -> str:
        if self._fingerprint is None:
            raise EngineError("this model was not opened from a file, so that no file of a prompt can be bound to it")
        return self._fingerprint()

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Cancel what runs and free the memory; the model cannot be used any more."""
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
