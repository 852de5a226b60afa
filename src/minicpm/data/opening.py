"""The data of a run, opened: mixture names → token shards, tokenizing text on the way where it was not yet.

What this leaves out: which step has which mixture (the trainer turns steps into rows).
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minicpm.data.mixture import Mix, StageMixture
from minicpm.data.shards import MANIFEST, TokenShards, read_manifest
from minicpm.data.supervised import tokenize_rows
from minicpm.data.tokenization import (
    HELDOUT_SUFFIX,
    Progress,
    TokenizeConfig,
    shard_facts,
    tokenize_documents,
)
from minicpm.errors import ConfigError, DataError
from minicpm.tokenizer import Tokenizer
from minicpm.tokenizer.fingerprint import fingerprint


def sources_of(stages: Sequence[StageMixture]) -> dict[str, Mix]:
    """Return every source of a run by name, each with its path.

    Raises:
        ConfigError: a name has no path in any stage (with the nearest name that has one), or two different ones.
    """
    found: dict[str, Mix] = {}
    mixes = {f"stage[{i}].mix[{j}]": mix for i, stage in enumerate(stages) for j, mix in enumerate(stage.mix)}
    for where, mix in mixes.items():
        if not mix.path:
            continue
        first = found.setdefault(mix.name, mix)
        if (first.path, first.field, first.kind) != (mix.path, mix.field, mix.kind):
            raise ConfigError(
                f"{where}: mixture name {mix.name!r} stands for {first.path} and for {mix.path}; use two names"
            )
    for where, mix in mixes.items():
        if mix.name not in found:
            near = difflib.get_close_matches(mix.name, found, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(found) or 'none'}"
            raise ConfigError(f"{where}: mixture name {mix.name!r} is unknown: no stage gives it a path; {hint}")
    return found


def open_sources(
    stages: Sequence[StageMixture],
    tokenizer: Tokenizer,
    cache: Path,
    config: TokenizeConfig | None = None,
    on_progress: Progress | None = None,
) -> dict[str, TokenShards]:
    """Return the shards of every source of a run by mixture name.

    A path that is a folder of shards is opened; any other is text, which is tokenized into `cache` unless the shards of
    the same files, tokenizer and settings are there already.

    Args:
        stages: the run's mixtures.
        tokenizer: the model's.
        cache: the folder for shards of text.
        config: how text becomes shards; the field comes from the mix.
        on_progress: see `tokenize_documents`.

    Raises:
        ConfigError: see `sources_of`.
        DataError: a source cannot be read, is empty, or was tokenized with another tokenizer.
    """
    opened = {}
    for name, mix in sources_of(stages).items():
        opened[name] = open_source(mix, tokenizer, cache, config, on_progress)
    return opened


def open_source(
    mix: Mix,
    tokenizer: Tokenizer,
    cache: Path,
    config: TokenizeConfig | None = None,
    on_progress: Progress | None = None,
) -> TokenShards:
    """Return the shards of one source; see `open_sources`."""
    path = Path(mix.path).expanduser()
    if (path / MANIFEST).exists():
        return TokenShards.open(path, fingerprint(tokenizer))
    base = config or TokenizeConfig()
    settings = TokenizeConfig(
        field=mix.field,
        # Rows are not set aside: what a model answers is measured on rows of its own.
        heldout_share=0.0 if mix.kind == "rows" else base.heldout_share,
        max_tokens=base.max_tokens,
        workers=base.workers,
        shard_tokens=base.shard_tokens,
        replaces=True,
    )
    folder = cache / _folder_name(mix)
    facts = shard_facts([mix.path], tokenizer, settings)
    if not _is_current(folder, facts):
        if mix.kind == "rows":
            tokenize_rows([mix.path], tokenizer, folder, replaces=True)
        else:
            tokenize_documents([mix.path], tokenizer, folder, settings, on_progress)
    return TokenShards.open(folder, facts["tokenizer_hash"])


def kept_shards(mix: Mix, cache: Path, tokenizer_hash: str | None = None) -> TokenShards:
    """Return the shards that `open_source` opened or made of this source; nothing is made.

    Raises:
        DataError: they are gone, damaged, or of another tokenizer.
    """
    return TokenShards.open(_kept_folder(mix, cache), tokenizer_hash)


def open_heldout(mix: Mix, cache: Path, tokenizer_hash: str | None = None) -> TokenShards | None:
    """Return the held-out part that was set aside when `open_source` tokenized this source, or None."""
    folder = _kept_folder(mix, cache)
    heldout = folder.with_name(folder.name + HELDOUT_SUFFIX)
    return TokenShards.open(heldout, tokenizer_hash) if (heldout / MANIFEST).exists() else None


def data_identity(shards: Mapping[str, TokenShards]) -> dict[str, str]:
    """Return the content hash of each source: a run goes on only with the same ones, or its batches are others."""
    return {name: str(opened.manifest["content_hash"]) for name, opened in shards.items()}


def check_identity(shards: Mapping[str, TokenShards], recorded: Mapping[str, str]) -> None:
    """Do nothing if `shards` hold what a run began with.

    Raises:
        DataError: a source holds other documents now; names it.
    """
    for name, content_hash in data_identity(shards).items():
        if recorded.get(name, content_hash) != content_hash:
            raise DataError(
                f"{name} ({shards[name].path}) holds other documents than this run began with; bring the old ones back "
                "or begin a new run"
            )


def _kept_folder(mix: Mix, cache: Path) -> Path:
    path = Path(mix.path).expanduser()
    return path if (path / MANIFEST).exists() else cache / _folder_name(mix)


def _folder_name(mix: Mix) -> str:
    # The name for people, the hash so that two texts under one name do not take turns in one folder.
    plain = re.sub(r"[^\w.-]+", "_", mix.name)[:40]
    identity = "\0".join((mix.path, mix.field, mix.kind))
    return f"{plain}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _is_current(folder: Path, facts: dict[str, Any]) -> bool:
    try:
        manifest = read_manifest(folder)
    except DataError:
        return False
    has_heldout = (folder.with_name(folder.name + HELDOUT_SUFFIX) / MANIFEST).exists()
    return has_heldout >= bool(facts["heldout_share"]) and all(manifest.get(n) == v for n, v in facts.items())
