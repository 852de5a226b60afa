"""What the training verbs share: the allocator, the plan that is shown first, and how a run ends."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minicpm.cli.parser import Parser
from minicpm.cli.terminal import note, out, suggest, table

if TYPE_CHECKING:
    from minicpm.train.plan import Plan
    from minicpm.train.pretrain import PretrainReady


def add_memory(verb: Parser) -> None:
    """Add the option `--memory`."""
    verb.add_argument(
        "--memory", default="", metavar="SIZE", help="what the run may take, like 8GB (default: what is free)"
    )


def memory_of(options: argparse.Namespace) -> int:
    """Return the bytes that `--memory` gives, 0 without it."""
    from minicpm.train.plan import parse_bytes

    return parse_bytes(options.memory) if options.memory else 0


def show_plan(plan: Plan, done_tokens: int = 0) -> None:
    """Write the plan's table and its lines of text, for what is left after `done_tokens`."""
    from minicpm.train.log import duration
    from minicpm.train.plan import size

    out(component_table(plan))
    layers = "compiled" if plan.is_compiled else "uncompiled"
    left = plan.total_tokens - done_tokens
    out(f"{left:,} tokens{' to go' if done_tokens else ''}, {plan.micro_sequences} rows at once, layers {layers}")
    if plan.seconds:
        seconds = plan.seconds * left / plan.total_tokens
        out(f"about {plan.tokens_per_second:,.0f} tokens a second on this machine: {duration(seconds)}")
    out(f"each checkpoint takes {size(plan.checkpoint_bytes)}")


def component_table(plan: Plan) -> str:
    """Return the table of a plan's bytes."""
    from minicpm.train.plan import size

    rows = [[name, size(count)] for name, count in plan.components.items()]
    return table(["memory", "bytes"], [*rows, ["together", size(plan.total_bytes)]], right=[1])


def resuming(arguments: Sequence[str]) -> str:
    """Return the command that goes on with what was begun with `arguments`."""
    return shlex.join(["minicpm", *arguments, *([] if "--resume" in arguments else ["--resume"])])


def run_to_end(ready: PretrainReady) -> None:
    """Train, say how it ended, and name the next command.

    Raises:
        SystemExit: 130 or 143 after an interruption that was saved.
    """
    from minicpm.train.pretrain import pretrain

    show_plan(ready.plan, ready.config.batch.tokens_through(ready.start.step))
    if ready.start.manifest is not None:
        losses = ready.start.manifest.losses
        note(f"going on after step {ready.start.step} of {ready.start.folder} (loss {losses.get('train', 0):.4f})")
    if not ready.corpus.heldout:
        note("no held-out text beside the shards: nothing is measured on unseen text")
    end, code = pretrain(ready, note)
    if code:
        note(f"saved step {end.step} and stopped, as asked")
        note(f"go on with: {resuming(sys.argv[1:])}")
        raise SystemExit(code)
    loss = f", loss {end.last.loss:.4f}" if end.last else ""
    out(f"done: step {end.step}{loss}; {ready.run}")
    suggest(f'minicpm generate {ready.run}/step_{end.step:06d} "def "')
