"""`FairQueue`: sequences that wait, and whose turn it is.

Whoever has the fewest running comes next: first among clients, then among the requests of that client; of equals the
one that has waited for its turn longest. So what one asks for, however much, delays another by one turn, not by all of
it. Sequences of one request keep their order.
Left out: whether there is room for the next one (`scheduler.py`).
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterator

from minicpm.engine.sequence import Owner, Sequence


class FairQueue:
    """The waiting sequences of one engine, and how many of each owner run. Not thread-safe."""

    def __init__(self) -> None:
        # Clients, and requests of each, that have something waiting, in the order of their last turn.
        self._waiting: OrderedDict[Hashable, OrderedDict[Owner, deque[Sequence]]] = OrderedDict()
        # Of clients and of owners.
        self._num_running: Counter[Hashable] = Counter()
        self._size = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, client by client."""
        return (sequence for requests in self._waiting.values() for line in requests.values() for sequence in line)

    def push(self, sequence: Sequence) -> None:
        """Let `sequence` wait behind those of its request."""
        self._line(sequence).append(sequence)
        self._count(sequence, 1)

    def put_back(self, sequence: Sequence) -> None:
        """Let a running `sequence` wait again, before those of its request."""
        self.stop(sequence)
        self._line(sequence).appendleft(sequence)
        self._count(sequence, 1)

    def remove(self, sequence: Sequence) -> bool:
        """Forget `sequence`; whether it waited."""
        requests = self._waiting.get(sequence.owner.client)
        line = requests.get(sequence.owner) if requests else None
        if line is None or sequence not in line:
            return False
        line.remove(sequence)
        self._drop(sequence)
        return True

    @property
    def next(self) -> Sequence | None:
        """The sequence whose turn it is."""
        if not self._waiting:
            return None
        running = self._num_running
        requests = self._waiting[min(self._waiting, key=running.__getitem__)]
        return requests[min(requests, key=running.__getitem__)][0]

    def start(self, sequence: Sequence) -> None:
        """Let `next` run; the others of its client and request go behind everyone else's."""
        client, owner = sequence.owner.client, sequence.owner
        self._waiting[client].move_to_end(owner)
        self._waiting.move_to_end(client)
        self._line(sequence).popleft()
        self._drop(sequence)
        self._num_running.update((client, owner))

    def stop(self, sequence: Sequence) -> None:
        """Note that `sequence` no longer runs."""
        self._num_running -= Counter((sequence.owner.client, sequence.owner))

    def debtor(self, running: list[Sequence]) -> Sequence | None:
        """The one of `running` that ought to make room for `next`, or None: the last of whoever has two more running.

        With one more they would only change places.
        """
        sequence = self.next
        if sequence is None or not running:
            return None
        counts = self._num_running
        latest = running[::-1]
        client = max((s.owner.client for s in latest), key=counts.__getitem__)
        if counts[client] < counts[sequence.owner.client] + 2:
            client = sequence.owner.client
        owners = [s.owner for s in latest if s.owner.client == client]
        owner = max(owners, key=counts.__getitem__, default=sequence.owner)
        if client == sequence.owner.client and counts[owner] < counts[sequence.owner] + 2:
            return None
        return next(s for s in latest if s.owner == owner)

    def _line(self, sequence: Sequence) -> deque[Sequence]:
        owner = sequence.owner
        return self._waiting.setdefault(owner.client, OrderedDict()).setdefault(owner, deque())

    def _count(self, sequence: Sequence, change: int) -> None:
        self._size += change
        self.num_tokens += change * len(sequence.token_ids)

    def _drop(self, sequence: Sequence) -> None:
        """Count out `sequence`, which was taken from its line, and forget lines with nothing in them."""
        self._count(sequence, -1)
        requests = self._waiting[sequence.owner.client]
        if not requests[sequence.owner]:
            del requests[sequence.owner]
        if not requests:
            del self._waiting[sequence.owner.client]
