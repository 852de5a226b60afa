"""`minicpm history VERB`: every checkpoint of a run, to list, see, check, compare, draw, copy, thin and bring in."""

from __future__ import annotations

import argparse

from minicpm.cli import history_average as averaging
from minicpm.cli import history_eval as evaluating
from minicpm.cli import history_page as page
from minicpm.cli import history_publishing as publishing
from minicpm.cli import history_reading as reading
from minicpm.cli import history_study as study
from minicpm.cli import history_writing as writing
from minicpm.cli.group import Group


def parser() -> Group:
    """Return the parser of this verb."""
    group = Group("history", "Look into the checkpoints of a run: RUN is its folder, its folder `history`, or a URL.")
    group.add("ls", reading.ls_parser(), reading.ls)
    group.add("show", reading.show_parser(), reading.show)
    group.add("serve", page.serve_parser(), page.serve)
    group.add("get", writing.get_parser(), writing.get)
    group.add("verify", reading.verify_parser(), reading.verify)
    group.add("lineage", reading.lineage_parser(), reading.lineage)
    group.add("diff", reading.diff_parser(), reading.diff)
    group.add("plot", study.plot_parser(), study.plot)
    group.add("average", averaging.average_parser(), averaging.average)
    group.add("eval", evaluating.eval_parser(), evaluating.evaluate)
    group.add("data", study.data_parser(), study.data)
    group.add("thin", writing.thin_parser(), writing.thin)
    group.add("publish", publishing.publish_parser(), publishing.publish)
    group.add("pull", writing.pull_parser(), writing.pull)
    group.add("import", writing.import_parser(), writing.import_)
    return group


def run(options: argparse.Namespace) -> None:
    """Run the chosen verb."""
    options.run(options)
