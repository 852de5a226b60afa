"""Other people's clients: schemathesis on the API's own description, and lm-evaluation-harness through the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from tests.e2e.serve.conftest import Server

import minicpm
from minicpm.engine import LanguageModel
from minicpm.eval.engine_model import EngineModel
from minicpm.serve.app import _VERBS

PAIRS = [
    ("The capital of France is", " Paris."),
    ("The capital of France is", " Berlin, a city in Germany"),
    ("She opened the old door and closed the", " door"),
    ("2 + 2 =", " 4"),
    ("Die Straße ist", " groß und 世界"),
]


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[LanguageModel]:
    with minicpm.load(smollm2_path, context_length=1024) as model:
        yield model


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_through_the_server_scores_as_in_process(
    server: Server, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = pytest.importorskip("lm_eval.api.registry")
    instances = pytest.importorskip("lm_eval.api.instance")
    monkeypatch.setenv("NO_PROXY", "*")
    harness = registry.get_model("local-completions")(
        base_url=f"{server.url}/v1/completions", model="smollm2", num_concurrent=4, batch_size=2, max_length=512
    )
    # Found out by itself, from /tokenizer_info and /tokenize.
    assert harness.tokenizer_backend == "remote"
    asked = [instances.Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    theirs = harness.loglikelihood(asked, disable_tqdm=True)
    ours = EngineModel("smollm2", model).loglikelihood(PAIRS)
    # One step reads other rows beside than there, which does not change a bit; 1e-4 is what the sums' order may.
    assert [score for score, _ in theirs] == pytest.approx([score.logprob for score in ours], abs=1e-4)
    assert [is_greedy for _, is_greedy in theirs] == [score.is_greedy for score in ours]
    assert any(score.is_greedy for score in ours)
    settings = {"until": [".", "\n"], "max_gen_toks": 12, "temperature": 0.0}
    contexts = sorted({context for context, _ in PAIRS})
    asked = [instances.Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(contexts)]
    texts = harness.generate_until(asked, disable_tqdm=True)
    expected = model.generate(contexts, temperature=0, max_new_tokens=12, stop=[".", "\n"])
    assert texts == [completion.text for completion in expected]


def test_the_description_is_true_of_whole_answers(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    bodies: dict[str, Any] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "logprobs": True},
        "/v1/completions": {"prompt": "Hi", "max_tokens": 3, "logprobs": 1, "echo": True},
        "/v1/embeddings": {"input": ["Hi"]},
        "/tokenize": {"content": "Hi", "with_pieces": True},
        "/detokenize": {"tokens": [1, 2, 3]},
        "/apply-template": {"messages": [{"role": "user", "content": "Hi"}]},
    }
    for verb in _VERBS:
        if verb.reply is None:
            continue
        path = verb.path.replace("{model}", "smollm2")
        answer = server.client.request(verb.method, path, json=bodies.get(path))
        assert answer.status_code == 200, answer.text
        schema = document["paths"][verb.path][verb.method.lower()]["responses"]["200"]["content"]["application/json"]
        jsonschema_rs.validate({**schema["schema"], "components": document["components"]}, answer.json())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_schemathesis_finds_no_fault(server: Server) -> None:
    """Requests made from our own description, true and false: no 5xx, and each answer as it was described."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    chosen = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    num_answers, statuses = 0, set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=40,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode)))
        def ask(case: Any) -> None:
            nonlocal num_answers
            if isinstance(case.body, dict) and case.path.endswith("/completions"):
                case.body = json.loads(json.dumps(case.body)) | {"max_tokens": 2}
            answer = case.call_and_validate(checks=chosen)
            num_answers += 1
            statuses.add(answer.status_code)

        ask()
    assert num_answers > 200
    assert {200, 400} <= statuses
    server.wait_until_idle()
