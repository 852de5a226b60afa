"""`minicpm doctor`: what this machine can do, and what is installed."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from minicpm import __version__
from minicpm.cli.parser import Parser
from minicpm.cli.terminal import out, suggest
from minicpm.hub import DEFAULT_MODEL, cache_folder, list_models
from minicpm.hub.progress import megabytes

# Beyond any cache that a laptop has, so that the memory itself is measured.
_BANDWIDTH_BYTES = 1 << 30
_PACKAGES = ("numpy", "tokenizers", "safetensors", "jinja2", "torch", "transformers", "peft", "sentencepiece")


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser("doctor", "Say what this machine can do: instruction sets, kernels, threads, memory, versions.")
    verb.add_argument("--json", action="store_true", help="as JSON")
    return verb


def run(options: argparse.Namespace) -> None:
    """Look, measure, and print."""
    facts = examine()
    if options.json:
        out(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    out(_as_text(facts))
    suggest(f"minicpm chat {DEFAULT_MODEL}")


def examine() -> dict[str, Any]:
    """Return the facts as plain data; the bandwidth is measured now, in about a second."""
    from minicpm import _native
    from minicpm.engine.decoder import KERNEL_VARIABLE, available_processors
    from minicpm.engine.sizing import free_memory

    features = _native.features()
    free_bytes, threads = free_memory(), available_processors()
    size = min(_BANDWIDTH_BYTES, free_bytes // 4) // 4096 * 4096
    folder = cache_folder()
    return {
        "minicpm": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor_name(),
        "instruction_sets": features["instruction_sets"],
        "kernels": features["kernels"],
        "kernel": os.environ.get(KERNEL_VARIABLE) or features["kernels"][0],
        "threads": threads,
        "free_memory_bytes": free_bytes,
        "read_bandwidth_gb_per_second": round(_native.read_bandwidth(size, threads) / 1e9, 1),
        "cache_folder": str(folder),
        "cache_free_bytes": shutil.disk_usage(_existing(folder)).free,
        "models": [model.name for model in list_models()],
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "is_torch_loaded": "torch" in sys.modules,
    }


def _as_text(facts: dict[str, Any]) -> str:
    kernels = ", ".join(facts["kernels"])
    lines = [
        ("minicpm", facts["minicpm"]),
        ("python", facts["python"]),
        ("system", facts["system"]),
        ("processor", facts["processor"]),
        ("instructions", " ".join(facts["instruction_sets"]) or "none beyond the baseline"),
        ("kernels", f"{kernels}; in use: {facts['kernel']}"),
        ("threads", str(facts["threads"])),
        ("memory", f"{megabytes(facts['free_memory_bytes'])} free"),
        ("bandwidth", f"{facts['read_bandwidth_gb_per_second']} GB/s read, {facts['threads']} threads"),
        ("cache", f"{facts['cache_folder']}, {megabytes(facts['cache_free_bytes'])} free"),
        ("models", ", ".join(facts["models"]) or f"none yet: minicpm pull {DEFAULT_MODEL}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in facts["packages"].items())),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, platform.processor() or "unknown")
