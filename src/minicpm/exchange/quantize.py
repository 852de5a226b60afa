"""A model into a smaller one that keeps its answers: calibrated rounding, written whole, read back, judged.

What this leaves out: the rounding (`minicpm.quant`), and tasks (`minicpm eval` runs them on the file).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.exchange.check import HashedEntries, check_bytes
from minicpm.exchange.convert import gguf_metadata
from minicpm.exchange.int4_folder import write_int4_folder
from minicpm.exchange.recipe import (
    FLOATS,
    FOLDERS,
    HELDOUT_SHARE,
    TARGETS,
    Recipe,
    check_recipe,
    folder_layout,
    rounding_method,
)
from minicpm.exchange.source import FOLD_KEY, Source, open_source
from minicpm.formats.blocks import BLOCK_TYPES
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.gguf_write import write_gguf_model
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry
from minicpm.quant.grid import blocks_per_group
from minicpm.quant.judge import Closeness, measure
from minicpm.quant.layer import RoundingSettings
from minicpm.quant.model import ModelRounding, QuantizeSettings
from minicpm.quant.precision import allot, folder_types, measure_sensitivity, tensor_bytes, uniform_types
from minicpm.quant.recovery import RecoverySettings, check_memory, recover
from minicpm.quant.windows import (
    DEFAULT_SOURCE,
    Windows,
    check_rows,
    document_rows,
    pack_evenly,
    read_token_rows,
    split_rows,
)
from minicpm.quant.work import WorkFolder

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Quantization:
    """What was written and how close it is.

    `before_recovery` is how close it was before its scales were tuned, where they were. `errors` is the relative
    squared error that rounding left in each matrix's outputs, by HF name, the worst first.
    """

    path: Path
    tensor_bytes: int
    file_bytes: int
    bits_per_weight: float
    block_types: Mapping[str, str]
    closeness: Closeness
    before_recovery: Closeness | None
    heldout: str
    heldout_texts: tuple[str, ...]
    errors: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it, without the texts."""
        fields = asdict(self) | {"path": str(self.path)}
        del fields["heldout_texts"]
        return fields


def quantize(
    path: Path,
    destination: Path,
    recipe: Recipe,
    *,
    max_kl: float | None = None,
    allows_requantizing: bool = False,
    progress: Progress = lambda name, done, total: None,
) -> Quantization:
    """Write the model at `path`, rounded by `recipe`, to `destination` and return the report.

    What is finished waits beside the destination: the same call goes on after an interruption.

    Args:
        path: a GGUF file or a folder.
        destination: a GGUF file, or a folder where the recipe wants one; must not exist.
        recipe: how.
        max_kl: the largest mean KL to the original, in nats, with which the file is written.
        allows_requantizing: whether the source may be quantized itself; its decoded weights are then the original.
        progress: called with what was done, how many parts are done, and how many there are.

    Raises:
        MiniCPMError: the destination does not exist afterwards.
    """
    check_recipe(recipe, destination)
    source = open_source(path)
    config, weights = source.checkpoint.config, source.checkpoint.weights
    quantized = sorted(set(weights.block_types()) - set(FLOATS))
    if quantized and not allows_requantizing:
        raise CheckpointError(
            f"{path} is quantized already ({', '.join(quantized)}); give the 16-bit model, or allow it by --requantize"
        )
    texts = _texts(source, recipe)
    types = _types(source, recipe, texts.calibration, progress)
    if recipe.recover:
        check_memory(config, types)
    plan = _plan(source, recipe, types, texts.calibration)
    work = WorkFolder(destination.with_name(f".{destination.name}.quantize"), plan)
    settings = QuantizeSettings(
        RoundingSettings(rounding_method(recipe), recipe.damping, recipe.shrinkage, recipe.sweeps),
        "awq" in recipe.method,
    )
    rounding = ModelRounding(config, weights, types, settings, work)
    rounding.run(texts.calibration, progress)
    made, before = rounding.quantized(), None
    if recipe.recover:
        before = measure(config, weights, made, texts.heldout)
        learning = RecoverySettings(recipe.recover, recipe.recover_rate, recipe.seed)
        made |= recover(config, weights, made, blocks_per_group(types), texts.recovery, learning, progress)
    closeness = _write(source, made, types, destination, texts.heldout, max_kl)
    errors = dict(sorted(rounding.errors().items(), key=lambda item: -item[1]))
    num_bytes = tensor_bytes(config, types)
    work.remove()
    return Quantization(
        path=destination,
        tensor_bytes=num_bytes,
        file_bytes=sum(file.stat().st_size for file in (destination, *destination.rglob("*")) if file.is_file()),
        bits_per_weight=8 * num_bytes / config.num_parameters().total,
        block_types=types,
        closeness=closeness,
        before_recovery=before,
        heldout=texts.heldout.origin,
        heldout_texts=tuple(source.tokenizer.decode(ids) for ids in document_rows(texts.heldout)),
        errors=errors,
    )


@dataclass(frozen=True)
class _Texts:
    """What is read: for rounding, for tuning (the same rows and more of them), and for judging, of other rows."""

    calibration: Windows
    recovery: Windows
    heldout: Windows


def _texts(source: Source, recipe: Recipe) -> _Texts:
    length = min(recipe.window_tokens, source.checkpoint.config.max_position_embeddings)
    names = recipe.calibration or (DEFAULT_SOURCE,)
    texts = {name: read_token_rows(source.tokenizer, name) for name in names}
    check_rows([row for rows in texts.values() for row in rows], ", ".join(names))
    share = 0.0 if recipe.heldout else HELDOUT_SHARE
    used, kept = {}, {}
    for name, rows in texts.items():
        used[name], kept[name] = split_rows(rows, recipe.seed, share)
    windows = pack_evenly(used, length, recipe.windows)
    more = pack_evenly(used, length, recipe.recover) if recipe.recover > recipe.windows else windows
    if not recipe.heldout:
        heldout = pack_evenly(kept, length, recipe.heldout_windows)
        origin = f"{HELDOUT_SHARE:.0%} of the rows of {heldout.origin}, kept apart"
        return _Texts(windows, more, replace(heldout, origin=origin))
    kept = {name: split_rows(read_token_rows(source.tokenizer, name), recipe.seed, 0.0)[0] for name in recipe.heldout}
    return _Texts(windows, more, pack_evenly(kept, length, recipe.heldout_windows))


def _types(source: Source, recipe: Recipe, windows: Windows, progress: Progress) -> dict[str, str]:
    config = source.checkpoint.config
    if recipe.to in FOLDERS:
        return folder_types(config, folder_layout(config, recipe))
    types = uniform_types(config, TARGETS[recipe.to], recipe.embedding.upper() if recipe.embedding else None)
    if recipe.budget_bytes is None:
        return types
    # Fails before anything is measured where nothing fits.
    allot(config, types, [], recipe.budget_bytes)
    few = Windows(windows.ids[:2], windows.document_ids[:2], windows.num_rows, windows.origin)
    found = measure_sensitivity(config, source.checkpoint.weights, types, few, progress)
    return allot(config, types, found, recipe.budget_bytes)


def _plan(source: Source, recipe: Recipe, types: Mapping[str, str], windows: Windows) -> dict[str, object]:
    """Return everything that the rounded weights depend on; tuning begins after them."""
    digest = hashlib.sha256(windows.ids.numpy().tobytes() + windows.document_ids.numpy().tobytes())
    paths = [source.path] if source.path.is_file() else sorted(source.path.glob("*.safetensors"))
    files = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    rounding = {name: value for name, value in asdict(recipe).items() if not name.startswith("recover")}
    return {"recipe": rounding, "types": dict(types), "text": digest.hexdigest(), "files": files}


def _write(
    source: Source,
    weights: Mapping[str, Weight],
    types: Mapping[str, str],
    destination: Path,
    heldout: Windows,
    max_kl: float | None,
) -> Closeness:
    """Write the model beside its place, read it back, judge what is in it, and only then give it its name."""
    config: ModelConfig = source.checkpoint.config

    def judge(written: Path, digests: Mapping[str, str]) -> Closeness:
        check_bytes(written, digests)
        closeness = measure(config, source.checkpoint.weights, open_checkpoint(written).weights, heldout)
        if max_kl is not None and not closeness.kl <= max_kl:
            raise CheckpointError(
                f"the mean KL to the original is {closeness.kl:.5f} nats, above the {max_kl:g} that was allowed; "
                "nothing was written. A finer --to, a larger --bits, or more calibration text help"
            )
        return closeness

    if not set(types.values()) <= BLOCK_TYPES.keys():
        return write_int4_folder(source, weights, types, destination, judge)
    hashed = HashedEntries({name: WeightEntry.of(weight) for name, weight in weights.items()})
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        note = {f"general.{FOLD_KEY}": json.dumps(source.note.to_dict())} if source.note else {}
        write_gguf_model(partial, config, hashed.entries, gguf_metadata(source) | note)
        closeness = judge(partial, hashed.digests)
        partial.rename(destination)
        return closeness
    finally:
        partial.unlink(missing_ok=True)


def worst(errors: Mapping[str, float], count: int) -> Sequence[tuple[str, float]]:
    """Return the `count` matrices whose outputs rounding changed most, the worst first."""
    return sorted(errors.items(), key=lambda item: -item[1])[:count]
