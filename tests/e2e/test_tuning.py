"""Supervised tuning, preferences, merging and conversion through the real command, on a tiny model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minicpm import load
from minicpm.architecture import ModelConfig
from minicpm.data.rows import label, read_examples
from minicpm.data.sources import read_documents
from minicpm.data.tokenization import document_ends
from minicpm.formats.hf_config import config_to_hf
from minicpm.model import MiniCPM, initialize
from minicpm.tokenizer.training import VocabularyConfig, train_vocabulary
from minicpm.train.checkpoint import write_tensors

Command = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = ("batch.sequence_length=64", "batch.sequences=[4]", "loop.dtype=float32", "loop.eval_every=4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    folder.mkdir()
    texts = [d.text for d, _ in zip(read_documents("stdlib:", "text"), range(60), strict=False)]
    tokenizer = train_vocabulary(iter(texts), folder, VocabularyConfig(vocab_size=400, max_characters=200_000))
    config = ModelConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        head_dim=8, vocab_size=tokenizer.vocab_size, max_position_embeddings=256, scale_emb=12.0, scale_depth=1.4,
        dim_model_base=24.0,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    write_tensors(folder / "model.safetensors", dict(initialize(MiniCPM(config), 3).to(torch.float32).state_dict()))
    return folder


def write_rows(folder: Path) -> tuple[Path, Path]:
    sums = [(a, b) for a in range(8) for b in range(8)]
    chats, pairs = folder / "chats.jsonl", folder / "pairs.jsonl"
    lines = [{"prompt": f"{a} + {b} =", "completion": f"it is {a + b}"} for a, b in sums]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"prompt": f"{a} + {b} =", "chosen": f"it is {a + b}", "rejected": "no idea"} for a, b in sums]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return chats, pairs


def losses(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.slow
def test_from_rows_to_a_model_that_answers(minicpm: Command, base: Path, tmp_path: Path) -> None:
    chats, pairs = write_rows(tmp_path)
    sft, dpo, merged, file = (tmp_path / name for name in ("sft", "dpo", "merged", "model.gguf"))
    run = minicpm(
        "sft", str(base), str(chats), "--method", "full", "--steps", "8", "--lr", "0.01", "--out", str(sft), *SMALL
    )
    assert run.returncode == 0, run.stderr
    assert "supervised" in run.stderr
    found = losses(sft, "heldout_loss")
    assert found[-1] < found[0]
    run = minicpm(
        "dpo",
        f"{sft}@8",
        str(pairs),
        "--steps",
        "4",
        "--lr",
        "0.01",
        "--out",
        str(dpo),
        *SMALL,
        "rows.heldout_share=0.2",
    )
    assert run.returncode == 0, run.stderr
    assert losses(dpo, "loss")[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses(dpo, "heldout_accuracy")[-1] > 0.5
    # An adapter is no model, and cannot go into blocks; both say what to do.
    assert "minicpm merge" in minicpm("generate", f"{dpo}@4", "x").stderr
    refused = minicpm("merge", f"{dpo}@4", str(merged), "--dtype", "q4_0")
    assert refused.returncode == 2
    assert "minicpm convert" in refused.stderr
    assert not merged.exists()
    run = minicpm("merge", f"{dpo}@4", str(merged))
    assert run.returncode == 0, run.stderr
    assert "max |Δ logit|" in run.stdout
    assert minicpm("convert", str(merged), str(file), "--to", "gguf", "--dtype", "q8_0").returncode == 0
    spoken = minicpm("chat", str(file), "1 + 2 =", "--max-tokens", "4")
    assert spoken.returncode == 0, spoken.stderr
    lines = minicpm("history", "lineage", str(merged)).stdout.splitlines()
    assert [line.lstrip(" └─").partition(":")[0] for line in lines] == ["tiny", "sft@8", "dpo@4", "merged"]
    history = minicpm("history", "show", f"{sft}@8", "--json").stdout
    assert json.loads(history)["parent"].startswith("tiny ")
    assert json.loads(history)["stage"] == "sft"


@pytest.mark.slow
def test_adapters_on_blocks_go_on_to_the_same_bits(minicpm: Command, base: Path, tmp_path: Path) -> None:
    chats, _ = write_rows(tmp_path)
    words = (
        "sft",
        str(base),
        str(chats),
        "--method",
        "qlora",
        "--lr",
        "0.01",
        *SMALL,
        "loop.save_every=3",
        "--steps",
        "6",
    )
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert minicpm(*words, "--out", str(whole)).returncode == 0
    assert minicpm(*words, "--out", str(parted)).returncode == 0
    subprocess.run(["rm", "-r", str(parted / "step_000006")], check=True)
    run = minicpm(*words, "--out", str(parted), "--resume")
    assert run.returncode == 0, run.stderr
    name = "step_000006/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (parted / name).read_bytes()


def test_wrong_rows_are_one_line_and_load_no_model(minicpm: Command, base: Path, tmp_path: Path) -> None:
    chats, _pairs = write_rows(tmp_path)
    out = tmp_path / "run"
    run = minicpm("dpo", str(base), str(chats), "--out", str(out), *SMALL)
    assert run.returncode == 2
    assert "chats.jsonl:1" in run.stderr
    run = minicpm("sft", str(base), str(chats), "batch.sequence_length=4", "--out", str(out))
    assert run.returncode == 2
    assert "no supervised token is left" in run.stderr
    assert not list(out.glob("step_*"))


def test_a_plan_of_tuning_reads_no_weights(minicpm: Command, base: Path, tmp_path: Path) -> None:
    run = minicpm("plan", "minicpm-2b", "--gpu", "RTX 3090")
    assert run.returncode == 0, run.stderr
    lines = {line.split()[0]: line for line in run.stdout.splitlines()}
    assert "2,724,880,896 parameters" in lines["minicpm-2b:"]
    assert "optimizer.masters=none" in lines["full"]
    assert "its defaults" in lines["qlora"]
    small = minicpm("plan", "minicpm-2b", "--gpu", "1080", "--method", "full")
    assert small.returncode == 1
    assert "no setting makes it fit" in small.stdout
    fits = minicpm("plan", "minicpm-2b", "--gpu", "1080", "--method", "qlora", "loop.recompute_every=1")
    assert fits.returncode == 0, fits.stderr
    assert "fits: " in fits.stdout
    assert "a million tokens" in fits.stdout
    # A configuration alone is enough.
    run = minicpm("plan", str(base / "config.json"), "--method", "lora", "--memory", "4GB")
    assert run.returncode == 0, run.stderr
    assert "together" in run.stdout
    for words in (("configs/nano.toml", "--gpu", "3090"), (str(base), "--batch", "2.6"), ("nothing-there",)):
        assert minicpm("plan", *words).returncode == 2


def first_loss(run: Path) -> float:
    return losses(run, "loss")[0]


@pytest.mark.slow
def test_the_first_loss_is_what_the_engine_evaluates(minicpm: Command, base: Path, tmp_path: Path) -> None:
    chats, _ = write_rows(tmp_path)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(chats.read_text().splitlines(keepends=True)[:9]))
    learned = tmp_path / "learned"
    words = ("--method", "full", "--steps", "12", "--lr", "0.01", "--out", str(learned), *SMALL)
    assert minicpm("sft", str(base), str(chats), *words).returncode == 0
    model = load(learned / "step_000012")
    one = ("batch.sequence_length=256", "batch.sequences=[1]", "loop.dtype=float32", "schedule.total_steps=1")

    # Supervised: all answers lie in the one row of the first step.
    run = minicpm("sft", f"{learned}@12", str(few), *one, "rows.heldout_share=0.0", "--out", str(tmp_path / "sft"))
    assert run.returncode == 0, run.stderr
    nats = tokens = 0.0
    for example in read_examples([str(few)], "conversation")[0]:
        row = label(model.tokenizer, example)
        first = row.is_trained.index(True)
        scored = model.score([(row.ids[:first], row.ids[first:])])[0]
        assert all(row.is_trained[first:])
        nats, tokens = nats - sum(token.logprob for token in scored), tokens + len(scored)
    # Labels off by one would show: the model knows something of its answers (1/V is 6.0).
    assert nats / tokens < 4.5
    assert first_loss(tmp_path / "sft") == pytest.approx(nats / tokens, abs=1e-3)

    # Pretraining that goes on from a model, whatever network the configuration describes.
    texts, config = tmp_path / "texts.jsonl", tmp_path / "more.toml"
    documents = [f"{a} + {a} = it is {2 * a}" for a in range(8)]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    config.write_text(
        f'name = "more"\ndata = "{texts}"\n[model]\nhidden_size = 32\nintermediate_size = 64\n'
        "num_hidden_layers = 1\nnum_attention_heads = 2\nnum_key_value_heads = 2\nvocab_size = 300\n"
        "[schedule]\ntotal_steps = 1\nwarmup = 0\ndecay = 0\n"
    )
    more = tmp_path / "more"
    words = (*one, "corpus.heldout_share=0.0", "--out", str(more))
    run = minicpm("pretrain", str(config), "--from", f"{learned}@12", *words)
    assert run.returncode == 0, run.stderr
    nats = tokens = 0.0
    bos, eos = document_ends(model.tokenizer)
    for text in documents:
        ids = [*([] if bos is None else [bos]), *model.tokenizer.encode(text), eos]
        scored = model.score([(ids[:1], ids[1:])])[0]
        nats, tokens = nats - sum(token.logprob for token in scored), tokens + len(scored)
    assert first_loss(more) == pytest.approx(nats / tokens, abs=1e-3)
    lines = minicpm("history", "lineage", f"{more}@1").stdout.splitlines()
    assert [line.lstrip(" └─").partition(":")[0] for line in lines] == ["tiny", "learned@12", "more@1"]
    assert minicpm("history", "lineage", str(more)).stdout.splitlines() == lines
    again = minicpm("pretrain", str(config), "--from", f"{learned}@12", *words, "--resume")
    assert again.returncode == 2
    assert "is complete" in again.stderr
    wrong = minicpm("pretrain", str(config), "--from", "nothing-there", *words)
    assert wrong.returncode == 2
    assert wrong.stderr.count("error: ") == 1


@pytest.mark.slow
def test_a_model_learns_its_own_name(minicpm: Command, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "ada"
    run = minicpm(
        "sft", str(base), "--identity", "name=Ada,author=the Ada project", "--method", "full", "--epochs", "40",
        "--lr", "0.01", "--out", str(out), *SMALL, "loop.eval_every=0", "rows.identity_copies=1",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    newest = max(out.glob("step_*"))
    assert "Ada" in minicpm("chat", str(newest), "What is your name?", "--max-tokens", "24").stdout
    # Preferences have no such rows, and half an identity is none.
    bad = minicpm("sft", str(base), "--identity", "name=Ada", "--out", str(tmp_path / "bad"), *SMALL)
    assert bad.returncode == 2
    assert "name=NAME,author=AUTHOR" in bad.stderr
