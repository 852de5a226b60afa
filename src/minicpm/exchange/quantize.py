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
from minicpm.errors import CheckpointError, ConfigError
from minicpm.exchange.check import HashedEntries, check_bytes
from minicpm.exchange.convert import gguf_metadata
from minicpm.exchange.int4_folder import write_int4_folder
from minicpm.exchange.source import FOLD_KEY, Source, open_source
from minicpm.formats.blocks import BLOCK_TYPES
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.gguf_write import write_gguf_model
from minicpm.formats.int4_folder import Int4Layout
from minicpm.formats.weight_map import WeightEntry
from minicpm.quant.grid import GROUP_SIZES
from minicpm.quant.judge import Closeness, measure
from minicpm.quant.layer import Method, RoundingSettings
from minicpm.quant.model import ModelRounding, QuantizeSettings
from minicpm.quant.precision import allot, folder_types, measure_sensitivity, tensor_bytes, uniform_types
from minicpm.quant.windows import DEFAULT_SOURCE, Windows, check_rows, pack_evenly, read_token_rows, split_rows
from minicpm.quant.work import WorkFolder

Progress = Callable[[str, int, int], None]
TARGETS: Mapping[str, str] = {name.lower(): name for name in ("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q8_0")}
FOLDERS = ("gptq", "awq")
METHODS = ("nearest", "search", "gptq", "awq", "awq+gptq")
FLOATS = ("F32", "F16", "BF16")
# Of the calibration's rows where no text of its own is given to judge by; never used for both.
HELDOUT_SHARE = 0.25


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        to: a key of `TARGETS` for a GGUF file, one of `FOLDERS` for a folder in that layout.
        method: one of `METHODS`; `awq` searches scales where `awq+gptq` feeds errors back.
        calibration: files of conversations or text, each filling as many windows; none is questions about Python's
            library.
        heldout: what the result is judged on; none keeps a quarter of the calibration's rows apart.
        windows: of calibration.
        window_tokens: the length of each.
        heldout_windows: of judgement.
        embedding: the type of embedding and head; None is Q6_K, or Q8_0 where rows hold no super-blocks; folders keep
            them in half precision.
        group_size: inputs that share a scale in a folder; None is the largest of 128, 64, 32 that divides every width.
        budget_bytes: of all tensors; finer types go where they help most. None keeps one type. Not for folders.
        damping: see `RoundingSettings`.
        shrinkage: see `RoundingSettings`.
        sweeps: see `RoundingSettings`.
        seed: shuffles the rows.
    """

    to: str = "q4_0"
    method: str = "gptq"
    calibration: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    windows: int = 64
    window_tokens: int = 512
    heldout_windows: int = 16
    embedding: str | None = None
    group_size: int | None = None
    budget_bytes: int | None = None
    damping: float = 0.01
    shrinkage: float = 0.2
    sweeps: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Quantization:
    """What was written and how close it is.

    `errors` is the relative squared error of each matrix's outputs, by HF name, the worst first.
    """

    path: Path
    tensor_bytes: int
    file_bytes: int
    bits_per_weight: float
    block_types: Mapping[str, str]
    closeness: Closeness
    heldout: str
    errors: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return asdict(self) | {"path": str(self.path)}


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
    _check_recipe(recipe, destination)
    source = open_source(path)
    config, weights = source.checkpoint.config, source.checkpoint.weights
    quantized = sorted(set(weights.block_types()) - set(FLOATS))
    if quantized and not allows_requantizing:
        raise CheckpointError(
            f"{path} is quantized already ({', '.join(quantized)}); give the 16-bit model, or allow it by --requantize"
        )
    windows, heldout = _texts(source, recipe)
    types = _types(source, recipe, windows, progress)
    plan = _plan(source, recipe, types, windows)
    work = WorkFolder(destination.with_name(f".{destination.name}.quantize"), plan)
    settings = QuantizeSettings(
        RoundingSettings(_method(recipe), recipe.damping, recipe.shrinkage, recipe.sweeps), "awq" in recipe.method
    )
    rounding = ModelRounding(config, weights, types, settings, work)
    rounding.run(windows, progress)
    closeness = _write(source, rounding, destination, heldout, max_kl)
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
        heldout=heldout.origin,
        errors=errors,
    )


def _method(recipe: Recipe) -> Method:
    methods: Mapping[str, Method] = {"nearest": "nearest", "search": "search", "awq": "search"}
    return methods.get(recipe.method, "gptq")


def _check_recipe(recipe: Recipe, destination: Path) -> None:
    if destination.exists():
        raise CheckpointError(f"{destination} exists already; name another, or remove it first")
    if recipe.to not in TARGETS and recipe.to not in FOLDERS:
        raise ConfigError(f"type {recipe.to!r} is not known; known: {', '.join((*TARGETS, *FOLDERS))}")
    _check_layout(recipe)
    if recipe.method not in METHODS:
        raise ConfigError(f"method {recipe.method!r} is not known; known: {', '.join(METHODS)}")
    if recipe.embedding is not None and recipe.embedding not in (*TARGETS, "q6_k"):
        raise ConfigError(f"embedding type {recipe.embedding!r} is not known; known: {', '.join(TARGETS)}, q6_k")
    for name in ("windows", "window_tokens", "heldout_windows"):
        if getattr(recipe, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(recipe, name)}")
    if not 0 < recipe.damping < 1:
        raise ConfigError(f"damping must be between 0 and 1, got {recipe.damping}")
    if not 0 <= recipe.shrinkage <= 1:
        raise ConfigError(f"shrinkage must be from 0 to 1, got {recipe.shrinkage}")


def _check_layout(recipe: Recipe) -> None:
    if recipe.to in FOLDERS and (recipe.embedding is not None or recipe.budget_bytes is not None):
        raise ConfigError(
            f"a {recipe.to} folder has one type and embeddings in fp16; budgets and --embedding are GGUF's"
        )
    if recipe.group_size is not None and (recipe.to not in FOLDERS or recipe.group_size not in GROUP_SIZES):
        raise ConfigError(
            f"group size {recipe.group_size} is not known for {recipe.to}; folders ({', '.join(FOLDERS)}) know "
            f"{', '.join(map(str, GROUP_SIZES))}; blocks of GGUF have their own"
        )


def _texts(source: Source, recipe: Recipe) -> tuple[Windows, Windows]:
    """Return the windows of calibration and of judgement, of different rows."""
    length = min(recipe.window_tokens, source.checkpoint.config.max_position_embeddings)
    names = recipe.calibration or (DEFAULT_SOURCE,)
    texts = {name: read_token_rows(source.tokenizer, name) for name in names}
    check_rows([row for rows in texts.values() for row in rows], ", ".join(names))
    share = 0.0 if recipe.heldout else HELDOUT_SHARE
    used, kept = {}, {}
    for name, rows in texts.items():
        used[name], kept[name] = split_rows(rows, recipe.seed, share)
    windows = pack_evenly(used, length, recipe.windows)
    if not recipe.heldout:
        heldout = pack_evenly(kept, length, recipe.heldout_windows)
        origin = f"{HELDOUT_SHARE:.0%} of the rows of {heldout.origin}, kept apart"
        return windows, replace(heldout, origin=origin)
    kept = {name: split_rows(read_token_rows(source.tokenizer, name), recipe.seed, 0.0)[0] for name in recipe.heldout}
    return windows, pack_evenly(kept, length, recipe.heldout_windows)


def _types(source: Source, recipe: Recipe, windows: Windows, progress: Progress) -> dict[str, str]:
    config = source.checkpoint.config
    if recipe.to in FOLDERS:
        return folder_types(config, _layout(config, recipe))
    types = uniform_types(config, TARGETS[recipe.to], recipe.embedding.upper() if recipe.embedding else None)
    if recipe.budget_bytes is None:
        return types
    # Fails before anything is measured where nothing fits.
    allot(config, types, [], recipe.budget_bytes)
    few = Windows(windows.ids[:2], windows.document_ids[:2], windows.num_rows, windows.origin)
    found = measure_sensitivity(config, source.checkpoint.weights, types, few, progress)
    return allot(config, types, found, recipe.budget_bytes)


def _layout(config: ModelConfig, recipe: Recipe) -> Int4Layout:
    widths = {shape[1] for name, shape in config.weight_shapes().items() if len(shape) > 1 and "layers" in name}
    fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
    return Int4Layout.of(recipe.to, recipe.group_size or max(fitting, default=min(GROUP_SIZES)))


def _plan(source: Source, recipe: Recipe, types: Mapping[str, str], windows: Windows) -> dict[str, object]:
    """Return everything that the rounded weights depend on."""
    digest = hashlib.sha256(windows.ids.numpy().tobytes() + windows.document_ids.numpy().tobytes())
    paths = [source.path] if source.path.is_file() else sorted(source.path.glob("*.safetensors"))
    files = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return {"recipe": asdict(recipe), "types": dict(types), "text": digest.hexdigest(), "files": files}


def _write(
    source: Source, rounding: ModelRounding, destination: Path, heldout: Windows, max_kl: float | None
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

    if not set(rounding.block_types.values()) <= BLOCK_TYPES.keys():
        return write_int4_folder(source, rounding.quantized(), rounding.block_types, destination, judge)
    hashed = HashedEntries({name: WeightEntry.of(weight) for name, weight in rounding.quantized().items()})
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
