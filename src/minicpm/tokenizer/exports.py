"""A tokenizer as GGUF metadata and as the settings of a model folder, wherever it came from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minicpm.tokenizer.gguf_vocabulary import write_vocabulary
from minicpm.tokenizer.merges import scores_from_merges
from minicpm.tokenizer.pretokenizers import name_pre_tokenizer
from minicpm.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from minicpm.tokenizer.tokenizer import Tokenizer


def hf_settings(tokenizer: Tokenizer, max_length: int, template: str | None = None) -> dict[str, Any]:
    """The fields of `tokenizer_config.json` for a tokenizer whose folder has none; `template` replaces its own."""

    def text(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.vocabulary.pieces[token_id]

    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.adds_bos,
        "bos_token": text(tokenizer.bos_id),
        "eos_token": text(tokenizer.vocabulary.eos_id),
        "unk_token": text(tokenizer.vocabulary.unk_id),
        "pad_token": text(tokenizer.pad_id),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": template or tokenizer.chat_template.source,
    }
    return {key: value for key, value in fields.items() if value is not None}


def gguf_metadata(backend: Backend, vocabulary: Vocabulary, template: str | Mapping[str, str] | None) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF for this machine and its vocabulary.

    Raises:
        FormatError: GGUF has no name for the way that the machine cuts text.
    """
    state = json.loads(backend.to_str())
    pairs = state["model"]["merges"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ", 1)) for pair in pairs]
    if vocabulary.kind == "gpt2":
        if vocabulary.pre is None:
            whole_words = bool(state["model"].get("ignore_merges"))
            pre = name_pre_tokenizer(state.get("pre_tokenizer") or {}, whole_words=whole_words)
            vocabulary = dataclasses.replace(vocabulary, pre=pre)
    elif vocabulary.scores is None:
        # From a tokenizer.json, which ranks merges and has no scores.
        vocabulary = dataclasses.replace(vocabulary, scores=scores_from_merges(vocabulary.pieces, merges))
    source = template if isinstance(template, str) or template is None else template.get("default")
    return write_vocabulary(vocabulary, merges, source)
