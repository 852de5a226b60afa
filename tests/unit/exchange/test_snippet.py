"""What `convert --to minicpm` writes runs the model card's snippet, and says there what our engine says here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.exchange.conftest import FolderWriter

import minicpm
from minicpm.exchange.convert import convert

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("remote_modules")
QUESTION = "山东省最高的山是哪座山, 它比黄山高还是矮?差距多少?"


def test_the_cards_snippet_runs_on_an_export(tmp_path: Path, write_minicpm: FolderWriter) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(convert(write_minicpm(), tmp_path / "snippet-export", to="minicpm").path)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, torch_dtype=torch.bfloat16, device_map="cpu", trust_remote_code=True
    )
    response, history = model.chat(tokenizer, QUESTION, temperature=0.8, top_p=0.8, max_length=300)
    assert history == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": response}]
    assert response


def test_greedy_text_equals_our_engines(tmp_path: Path, write_minicpm: FolderWriter) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = convert(write_minicpm(), tmp_path / "greedy-export", to="minicpm", dtype="fp32").path
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    model = AutoModelForCausalLM.from_pretrained(str(path), torch_dtype=torch.float32, trust_remote_code=True)
    with minicpm.load(path) as ours:
        prompt = ours.tokenizer.apply_chat([{"role": "user", "content": QUESTION}])
        theirs = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False)
        assert tokenizer(theirs).input_ids == prompt
        completion = ours.generate([prompt], temperature=0.0, max_new_tokens=32, logprobs=2)[0]
        with torch.inference_mode():
            ids = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=32
            )[0, len(prompt) :].tolist()
        assert completion.logprobs is not None
        for position, (mine, other) in enumerate(zip(completion.token_ids, ids, strict=False)):
            if mine != other:
                best, second = completion.logprobs[position].top
                assert best.logprob - second.logprob < 0.01, f"different tokens at {position} without a near tie"
                break
        else:
            assert len(ids) == len(completion.token_ids)


@pytest.mark.parametrize("family", ["minicpm", "granite", "llama"])
def test_transformers_torch_and_engine_agree_on_an_export(
    tmp_path: Path, write_minicpm: FolderWriter, family: str
) -> None:
    from transformers import AutoModelForCausalLM

    from minicpm.exchange.backends import EngineBackend, TorchBackend, log_softmax

    path = convert(write_minicpm(), tmp_path / f"{family}-parity", to=family, dtype="fp32", is_verified=False).path
    ids = [1, 5, 300, 17, 44, 268, 9, 12, 330, 2, 71]
    network = AutoModelForCausalLM.from_pretrained(
        str(path), torch_dtype=torch.float32, trust_remote_code=family == "minicpm"
    )
    with torch.inference_mode():
        theirs = log_softmax(network(torch.tensor([ids])).logits[0].numpy())
    for backend in (TorchBackend(str(path), "fp32"), EngineBackend(str(path))):
        assert np.abs(backend.score(ids).logprobs - theirs).max() <= 2e-5
