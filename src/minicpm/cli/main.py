"""The entry point: finds the verb, imports it alone, and turns a `MiniCPMError` into one line and exit code 2.

A verb is a module of this folder with `parser() -> Parser` and `run(options) -> None`. Exit codes: 0 done, 2 an error
that says what to do, 130 Ctrl-C, 141 the reader of the output went away; anything else is our fault: a traceback shows.
"""

from __future__ import annotations

import importlib
import os
import sys

from minicpm import __version__
from minicpm.errors import MiniCPMError

VERBS = {
    "chat": "talk with a model, or ask one question",
    "generate": "continue texts, as they are",
    "serve": "serve a model under OpenAI's API, with a chat page",
    "pull": "fetch a model into the cache",
    "models": "list the models of the cache",
    "show": "say what is in a model file",
    "convert": "turn a model into any format or dtype",
    "quantize": "make a 4-bit file of a model that keeps its answers",
    "compare": "say how far two models agree",
    "eval": "score a model on published tasks",
    "data": "clean text, learn a vocabulary, make token shards, look at them",
    "pretrain": "train a model from text",
    "decay": "finish any checkpoint of a run, with other data mixed in",
    "sft": "teach a model to answer, by full tuning, LoRA or QLoRA",
    "dpo": "teach a model which answers are preferred",
    "merge": "make a whole model of an adapter and its base",
    "history": "list, check, compare, thin and copy every checkpoint of a run",
    "plan": "say what a training run takes, before it begins",
    "bench": "say how fast this machine runs a model",
    "doctor": "say what this machine can do",
}

_HELP = """\
minicpm: small end-side language models, from training to chat

usage: minicpm VERB [ARGUMENTS]     minicpm VERB --help     minicpm --version

{verbs}

start with:  minicpm chat
"""


def main() -> None:
    """Run the command line of this process."""
    raise SystemExit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except MiniCPMError as error:
        # Folded: whatever a message quotes, it stays one line.
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        sys.stderr.write(f"error: {arguments[0]} needs torch, which is not installed: pip install 'minicpm[train]'\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes standard output once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        width = max(map(len, VERBS))
        sys.stdout.write(_HELP.format(verbs="\n".join(f"  {name:{width}}  {text}" for name, text in VERBS.items())))
        return
    verb, *rest = arguments
    if verb in {"--version", "-V", "version"}:
        sys.stdout.write(f"minicpm {__version__}\n")
        return
    if verb not in VERBS:
        raise MiniCPMError(_unknown(verb))
    module = importlib.import_module(f"minicpm.cli.{verb}")
    module.run(module.parser().parse(rest))


def _unknown(verb: str) -> str:
    # Only a wrong command pays for the import.
    import difflib

    kind = "option" if verb.startswith("-") else "verb"
    near = difflib.get_close_matches(verb, VERBS, n=2, cutoff=0.55)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(VERBS)}"
    return f"unknown {kind} {verb!r}; {hint}"
