"""Peak anonymous memory and time of converting a full-size MiniCPM-2B (random weights, bf16, 5.4 GB).

The bound is 2 GB for any target (`--no-verify`). Memory that maps the source's file is not counted: it can be dropped.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from minicpm.architecture import PRESETS, ModelConfig
from minicpm.formats.hf_config import config_to_hf
from minicpm.formats.safetensors_write import write_safetensors_model
from minicpm.formats.weight import Weight
from minicpm.formats.weight_map import WeightEntry

TARGETS = {
    "anon-granite": ["--to", "granite"],
    "anon-q4_0": ["--to", "gguf", "--dtype", "q4_0"],
    "anon-llama": ["--to", "llama"],
}
BOUND_BYTES = 2_000_000_000


def write_source(folder: Path, config: ModelConfig) -> None:
    """Write random weights of `config` with a tokenizer of bytes and reserved pieces."""
    noise = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) * 0.03

    def make(shape: tuple[int, ...]) -> Weight:
        values = np.resize(noise, shape) if len(shape) > 1 else np.ones(shape, np.float32)
        return Weight.from_array(values, "BF16")

    entries = {name: WeightEntry(s, "BF16", lambda s=s: make(s)) for name, s in config.weight_shapes().items()}
    write_safetensors_model(folder, entries)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    (folder / "tokenizer.json").write_text(_byte_tokenizer())


def _byte_tokenizer() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str())


def run(source: Path, destination: Path, arguments: list[str]) -> tuple[int, float]:
    """Convert in a process of its own; return its peak anonymous bytes and the seconds it took."""
    command = [sys.executable, "-m", "minicpm", "convert", str(source), str(destination), *arguments, "--no-verify"]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            peak = max(peak, int(found.group(1)) * 1024 if found else 0)
            time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return peak, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest wind-tunnel model instead of the 2B")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = PRESETS["wind-9m" if options.quick else "minicpm-2b"]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        source.mkdir()
        write_source(source, config)
        for name, arguments in TARGETS.items():
            peak, seconds = run(source, Path(temporary) / "out", arguments)
            subprocess.run(["rm", "-rf", str(Path(temporary) / "out")], check=True)
            print(f"{name:14} peak {peak / 1e6:8.0f} MB of anonymous memory, {seconds:6.1f} s")
            rows.append(
                {
                    "name": name,
                    "ours": peak,
                    "peer": BOUND_BYTES,
                    "peer_name": "bound",
                    "unit": "bytes",
                    "ratio": BOUND_BYTES / max(peak, 1),
                    "must": 1.0,
                }
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
