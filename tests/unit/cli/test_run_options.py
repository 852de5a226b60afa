"""The command that goes on with an interrupted run is the one that began it."""

from __future__ import annotations

from minicpm.cli.run_options import resuming


def test_resuming_repeats_the_command() -> None:
    begun = ["decay", "my runs/nano@300", "--steps", "40"]
    assert resuming(begun) == "minicpm decay 'my runs/nano@300' --steps 40 --resume"
    assert resuming([*begun, "--resume"]) == resuming(begun)
