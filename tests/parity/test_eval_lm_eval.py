"""Against lm-evaluation-harness: the same rows and figures, its `hf` backend against our torch model and engine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import minicpm
from minicpm.eval.engine_model import EngineModel
from minicpm.eval.results import read_samples
from minicpm.eval.runner import Plan, prepare, run
from minicpm.eval.torch_model import TorchModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

ROWS = {
    "arc_easy": [
        {
            "id": str(n),
            "question": f"Which of these {thing} is the {word}est?",
            "choices": {"text": [f"{a} one", f"the {b}", "none of them"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[n % 3],
        }
        for n, (thing, word, a, b) in enumerate(
            [
                ("cats", "old", "first", "grey cat"),
                ("seas", "deep", "cold", "north sea"),
                ("roads", "long", "last", "way"),
            ]
        )
    ],
    "hellaswag": [
        {
            "ind": n,
            "activity_label": "Roof repair",
            "ctx_a": "A man sits on a roof.",
            "ctx_b": "he",
            "ctx": "A man sits on a roof. he",
            "endings": [f"takes {n} old tiles off.", "[header] sings [title] loudly", "is  asleep", "falls."],
            "label": str(n % 4),
        }
        for n in range(4)
    ],
    "piqa": [
        {"goal": f"open jar {n}", "sol1": "turn the lid", "sol2": "break the glass.", "label": n % 2} for n in range(4)
    ],
    "winogrande": [
        {
            "sentence": f"Ann gave {n} books to Eve because _ had too many.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": "1",
        }
        for n in range(3)
    ],
    "lambada": [{"text": f"She took {n} keys, opened the old door and closed the door"} for n in range(3)],
    "wikitext": [
        {"page": f' = Title = \n \n In {n} @,@ 000 words , " a text " ( long ) .\n' * (n + 1)} for n in range(3)
    ],
}
FILES = {
    "arc_easy": "arc_easy_test.jsonl",
    "hellaswag": "hellaswag_val.jsonl",
    "piqa": "piqa_val.jsonl",
    "winogrande": "winogrande_xl_val.jsonl",
    "lambada": "lambada_openai_test.jsonl",
    "wikitext": "wikitext.jsonl",
}
THEIRS = {
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a vocabulary of its own, as transformers writes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([json.dumps(rows) for rows in ROWS.values()], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>"
    ).save_pretrained(path)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=256, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows as files, and the harness's own tasks on them."""
    path = tmp_path_factory.mktemp("data")
    source = Path(lm_eval.__file__).parent / "tasks"
    for name, rows in ROWS.items():
        (path / FILES[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        theirs = path / "tasks" / name
        shutil.copytree((source / THEIRS[name]).parent, theirs)
        text = (source / THEIRS[name]).read_text()
        splits = {"train": None, "validation": None, "test": None} | {"test": str(path / FILES[name])}
        text = re.sub(r"dataset_path: .*", "dataset_path: json", text)
        text = re.sub(r"dataset_name: .*\n", "", text)
        text = re.sub(r"(training|validation|test)_split: .*\n", "", text)
        text = re.sub(r"^task: .*", f"task: own_{name}", text, flags=re.M)
        text = re.sub(r"^tag:\n(?:  - .*\n)+", "", text, flags=re.M)
        text += f"\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {splits['test']}\n"
        for other in theirs.glob("*.yaml"):
            other.unlink()
        (theirs / f"{name}.yaml").write_text(text)
    # WikiText comes as articles there and as one file here: the same articles, as rows.
    own = Path(minicpm.__file__).parent / "eval" / "tasks" / "wikitext.toml"
    text = re.sub(r"file = .*", f'file = "{FILES["wikitext"]}"', own.read_text())
    (path / "wikitext.toml").write_text(re.sub(r"split_at = .*\n", "", text))
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path, data: Path) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[f"own_{name}" for name in ROWS],
        task_manager=TaskManager(include_path=str(data / "tasks"), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
        device="cpu",
    )
    assert results is not None
    return results


def own(model: Any, data: Path, out: Path) -> dict[tuple[str, str], float]:
    tasks = [name if name != "wikitext" else str(data / "wikitext.toml") for name in ROWS]
    plan = Plan(tasks, out, data=data)
    scorings = run(plan, prepare(plan), model, {"model": model.name})
    return {(Path(s.task).stem, figure.metric): figure.value for s in scorings for figure in s.figures}


@pytest.mark.parametrize("runtime", ["torch", "engine"])
def test_the_same_rows_give_the_same_figures(
    runtime: str, folder: Path, data: Path, theirs: dict[str, Any], tmp_path: Path
) -> None:
    if runtime == "torch":
        figures = own(TorchModel("tiny", folder, "fp32", batch_tokens=200), data, tmp_path)
        tolerance = 1e-4
    else:
        with minicpm.load(folder, num_threads=1) as model:
            figures = own(EngineModel("tiny", model), data, tmp_path)
        tolerance = 2e-2
    compared = 0
    for (task, metric), value in figures.items():
        wanted = theirs["results"][f"own_{task}"].get(f"{metric},none")
        if wanted is None:
            continue
        compared += 1
        if metric.startswith("acc"):
            assert value == pytest.approx(wanted, abs=1e-6), (task, metric)
        else:
            assert value == pytest.approx(wanted, rel=tolerance), (task, metric)
    assert compared >= 10
    for task in ("arc_easy", "hellaswag", "piqa", "winogrande"):
        samples = read_samples(tmp_path, task, "choice")
        for sample, their in zip(samples, theirs["samples"][f"own_{task}"], strict=True):
            logprobs = [float(response[0][0]) for response in their["resps"]]
            assert sample.detail["logprobs"] == pytest.approx(logprobs, abs=10 * tolerance)


def test_their_tasks_on_our_engine(folder: Path, data: Path, theirs: dict[str, Any]) -> None:
    from minicpm.eval.lm_eval_bridge import evaluate

    with minicpm.load(folder, num_threads=1) as model:
        results, table = evaluate(EngineModel("tiny", model), ["own_piqa", "own_lambada"], include=data / "tasks")
    for task in ("own_piqa", "own_lambada"):
        assert results[task]["acc,none"] == theirs["results"][task]["acc,none"]
        assert task in table
