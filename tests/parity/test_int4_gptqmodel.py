"""Our GPTQ and AWQ folders as transformers and gptqmodel read them, against our torch model on the same folder.

gptqmodel is not among the development packages: it comes as sources only, its build needs torch beside it and its
requirements move other packages. Where it is not installed the tests are skipped. To run them: `BUILD_CUDA_EXT=0 pip
install --no-build-isolation --no-deps --target DIR gptqmodel optimum defuser device-smi dill kernels logbar pypcre
random_word threadpoolctl tokenicer`, and DIR on PYTHONPATH. Measured with gptqmodel 7.7, transformers 5.24: the largest
difference of a log-probability 0.0039 (GPTQ) and 0.0046 (AWQ), KL 3e-7: half-precision arithmetic on their side.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.exchange.conftest import FolderWriter, sentencepiece_file, write_minicpm

from minicpm.architecture import ModelConfig
from minicpm.exchange.convert import convert
from minicpm.exchange.quantize import quantize
from minicpm.exchange.recipe import Recipe
from minicpm.formats.checkpoint import open_checkpoint
from minicpm.model.loading import load_model

__all__ = ["sentencepiece_file", "write_minicpm"]  # fixtures
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed"),
]
# The default backends compile for minutes; these are gptqmodel's own PyTorch.
BACKENDS = {"gptq": ("GPTQConfig", "gptq_torch"), "awq": ("AwqConfig", "torch_awq")}
READ = """
import sys
import numpy as np, torch, transformers
path, name, backend, ids, out = sys.argv[1:]
settings = getattr(transformers, name)(bits=4, backend=backend)
model = transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float16, device_map="cpu", quantization_config=settings
).eval()
assert hasattr(model.model.layers[0].mlp.down_proj, "qweight"), type(model.model.layers[0].mlp.down_proj)
with torch.no_grad():
    np.save(out, model(torch.from_numpy(np.load(ids))).logits.float().log_softmax(-1).numpy())
"""


@pytest.mark.parametrize("to", sorted(BACKENDS))
def test_gptqmodel_computes_the_model_that_we_wrote(
    tmp_path: Path, tiny_config: ModelConfig, write_minicpm: FolderWriter, to: str
) -> None:
    rows = [{"instruction": f"The quick fox {n}", "output": f"jumps over {n * n} lazy dogs"} for n in range(120)]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config.replace(hidden_size=128, num_attention_heads=8, num_hidden_layers=3)
    granite = convert(write_minicpm(config), tmp_path / "granite", to="granite", is_verified=False).path
    recipe = Recipe(to=to, calibration=(str(chat),), windows=8, window_tokens=64, heldout_windows=2)
    path = quantize(granite, tmp_path / to, recipe).path
    ids = np.random.default_rng(0).integers(3, 331, (2, 40))
    np.save(tmp_path / "ids.npy", ids)
    # A process of its own: it sets up logging, threads and compilers as it is imported.
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), *BACKENDS[to], str(tmp_path / "ids.npy"), str(tmp_path / "out.npy")],
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.from_numpy(np.load(tmp_path / "out.npy"))
    checkpoint = open_checkpoint(path)
    with torch.no_grad():
        ours = load_model(checkpoint.config, checkpoint.weights, dtype=torch.float32)(torch.from_numpy(ids))
    ours = ours.log_softmax(-1)
    assert (ours - theirs).abs().max() < 0.02
    assert (ours.exp() * (ours - theirs)).sum(-1).mean() < 1e-5
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.98
