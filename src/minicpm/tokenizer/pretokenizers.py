"""The named pre-tokenizers of byte-level BPE: how text is cut before merging.

GGUF stores a name, `tokenizer.json` stores patterns; this table knows both and is read in both directions.
Source: the pattern table of llama.cpp (src/llama-vocab.cpp) and the `tokenizer.json` files of the named models.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from minicpm.errors import FormatError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _REST

# Each pattern in turn cuts what the ones before it left; matches and gaps are both kept.
PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (_DIGIT, _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}

# Further names of GGUF for the same cuts.
ALIASES: dict[str, str] = {
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "codeshell": "smollm",
    "exaone": "smollm",
    "minerva-7b": "smollm",
    "phi-2": "gpt-2",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
    "roberta-bpe": "gpt-2",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "dbrx": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "stablelm2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
}

# These models take a whole word that is a piece of the vocabulary at once, whatever its merges say.
_WHOLE_WORD_NAMES = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3"})
# ... and begin every sequence with bos although older files do not say so.
BOS_NAMES = frozenset({"llama-bpe", "llama3", "llama-v3"})


def takes_whole_words(name: str) -> bool:
    """Whether a pre-tokenized word that is a piece is used without looking at merges."""
    return name in _WHOLE_WORD_NAMES


def build_pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer that GGUF calls `name`.

    Raises:
        FormatError: the name is not known; lists those that are.
    """
    from tokenizers import Regex, pre_tokenizers

    patterns = PATTERNS.get(ALIASES.get(name, name))
    if patterns is None:
        known = ", ".join(sorted({*PATTERNS, *ALIASES}))
        raise FormatError(f"unknown pre-tokenizer {name!r} in tokenizer.ggml.pre; this version knows {known}")
    if patterns == PATTERNS["smollm"]:
        # The same cuts as the patterns, in the form that these models' own tokenizer.json has, and faster.
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if patterns == PATTERNS["gpt-2"]:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def describe(component: Any) -> dict[str, Any]:
    """The JSON form of a component of `tokenizers` (an empty dict for None)."""
    if component is None:
        return {}
    state: dict[str, Any] = json.loads(component.__getstate__())
    return state


def members(component: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The steps of a `Sequence` component, or the component itself as the only step."""
    if not component:
        return []
    inner = component.get(key)
    return list(inner) if component.get("type") == "Sequence" and isinstance(inner, list) else [component]


def name_pre_tokenizer(component: dict[str, Any], *, whole_words: bool) -> str:
    """GGUF's name of a pre-tokenizer given in the JSON form of `tokenizers`.

    Raises:
        FormatError: no known name cuts text like this.
    """
    patterns = tuple(p for step in members(component, "pretokenizers") for p in _step_patterns(step))
    for name, known in PATTERNS.items():
        if known == patterns and takes_whole_words(name) == whole_words:
            return name
    if patterns == PATTERNS["llama-bpe"]:
        return "smaug-bpe"
    raise FormatError(
        f"the pre-tokenizer of this tokenizer.json has no GGUF name (patterns {list(patterns)}); "
        f"names are known for {', '.join(sorted(PATTERNS))}"
    )


def _step_patterns(step: dict[str, Any]) -> list[str]:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [_GPT2] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return [_DIGIT]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step.get("pattern", {})
        return [str(pattern.get("Regex", pattern.get("String")))]
    return [f"{kind}?"]
