"""Whole runs on a tiny model: figures, resumption, comparison, the page, dialogues with a judge behind HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.unit.engine.tiny import reference_model

from minicpm.architecture import ModelConfig
from minicpm.errors import EvalError
from minicpm.eval.compare import compare_runs
from minicpm.eval.contract import Scored
from minicpm.eval.dialogue import find_rating
from minicpm.eval.engine_model import EngineModel
from minicpm.eval.report import spread, write_report
from minicpm.eval.results import Scoring, read_results, read_samples
from minicpm.eval.runner import Plan, Progress, prepare
from minicpm.eval.runner import run as run_jobs
from minicpm.eval.url_model import UrlModel

PIQA = [{"goal": f"do {n}", "sol1": "so", "sol2": "not so", "label": n % 2} for n in range(6)]
FACTS = {"model": "tiny", "runtime": "engine"}


@pytest.fixture
def model(tiny_config: ModelConfig) -> EngineModel:
    return EngineModel("tiny", reference_model(tiny_config))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "piqa_val.jsonl", PIQA)
    return folder


def run(plan: Plan, model: Any, facts: dict[str, Any]) -> list[Scoring]:
    return run_jobs(plan, prepare(plan), model, facts)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Counting:
    """A model that counts what it is asked, and may fail."""

    def __init__(self, inner: Any, fails_after: int = 10**9) -> None:
        self.inner, self.fails_after, self.num_pairs = inner, fails_after, 0
        self.name, self.runtime, self.has_chat_template = inner.name, inner.runtime, inner.has_chat_template

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        if self.num_pairs >= self.fails_after:
            raise KeyboardInterrupt
        self.num_pairs += len(pairs)
        return list(self.inner.loglikelihood(pairs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_an_interrupted_run_goes_on_where_it_stopped(model: EngineModel, data: Path, tmp_path: Path) -> None:
    whole = run(Plan(["piqa"], tmp_path / "whole", data=data), model, FACTS)
    seen: list[Progress] = []
    plan = Plan(["piqa"], tmp_path / "parts", data=data, batch_rows=2, report=seen.append)
    with pytest.raises(KeyboardInterrupt):
        run(plan, Counting(model, fails_after=8), FACTS)
    # What a process killed in the middle of a line leaves.
    path = tmp_path / "parts" / "samples" / "piqa.choice.jsonl"
    with path.open("a") as file:
        file.write('{"index": 4, "val')
    rest = Counting(model)
    assert run(plan, rest, FACTS) == whole
    assert rest.num_pairs == 4
    assert [p.num_done for p in seen] == [0, 2, 4, 4, 6]
    assert read_results(tmp_path / "parts") == read_results(tmp_path / "whole")
    again = Counting(model)
    assert run(plan, again, FACTS) == whole
    assert again.num_pairs == 0


def test_scores_are_those_of_the_model(model: EngineModel, data: Path, tmp_path: Path) -> None:
    run(Plan(["piqa"], tmp_path / "out", data=data, limit=3), model, FACTS)
    samples = read_samples(tmp_path / "out", "piqa", "choice")
    assert [sample.index for sample in samples] == [0, 1, 2]
    language_model = model._model
    ids = language_model.tokenizer.add_bos(language_model.tokenizer.encode("Question: do 1\nAnswer: not so"))
    tokens = language_model.logprobs(ids)
    assert samples[1].detail["logprobs"][1] == pytest.approx(sum(t.logprob or 0 for t in tokens[-7:]), abs=1e-4)


def test_a_run_of_something_else_is_not_continued(model: EngineModel, data: Path, tmp_path: Path) -> None:
    plan = Plan(["piqa"], tmp_path / "out", data=data)
    run(plan, model, FACTS)
    with pytest.raises(EvalError, match="another run: model differ"):
        run(plan, model, {"model": "other"})
    with pytest.raises(EvalError, match="another run: form_digest, shots differ"):
        run(Plan(["piqa"], tmp_path / "out", data=data, shots=1), model, FACTS)
    write(data / "piqa_val.jsonl", PIQA[:5])
    with pytest.raises(EvalError, match="another run: sha256 differ"):
        run(plan, model, FACTS)
    (tmp_path / "out" / "samples" / "piqa.choice.jsonl").write_text("no json\n")
    with pytest.raises(EvalError, match=r"piqa\.choice\.jsonl:1 is damaged"):
        run(plan, model, FACTS)


def test_what_can_be_wrong_is_found_before_the_model(data: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="--allow-code"):
        prepare(Plan(["humaneval"], tmp_path, data=data))
    with pytest.raises(EvalError, match="--judge URL"):
        prepare(Plan(["mt_bench"], tmp_path, data=data))
    prepare(Plan(["piqa"], tmp_path, data=data))


def test_two_runs_are_compared_row_by_row(model: EngineModel, data: Path, tmp_path: Path) -> None:
    run(Plan(["piqa"], tmp_path / "a", data=data), model, FACTS)
    run(Plan(["piqa"], tmp_path / "b", data=data), model, FACTS)
    change = compare_runs(tmp_path / "a", tmp_path / "b")[0]
    assert (change.difference.difference, change.difference.p_value, change.difference.num_rows) == (0, 1, 6)
    run(Plan(["piqa"], tmp_path / "c", data=data, shots=2), model, FACTS)
    with pytest.raises(EvalError, match="form_digest"):
        compare_runs(tmp_path / "a", tmp_path / "c")
    with pytest.raises(EvalError, match="no finished evaluation"):
        compare_runs(tmp_path / "a", tmp_path / "none")


def test_the_page_shows_every_phrasing_and_escapes(model: EngineModel, data: Path, tmp_path: Path) -> None:
    write(data / "piqa_val.jsonl", [{**row, "goal": "<script>alert(1)</script>"} for row in PIQA])
    facts = {"model": "<b>tiny</b>"}
    scorings = run(Plan(["piqa"], tmp_path / "out", data=data, with_paraphrases=True), model, facts)
    assert [scoring.form for scoring in scorings] == ["choice", "bare", "how-to"]
    assert [(task, metric) for task, metric, _, _ in spread(scorings)] == [("piqa", "acc")]
    page = write_report(tmp_path / "out", facts, "plain", scorings).read_text()
    assert "&lt;b&gt;tiny" in page
    assert "<script>alert" not in page
    assert page.count("<svg") == 6
    # Fewer rows of one phrasing are no other phrasing; a file is named once.
    fewer = run(Plan(["piqa"], tmp_path / "fewer", data=data, limit=3), model, facts)
    assert spread([*scorings[1:], *fewer])[0][2:] == spread(scorings[1:])[0][2:]
    page = write_report(tmp_path / "out", facts, "plain", [*scorings[1:], scorings[0]]).read_text()
    assert page.count(scorings[0].sha256) == 1


def test_whole_texts_are_on_disk_one_by_one(model: EngineModel, data: Path, tmp_path: Path) -> None:
    texts = "".join(f" = Heading {n} = \n\n text {n} \n\n" for n in range(3))
    (data / "wikitext2_raw_test.txt").write_text(texts)
    seen: list[Progress] = []
    (scoring,) = run(Plan(["wikitext"], tmp_path / "out", data=data, report=seen.append), model, FACTS)
    assert [p.num_done for p in seen] == list(range(scoring.num_rows + 1))
    assert scoring.num_rows > 1


# ------------------------------------------------------------------ dialogues

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Say {a}.", "Again."]},
    {"question_id": 101, "category": "math", "turns": ["1+1?", "And 2+2?"]},
]
PROMPTS = [
    {"name": f"single{math}-v1{turn}", "system_prompt": "Rate.", "prompt_template": text + ref}
    for math, ref in (("", ""), ("-math", " ref={ref_answer_1}"))
    for turn, text in (("", "Q={question} A={answer}"), ("-multi-turn", "Q2={question_2} A2={answer_2}"))
]
REFERENCES = [{"question_id": 101, "choices": [{"turns": ["2", "4"]}]}]


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server whose replies a test writes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Any] = []
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "judge-1"}]})

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        reply = self.server.replies.pop(0)
        if isinstance(reply, int):
            self.send_error(reply, "overloaded")
        else:
            self.answer({"choices": [{"message": {"content": reply}}]})

    def answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def dialogues(data: Path) -> Path:
    write(data / "mt_bench_questions.jsonl", QUESTIONS)
    write(data / "mt_bench_judge_prompts.jsonl", PROMPTS)
    write(data / "mt_bench_reference_gpt4.jsonl", REFERENCES)
    return data


def test_dialogues_are_rated_turn_by_turn(
    model: EngineModel, dialogues: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.replies = ["Good. Rating: [[7]]", "Less: [[4]], no: [[5]]", "nonsense", "[[99]]", "fine [[3]]", "[[1.5]]"]
    judge = UrlModel(server.url)
    plan = Plan(["mt_bench"], tmp_path / "out", data=dialogues, judge=judge)
    figures = {figure.metric: figure.value for figure in run(plan, model, FACTS)[0].figures}
    assert figures == {"score": pytest.approx((6 + 2.25) / 2), "score_turn_1": 5, "score_turn_2": 3.25}
    samples = read_samples(tmp_path / "out", "mt_bench", "dialogue")
    assert samples[0].detail["judgements"][0] == "Good. Rating: [[7]]"
    asked = [body["messages"][1]["content"] for body in server.asked]
    assert asked[0] == f"Q=Say {{a}}. A={samples[0].detail['answers'][0]}"
    assert asked[1] == f"Q2=Again. A2={samples[0].detail['answers'][1]}"
    assert asked[2].endswith(" ref=2")
    # Its second and third try, with another seed.
    assert asked[2] == asked[3] == asked[4]
    assert "secret" not in (tmp_path / "out" / "results.json").read_text()


@pytest.mark.parametrize(("replies", "message"), [(["no"] * 3, "gave no rating"), ([503], "answered 503")])
def test_a_judge_that_fails_leaves_what_was_rated(
    model: EngineModel, dialogues: Path, server: Server, tmp_path: Path, replies: list[Any], message: str
) -> None:
    server.replies = ["[[7]]", "[[5]]", *replies]
    plan = Plan(["mt_bench"], tmp_path / "out", data=dialogues, judge=UrlModel(server.url))
    with pytest.raises(EvalError, match=message):
        run(plan, model, FACTS)
    server.replies = ["[[3]]", "[[1]]"]
    assert run(plan, model, FACTS)[0].figures[0].value == 4
    assert not server.replies


@pytest.mark.parametrize(
    ("text", "rating"), [("[[10]]", 10), ("[[0]]", None), ("[[11]]", None), ("10", None), ("[[5]] or [[6]]", 6)]
)
def test_ratings(text: str, rating: float | None) -> None:
    assert find_rating(text) == rating


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(EvalError, match="is the server running"):
        UrlModel("http://127.0.0.1:9/v1")
    with pytest.raises(EvalError, match="no http"):
        UrlModel("file:///etc/passwd")
