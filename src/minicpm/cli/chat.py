"""`minicpm chat [MODEL] [PROMPT]`: a conversation at the terminal, or one question and its answer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from minicpm.cli.conversation import Conversation
from minicpm.cli.kept_prompt import KeptPrompt, add_prompt_cache
from minicpm.cli.parser import Parser, UsageError, add_model
from minicpm.cli.sampling import add_sampling, sampling_settings
from minicpm.hub import DEFAULT_MODEL

# A small model answers best with its likeliest words, and the same way each time; drawing from its distribution lets
# it wander. The bound ends a reply that repeats itself.
DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 1024}


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "chat",
        "Talk with a model. With a PROMPT, or with text on standard input, answer that alone: the answer goes to "
        "standard output and nothing else does. Unless told otherwise, replies are greedy and end after 1,024 tokens.",
        [
            "minicpm chat",
            'minicpm chat smollm2 "What is the capital of France?"',
            "minicpm chat model.gguf --system 'You answer in one sentence.' --temperature 0.7",
            "minicpm chat smollm2 --greedy < question.txt",
            "minicpm chat smollm2 --prompt-cache notes.cache < notes-and-question.txt",
        ],
    )
    add_model(verb, nargs="?", default=DEFAULT_MODEL)
    verb.add_argument("prompt", metavar="PROMPT", nargs="?", help="answer this and leave")
    verb.add_argument("--system", metavar="TEXT", help="the system prompt; default: what the model's template says")
    verb.add_argument("--load", metavar="FILE", type=Path, help="go on with a conversation that /save kept")
    add_prompt_cache(verb)
    add_sampling(verb)
    return verb


def run(options: argparse.Namespace) -> None:
    """Answer once, or until the person leaves."""
    settings = DEFAULTS | sampling_settings(options)
    conversation = Conversation.load(options.load) if options.load else Conversation()
    if options.system is not None:
        conversation.system = options.system or None
    prompt = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = _read_input()
    import minicpm

    model = minicpm.load(
        options.model,
        context_length=options.ctx,
        num_threads=options.threads,
        kv_type=options.kv_type,
        draft=options.draft,
    )
    kept = KeptPrompt(options.prompt_cache, model)
    if prompt is None:
        _converse(model, options.model, conversation, settings, kept)
        return
    from minicpm.cli.reply import write_reply

    stream = model.stream(prompt, history=conversation.messages(), **settings)
    reply = write_reply(stream)
    if not reply.is_whole:
        raise KeyboardInterrupt
    kept.keep(stream.token_ids[: stream.result.num_prompt_tokens])


def _read_input() -> str:
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 text: {error}") from error
    if not text.strip():
        raise UsageError("standard input is empty; give a PROMPT, or start `minicpm chat` at a terminal to converse")
    return text.removesuffix("\n")


def _converse(model: Any, name: str, conversation: Conversation, settings: dict[str, Any], kept: KeptPrompt) -> None:
    from minicpm.cli.line_history import line_history
    from minicpm.cli.repl import Repl
    from minicpm.cli.terminal import suggest

    with line_history():
        repl = Repl(model, name, conversation, settings)
        repl.run()
    if repl.token_ids:
        kept.keep(repl.token_ids)
    suggest(f"minicpm show {name}")
