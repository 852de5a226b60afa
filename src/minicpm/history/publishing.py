"""Publishing a run: copied to where others read it, looked at from their side, with a card that says what it is.

What this leaves out: the copying (`transfer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minicpm.errors import CheckpointError
from minicpm.history.card import write_card
from minicpm.history.catalogue import Precision
from minicpm.history.destination import Destination
from minicpm.history.place import MissingFileError
from minicpm.history.reading import History
from minicpm.history.transfer import Report, copy
from minicpm.history.verification import verify

CARD = "README.md"


def publish(
    source: History,
    destination: Destination,
    steps: Sequence[int],
    name: str,
    *,
    precision: Precision = "exact",
    licence: str = "",
    on_progress: Report = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Make `destination` hold the checkpoints `steps` of `source`, verified, under a card; return the bytes sent.

    Args:
        source: the run's history.
        destination: a folder for any static server, or a store.
        steps: which; those of earlier calls stay.
        name: what the card calls the run.
        precision: "base" keeps the refinements back.
        licence: for the card, as the hub names licences; empty is unknown.
        on_progress: told (source, bytes done, bytes in all).
        say: told what is being done after that.

    Raises:
        CheckpointError: see `transfer.copy`; or what was published is not what was sent.
    """
    sent = copy(source, destination, steps, precision, on_progress, is_published=True)
    say(f"reading {destination.place.name} back")
    published = History(destination.place)
    problems = verify(published, is_deep=False, steps=set(steps))
    if problems:
        raise CheckpointError(
            f"{destination.place.name} is not what was sent, {len(problems)} problems: {problems[0].text}; remove what "
            "is damaged there, and publish again"
        )
    card = write_card(published, name, licence).encode()
    if card != _read(destination, CARD):
        destination.write(CARD, card)
    return sent


def _read(destination: Destination, path: str) -> bytes:
    try:
        return destination.place.read(path)
    except MissingFileError:
        return b""
