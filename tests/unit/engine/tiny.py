"""A tokenizer and engines for tiny random models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.reference import ReferenceDecoder, random_weights

from minicpm.architecture import ModelConfig
from minicpm.engine import Engine, Event, LanguageModel, Request, Sequence
from minicpm.tokenizer import Tokenizer, TokenType, Vocabulary

CHARACTERS = "▁etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLUCMFWYPVBGKJQXZ0123456789.,:;!?<>-"
BOS, EOS = 1, 2


def tiny_tokenizer(vocab_size: int = 331) -> Tokenizer:
    """A SentencePiece-like tokenizer of single characters and bytes, in MiniCPM's manner."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *CHARACTERS]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    types += [TokenType.NORMAL] * len(CHARACTERS)
    assert len(pieces) <= vocab_size
    vocabulary = Vocabulary(
        kind="llama",
        pieces=pieces,
        types=types,
        scores=[0.0] * 259 + [-float(i) for i in range(len(CHARACTERS))],
        bos_id=BOS,
        eos_id=EOS,
        unk_id=0,
        adds_bos=True,
        prepends_space=True,
    )
    return Tokenizer.from_vocabulary(vocabulary)


def reference_engine(config: ModelConfig, *, num_blocks: int = 64, **options: Any) -> tuple[Engine, ReferenceDecoder]:
    """An engine over the reference decoder on random weights."""
    block_tokens = options.get("block_tokens", 32)
    decoder = ReferenceDecoder(config, random_weights(config), num_blocks=num_blocks, block_tokens=block_tokens)
    return Engine(decoder, config, num_blocks=num_blocks, **options), decoder


def reference_model(config: ModelConfig, **options: Any) -> LanguageModel:
    """A language model over the reference decoder."""
    tokenizer = tiny_tokenizer(config.vocab_size)
    engine, _ = reference_engine(config, tokenizer=tokenizer, **options)
    return LanguageModel(engine, tokenizer)


def run_all(engine: Engine, max_steps: int = 10_000) -> Iterator[Event]:
    """The events until nothing is left to do."""
    for _ in range(max_steps):
        if not engine.has_work:
            return
        yield from engine.step()
    raise AssertionError(f"the engine still has work after {max_steps} steps")


def complete(engine: Engine, *requests: Request) -> list[Sequence]:
    """The finished sequences of `requests`, run together."""
    sequences = [engine.add(request) for request in requests]
    for _ in run_all(engine):
        pass
    return sequences
