"""The filters and text operations that a chat template may use, each bounded and each carrying trust over.

The list holds what the templates of published models use, and what Jinja's users expect of it that cannot grow without
bound. `tojson` writes what Hugging Face's writes.
"""

from __future__ import annotations

import functools
import html
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import filters as jinja_filters
from jinja2.exceptions import SecurityError

from minicpm.tokenizer.budget import ITEM_CHARACTERS
from minicpm.tokenizer.provenance import TracedText, join_texts, spans_of, trust

if TYPE_CHECKING:
    from minicpm.tokenizer.budget import Budget
    from minicpm.tokenizer.sandbox import TemplateEnvironment

# Jinja's own filters whose results cannot be larger than what they take.
_JINJA_NAMES = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last"),
    *("length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr"),
    *("sort", "title", "trim", "unique", "upper"),
)
MAX_INDENT = 64
# A width or precision in a format: `%9999999d` makes megabytes out of nothing.
_WIDE = re.compile(r"\d{4,}|\*")


def allowed_filters(environment: TemplateEnvironment) -> dict[str, Callable[..., Any]]:
    """Filter name → function, for one environment."""
    allowed: dict[str, Callable[..., Any]] = {name: jinja_filters.FILTERS[name] for name in _JINJA_NAMES}
    own: dict[str, Callable[..., Any]] = {
        "escape": _escape,
        "e": _escape,
        "format": _format,
        "indent": _indent,
        "join": _join,
        "replace": _replace,
        "round": _round,
        "safe": _safe,
        "string": _string,
        "sum": _sum,
        "tojson": to_json,
    }
    allowed |= {name: functools.partial(function, environment) for name, function in own.items()}
    return {name: _metered(environment, function) for name, function in allowed.items()}


def _metered(environment: TemplateEnvironment, function: Callable[..., Any]) -> Callable[..., Any]:
    # Keeps the attributes by which Jinja knows that a filter wants the context or the environment.
    @functools.wraps(function, assigned=())
    def metered(*args: Any, **kwargs: Any) -> Any:
        return environment.budget.hold(function(*args, **kwargs))

    return metered


def check_growth(budget: Budget, text: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of a text method before it makes more than the budget allows.

    Raises:
        SecurityError: the result would be too large.
    """
    if method == "replace":
        old, new = (*args, *kwargs.values())[:2]
        budget.allow(len(text) + str.count(text, old) * max(0, len(new) - len(old)))
    elif method == "join":
        parts = args[0] if isinstance(args[0], (list, tuple, str, dict)) else ()
        budget.allow(sum(len(part) for part in parts if isinstance(part, str)) + len(text) * len(parts))
        if not isinstance(args[0], (list, tuple, str, dict)):
            raise SecurityError("join takes a list")
    elif method in ("split", "rsplit", "splitlines"):
        # Counted by doing it on plain text, which makes smaller objects than the traced text of the result.
        budget.allow(len(text) + ITEM_CHARACTERS * len(getattr(str, method)(text, *args, **kwargs)))
    elif method not in ("startswith", "endswith"):
        budget.allow(len(text))


def format_percent(environment: TemplateEnvironment, pattern: str, values: Any) -> TracedText:
    """The operator `%` on text. Where only `%s` occurs, trust is carried over.

    Raises:
        SecurityError: a width would make a huge text.
    """
    if _WIDE.search(pattern):
        raise SecurityError("a format with a width of four digits or more, or one taken from the values")
    given = values if isinstance(values, tuple) else (values,)
    texts = tuple(environment.as_text(v) if not isinstance(v, (int, float)) else v for v in given)
    parts = pattern.split("%s")
    if len(parts) == len(texts) + 1 and not any("%" in part for part in parts):
        woven = [parts[0]]
        for value, part in zip(texts, parts[1:], strict=True):
            woven += [environment.as_text(value), part]
        return environment.concat(woven)
    if isinstance(values, Mapping):
        return environment.concat([str.__mod__(pattern, environment.budget.weigh(values))])
    environment.budget.allow(len(pattern) + sum(len(t) if isinstance(t, str) else 4096 for t in texts))
    return TracedText(str.__mod__(pattern, texts))


def format_braces(
    environment: TemplateEnvironment, pattern: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> TracedText:
    """`str.format`, without attribute access and with bounded widths; the pattern's own text keeps its trust.

    Raises:
        SecurityError: a field reaches into a value, or a width would make a huge text.
    """
    is_trusted = spans_of(pattern) == ((0, len(pattern)),)
    woven: list[str] = []
    counter = 0
    for literal, name, specification, conversion in string.Formatter().parse(pattern):
        woven.append(trust(literal) if is_trusted else literal)
        if name is None:
            continue
        if not re.fullmatch(r"\w*", name) or "{" in (specification or "") or _WIDE.search(specification or ""):
            raise SecurityError(f"the format field {{{name}:{specification}}}; use a plain name or number")
        if name == "":
            name, counter = str(counter), counter + 1
        value = args[int(name)] if name.isdecimal() else kwargs[name]
        text = environment.as_text(value)
        if conversion == "r":
            text = repr(str.__str__(text) if isinstance(value, str) else value)
        if specification:
            text = format(value, specification)
        woven.append(text)
    return environment.concat(woven)


def to_json(
    environment: TemplateEnvironment,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The JSON text of a value."""
    _check_indent(indent)
    text = json.dumps(
        environment.budget.weigh(value),
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=None if separators is None else (separators[0], separators[1]),
        sort_keys=sort_keys,
    )
    environment.budget.allow(len(text))
    return text


def _check_indent(indent: Any) -> None:
    width = len(indent) if isinstance(indent, str) else indent
    if width is not None and not 0 <= int(width) <= MAX_INDENT:
        raise SecurityError(f"an indent of {width}; the limit is {MAX_INDENT}")


def _indent(
    environment: TemplateEnvironment, text: str, width: int | str = 4, first: bool = False, blank: bool = False
) -> TracedText:
    _check_indent(width)
    pad = width if isinstance(width, str) else " " * width
    lines = text.splitlines() if text else []
    if text.endswith("\n"):
        lines.append("")
    parts = []
    for i, line in enumerate(lines):
        has_pad = (first if i == 0 else True) and (bool(line) or blank)
        parts.append(join_texts((pad, line)) if has_pad else line)
    return environment.concat([join_texts(parts, "\n")])


def _join(environment: TemplateEnvironment, values: Iterable[Any], d: str = "", attribute: Any = None) -> TracedText:
    items = values if attribute is None else map(jinja_filters.make_attrgetter(environment, attribute), values)
    texts = [environment.as_text(item) for item in items]
    environment.budget.allow(sum(map(len, texts)) + len(d) * len(texts))
    return join_texts(texts, d)


def _replace(environment: TemplateEnvironment, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text = environment.as_text(value)
    old, new = environment.as_text(old), environment.as_text(new)
    check_growth(environment.budget, text, "replace", (old, new), {})
    traced = text if isinstance(text, TracedText) else TracedText(text)
    return traced.replace(old, new, -1 if count is None else count)


def _round(environment: TemplateEnvironment, value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 20:
        raise SecurityError(f"a rounding to {precision} digits; the limit is 20")
    return jinja_filters.do_round(value, precision, method)


def _sum(environment: TemplateEnvironment, values: Iterable[Any], attribute: Any = None, start: float = 0) -> Any:
    items = values if attribute is None else map(jinja_filters.make_attrgetter(environment, attribute), values)
    numbers = list(items)
    if not all(isinstance(number, (int, float)) for number in [start, *numbers]):
        raise TypeError("sum adds numbers only")
    return sum(numbers, start)


def _safe(environment: TemplateEnvironment, value: Any) -> str:
    return environment.as_text(value)


def _string(environment: TemplateEnvironment, value: Any) -> str:
    return environment.as_text(value)


def _escape(environment: TemplateEnvironment, value: Any) -> str:
    return environment.concat([html.escape(environment.as_text(value))])


def _format(environment: TemplateEnvironment, value: Any, *args: Any, **kwargs: Any) -> str:
    return format_percent(environment, environment.as_text(value), kwargs or args)
