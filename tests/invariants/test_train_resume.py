"""A run is a function of its configuration: however it was interrupted, batched or branched, the bits are the same."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minicpm import config as configuration
from minicpm.errors import CheckpointError
from minicpm.train import checkpoint
from minicpm.train.branch import branch_config
from minicpm.train.corpus import StepBatches
from minicpm.train.log import read_metrics
from minicpm.train.pretrain import Ready, prepare, pretrain
from minicpm.train.pretrain_config import PretrainConfig
from minicpm.train.run_start import Start, branch_from, find_start
from minicpm.train.settings import Ranks

STDLIB = Path(dataclasses.__file__).parent
CONFIG = """
name = "tiny"
data = "{text}"
[model]
hidden_size = 48
intermediate_size = 80
num_hidden_layers = 2
num_attention_heads = 6
num_key_value_heads = 2
head_dim = 8
vocab_size = 400
scale_emb = 12.0
scale_depth = 1.4
dim_model_base = 24.0
[schedule]
total_steps = 40
warmup = 4
decay = 10
[batch]
sequence_length = 32
sequences = [4, 8]
ramp_steps = 5
micro_sequences = 4
[corpus]
cache = "{home}/data"
heldout_share = 0.1
[tokenizer]
path = "{tokenizer}"
[loop]
save_every = 10
saves_early = false
eval_every = 15
compile = "off"
"""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second thread, and lose much where other processes hold the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a tokenizer and token shards that all runs share, and `tiny.toml`."""
    home = tmp_path_factory.mktemp("resume")
    text = home / "text.jsonl"
    paragraphs = (STDLIB / "argparse.py").read_text(encoding="utf-8").split("\n\n")
    text.write_text("".join(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs if paragraph.strip()))
    template = home / "tiny.toml"
    template.write_text(CONFIG.format(text=text, home=home, tokenizer=""))
    first = home / "first"
    prepare(configuration.load(PretrainConfig, template), first, Start(), print)
    template.write_text(CONFIG.format(text=text, home=home, tokenizer=first / "tokenizer"))
    return home


def load(home: Path, *overrides: str) -> PretrainConfig:
    return configuration.load(PretrainConfig, home / "tiny.toml", overrides)


def start(config: PretrainConfig, run: Path, wants_resume: bool = False) -> Ready:
    return prepare(config, run, find_start(run, config, wants_resume, lambda line: None), lambda line: None)


def go(config: PretrainConfig, run: Path, wants_resume: bool = False, stop_after: int = 0) -> None:
    """Run to the end, or let a hook fail after a step, which is as sudden as a crash."""

    class Crash(Exception):
        pass

    def crash(state: object, record: object) -> None:
        if getattr(record, "step", 0) == stop_after:
            raise Crash

    try:
        pretrain(start(config, run, wants_resume), lambda line: None, [crash])
    except Crash:
        assert stop_after


def hashes(folder: Path) -> dict[str, str]:
    return {name: facts["sha256"] for name, facts in checkpoint.verify(folder).files.items()}


@pytest.fixture(scope="module")
def straight(home: Path) -> dict[str, str]:
    """The files of the last checkpoint of a run that nothing interrupted."""
    go(load(home), home / "straight")
    return hashes(home / "straight" / "step_000040")


@pytest.mark.parametrize("moment", [1, 9, 10, 23])
def test_a_crash_changes_nothing(home: Path, straight: dict[str, str], moment: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(load(home), run, stop_after=moment)
    go(load(home), run, wants_resume=True)
    assert hashes(run / "step_000040") == straight
    # The curve has every step once, whatever was made twice.
    steps = [row["step"] for row in read_metrics(run) if "loss" in row]
    assert steps == list(range(1, 41))


@pytest.mark.parametrize("workers", [0, 4])
def test_threads_that_prepare_batches_change_nothing(
    home: Path, straight: dict[str, str], workers: int, tmp_path: Path
) -> None:
    go(load(home, f"corpus.workers={workers}"), tmp_path / "run")
    found = hashes(tmp_path / "run" / "step_000040")
    assert found["state.safetensors"] == straight["state.safetensors"]
    assert found["model.safetensors"] == straight["model.safetensors"]


def test_a_branch_is_the_run_that_decayed_there(home: Path, straight: dict[str, str], tmp_path: Path) -> None:
    # "straight" decays at 30; a run that was meant to go on for long reaches 30 with the same bits.
    go(load(home, "schedule.total_steps=200"), home / "long", stop_after=30)
    from_step = branch_from(home / "long", 30)
    config = branch_config(from_step, home / "long", 10, "", [])
    run = tmp_path / "branch"
    pretrain(prepare(config, run, from_step, print), print)
    found = hashes(run / "step_000040")
    assert found["state.safetensors"] == straight["state.safetensors"]
    assert found["model.safetensors"] == straight["model.safetensors"]
    manifest = checkpoint.read_manifest(run / "step_000040")
    assert (manifest.parent or "").startswith("long@30 ")
    assert manifest.stage == "decay"


def test_what_is_mixed_into_a_decay_has_its_share(home: Path, straight: dict[str, str], tmp_path: Path) -> None:
    extra = tmp_path / "extra.jsonl"
    sentences = (f"A different sort of text, about {i} things in particular." for i in range(400))
    extra.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences))
    from_step = branch_from(home / "straight", 30)
    config = branch_config(from_step, home / "straight", 20, "wsd-linear", [(str(extra), 0.25, "text")])
    ready = prepare(dataclasses.replace(config, name="mixed"), tmp_path / "run", from_step, print)
    spans = ready.config.spans()
    assert [span.mixture.shares for span in spans] == [{"data": 1.0}, {"data": 0.75, "extra": 0.25}]
    assert spans[1].first_row == ready.config.batch.sequences_before(31)
    pretrain(ready, print)
    means = [row["loss/extra"] for row in read_metrics(tmp_path / "run") if "loss/extra" in row]
    assert means[-1] < means[0]
    with pytest.raises(Exception, match="decay stage; branch from a stable"):
        branch_config(branch_from(home / "straight", 40), home / "straight", 5, "", [])


def test_micro_batches_and_ranks_deal_out_the_same_rows(home: Path) -> None:
    ready = start(load(home), home / "dealt")
    for step in (1, 6, 7, 30):
        whole = StepBatches(ready.corpus.stream, ready.config, 8, Ranks()).make(step)
        expected = [row.tolist() for batch in whole for row in batch.input_ids]
        assert len(expected) == (4 if step <= 5 else 8)
        for world in (1, 2, 4):
            for micro in (1, 2, 3):
                dealt: list[list[int]] = []
                for rank in range(world):
                    parts = StepBatches(ready.corpus.stream, ready.config, micro, Ranks(rank, world)).make(step)
                    dealt += [row.tolist() for batch in parts for row in batch.input_ids]
                assert dealt == expected


def test_going_on_refuses_what_would_not_be_the_same_run(home: Path, straight: dict[str, str]) -> None:
    run = home / "straight"
    with pytest.raises(CheckpointError, match=r"holds checkpoints up to step_000040; go on with --resume"):
        start(load(home), run)
    with pytest.raises(CheckpointError, match=r"complete: step 40 of 40; raise schedule.total_steps, or branch"):
        start(load(home), run, wants_resume=True)
    for override, reason in (
        ("optimizer.beta1=0.8", r"optimizer.beta1 is 0.8, and the checkpoint was made with 0.9"),
        ("model.scale_emb=10", r"model.scale_emb is 10.0"),
        ("loop.seed=7", r"loop.seed is 7"),
        ("batch.sequences=[8]", r"batch.sequences"),
        ("schedule.total_steps=80", r"step 31 was made in stage decay with lr"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            start(load(home, override), run, wants_resume=True)


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(
    home: Path, straight: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    go(load(home), run, stop_after=25)
    with (run / "step_000020" / "state.safetensors").open("r+b") as file:
        file.truncate(1000)
    said: list[str] = []
    config = load(home)
    found = find_start(run, config, True, said.append)
    assert found.step == 10
    assert "step_000020: state.safetensors has 1000 bytes" in said[0]
    pretrain(prepare(config, run, found, said.append), said.append)
    assert hashes(run / "step_000040") == straight


KILLS = [pytest.param(0), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


@pytest.mark.parametrize("seed", KILLS)
def test_kill_at_any_moment_changes_nothing(home: Path, seed: int, tmp_path: Path) -> None:
    """Checkpoints after every step, so that many kills fall into a save."""
    moment = random.Random(seed)
    run, uninterrupted = tmp_path / "run", home / "every"
    overrides = ["loop.save_every=1", "loop.eval_every=0", "schedule.total_steps=60"]
    program = [sys.executable, __file__, str(home), *overrides]
    if not uninterrupted.exists():
        subprocess.run([*program, str(uninterrupted)], check=True, timeout=120, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([*program, str(run)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not checkpoint.step_folders(run) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(moment.uniform(0, 1.0))
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    newest = checkpoint.newest_verified(run)
    # A folder that has its name is whole: nothing is ever skipped after a kill.
    assert newest[2] == []
    if newest[1] is not None and newest[1].step == 60:
        pytest.skip("the run was quicker than the kill")
    subprocess.run([*program, str(run)], check=True, timeout=120, stderr=subprocess.DEVNULL)
    assert not list(run.glob(".partial-*"))
    assert hashes(run / "step_000060") == hashes(uninterrupted / "step_000060")


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, _home, *_overrides, _run = sys.argv
    go(load(Path(_home), *_overrides), Path(_run), wants_resume=Path(_run).exists())
