"""A model behind an OpenAI-compatible server, under evaluation or as a judge.

Scoring needs a server whose `/completions` gives log-probabilities of the prompt (`echo`), as vLLM's does and
llama-server's does not; generation and conversation work with any.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from minicpm.errors import EvalError
from minicpm.eval.contract import Generation, Messages, Scored

_TIMEOUT_SECONDS = 600
_KEY_VARIABLE = "OPENAI_API_KEY"


class UrlModel:
    """A server behind the contract. Its key comes from the environment, never from the command line."""

    has_chat_template = True

    def __init__(self, url: str, model: str | None = None) -> None:
        """Ask the server which model it has, unless that is said.

        Args:
            url: the base, such as http://127.0.0.1:8000/v1.
            model: its name there; None is the first that the server lists.

        Raises:
            EvalError: no such server, or it lists no model.
        """
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise EvalError(f"{url!r} is no http(s) URL; give the base of an OpenAI-compatible server")
        self._url = url.rstrip("/")
        if model is None:
            listed = self._call("/models", None).get("data") or []
            if not listed:
                raise EvalError(f"{url} lists no model; name one")
            model = str(listed[0]["id"])
        self.model = model
        self.name = f"{model} at {url}"
        self.runtime = "server"

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Return the score of each continuation after its context, as the server cuts it into tokens."""
        return [self._score(context, continuation) for context, continuation in pairs]

    def rolling_loglikelihood(self, texts: Sequence[str]) -> list[Scored]:
        """Return the score of each whole text, which must fit the server's context; its first token is not scored."""
        return [self._score("", text) for text in texts]

    def generate(self, prompts: Sequence[str | Messages], generation: Generation) -> list[str]:
        """Return the continuation of each text, or the reply to each conversation."""
        settings: dict[str, Any] = {
            "model": self.model,
            "max_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "seed": generation.seed,
        }
        if generation.stop:
            settings["stop"] = list(generation.stop)
        texts = []
        for prompt in prompts:
            if isinstance(prompt, str):
                texts.append(str(self._choice("/completions", {**settings, "prompt": prompt})["text"] or ""))
            else:
                choice = self._choice("/chat/completions", {**settings, "messages": list(prompt)})
                texts.append(str(choice["message"]["content"] or ""))
        return texts

    def _score(self, context: str, continuation: str) -> Scored:
        body = {"model": self.model, "prompt": context + continuation, "max_tokens": 0, "echo": True, "logprobs": 1}
        logprobs = self._choice("/completions", body).get("logprobs") or {}
        try:
            offsets, values, tops = logprobs["text_offset"], logprobs["token_logprobs"], logprobs["top_logprobs"]
            tokens = logprobs["tokens"]
            # A token that begins with the context's last space belongs to the continuation.
            start = len(context.rstrip())
            chosen = [i for i, offset in enumerate(offsets) if offset >= start and values[i] is not None]
            is_greedy = all(tokens[i] in tops[i] and values[i] >= max(tops[i].values()) - 1e-6 for i in chosen)
            return Scored(sum(values[i] for i in chosen), len(chosen), is_greedy)
        except (KeyError, TypeError, IndexError) as error:
            raise EvalError(
                f"{self._url} gives no log-probabilities of the prompt (`echo`);"
                " score with the engine, or use tasks that generate"
            ) from error

    def _choice(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._call(path, body)
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise EvalError(f"{self._url}{path} answered without a choice: {str(answer)[:200]}") from error

    def _call(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(_KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = error.read(500).decode("utf-8", "replace")
            raise EvalError(f"{self._url}{path} answered {error.code}: {said}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EvalError(f"{self._url}{path} cannot be asked: {error}; is the server running?") from error
