"""Our engine as a model under evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minicpm.eval.contract import Generation, Messages, Scored
from minicpm.eval.windows import cut_left, encode_pair, rolling_windows

if TYPE_CHECKING:
    from minicpm.engine import LanguageModel
    from minicpm.engine.sequence import TokenLogprob


class EngineModel:
    """A `LanguageModel` behind the contract."""

    def __init__(self, name: str, model: LanguageModel) -> None:
        """Take `model`, which stays the caller's to close."""
        self.name = name
        self.runtime = f"engine; {model.dtypes}"
        self._model = model
        self._prefix = _prefix(model)
        self.has_chat_template = bool(model.tokenizer.chat_template.source)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Return the score of each continuation after its context."""
        limit = self._model.context_length
        encoded = [cut_left(encode_pair(self._encode, self._prefix, *pair), limit) for pair in pairs]
        return [_scored(tokens) for tokens in self._model.score(encoded)]

    def rolling_loglikelihood(self, texts: Sequence[str]) -> list[Scored]:
        """Return the score of each whole text."""
        limit, tokenizer = self._model.context_length, self._model.tokenizer
        scores = []
        for text in texts:
            windows = rolling_windows(tokenizer.encode(text), self._prefix[0], limit)
            scores.append(_scored([token for tokens in self._model.score(windows) for token in tokens]))
        return scores

    def generate(self, prompts: Sequence[str | Messages], generation: Generation) -> list[str]:
        """Return the continuation of each text, or the reply to each conversation."""
        model = self._model
        # At least half of a short context stays for the prompt, which loses its beginning if it is longer.
        num_new = min(generation.max_new_tokens, model.context_length // 2)
        room = model.context_length - num_new
        settings = self._settings(generation, num_new)
        ids = [self._prompt(prompt) for prompt in prompts]
        return [completion.text for completion in model.generate([i[-room:] for i in ids], **settings)]

    def _prompt(self, prompt: str | Messages) -> list[int]:
        return self._encode(prompt) if isinstance(prompt, str) else self._model.tokenizer.apply_chat(prompt)

    def _encode(self, text: str) -> list[int]:
        return self._model.tokenizer.add_bos(self._model.tokenizer.encode(text))

    @staticmethod
    def _settings(generation: Generation, num_new: int) -> Any:
        return {
            "max_new_tokens": num_new,
            "stop": list(generation.stop),
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "top_k": 0,
            "seed": generation.seed,
        }


def _prefix(model: LanguageModel) -> list[int]:
    """What an empty context is: bos, or the end token of a vocabulary without one."""
    tokenizer = model.tokenizer
    bos = tokenizer.bos_id
    return [bos if bos is not None else min(tokenizer.eos_ids)]


def _scored(tokens: Sequence[TokenLogprob]) -> Scored:
    return Scored(
        sum(token.logprob or 0.0 for token in tokens),
        len(tokens),
        all(token.top[0].token_id == token.token_id for token in tokens),
    )
