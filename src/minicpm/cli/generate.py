"""`minicpm generate MODEL PROMPT…`: continue texts as they are, without a chat template."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from minicpm.cli.kept_prompt import KeptPrompt, add_prompt_cache
from minicpm.cli.parser import Parser, UsageError, add_model
from minicpm.cli.sampling import add_sampling, sampling_settings
from minicpm.cli.terminal import out
from minicpm.errors import DataError


def parser() -> Parser:
    """Return the parser of this verb."""
    verb = Parser(
        "generate",
        "Continue one or more texts as they are, without a chat template; several are run together. One text is "
        "streamed. Without a text, standard input is one.",
        [
            'minicpm generate smollm2 "The sea is" --max-tokens 20 --greedy',
            "minicpm generate smollm2 --file prompts.txt --json",
            'minicpm generate smollm2 "2, 3, 5, 7," --json --logprobs 5',
        ],
    )
    add_model(verb)
    verb.add_argument("prompts", metavar="PROMPT", nargs="*", help="a text to continue")
    verb.add_argument("--file", type=Path, metavar="FILE", help="one prompt a line")
    verb.add_argument("--json", action="store_true", help="one JSON object a prompt: text, ids, why it ended, times")
    verb.add_argument("--logprobs", type=int, metavar="N", help="with --json: each token's N likeliest alternatives")
    add_prompt_cache(verb)
    add_sampling(verb)
    return verb


def run(options: argparse.Namespace) -> None:
    """Continue every prompt."""
    settings = sampling_settings(options)
    if options.logprobs is not None:
        if not options.json:
            raise UsageError("--logprobs needs --json, which has room for them")
        settings["logprobs"] = options.logprobs
    prompts = _prompts(options)
    if options.prompt_cache and len(prompts) > 1:
        raise UsageError(f"--prompt-cache keeps one prompt, and there are {len(prompts)}; give one")
    import minicpm

    model = minicpm.load(
        options.model,
        context_length=options.ctx,
        num_threads=options.threads,
        kv_type=options.kv_type,
        draft=options.draft,
    )
    kept = KeptPrompt(options.prompt_cache, model)
    if len(prompts) == 1 and not options.json:
        from minicpm.cli.reply import write_reply

        stream = model.continue_text(prompts[0], **settings)
        reply = write_reply(stream)
        if not reply.is_whole:
            raise KeyboardInterrupt
        kept.keep(stream.token_ids[: stream.result.num_prompt_tokens])
        return
    for prompt, completion in zip(prompts, model.generate(prompts, **settings), strict=True):
        out(_as_json(prompt, completion) if options.json else completion.text)
    if options.prompt_cache:
        kept.keep(model.encode_prompt(prompts[0]))


def _as_json(prompt: str, completion: Any) -> str:
    facts = {"prompt": prompt} | dataclasses.asdict(completion)
    if facts["logprobs"] is None:
        del facts["logprobs"]
    return json.dumps(facts, ensure_ascii=False)


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts: list[str] = list(options.prompts)
    try:
        if options.file is not None:
            prompts += options.file.read_text(encoding="utf-8").splitlines()
        elif not prompts and not sys.stdin.isatty():
            prompts.append(sys.stdin.read().removesuffix("\n"))
    except OSError as error:
        raise DataError(f"cannot read {options.file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{options.file or 'standard input'} is not UTF-8 text: {error}") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UsageError("there is nothing to continue; give a PROMPT, --file FILE, or text on standard input")
    return prompts
