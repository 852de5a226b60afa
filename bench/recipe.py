"""Does the recipe train well? Held-out loss against transformers' Llama with AdamW on the same batches, three ways.

    neutral    our loop and model with every MiniCPM scale neutral and one rate for all parameters
    llama      LlamaForCausalLM, autocast bf16, AdamW, the same std, batches, schedule and document borders
    recipe     MiniCPM's scales and muP groups at the report's rate

Text: the pretraining bundle beside the checkout (English, Chinese, code), else the standard library's sources.
`--rates` sweeps the rate at two widths instead: the best one should be the same. A ratio is peer's loss over ours.
With `--home` what was trained stays there, and contenders that are finished are not trained again, so that `--only`
can take them one by one.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import Row, arguments, compare, finish

from minicpm.architecture import ModelConfig
from minicpm.data.batches import Batch
from minicpm.data.mixture import Mix, StageMixture
from minicpm.model import MiniCPM
from minicpm.train import schedule as schedules
from minicpm.train.heldout import HeldoutText
from minicpm.train.log import MetricsFile, read_metrics
from minicpm.train.optim import OptimizerConfig
from minicpm.train.plot import smooth
from minicpm.train.pretrain import PretrainReady, prepare, pretrain, pretraining_loss
from minicpm.train.pretrain_config import CorpusConfig, PretrainConfig, TokenizerConfig
from minicpm.train.run_start import Start
from minicpm.train.schedule import ScheduleConfig
from minicpm.train.settings import BatchConfig, LoopConfig

BUNDLE = Path(__file__).parents[1] / "../shared/data/pretrain"
SHARES = {
    "en_standardebooks.train.jsonl.xz": 0.4,
    "zh_four_novels.jsonl.xz": 0.2,
    "zh_laws.train.jsonl.xz": 0.1,
    "code_cpython_stdlib.jsonl.xz": 0.3,
}
STD = 0.02


def stages() -> tuple[StageMixture, ...]:
    if not BUNDLE.is_dir():
        return (StageMixture(mix=(Mix("sources", 1.0, "stdlib:sources"),)),)
    names = [(name.split(".")[0], name, share) for name, share in SHARES.items()]
    return (StageMixture(mix=tuple(Mix(short, share, str(BUNDLE / name)) for short, name, share in names)),)


def model(hidden: int, layers: int, is_neutral: bool) -> ModelConfig:
    scales: dict[str, Any] = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256.0}
    if is_neutral:
        scales = {"scale_depth": layers**0.5, "initializer_range": STD}
    return ModelConfig(
        hidden_size=hidden, intermediate_size=5 * hidden // 2, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, vocab_size=8192, max_position_embeddings=256, **scales,
    )  # fmt: skip


def configuration(home: Path, name: str, shape: ModelConfig, lr: float, steps: int, is_mup: bool) -> PretrainConfig:
    learned = home / "tokenizer"
    return PretrainConfig(
        name=name,
        model=shape,
        schedule=ScheduleConfig(total_steps=steps, lr=lr, warmup=0.05, decay=0.1),
        stage=stages(),
        batch=BatchConfig(sequence_length=256, sequences=(16,), micro_sequences=16),
        optimizer=OptimizerConfig(is_mup=is_mup),
        tokenizer=TokenizerConfig(str(learned) if learned.is_dir() else "", train_characters=5_000_000),
        corpus=CorpusConfig(cache=str(home / "data"), max_tokens=4_000_000),
        loop=LoopConfig(seed=1, eval_every=steps, eval_sequences=128, save_every=steps, saves_early=False, log_every=5),
    )


def learn_tokenizer(home: Path) -> None:
    """Make the one tokenizer and the token shards that all runs share."""
    config = configuration(home, "first", model(64, 2, True), 1e-3, 1, False)
    prepare(config, home / "first", Start(), print)
    (home / "first" / "tokenizer").rename(home / "tokenizer")


def ready(home: Path, config: PretrainConfig) -> PretrainReady:
    return prepare(config, home / config.name, Start(), print)


def heldout(home: Path, name: str) -> float | None:
    """Return what a finished run reached."""
    return next((float(row["heldout_loss"]) for row in read_metrics(home / name) if "heldout_loss" in row), None)


def train_ours(home: Path, config: PretrainConfig) -> None:
    pretrain(ready(home, config), lambda line: None)


def train_llama(home: Path, config: PretrainConfig) -> None:
    """The peer: its own model code and optimizer on our batches."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.loop.seed)
    made, shape = ready(home, dataclasses.replace(config, name="llama")), config.model
    peer = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, vocab_size=shape.vocab_size,
            num_hidden_layers=shape.num_hidden_layers, num_attention_heads=shape.num_attention_heads,
            rms_norm_eps=shape.rms_norm_eps, tie_word_embeddings=True, initializer_range=STD, use_cache=False,
            max_position_embeddings=shape.max_position_embeddings,
        )
    )  # fmt: skip
    metrics = MetricsFile(home / "llama", 0, print)
    optimizer = torch.optim.AdamW(peer.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(1, config.schedule.total_steps + 1):
        batch = made.corpus.stream.batch(config.batch.sequences_before(step), config.batch.at(step))
        for group in optimizer.param_groups:
            group["lr"] = schedules.lr(config.schedule, step)
        loss = llama_loss(peer, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % config.loop.log_every == 0:
            metrics.add({"step": step, "loss": float(loss)})
    # The same names: the trained weights are measured by the very code that measures ours.
    measured = MiniCPM(shape)
    measured.load_state_dict({n: t for n, t in peer.state_dict().items() if n != "lm_head.weight"})
    text = HeldoutText(made.corpus.heldout, config.batch.sequence_length, config.loop.eval_sequences, config.loop.seed)
    found = text.measure(
        measured.to(torch.bfloat16), pretraining_loss(torch.device("cpu"), False), config.batch.micro_sequences
    )
    metrics.add({"step": config.schedule.total_steps, **found})


def llama_loss(peer: Any, batch: Batch) -> torch.Tensor:
    documents = torch.from_numpy(batch.document_ids)
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]  # (B, 1, T, T)
    with torch.autocast("cpu", torch.bfloat16):
        logits = peer(
            input_ids=torch.from_numpy(batch.input_ids),
            position_ids=torch.from_numpy(batch.positions).long(),
            attention_mask=mask,
        ).logits
    targets = torch.from_numpy(batch.targets)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def against_llama(home: Path, steps: int, only: str, picture: Path | None) -> list[Row]:
    neutral = configuration(home, "neutral", model(128, 6, True), 2e-3, steps, False)
    recipe = configuration(home, "recipe", model(128, 6, False), 0.01, steps, True)
    runs: dict[str, Callable[[], None]] = {
        "neutral": lambda: train_ours(home, neutral),
        "llama": lambda: train_llama(home, neutral),
        "recipe": lambda: train_ours(home, recipe),
    }
    for name, run in runs.items():
        if heldout(home, name) is None and only in ("", name):
            began = time.perf_counter()
            run()
            print(f"{name}: {time.perf_counter() - began:.0f} s")
    losses = {name: loss for name in runs if (loss := heldout(home, name)) is not None}
    if len(losses) < len(runs):
        print(f"finished: {', '.join(losses)}; still to train: {', '.join(n for n in runs if n not in losses)}")
        return []
    show_curves(home, list(runs), picture)
    return [
        compare("neutral-loss", losses["neutral"], losses["llama"], "transformers Llama", "nats", 1 / 1.02,
                less_is_better=True),
        compare("recipe-loss", losses["recipe"], losses["llama"], "transformers Llama", "nats", 1.0,
                less_is_better=True),
    ]  # fmt: skip


def show_curves(home: Path, names: list[str], picture: Path | None) -> None:
    """Print the smoothed training losses side by side, and draw them."""
    curves = {}
    for name in names:
        rows = [(row["step"], row["loss"]) for row in read_metrics(home / name) if "loss" in row]
        curves[name] = dict(smooth(rows, keep=0.8))
    steps = list(curves[names[0]])
    for step in steps[:: max(len(steps) // 10, 1)] + steps[-1:]:
        print(f"step {step:5}  " + "  ".join(f"{name} {curve[step]:.4f}" for name, curve in curves.items()))
    if picture is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), label=f"{name}: held out {heldout(home, name):.4f}")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a token (smoothed)")
    axes.legend()
    figure.savefig(picture, dpi=110)


def best_rates(home: Path, steps: int) -> list[Row]:
    grid = (0.0025, 0.005, 0.01, 0.02, 0.04)
    best = []
    for hidden in (64, 256):
        losses = {}
        for rate in grid:
            name = f"w{hidden}-{rate:g}"
            if heldout(home, name) is None:
                train_ours(home, configuration(home, name, model(hidden, 4, False), rate, steps, True))
            losses[rate] = heldout(home, name) or float("inf")
        print(f"width {hidden}: " + ", ".join(f"lr {rate:g} → {loss:.4f}" for rate, loss in losses.items()))
        best.append(grid.index(min(losses, key=lambda rate: losses[rate])))
    # Neighbours on the grid count as the same.
    apart = abs(best[0] - best[1])
    return [compare("best-rate", 2.0 ** (1 - apart), 1.0, "one grid step", "factor 2", 1.0)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=0, help="(default: 600; 20 with --quick; 150 with --rates)")
    parser.add_argument("--rates", action="store_true", help="sweep the rate at two widths")
    parser.add_argument("--home", type=Path, help="keep what is trained in this folder")
    parser.add_argument("--only", default="", choices=["neutral", "llama", "recipe"], help="train this one only")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the curves")
    options = parser.parse_args()
    steps = options.steps or (20 if options.quick else 150 if options.rates else 600)
    with tempfile.TemporaryDirectory() as folder:
        home = options.home or Path(folder)
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "tokenizer").is_dir():
            learn_tokenizer(home)
        rows = best_rates(home, steps) if options.rates else against_llama(home, steps, options.only, options.picture)
    finish(rows, options)


if __name__ == "__main__":
    main()
