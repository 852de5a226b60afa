"""Training a vocabulary: SentencePiece BPE in MiniCPM's settings, saved in every form that other programs read.

Byte fallback, digits split, text as it is (no normalization, all whitespace kept), a piece of its own for the line feed
and the tab. The folder holds `tokenizer.model`, an equal `tokenizer.json`, and `tokenizer_config.json` with the chat
template. What this leaves out: where the text comes from, and extending a vocabulary.

Source: facts of the released `tokenizer.model` of MiniCPM-2B (its trainer and normalizer settings).
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm.errors import ConfigError, DataError
from minicpm.tokenizer.template import CHATML_TEMPLATE, MINICPM_TEMPLATE
from minicpm.tokenizer.tokenizer import Tokenizer

# SentencePiece passes over longer lines without a word; these are characters, its limit is bytes.
_LINE_CHARACTERS = 1000
_LINE_BYTES = 4 * _LINE_CHARACTERS + 1
_SMALLEST = 3 + 256 + 2
_TOO_LARGE = re.compile(r"<= ?(\d+)")


@dataclass(frozen=True)
class VocabularyConfig:
    """What a vocabulary is made of.

    Attributes:
        vocab_size: all ids, the 256 bytes and the special ones among them.
        symbols: single characters that are never joined with others; each is sure to have an id.
        control: control tokens such as `<|im_start|>`, behind unk, bos and eos; text never becomes one.
        character_coverage: the share of the text's characters that get ids of their own; the rest are spelt in bytes.
        max_characters: text to learn from; what comes after it is not read.
        threads: of the trainer; 0 is all cores. The result does not depend on it.
    """

    vocab_size: int = 32000
    symbols: tuple[str, ...] = ("\n", "\t")
    control: tuple[str, ...] = ()
    character_coverage: float = 0.9995
    max_characters: int = 200_000_000
    threads: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size < _SMALLEST:
            raise ConfigError(f"vocab_size must be at least {_SMALLEST} (256 bytes and the special ids), "
                              f"got {self.vocab_size}")  # fmt: skip
        if not 0.9 <= self.character_coverage <= 1:
            raise ConfigError(f"character_coverage must lie between 0.9 and 1, got {self.character_coverage}")
        for symbol in self.symbols:
            # The fast tokenizer builds longer pieces from merges, and a symbol has none: it would never be found.
            if len(symbol) != 1:
                raise ConfigError(f"symbol {symbol!r} must be a single character; longer ones belong into control")
        if self.max_characters < 1 or self.threads < 0:
            raise ConfigError("max_characters must be at least 1, threads at least 0")


def train_vocabulary(texts: Iterable[str], folder: Path, config: VocabularyConfig | None = None) -> Tokenizer:
    """Write the files of a vocabulary learned from `texts` into the existing `folder`, and return its tokenizer.

    Raises:
        DataError: there is no text, or too little for so many ids (the message says how many it is enough for).
        ConfigError: sentencepiece is not installed.
    """
    config = config or VocabularyConfig()
    model = _train(texts, config)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = Tokenizer.from_sentencepiece(folder / "tokenizer.model")
    (folder / "tokenizer.json").write_text(tokenizer.to_json() + "\n", encoding="utf-8")
    settings = json.dumps(tokenizer_settings(config.control), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
    return Tokenizer.from_folder(folder)


def tokenizer_settings(control: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the `tokenizer_config.json` of such a vocabulary; with ChatML's control tokens also its template."""
    is_chatml = {"<|im_start|>", "<|im_end|>"} <= set(control)
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "chat_template": CHATML_TEMPLATE if is_chatml else MINICPM_TEMPLATE,
    }


def _train(texts: Iterable[str], config: VocabularyConfig) -> bytes:
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError("training a vocabulary needs sentencepiece; run `pip install 'minicpm[train]'`") from error
    lines = _Lines(texts, config.max_characters)
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            model_type="bpe",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=list(config.symbols),
            control_symbols=list(config.control),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=_LINE_BYTES,
            num_threads=config.threads or os.cpu_count() or 1,
            train_extremely_large_corpus=True,
            minloglevel=3,
        )
    except RuntimeError as error:
        if lines.error is not None:
            # The trainer wraps what the text raised into an error of its own.
            raise lines.error from None
        if lines.num_lines == 0:
            raise DataError("there is no text to learn a vocabulary from") from error
        raise _explain(error, config) from error
    return out.getvalue()


def _explain(error: RuntimeError, config: VocabularyConfig) -> DataError:
    message = " ".join(str(error).split())
    limit = _TOO_LARGE.search(message)
    if "too high" in message and limit is not None:
        return DataError(
            f"the text is too little for {config.vocab_size} ids; give more, or ask for at most {limit[1]}"
        )
    if "smaller than required_chars" in message:
        return DataError(
            f"vocab_size {config.vocab_size} has no room for the text's characters; ask for more ids, or lower "
            "character_coverage"
        )
    return DataError(f"sentencepiece could not learn a vocabulary: {message}")


class _Lines:
    """Text as the lines that the trainer takes, up to a number of characters; how many there were, and what failed."""

    def __init__(self, texts: Iterable[str], max_characters: int) -> None:
        self._texts = texts
        self._max_characters = max_characters
        self.num_lines = 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._cut()
        except Exception as error:  # the trainer, which draws from here, hides it from its caller
            self.error = error
            raise

    def _cut(self) -> Iterator[str]:
        taken = 0
        for text in self._texts:
            # A line feed is a symbol of its own: nothing is learned across it.
            for line in text.split("\n"):
                for first in range(0, len(line), _LINE_CHARACTERS):
                    self.num_lines += 1
                    yield line[first : first + _LINE_CHARACTERS].replace("\0", "")
            taken += len(text)
            if taken >= self._max_characters:
                return
