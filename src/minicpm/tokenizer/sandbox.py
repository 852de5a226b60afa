"""A Jinja environment in which a hostile chat template can neither reach out, nor hang, nor fill the memory.

Beside Jinja's immutable sandbox: an allow-list of filters, globals and methods; a budget of steps, characters and
processor time for each rendering; and no operation whose result could be larger than the budget allows. Literals of the
template become trusted `TracedText`, everything else is untrusted (`provenance.py`).
Left out: includes, imports and inheritance, for which a model has no files.
"""

from __future__ import annotations

import contextlib
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minicpm.tokenizer import template_filters as filters
from minicpm.tokenizer.budget import Budget
from minicpm.tokenizer.provenance import TracedText, join_texts, trust
from minicpm.tokenizer.template_compiler import GenerationTag, Guard, TracingGenerator

MAX_SOURCE_CHARACTERS = 1 << 20
MAX_RANGE = 100_000
MAX_INTEGER_BITS = 4096

_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        {"capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii"}
        | {"isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip"}
        | {"partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip"}
        | {"split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"}
    ),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    int: frozenset(),
    float: frozenset(),
    bytes: frozenset(),
}


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one chat template. Rendering happens inside `with environment.spending(budget)`."""

    code_generator_class = TracingGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, global_names: Mapping[str, Any]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            # Folding would compute at compile time what the budget is meant to watch.
            optimized=False,
            cache_size=0,
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
            finalize=self.as_text,
        )
        self.budget = Budget(0)
        self.trust = trust
        namespace = self.globals["namespace"]
        self.globals = {"namespace": namespace, "range": self._range, "dict": self._dict, **global_names}
        self.filters = filters.allowed_filters(self)

    @contextlib.contextmanager
    def spending(self, budget: Budget) -> Iterator[None]:
        """Render within `budget`; not for two threads at once."""
        previous, self.budget = self.budget, budget
        try:
            yield
        finally:
            self.budget = previous

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        guarded: nodes.Template = Guard().visit(tree)
        return guarded

    # What compiled templates call.

    def concat(self, parts: Iterable[str]) -> TracedText:
        """The parts of an output in a row."""
        texts = list(parts)
        self.budget.spend()
        self.budget.allow(sum(map(len, texts)))
        return join_texts(texts)

    def join_values(self, values: Iterable[Any]) -> TracedText:
        """The operator `~`."""
        return self.concat([self.as_text(value) for value in values])

    def as_text(self, value: Any) -> str:
        """The text of a value that a template prints."""
        if isinstance(value, str):
            return value
        if value is None or isinstance(value, (int, float, Undefined)):
            return str(value)
        if isinstance(value, (list, tuple, dict)):
            text = str(self.budget.weigh(value))
            self.budget.allow(len(text))
            return text
        raise TypeError(f"a template cannot print a {type(value).__name__}")

    def bounded_items(self, values: Any) -> Any:
        """What a loop runs over, as a list whose length is paid for."""
        if isinstance(values, Undefined):
            return values
        items = list(values)
        self.budget.spend(1 + len(items))
        return items

    def held(self, value: Any) -> Any:
        """A text or list that the template cut out of another."""
        return self.budget.hold(value)

    def weighed(self, value: Any) -> Any:
        """A list, tuple or dict that the template built."""
        return self.budget.weigh(value)

    # What Jinja's sandbox asks.

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Only methods on the allow-list exist for the types of plain data."""
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with the template's own formatter; `format_map` stays out of reach."""
        if isinstance(value, (types.MethodType, types.BuiltinMethodType)) and isinstance(value.__self__, str):
            pattern = value.__self__
            if value.__name__ == "format":
                return lambda *args, **kwargs: filters.format_braces(self, pattern, args, kwargs)
        return None

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, RUF100 -- Jinja's names
        """Any call in a template: one step, and a check of methods whose result can grow."""
        self = __self
        self.budget.spend()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            # Inside a loop Jinja adds names of its own, which it takes out again before the call.
            given = {name: value for name, value in kwargs.items() if not name.startswith("_")}
            filters.check_growth(self.budget, owner, __obj.__name__, args, given)
        elif isinstance(__obj, LoopContext) and args:
            args = (self.bounded_items(args[0]), *args[1:])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators whose result can be larger than what they take."""
        return _OPERATORS[operator](self, left, right)

    def _range(self, *args: int) -> range:
        values = range(*args)
        if len(values) > MAX_RANGE:
            raise SecurityError(f"range of {len(values)} numbers; the limit is {MAX_RANGE}")
        return values

    def _dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.budget.weigh(dict(*args, **kwargs))


def _add(self: TemplateEnvironment, left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str):
        return self.concat((left, right))
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        self.budget.spend(1 + len(left) + len(right))
    return self.budget.weigh(left + right)


def _multiply(self: TemplateEnvironment, left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
            raise SecurityError("it multiplies very large numbers")
        return left * right
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
            self.budget.allow(len(sequence) * max(times, 0))
    return self.budget.weigh(left * right)


def _power(self: TemplateEnvironment, left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MAX_INTEGER_BITS:
        raise SecurityError("it raises to a very large power")
    return operator.pow(left, right)


def _modulo(self: TemplateEnvironment, left: Any, right: Any) -> Any:
    return filters.format_percent(self, left, right) if isinstance(left, str) else operator.mod(left, right)


_OPERATORS = {"+": _add, "*": _multiply, "**": _power, "%": _modulo}
