"""The card of an exported model, in English and Chinese. What this leaves out: numbers that were not measured."""

from __future__ import annotations

from dataclasses import dataclass

from minicpm.architecture import ModelConfig

_UNKNOWN = "unknown"


@dataclass(frozen=True)
class CardFacts:
    """What the card says."""

    name: str
    source: str
    licence: str | None
    config: ModelConfig
    family: str
    dtype: str
    check: str | None
    is_folded: bool
    verb: str = "convert"


def write_card(facts: CardFacts) -> str:
    """Return the text of README.md."""
    config, counts = facts.config, facts.config.num_parameters()
    licence = facts.licence or _UNKNOWN
    how_en, how_zh = _HOW["folded" if facts.is_folded else facts.family]
    shape = (
        f"{counts.total:,} parameters · {config.num_hidden_layers} layers · hidden {config.hidden_size} · "
        f"{config.num_attention_heads}/{config.num_key_value_heads} heads · context {config.max_position_embeddings:,}"
    )
    checked_en = f"Checked against the source when it was written: {facts.check}." if facts.check else "Not checked."
    checked_zh = f"写出时与来源对比:{facts.check}。" if facts.check else "未经校验。"
    return f"""---
license: {licence}
language:
- en
- zh
pipeline_tag: text-generation
---
# {facts.name}

{shape}

Converted by `minicpm {facts.verb}` from `{facts.source}` to the `{facts.family}` format in {facts.dtype}.
{checked_en} The licence is the source's: {licence}. `SHA256SUMS` lists every file (`sha256sum -c SHA256SUMS`).

{how_en}

```console
$ minicpm chat .
```

## 中文

由 `minicpm {facts.verb}` 从 `{facts.source}` 转换为 `{facts.family}` 格式,精度 {facts.dtype}。
{checked_zh}许可证沿用来源:{licence}。`SHA256SUMS` 列出全部文件的校验和(`sha256sum -c SHA256SUMS`)。

{how_zh}
"""


_GRANITE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
```"""
_MINICPM = """```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", torch_dtype=torch.bfloat16, trust_remote_code=True)
query = "山东省最高的山是哪座山, 它比黄山高还是矮?差距多少?"
response, history = model.chat(tokenizer, query, temperature=0.8, top_p=0.8)
```"""
_HOW = {
    "granite": (
        "MiniCPM's graph under the name that transformers, vLLM and llama.cpp know; no remote code is needed.\n\n"
        + _GRANITE,
        "计算图与 MiniCPM 完全相同,采用 transformers、vLLM、llama.cpp 原生支持的名称,无需远程代码。",
    ),
    "llama": ("Any runtime that knows Llama runs it.\n\n" + _GRANITE, "任何支持 Llama 的运行时均可直接加载。"),
    "folded": (
        "The scales are folded into the weights and the head is untied; `minicpm_fold` in config.json says how.\n\n"
        + _GRANITE,
        "缩放系数已折叠进权重,输出头与词嵌入不再共享;config.json 的 `minicpm_fold` 记录了还原方法。",
    ),
    "minicpm": (
        "The folder carries its own model code, so `trust_remote_code=True` runs it.\n\n" + _MINICPM,
        "目录自带模型代码,需使用 `trust_remote_code=True`。",
    ),
}
