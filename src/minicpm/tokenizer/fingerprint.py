"""One number for what a tokenizer does, so that ids made with another one are refused instead of trained on.

Left out: the chat template and which ids begin and end a document; they change no plain text's ids.
"""

from __future__ import annotations

import hashlib
import json

from minicpm.tokenizer.tokenizer import Tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """The SHA-256, in hex, of all that decides a text's ids; equal for `tokenizer.model` and its `tokenizer.json`."""
    state = json.loads(tokenizer.to_json())
    model = state["model"]
    # Older files write a merge as one string, newer ones as a pair.
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    facts = {
        "vocab": sorted(model["vocab"].items(), key=lambda item: item[1]),
        "merges": merges,
        "added": [[token["id"], token["content"]] for token in state.get("added_tokens") or []],
        "normalizer": state.get("normalizer"),
        "pre_tokenizer": state.get("pre_tokenizer"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
