"""Prompts for the benchmarks of generation, from real texts: those that make a model copy, and those that do not.

They come from the data folder beside the checkout where there is one, else from the source and documentation of
Python's own library.
"""

from __future__ import annotations

import gzip
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Begun for the model: a small one that is only asked to quote rarely does.
_QUOTE = '{text}\n\nSummary of the text above, in quotations taken from it word for word:\n\n"{start}'
_EDIT = "```python\n{text}\n```\n\nRename the function `{name}` to `{new}`. Reply with the whole file, changed."


def copying_prompts(count: int) -> list[tuple[str, str]]:
    """(kind, prompt), in turns, `count` in all: "quote" is a begun summary to continue, "edit" a message about code."""
    quotes = (_QUOTE.format(text=text, start=" ".join(text.split()[:6])) for text in _passages())
    edits = (_EDIT.format(text=code, name=name, new=f"{name}_v2") for name, code in _functions())
    pairs = (pair for both in zip(quotes, edits, strict=False) for pair in zip(("quote", "edit"), both, strict=True))
    return _take(pairs, count)


def plain_prompts(count: int) -> list[tuple[str, str]]:
    """(kind, prompt): messages whose answers repeat little, of the kind "question", `count` in all."""
    return _take((("question", text) for text in _questions()), count)


def passages(count: int) -> list[str]:
    """Plain English texts of 500 to 1,200 characters; some come again when there are fewer."""
    found = [text for text, _ in zip(_passages(), range(count), strict=False)]
    return [found[i % len(found)] for i in range(count)]


def _take(items: Iterator[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    found = [item for item, _ in zip(items, range(count), strict=False)]
    if len(found) < count:
        raise ValueError(f"there are {len(found)} prompts, {count} were asked for")
    return found


def _passages() -> Iterator[str]:
    if (DATA / "rag").is_dir():
        for number, row in enumerate(_rows("rag/en_passages.jsonl.gz")):
            # Neighbours are about the same thing.
            if number % 23 == 0 and 500 < len(row["text"]) < 1200:
                yield row["text"]
        return
    for module in (textwrap, inspect, json, gzip, re):
        for _, function in inspect.getmembers(module, inspect.isfunction):
            if len(inspect.getdoc(function) or "") > 300:
                yield inspect.getdoc(function) or ""


def _functions() -> Iterator[tuple[str, str]]:
    if (DATA / "pretrain").is_dir():
        for row in _rows("pretrain/code_thealgorithms.jsonl.gz"):
            found = re.search(r"^def (\w+)", row["text"], re.MULTILINE)
            if found and 600 < len(row["text"]) < 1600:
                yield found[1], row["text"].strip()
        return
    for module in (textwrap, inspect, json, gzip, re):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            code = inspect.getsource(function)
            if 600 < len(code) < 1600:
                yield name, code.strip()


def _questions() -> Iterator[str]:
    if (DATA / "eval").is_dir():
        for name in ("mt_bench_questions", "mt_bench_zh_questions", "vicuna_bench_questions"):
            for number, row in enumerate(_rows(f"eval/{name}.jsonl.gz")):
                if number % 3 == 0:
                    yield row["turns"][0]
        return
    for module in (textwrap, inspect, json, gzip, re):
        for name in dir(module):
            yield f"What is `{name}` of Python's module `{module.__name__}` good for?"


def _rows(path: str) -> Iterator[dict[str, str]]:
    with gzip.open(DATA / path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)
