"""Our torch model as a model under evaluation, in the precision of one's choice: what the engine is held to.

What this leaves out: speed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from minicpm.eval.contract import Generation, Messages, Scored
from minicpm.eval.windows import Pair, cut_left, encode_pair, rolling_windows
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.model.generation import generate
from minicpm.model.loading import describe_dtypes, load_model, parse_dtype, saved_dtype
from minicpm.tokenizer import Tokenizer


class TorchModel:
    """A checkpoint in PyTorch behind the contract."""

    def __init__(
        self, name: str, path: str | os.PathLike[str], dtype: str | None = None, batch_tokens: int = 2048
    ) -> None:
        """Load the checkpoint at `path`.

        Args:
            name: for people.
            path: a GGUF file or a folder.
            dtype: bf16, fp16 or fp32; None is what it is saved in.
            batch_tokens: of one forward pass, padding included.
        """
        checkpoint = open_checkpoint(path)
        compute = parse_dtype(dtype) if dtype else saved_dtype(checkpoint.config, checkpoint.weights)
        self.name = name
        self.runtime = f"torch; {describe_dtypes(checkpoint.weights, compute)}"
        self._config = checkpoint.config
        self._model = load_model(checkpoint.config, checkpoint.weights, dtype=compute)
        self._batch_tokens = batch_tokens
        if checkpoint.kind == "gguf":
            self._tokenizer = Tokenizer.from_gguf(checkpoint.metadata)
        else:
            self._tokenizer = Tokenizer.from_folder(Path(checkpoint.path))
        self.has_chat_template = bool(self._tokenizer.chat_template.source)
        bos = self._tokenizer.bos_id
        self._prefix = [bos if bos is not None else min(self._tokenizer.eos_ids)]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Return the score of each continuation after its context."""
        limit = self._config.max_position_embeddings
        return self._score([cut_left(encode_pair(self._encode, self._prefix, *pair), limit) for pair in pairs])

    def rolling_loglikelihood(self, texts: Sequence[str]) -> list[Scored]:
        """Return the score of each whole text."""
        limit = self._config.max_position_embeddings
        scores = []
        for text in texts:
            parts = self._score(rolling_windows(self._tokenizer.encode(text), self._prefix[0], limit))
            scores.append(
                Scored(sum(p.logprob for p in parts), sum(p.num_tokens for p in parts), all(p.is_greedy for p in parts))
            )
        return scores

    def generate(self, prompts: Sequence[str | Messages], generation: Generation) -> list[str]:
        """Return the continuation of each text, or the reply to each conversation, one after another."""
        num_new = min(generation.max_new_tokens, self._config.max_position_embeddings // 2)
        room = self._config.max_position_embeddings - num_new
        texts = []
        for index, prompt in enumerate(prompts):
            ids = self._encode(prompt) if isinstance(prompt, str) else self._tokenizer.apply_chat(prompt)
            new = generate(
                self._model,
                torch.tensor([ids[-room:]]),
                num_new,
                temperature=generation.temperature,
                top_p=generation.top_p,
                stop_ids=self._tokenizer.eos_ids,
                generator=torch.Generator().manual_seed(generation.seed + index),
            )[0].tolist()
            texts.append(
                _before_stop(
                    self._tokenizer.decode([i for i in new if i not in self._tokenizer.eos_ids]), generation.stop
                )
            )
        return texts

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.add_bos(self._tokenizer.encode(text))

    @torch.inference_mode()
    def _score(self, pairs: Sequence[Pair]) -> list[Scored]:
        scores: dict[int, Scored] = {}
        # Rows of nearly one length share a forward pass.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        while order:
            length = len(pairs[order[-1]][0]) + len(pairs[order[-1]][1])
            batch = [order.pop() for _ in range(min(len(order), max(1, self._batch_tokens // length)))]
            ids = torch.zeros(len(batch), length - 1, dtype=torch.long)  # (B, T)
            for row, index in enumerate(batch):
                whole = [*pairs[index][0], *pairs[index][1]][:-1]
                ids[row, : len(whole)] = torch.tensor(whole)
            hidden = self._model.hidden_states(ids)  # (B, T, E)
            for row, index in enumerate(batch):
                context, continuation = pairs[index]
                wanted = hidden[row, len(context) - 1 : len(context) + len(continuation) - 1]
                scores[index] = _scored(self._model.head(wanted).float(), continuation)
        return [scores[index] for index in range(len(pairs))]


def _scored(logits: torch.Tensor, continuation: Sequence[int]) -> Scored:
    targets = torch.tensor(list(continuation))
    logprobs = logits.log_softmax(dim=-1).gather(1, targets[:, None])
    return Scored(float(logprobs.double().sum()), len(continuation), bool((logits.argmax(dim=-1) == targets).all()))


def _before_stop(text: str, stops: Sequence[str]) -> str:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
