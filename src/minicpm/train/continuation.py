"""Pretraining that goes on from a model: its network, its tokenizer and its weights, in a run of its own.

What this leaves out: a decay, which goes on with the optimizer's state as well (`branch`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from minicpm.data.atomic import new_folder
from minicpm.errors import DataError
from minicpm.formats.checkpoint import Checkpoint
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.fingerprint import fingerprint
from minicpm.train.pretrain_config import PretrainConfig, TokenizerConfig
from minicpm.train.tune_corpus import open_base_tokenizer


def continue_from(config: PretrainConfig, base: Checkpoint, run: Path) -> PretrainConfig:
    """Return `config` with the network of `base`, whose tokenizer lies in the run's folder afterwards.

    Raises:
        ConfigError: rows that are longer than the model has positions.
        DataError: the run's folder has another tokenizer.
        FormatError: the model has none.
    """
    config = dataclasses.replace(config, model=base.config, tokenizer=TokenizerConfig())
    kept = run / "tokenizer"
    tokenizer, files = open_base_tokenizer(base)
    if not kept.is_dir():
        run.mkdir(parents=True, exist_ok=True)
        with new_folder(kept) as folder:
            for name, content in files.items():
                (folder / name).write_bytes(content)
    elif fingerprint(Tokenizer.from_folder(kept)) != fingerprint(tokenizer):
        raise DataError(f"{kept} holds another tokenizer than {base.path}; begin a new run with --out")
    return config
