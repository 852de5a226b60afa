"""The card of a published history, in English and Chinese: what it holds, how large, by which hashes, how to open it.

What this leaves out: what was not measured, and the data's licence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from minicpm.history.catalogue import INDEX, Row
from minicpm.history.reading import History
from minicpm.history.scores import Score, by_setting, current_scores
from minicpm.history.verification import needed_objects

_MEGABYTE = 1_000_000
_ADDRESS = "https://ADDRESS"
_HERE_EN = f"`{_ADDRESS}` is where this folder is served; its path on this machine opens it too.\n"
_HERE_ZH = f"`{_ADDRESS}` 为本目录的网址,也可直接使用本地路径。"


def write_card(history: History, name: str, licence: str = "") -> str:
    """Return the text of README.md for the history as it is listed now."""
    config, rows = history.config, history.rows
    manifests = [(history.manifest(row), row) for row in rows]
    objects = {name: manifest.objects[name] for manifest, row in manifests for name in needed_objects(manifest, row)}
    shape = (
        f"{config.num_parameters().total:,} parameters · {config.num_hidden_layers} layers · "
        f"hidden {config.hidden_size} · {config.num_attention_heads}/{config.num_key_value_heads} heads"
    )
    raw, size = sum(manifest.num_bytes for manifest, _ in manifests), sum(objects.values())
    share = f"{size / raw:.1%}" if raw else "–"
    num_base = sum(row.precision == "base" for row in rows)
    where = history.place.name if "://" in history.place.name else _ADDRESS
    last = rows[-1].step if rows else 0
    index = hashlib.sha256(history.place.read(INDEX)).hexdigest()
    base_en = f" Of {num_base} only the base layer is here yet." if num_base else ""
    base_zh = f"其中 {num_base} 个目前仅有基础层。" if num_base else ""
    scores = by_setting(current_scores(history))
    return _CARD.format(
        licence=licence or "unknown", name=name, count=len(rows), shape=shape, raw=_bytes(raw), size=_bytes(size),
        share=share, base_en=base_en, base_zh=base_zh, stages_en=_stages(rows, _EN), stages_zh=_stages(rows, _ZH),
        scores_en=_scores(scores, _SCORES_EN), scores_zh=_scores(scores, _SCORES_ZH), where=where, last=last,
        here_en=_HERE_EN if where == _ADDRESS else "",
        here_zh=_HERE_ZH if where == _ADDRESS else "", about=history.catalogue.about_sha256, index=index,
        tokenizer=history.about.tokenizer_sha256 or "–", lines=_lines(rows),
    )  # fmt: skip


_CARD = """---
license: {licence}
language:
- en
- zh
tags:
- minicpm-history
---
# {name}: {count} checkpoints of one run

{shape}

{count} checkpoints, {raw} as trained, {size} here ({share}). Each tensor of each step is what was \
trained, to the bit, and has its SHA-256.{base_en}

{stages_en}

```python
import minicpm

history = minicpm.History("{where}")
history[{last}].state_dict()  # or history.at({last}, precision="base"): a few bits a weight
```

{scores_en}{here_en}
```console
$ minicpm history ls {where}
$ minicpm chat {where}@{last}
$ minicpm history pull {where} {name} --steps {last}
$ minicpm history verify {where}
```

## 中文

本目录为一次训练的完整过程:{count} 个检查点,原始大小 {raw},此处 {size}({share})。\
每一步的每个张量均逐位还原,并附训练时的 SHA-256。{base_zh}

{stages_zh}

{scores_zh}{here_zh}打开方式同上;`precision="base"` 只读取每个权重几比特的基础层。

## SHA-256

| | |
|---|---|
| history.json | `{about}` |
| index.json | `{index}` |
| tokenizer | `{tokenizer}` |

<details><summary>{count} manifests · 清单</summary>

| step | tokens | stage | lr | loss | precision | bytes | manifest |
|---:|---:|---|---:|---:|---|---:|---|
{lines}

</details>
"""
_EN = ("stage", "steps", "checkpoints", "tokens", "learning rate", "loss", "bytes")
_ZH = ("阶段", "步数", "检查点", "词元", "学习率", "损失", "字节")
_SCORES_EN = ("score", "rows", "first checkpoint", "last checkpoint")
_SCORES_ZH = ("评测", "题数", "首个检查点", "末个检查点")
_FIRST_LAST = " → "


def _stages(rows: Sequence[Row], header: Sequence[str]) -> str:
    groups: list[list[Row]] = []
    for row in rows:
        if not groups or groups[-1][-1].stage != row.stage:
            groups.append([])
        groups[-1].append(row)
    lines = [f"| {' | '.join(header)} |", "|---|---:|---:|---:|---:|---:|---:|"]
    for group in groups:
        first, last = group[0], group[-1]
        cells = (
            _cell(first.stage),
            _span(f"{first.step:,}", f"{last.step:,}", "–"),
            str(len(group)),
            f"{last.tokens:,}",
            _span(f"{first.lr:.3g}", f"{last.lr:.3g}"),
            _span(_loss(first), _loss(last)),
            _bytes(sum(row.num_bytes for row in group)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _scores(series: Mapping[str, Sequence[Score]], header: Sequence[str]) -> str:
    """A table of what `history eval` found, nothing where it found nothing."""
    lines = [
        f"| {_cell(label)} | {scores[0].setting.num_rows:,} | {_score(scores[0])} | {_score(scores[-1])} |"
        for label, scores in series.items()
    ]
    return "\n".join([f"| {' | '.join(header)} |", "|---|---:|---:|---:|", *lines, "", ""]) if lines else ""


def _score(score: Score) -> str:
    return f"{score.text} ({score.step:,})"


def _lines(rows: Sequence[Row]) -> str:
    return "\n".join(
        f"| {row.step} | {row.tokens:,} | {_cell(row.stage)} | {row.lr:.3g} | {_loss(row)} | {row.precision} | "
        f"{_bytes(row.num_bytes)} | `{row.manifest_sha256}` |"
        for row in rows
    )


def _span(first: str, last: str, between: str = _FIRST_LAST) -> str:
    return first if first == last else f"{first}{between}{last}"


def _loss(row: Row) -> str:
    return f"{row.losses['train']:.4f}" if "train" in row.losses else "–"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _bytes(count: int) -> str:
    return f"{count / _MEGABYTE:,.1f} MB"
