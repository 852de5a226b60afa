"""Schemas, regular expressions and grammars -> what restricts the tokens of a reply, by llguidance.

Compiling is bounded three ways: bytes of the source, llguidance's own fuel, and the seconds that a request waits.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from minicpm.engine import Constraint
from minicpm.serve.api_error import ApiError, RequestFailure
from minicpm.serve.settings import Caps

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

    from minicpm.serve.fields import ResponseFormat
    from minicpm.tokenizer import Tokenizer

# A small model may go on with white space for ever, so none is free; the commas and colons are those that models write.
JSON_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NUM_KEPT = 32


class TokenConstraint:
    """One reply's way through a grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> npt.NDArray[np.bool_]:
        """The tokens that may come next; end tokens where the text may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token_id: int) -> bool:
        """Go on; whether nothing can follow."""
        self._matcher.consume_token(token_id)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestFailure(f"the grammar cannot be followed: {_first_line(self._matcher.get_error())}")


class Grammars:
    """Compiles for one tokenizer and keeps what came last."""

    def __init__(self, tokenizer: Tokenizer, caps: Caps) -> None:
        """Compile nothing yet."""
        self._tokenizer = tokenizer
        self._caps = caps
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, "minicpm-grammar")
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None

    async def constrain(self, chosen: ResponseFormat | None) -> Callable[[], Constraint] | None:
        """Return what makes a constraint for one reply of the format; None where every text is one.

        Raises:
            ApiError: it is not valid, or too costly.
        """
        if chosen is None or chosen.type == "text":
            return None
        return await self.compile(lambda: grammar_of(chosen), len(chosen.model_dump_json()), "response_format")

    async def compile(self, write: Callable[[], str], size: int, param: str) -> Callable[[], Constraint]:
        """Return what makes a constraint for one reply.

        Args:
            write: gives the grammar in llguidance's own form; it runs in the thread that compiles.
            size: bytes of what it is made from.
            param: the field of the request, for errors.

        Raises:
            ApiError: it is not valid, or too costly.
        """
        if size > self._caps.schema_bytes:
            limit = self._caps.schema_bytes
            raise ApiError(400, f"{param} is longer than {limit} bytes", code="schema_too_large", param=param)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._caps.grammar_seconds):
                matcher = await loop.run_in_executor(self._pool, lambda: self._compile(write()))
        except TimeoutError:
            seconds = self._caps.grammar_seconds
            raise ApiError(
                400, f"{param} takes more than {seconds:g} seconds to compile", code="schema_too_complex", param=param
            ) from None
        if matcher.is_error():
            reason = _first_line(matcher.get_error())
            raise ApiError(400, f"{param} is not usable: {reason}", code="invalid_schema", param=param)
        vocab_size = self._tokenizer.vocab_size
        return lambda: TokenConstraint(matcher.deep_copy(), vocab_size)

    def close(self) -> None:
        """Compile no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar]
        if self._vocabulary is None:
            self._vocabulary = _read_vocabulary(self._tokenizer)
        limits = LLParserLimits(initial_lexer_fuel=1_000_000, max_grammar_size=100_000, max_lexer_states=50_000)
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        # Some that compile cannot be followed for a single token.
        trial = matcher.deep_copy()
        trial.compute_bitmask()
        if trial.is_error():
            return trial
        with self._lock:
            self._kept[grammar] = matcher
            while len(self._kept) > _NUM_KEPT:
                self._kept.popitem(last=False)
        return matcher


def grammar_of(chosen: ResponseFormat) -> str:
    """Return a response format as a grammar in llguidance's form.

    Raises:
        ApiError: it is not valid.
    """
    from llguidance import LLMatcher, grammar_from

    try:
        match chosen.type:
            case "json_object":
                return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=JSON_STYLE)
            case "json_schema":
                schema = _styled(chosen.json_schema.schema_)
                return LLMatcher.grammar_from_json_schema(json.dumps(schema))
            case "regex":
                return LLMatcher.grammar_from_regex(chosen.regex)
            case "grammar":
                return grammar_from("grammar", chosen.grammar)
            case "text":
                return LLMatcher.grammar_from_regex(r"(?s:.*)")
    except (ValueError, TypeError, RecursionError) as error:
        message = f"response_format is not usable: {_first_line(str(error))}"
        raise ApiError(400, message, code="invalid_schema", param="response_format") from None


def _styled(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": JSON_STYLE}


def styled_json(schema: Mapping[str, Any]) -> str:
    """Return `schema` as text, with the spacing that replies have."""
    return json.dumps(_styled(schema))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


class _Vocabulary:
    """A tokenizer as llguidance reads one."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.eos_ids)
        self.special_token_ids = sorted(tokenizer.control_ids)
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode_continuation(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _read_vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer(_Vocabulary(tokenizer), eos_token=sorted(tokenizer.eos_ids))  # type: ignore[arg-type]  # known by its attributes
