"""How a model is quantized: every choice, and what is wrong with one before anything is read.

What this leaves out: doing it (`quantize.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError, ConfigError
from minicpm.formats.int4_folder import Int4Layout
from minicpm.quant.grid import GROUP_SIZES
from minicpm.quant.layer import Method

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
        recover: steps of tuning after rounding, one window each; see `minicpm.quant.recovery`.
        recover_rate: of those steps, at its peak, relative to each scale.
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
    recover: int = 0
    recover_rate: float = 1e-3
    seed: int = 0


def rounding_method(recipe: Recipe) -> Method:
    """Return how matrices are rounded, whether inputs are scaled first or not."""
    methods: Mapping[str, Method] = {"nearest": "nearest", "search": "search", "awq": "search"}
    return methods.get(recipe.method, "gptq")


def check_recipe(recipe: Recipe, destination: Path) -> None:
    """Return when `recipe` can be followed to `destination`.

    Raises:
        ConfigError: a value that is not known or out of range.
        CheckpointError: the destination exists.
    """
    if destination.exists():
        raise CheckpointError(f"{destination} exists already; name another, or remove it first")
    if not destination.parent.is_dir():
        raise CheckpointError(f"{destination} cannot be written: {destination.parent} is no folder; make it first")
    if recipe.to not in TARGETS and recipe.to not in FOLDERS:
        raise ConfigError(f"type {recipe.to!r} is not known; known: {', '.join((*TARGETS, *FOLDERS))}")
    _check_layout(recipe)
    if recipe.method not in METHODS:
        raise ConfigError(f"method {recipe.method!r} is not known; known: {', '.join(METHODS)}")
    if recipe.embedding is not None and recipe.embedding not in (*TARGETS, "q6_k"):
        raise ConfigError(f"embedding type {recipe.embedding!r} is not known; known: {', '.join(TARGETS)}, q6_k")
    _check_numbers(recipe)


def _check_numbers(recipe: Recipe) -> None:
    for name, least in {"windows": 1, "window_tokens": 2, "heldout_windows": 1}.items():
        if getattr(recipe, name) < least:
            raise ConfigError(f"{name} must be at least {least}, got {getattr(recipe, name)}")
    if recipe.recover < 0:
        raise ConfigError(f"recover must be at least 0 steps, got {recipe.recover}")
    if not 0 < recipe.recover_rate < 1:
        raise ConfigError(f"recover_rate must be between 0 and 1, got {recipe.recover_rate}")
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


def folder_layout(config: ModelConfig, recipe: Recipe) -> Int4Layout:
    """Return the layout of the folder that `recipe` wants: the largest groups that divide every width, or its own."""
    widths = {shape[1] for name, shape in config.weight_shapes().items() if len(shape) > 1 and "layers" in name}
    fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
    return Int4Layout.of(recipe.to, recipe.group_size or max(fitting, default=min(GROUP_SIZES)))
