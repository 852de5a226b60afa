"""The held-out loss of any weights of a run's network, on the text that the run set aside.

What this leaves out: benchmarks (`eval`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from minicpm import config as configuration
from minicpm.architecture import ModelConfig
from minicpm.data.opening import open_heldout, sources_of
from minicpm.errors import DataError
from minicpm.formats.weight import Weight
from minicpm.model.loading import load_model
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.fingerprint import fingerprint
from minicpm.train.data_order import recorded_facts
from minicpm.train.heldout import HeldoutText
from minicpm.train.pretrain import pretraining_loss
from minicpm.train.pretrain_config import PretrainConfig

_MICRO_SEQUENCES = 8


class HeldoutScore:
    """Measures one model after the other on the same rows, in float32.

    Args:
        run: the folder of the run whose held-out text it is.
        sequences: rows in all, dealt out to the sources.

    Raises:
        CheckpointError: the run does not say what it was trained on.
        DataError: nothing was held out, or it is gone.
    """

    def __init__(self, run: Path, sequences: int) -> None:
        config = configuration.build(PretrainConfig, dict(recorded_facts(run)["config"]))
        cache = Path(config.corpus.cache) if config.corpus.cache else run / "data"
        kept = run / "tokenizer"
        digest = fingerprint(Tokenizer.from_folder(kept)) if kept.is_dir() else None
        found = {name: open_heldout(mix, cache, digest) for name, mix in sources_of(config.stages).items()}
        parts = {name: part for name, part in found.items() if part is not None and part.num_documents}
        if not parts:
            raise DataError(f"{run} has no held-out text in {cache}: nothing can be measured; see --no-score")
        self.text = HeldoutText(parts, config.batch.sequence_length, sequences, config.loop.seed)
        self.num_rows = sum(self.text.rows.values())

    def __call__(self, config: ModelConfig, weights: Mapping[str, Weight]) -> float:
        """Return the loss in nats a token."""
        model = load_model(config, weights, dtype=torch.float32)
        loss = pretraining_loss(torch.device("cpu"), is_compiled=False)
        return self.text.measure(model, loss, _MICRO_SEQUENCES)["heldout_loss"]
