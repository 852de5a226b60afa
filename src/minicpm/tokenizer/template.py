"""Chat templates: the model's own Jinja text, rendered so that each character's author is known.

Left out: turning the rendered text into ids (`Tokenizer.apply_chat`) and the supervised mask (`chat.py`).
"""

from __future__ import annotations

import datetime
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from minicpm.errors import ConfigError, DataError, FormatError, MiniCPMError
from minicpm.tokenizer.provenance import TracedText, trust
from minicpm.tokenizer.vocabulary import Vocabulary

# User → `<用户>` text `<AI>`; every other role is bare text. No marks between turns.
MINICPM_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<用户>' + message['content'].strip() + '<AI>' }}"
    "{% else %}{{ message['content'].strip() }}{% endif %}"
    "{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# These names of roles count as the template's own words: several templates build a control token around them
# (`'<|' + role + '|>'`). Any other role is untrusted text.
KNOWN_ROLES = frozenset({"system", "user", "assistant", "tool", "developer", "function", "ipython", "model"})


def default_template(vocabulary: Vocabulary) -> str:
    """ChatML for a vocabulary that has its control tokens, else the template of MiniCPM."""
    controls = {vocabulary.pieces[i] for i in vocabulary.control_ids}
    return CHATML_TEMPLATE if {"<|im_start|>", "<|im_end|>"} <= controls else MINICPM_TEMPLATE


class ChatTemplate:
    """One model's chat template. Safe to share between threads; compiled when first used."""

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        """Keep the source; nothing is compiled yet.

        Args:
            source: Jinja text, or several by name (`default`, and `tool_use` for conversations with tools).
            special_tokens: what `bos_token`, `eos_token` and so on stand for in the template.

        Raises:
            FormatError: there are several templates and none is the default.
        """
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in self._sources:
            raise FormatError(f"there are chat templates named {sorted(self._sources)} but none named 'default'")
        self._special_tokens = {name: trust(text) for name, text in (special_tokens or {}).items()}
        self._compiled: dict[str, Any] = {}
        # The environment keeps the budget of the rendering under way.
        self._lock = threading.RLock()

    @property
    def source(self) -> str:
        """The Jinja text of the default template."""
        return self._sources["default"]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> TracedText:
        """The conversation as text, with the spans that the template wrote.

        Raises:
            DataError: a message is malformed, or the template refuses the conversation (`raise_exception`).
            FormatError: the template is not valid Jinja, fails, or exceeds its limits; names the line.
            ConfigError: `variables` holds a name that the template is given anyway.
        """
        names = {
            "messages": [check_message(message, i) for i, message in enumerate(messages)],
            "tools": _as_data(list(tools)) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        extra = {str(key): _as_data(value) for key, value in (variables or {}).items()}
        if taken := sorted(extra.keys() & (names.keys() | self._special_tokens.keys())):
            raise ConfigError(f"the template variables {taken} cannot be set: they are given by the conversation")
        which = "tool_use" if tools and "tool_use" in self._sources else "default"
        with self._lock:
            return self._run(which, {**self._special_tokens, **extra, **names})

    def _run(self, which: str, names: dict[str, Any]) -> TracedText:
        from minicpm.tokenizer.budget import Budget

        template = self._compile(which)
        room = (1 << 20) + 8 * (len(self._sources[which]) + _num_characters(names))
        environment = template.environment
        try:
            with environment.spending(Budget(room)):
                context = template.new_context(names)
                rendered: TracedText = environment.concat(template.root_render_func(context))
                return rendered
        except MiniCPMError:
            raise
        except Exception as error:  # a template is a program of someone else's and may raise anything
            raise FormatError(
                f"the chat template fails{_where(error)}: {type(error).__name__}: {_one_line(error)}"
            ) from error

    def _compile(self, which: str) -> Any:
        from jinja2.exceptions import TemplateSyntaxError

        from minicpm.tokenizer.sandbox import MAX_SOURCE_CHARACTERS, TemplateEnvironment

        if which in self._compiled:
            return self._compiled[which]
        source = self._sources[which]
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise FormatError(f"the chat template has {len(source)} characters; the limit is {MAX_SOURCE_CHARACTERS}")
        environment = TemplateEnvironment({"raise_exception": _refuse_conversation, "strftime_now": _format_now})
        try:
            template = environment.from_string(source)
            # How a failing frame is recognised and its line told.
            template.root_render_func.__globals__["__minicpm_template__"] = template
        except TemplateSyntaxError as error:
            raise FormatError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        except Exception as error:
            # Extreme nesting ends in the parser's or in Python's own limits.
            raise FormatError(f"the chat template cannot be compiled: {_one_line(error)}") from error
        self._compiled[which] = template
        return template


def check_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """One message as the template gets it: parts of text joined, arguments of tool calls as data, all of it untrusted.

    Raises:
        DataError: names the message and the field.
    """
    if not isinstance(message, Mapping):
        raise DataError(f"messages[{index}] is a {type(message).__name__}; a mapping with role and content is expected")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(f"messages[{index}].role is {role!r}; text such as 'user' is expected")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part_text(part, f"messages[{index}].content[{i}]") for i, part in enumerate(content))
    if content is None and not message.get("tool_calls"):
        raise DataError(f"messages[{index}] has no content; text is expected")
    if content is not None and not isinstance(content, str):
        raise DataError(f"messages[{index}].content is a {type(content).__name__}; text is expected")
    checked: dict[str, Any] = _as_data({str(key): value for key, value in message.items()})
    checked["role"] = trust(role) if role in KNOWN_ROLES else TracedText(role)
    checked["content"] = None if content is None else TracedText(content)
    for call in checked.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _parse_arguments(function["arguments"])
    return checked


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise DataError(f"{where} is not a text part; {{'type': 'text', 'text': …}} is expected")


def _parse_arguments(text: str) -> Any:
    # The API of OpenAI carries arguments as JSON text, templates expect the value; text that is no JSON stays.
    try:
        return _as_data(json.loads(text))
    except ValueError:
        return text


def _as_data(value: Any, depth: int = 0) -> Any:
    """A copy of plain data with every text untrusted."""
    if depth > 64:
        raise DataError("the messages or tools nest deeper than 64 levels")
    if isinstance(value, str):
        return TracedText(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {TracedText(key): _as_data(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_data(item, depth + 1) for item in value]
    raise DataError(f"the messages or tools hold a {type(value).__name__}; plain JSON data is expected")


def _num_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_num_characters(key) + _num_characters(item) for key, item in value.items())
    return sum(map(_num_characters, value)) if isinstance(value, list) else 8


def _refuse_conversation(message: str) -> NoReturn:
    raise DataError(f"the chat template refuses the conversation: {str(message)[:500]}")


def _format_now(pattern: str) -> str:
    # The C library would pad `%999999999Y` to a gigabyte.
    if len(pattern) > 256 or re.search(r"%[^a-zA-Z%-]|%-[^a-zA-Z]", pattern):
        raise ValueError(f"the date format {pattern[:40]!r}; plain directives such as %Y-%m-%d are accepted")
    return datetime.datetime.now().strftime(pattern)


def _where(error: BaseException) -> str:
    from jinja2 import Template

    line = None
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_globals.get("__minicpm_template__")
        if isinstance(owner, Template):
            line = owner.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return "" if line is None else f" in line {line}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
