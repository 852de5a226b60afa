"""Our models inside EleutherAI's lm-evaluation-harness, so that all of its tasks (IFEval, TruthfulQA, …) run on them.

`minicpm eval MODEL --with lm-eval --tasks …` comes here. The harness's own command line knows only the models that it
ships; `python -m minicpm.eval.lm_eval_bridge --model minicpm --model_args model=smollm2 …` is the same command line
with ours added. Needs the extra `[eval]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from minicpm.eval.contract import EvaluatedModel, Generation

_DEFAULT_NEW_TOKENS = 256


@register_model("minicpm")
class MiniCPMLM(LM):  # type: ignore[misc, unused-ignore]  # untyped, or not installed
    """A model of ours, opened by name or path, behind the harness's interface."""

    def __init__(self, model: str | EvaluatedModel, **settings: Any) -> None:
        """Take a model, or open the one of that name or path with our engine.

        Args:
            model: a name, a GGUF file, a folder, or a model under evaluation.
            **settings: `context_length` and `num_threads` count; what the harness adds for all models does not.
        """
        super().__init__()
        if isinstance(model, str):
            import minicpm
            from minicpm.eval.engine_model import EngineModel

            known: dict[str, Any] = {
                k: int(settings[k]) for k in ("context_length", "num_threads") if settings.get(k) is not None
            }
            model = EngineModel(model, minicpm.load(model, **known))
        self._evaluated = model
        # Conversations come rendered, where a control token could not be told from its letters: this finds them again.
        self._conversations: dict[str, list[dict[str, str]]] = {}

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests is keyed by."""
        return self._evaluated.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a text that stands for the conversation."""
        text = "\n".join(f"{message['role']}: {message['content']}" for message in chat_history)
        if add_generation_prompt:
            text += "\nassistant:"
        self._conversations[text] = [dict(message) for message in chat_history]
        return text

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return (log-probability, whether greedy) of each continuation."""
        scores = self._evaluated.loglikelihood([request.args for request in requests])
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-probability of each text."""
        scores = self._evaluated.rolling_loglikelihood([request.args[0] for request in requests])
        return [score.logprob for score in scores]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the continuation of each context up to its stop texts."""
        by_settings: dict[Generation, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(_generation(request.args[1]), []).append(index)
        texts: dict[int, str] = {}
        for generation, indices in by_settings.items():
            contexts = [requests[index].args[0] for index in indices]
            prompts = [self._conversations.get(context, context) for context in contexts]
            for index, text in zip(indices, self._evaluated.generate(prompts, generation), strict=True):
                texts[index] = text
        return [texts[index] for index in range(len(requests))]


def evaluate(
    model: EvaluatedModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    include: Path | None = None,
    is_chat: bool = False,
) -> tuple[dict[str, Any], str]:
    """Run tasks of the harness on `model` and return its results and its table.

    Args:
        model: under evaluation.
        tasks: names that the harness knows.
        limit: rows of each.
        shots: examples in front; None is each task's own number.
        include: a folder of further task files, for work without a network.
        is_chat: whether prompts become conversations.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    results: Any = simple_evaluate(
        model=MiniCPMLM(model),
        tasks=list(tasks),
        limit=limit,
        num_fewshot=shots,
        apply_chat_template=is_chat,
        task_manager=TaskManager(include_path=str(include) if include else None),
        bootstrap_iters=0,
    )
    return results["results"], str(make_table(results))


def _generation(settings: dict[str, Any]) -> Generation:
    until = settings.get("until") or []
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
    return Generation(
        max_new_tokens=int(settings.get("max_gen_toks") or _DEFAULT_NEW_TOKENS),
        stop=(until,) if isinstance(until, str) else tuple(until),
        temperature=temperature,
        top_p=float(settings.get("top_p") or 1.0),
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
