"""Files of the same types and size: llama.cpp's quantizer, with and without an importance matrix, and ours.

All read the same calibration text; the divergence from the original is taken in float32 arithmetic on the weights of
each file, on rows that none of them has seen. Peers are `llama-quantize` and `llama-imatrix` of a folder that --bin
names; both get the tensors' types that ours has. The model of one's own comes from `minicpm pretrain` (--run). --quick
takes the first layers of a model alone; --full rounds random weights of the 2.7 B shape instead (a process of its own,
an hour or so on one core) and tells its peak memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import rows
from bench.random_model import write_random_model

from minicpm.architecture import PRESETS
from minicpm.exchange.convert import convert, gguf_metadata
from minicpm.exchange.quantize import quantize
from minicpm.exchange.recipe import TARGETS, Recipe
from minicpm.exchange.source import Source, open_source
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.formats.gguf_write import write_gguf_model
from minicpm.formats.names import HF_TO_GGUF, translate
from minicpm.history.naming import resolve
from minicpm.quant.judge import Closeness, measure
from minicpm.quant.windows import Windows, pack, read_token_rows, split_rows

FEWER_OF_NEAREST = 1 / 0.7  # at 4.5 bits: at least 30 % less divergence than nearest rounding
FULL_GIB = 8.0
QUICK_LAYERS = 4
# Name -> (how, whether scales are tuned afterwards); the first is what bars are about.
OURS = {
    "gptq": ("gptq", False), "recover": ("gptq", True), "awq+gptq": ("awq+gptq", False), "search": ("search", False),
    "awq": ("awq", False),
}  # fmt: skip


def heldout_rows(source: Source, calibration: str, share: float = 0.25) -> tuple[list[list[int]], list[list[int]]]:
    return split_rows(read_token_rows(source.tokenizer, calibration), 0, share)


def peer_file(options: argparse.Namespace, float_file: Path, ours: Path, imatrix: Path | None, path: Path) -> Path:
    """Return llama.cpp's file of `float_file` with the types that each tensor of `ours` has."""
    if not options.bin:
        recipe = Recipe(to=options.kind, method="nearest", calibration=(options.calibration,), windows=1)
        return quantize(options.model, path, recipe, allows_requantizing=True).path
    types = []
    for name, entry in open_checkpoint(ours).weights.entries.items():
        if len(entry.shape) > 1:
            types += ["--tensor-type", f"{translate(name, HF_TO_GGUF).removesuffix('.weight')}={entry.block_type}"]
    matrix = ["--imatrix", str(imatrix)] if imatrix else []
    embedding = open_checkpoint(ours).weights.entries["model.embed_tokens.weight"].block_type
    command = [
        f"{options.bin}/llama-quantize",
        "--allow-requantize",
        "--token-embedding-type",
        embedding,
        *matrix,
        *types,
    ]
    subprocess.run([*command, str(float_file), str(path), options.kind.upper()], check=True, capture_output=True)
    theirs = open_checkpoint(path).weights.block_types()
    if theirs != open_checkpoint(ours).weights.block_types():
        raise SystemExit(f"llama.cpp chose other types: {theirs}")
    return path


def measured(name: str, source: Source, path: Path, heldout: Windows) -> Closeness:
    gc.collect()
    found = measure(source.checkpoint.config, source.checkpoint.weights, open_checkpoint(path).weights, heldout)
    print(f"{name:24} {found.describe()}", flush=True)
    return found


def shortened(path: Path, shorter: Path) -> Path:
    """Write the first layers of a model alone and return the file; the scale of their residuals stays."""
    source = open_source(path)
    config = source.checkpoint.config
    scale = config.scale_depth * (QUICK_LAYERS / config.num_hidden_layers) ** 0.5
    config = config.replace(num_hidden_layers=QUICK_LAYERS, scale_depth=scale)
    entries = source.checkpoint.weights.entries
    write_gguf_model(shorter, config, {name: entries[name] for name in config.weight_shapes()}, gguf_metadata(source))
    return shorter


def full_size(options: argparse.Namespace, folder: Path) -> list[rows.Row]:
    """Round the 2.7 B shape in a process of its own and return its peak beside the bar."""
    source, result = folder / "random.gguf", folder / "q4_0.gguf"
    write_random_model(source, PRESETS["minicpm-2b"], "BF16")
    command = [
        sys.executable,
        "-c",
        _FULL,
        str(source),
        str(result),
        str(options.windows),
        str(options.heldout_windows),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"minicpm-2b: {found['seconds']:.0f} s, {found['bytes']:,} bytes of tensors, peak {found['gib']:.2f} GiB")
    return [rows.compare("full-2b", found["gib"], FULL_GIB, "the bar", "peak GiB", 1.0, less_is_better=True)]


_FULL = """
import json, resource, sys, time
from pathlib import Path
from minicpm.exchange.quantize import quantize
from minicpm.exchange.recipe import Recipe
start = time.perf_counter()
recipe = Recipe(windows=int(sys.argv[3]), heldout_windows=int(sys.argv[4]))
made = quantize(Path(sys.argv[1]), Path(sys.argv[2]), recipe)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": time.perf_counter() - start, "gib": peak, "bytes": made.tensor_bytes}))
"""


def compare_types(
    options: argparse.Namespace, label: str, model: Path, kinds: list[str], folder: Path
) -> list[rows.Row]:
    if options.quick:
        model = shortened(model, folder / f"{label}-short.gguf")
    options.model = model
    source = open_source(model)
    calibration, kept = heldout_rows(source, options.calibration)
    heldout = pack(kept, "held-out rows", options.tokens, options.heldout_windows)
    windows = pack(calibration, "calibration", options.tokens, options.windows)
    text = folder / f"{label}.txt"
    text.write_text("\n\n".join(source.tokenizer.decode(ids) for ids in windows.ids.tolist()), encoding="utf-8")
    float_file = convert(model, folder / f"{label}.gguf", to="gguf", dtype="fp32", is_verified=False).path
    imatrix = folder / f"{label}.imatrix.gguf"
    peers: list[tuple[str, Path | None]] = [("nearest", None)]
    if options.bin:
        peers.append(("imatrix", imatrix))
    command = (
        [f"{options.bin}/llama-imatrix", "-m", str(float_file), "-f", str(text), "-o", str(imatrix), "-c",
         str(options.tokens), "--parse-special", "--no-ppl", "-t", "1"]
    )  # fmt: skip
    if options.bin:
        subprocess.run(command, check=True, capture_output=True)
    results = []
    for options.kind in kinds:
        made: dict[str, Closeness] = {}
        ours: Path | None = None
        for name, (method, is_tuned) in list(OURS.items())[: 1 if options.quick else None]:
            path = folder / f"{label}-{options.kind}-{name}.gguf"
            recipe = Recipe(
                to=options.kind, method=method, calibration=(options.calibration,), windows=options.windows,
                window_tokens=options.tokens, heldout_windows=options.heldout_windows,
                recover=options.recover if is_tuned else 0,
            )  # fmt: skip
            made[name] = quantize(model, path, recipe, allows_requantizing=True).closeness
            print(f"{label} {options.kind} {name:12} {made[name].describe()}", flush=True)
            ours = ours or path
        assert ours is not None
        for name, matrix in peers:
            path = peer_file(options, float_file, ours, matrix, folder / f"{label}-{options.kind}-{name}.gguf")
            made[name] = measured(f"{label} {options.kind} {name}", source, path, heldout)
        row = f"{options.kind}-{label}"
        need = FEWER_OF_NEAREST if TARGETS[options.kind] in ("Q4_0", "Q4_K") else 1.0
        unit = "mean KL, nats"
        for peer, must in {"nearest": need, "imatrix": 1.0}.items():
            if peer not in made:
                continue
            results.append(
                rows.compare(row, made["gptq"].kl, made[peer].kl, f"llama.cpp {peer}", unit, must, less_is_better=True)
            )
    return results


def main() -> None:
    parser = rows.arguments(__doc__)
    parser.add_argument("--bin", type=Path, help="the folder of llama-quantize and llama-imatrix (else: our nearest)")
    parser.add_argument("--run", help="a model of one's own with widths that are multiples of 256")
    parser.add_argument("--calibration", default="stdlib:docs")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--heldout-windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--recover", type=int, default=64, help="steps of the tuned file")
    parser.add_argument("--full", action="store_true", help="the memory of the 2.7 B shape alone")
    parser.add_argument("--skip-default", action="store_true", help="the model of one's own alone")
    options = parser.parse_args()
    if options.quick:
        options.windows, options.tokens, options.heldout_windows, options.recover = 8, 128, 4, 8
    found: list[rows.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if options.full:
            found = full_size(options, Path(folder))
            options.run, options.skip_default = None, True
        if options.run:
            found += compare_types(options, "own", resolve(options.run), ["q4_0", "q4_1", "q4_k"], Path(folder))
        if not options.skip_default:
            found += compare_types(options, "smollm2", resolve("smollm2"), ["q4_0"], Path(folder))
    rows.finish(found, options)


if __name__ == "__main__":
    main()
