"""Who runs when, held by invariants under random load; no decoder is needed for that."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicpm.engine.cache import BlockPool
from minicpm.engine.scheduler import Limits, QueueFullError, Scheduler
from minicpm.engine.sequence import Owner, Request, Sequence
from minicpm.engine.sharing import publish
from minicpm.engine.stopping import Ending

BLOCK = 4


def sequence_of(prompt: list[int], *, owner: Owner | None = None, **options: Any) -> Sequence:
    ending = Ending(None, end_ids=frozenset(), stops=(), max_new_tokens=100)
    request = Request(prompt, **options)
    return Sequence(request, owner, ending=ending, max_new_tokens=100, vocab_size=1000)


def scheduler_of(num_blocks: int = 64, **limits: int) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, BLOCK), Limits(**limits))


class Contents:
    """What a decoder's blocks would hold: the tokens whose keys and values were written at each place."""

    def __init__(self, num_blocks: int) -> None:
        self.places: list[list[int | None]] = [[None] * BLOCK for _ in range(num_blocks)]
        self.num_copies = 0

    def copy(self, source: int, target: int) -> None:
        self.places[target] = list(self.places[source])
        self.num_copies += 1

    def write(self, sequence: Sequence, num_tokens: int) -> None:
        for place in range(sequence.num_computed, sequence.num_computed + num_tokens):
            self.places[sequence.blocks[place // BLOCK]][place % BLOCK] = sequence.token_ids[place]

    def check(self, sequence: Sequence) -> None:
        """What `sequence` relies on is there."""
        held = [token for block in sequence.blocks for token in self.places[block]]
        assert held[: sequence.num_computed] == sequence.token_ids[: sequence.num_computed]


def run_step(scheduler: Scheduler, contents: Contents | None = None) -> dict[Sequence, int]:
    """Plan a step and write it into the books as the engine does; sequences whose tokens are all read get one more."""
    plan = {chunk.sequence: chunk.num_tokens for chunk in scheduler.plan()}
    for sequence, num_tokens in plan.items():
        assert 1 <= num_tokens <= sequence.num_pending
        assert len(sequence.blocks) * BLOCK >= sequence.num_computed + num_tokens
        if contents:
            contents.check(sequence)
            contents.write(sequence, num_tokens)
        sequence.num_computed += num_tokens
        publish(sequence, scheduler.pool)
        if not sequence.num_pending:
            sequence.token_ids.append(len(sequence.token_ids))
    return plan


def numbers(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def test_generating_sequences_get_one_token_each_and_prompts_the_mixed_budget() -> None:
    scheduler = scheduler_of(max_step_tokens=32, max_mixed_tokens=6)
    first, second, third = (sequence_of(numbers(n, 100 * n)) for n in (5, 20, 21))
    scheduler.add(first)
    assert run_step(scheduler) == {first: 5}
    scheduler.add(second)
    scheduler.add(third)
    assert run_step(scheduler) == {first: 1, second: 3, third: 3}


def test_prompts_are_read_in_order_but_a_long_one_leaves_half_of_the_room() -> None:
    scheduler = scheduler_of(max_step_tokens=32)
    long, short, shorter = (sequence_of(numbers(n, 100 * n)) for n in (100, 10, 3))
    for sequence in (long, short, shorter):
        scheduler.add(sequence)
    assert run_step(scheduler) == {long: 16, short: 10, shorter: 3}
    scheduler.remove(short)
    scheduler.remove(shorter)
    assert run_step(scheduler) == {long: 32}


def test_no_more_run_than_may() -> None:
    scheduler = scheduler_of(max_parallel=2)
    sequences = [sequence_of(numbers(3, 10 * i)) for i in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    assert set(run_step(scheduler)) == set(sequences[:2])
    scheduler.remove(sequences[0])
    assert set(run_step(scheduler)) == set(sequences[1:])


def test_a_common_beginning_is_computed_once() -> None:
    scheduler = scheduler_of(max_step_tokens=64)
    common = numbers(10)
    one, other, different = sequence_of([*common, 50]), sequence_of([*common, 60]), sequence_of(numbers(6, 200))
    for sequence in (one, other, different):
        scheduler.add(sequence)
    assert run_step(scheduler) == {one: 11, different: 6}
    assert run_step(scheduler) == {one: 1, different: 1, other: 3}
    assert other.blocks[:2] == one.blocks[:2]
    assert (one.num_cached_tokens, other.num_cached_tokens) == (0, 8)


def sharing_scheduler(num_blocks: int = 64, **limits: int) -> tuple[Scheduler, Contents]:
    contents = Contents(num_blocks)
    return Scheduler(BlockPool(num_blocks, BLOCK), Limits(**limits), contents.copy), contents


@pytest.fixture
def parts_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of four positions would have no part that is worth a copy."""
    monkeypatch.setattr("minicpm.engine.sharing._LEAST_COPIED", 1)


@pytest.mark.usefixtures("parts_of_one_token")
def test_the_beginning_of_a_block_is_copied() -> None:
    scheduler, contents = sharing_scheduler()
    first = sequence_of([*numbers(7), 50, 51])
    scheduler.add(first)
    assert run_step(scheduler, contents) == {first: 9}
    # In the middle of a full block, of one being filled, and after nothing that is known.
    inside, being_filled, other = (
        sequence_of(ids) for ids in ([*numbers(7), 60, 61], [*numbers(7), 50, 51, 62], [9, 10])
    )
    for sequence in (inside, being_filled, other):
        scheduler.add(sequence)
    assert run_step(scheduler, contents) == {first: 1, inside: 2, being_filled: 1, other: 2}
    assert [s.num_cached_tokens for s in (first, inside, being_filled, other)] == [0, 7, 9, 0]
    assert contents.num_copies == 2


@pytest.mark.usefixtures("parts_of_one_token")
def test_endings_of_one_context_wait_for_the_first_of_them() -> None:
    scheduler, contents = sharing_scheduler()
    context = numbers(6)
    endings = [sequence_of([*context, 50 + i], prompt_logprobs=0, first_scored=6) for i in range(3)]
    unlike = sequence_of([*numbers(3), *numbers(10, 70)])
    for sequence in (*endings, unlike):
        scheduler.add(sequence)
    # One that would gain little, three tokens of thirteen, does not wait.
    assert run_step(scheduler, contents) == {endings[0]: 7, unlike: 13}
    assert run_step(scheduler, contents) == {endings[0]: 1, unlike: 1, endings[1]: 2, endings[2]: 2}


@pytest.mark.usefixtures("parts_of_one_token")
def test_what_a_sequence_leaves_is_copied_until_its_space_is_needed() -> None:
    scheduler, contents = sharing_scheduler(num_blocks=4)
    for ids in (numbers(6), numbers(6), numbers(6)):
        scheduler.add(sequence_of(ids))
        run_step(scheduler, contents)
        scheduler.remove(scheduler.running[0])
    # Nothing is kept twice.
    assert scheduler.pool.num_kept == 2
    scheduler.add(sequence_of(numbers(14, 100)))
    run_step(scheduler, contents)
    scheduler.remove(scheduler.running[0])
    again = sequence_of(numbers(6))
    scheduler.add(again)
    assert run_step(scheduler, contents) == {again: 6}


def test_a_part_that_all_texts_have_is_not_copied() -> None:
    scheduler, contents = sharing_scheduler()
    for ids in ([1, 2, 3, 50], [1, 2, 3, 60]):
        scheduler.add(sequence_of(ids))
    assert set(run_step(scheduler, contents).values()) == {4}
    assert contents.num_copies == 0


def test_the_last_token_is_always_computed() -> None:
    scheduler = scheduler_of()
    one, same = sequence_of(numbers(8)), sequence_of(numbers(8))
    scheduler.add(one)
    run_step(scheduler)
    scheduler.remove(one)
    scheduler.add(same)
    assert run_step(scheduler) == {same: 4}


def test_a_request_that_reads_every_row_takes_nothing_from_the_cache() -> None:
    scheduler = scheduler_of(max_output_rows=6)
    one, scored = sequence_of(numbers(9)), sequence_of(numbers(9), prompt_logprobs=0)
    scheduler.add(one)
    run_step(scheduler)
    scheduler.add(scored)
    assert run_step(scheduler) == {one: 1, scored: 6}
    assert scored.num_cached_tokens == 0


def test_hidden_states_and_logits_take_turns() -> None:
    scheduler = scheduler_of(max_step_tokens=4)
    plain, hidden = sequence_of(numbers(12)), sequence_of(numbers(12, 50), pooling="mean")
    scheduler.add(plain)
    scheduler.add(hidden)
    kinds = [[s.wants_hidden for s in run_step(scheduler)] for _ in range(4)]
    assert kinds == [[True], [False], [True], [False]]


def test_when_blocks_run_out_the_last_to_come_makes_room_and_is_first_to_return() -> None:
    scheduler = scheduler_of(num_blocks=6)
    old, young, waiting = (sequence_of(numbers(8, 20 * i)) for i in range(3))
    for sequence in (old, young, waiting):
        scheduler.add(sequence)
    run_step(scheduler)
    assert scheduler.running == [old, young]
    for _ in range(8):
        run_step(scheduler)
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [young, waiting]
    assert young.num_preemptions == 1
    assert old.num_preemptions == 0
    scheduler.remove(old)
    run_step(scheduler)
    assert scheduler.running[0] is young


def test_the_queue_is_bounded_by_requests_and_by_tokens() -> None:
    scheduler = scheduler_of(max_waiting=2, max_waiting_tokens=10)
    scheduler.add(sequence_of(numbers(6)))
    with pytest.raises(QueueFullError, match="6 tokens wait already and 5 more would pass the limit of 10"):
        scheduler.add(sequence_of(numbers(5)))
    last = sequence_of(numbers(4))
    scheduler.add(last)
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        scheduler.add(sequence_of([1]))
    scheduler.remove(last)
    scheduler.add(sequence_of([1]))


def many(count: int, owner: Owner, start: int) -> list[Sequence]:
    return [sequence_of(numbers(6, start + 10 * i), owner=owner) for i in range(count)]


def test_a_small_request_does_not_wait_for_all_of_an_earlier_big_one() -> None:
    scheduler = scheduler_of(max_parallel=4)
    big, small, smaller = many(9, Owner("a", 1), 0), many(2, Owner("a", 2), 200), many(1, Owner("a", 3), 300)
    for sequence in big:
        scheduler.add(sequence)
    run_step(scheduler)
    assert scheduler.running == big[:4]
    for sequence in (*small, *smaller):
        scheduler.add(sequence)
    # The last of the big one make room, one for each who has less, until all have as good as the same.
    run_step(scheduler)
    assert scheduler.running == [big[0], big[1], small[0], smaller[0]]
    assert [s.num_preemptions for s in big[:4]] == [0, 0, 1, 1]
    for _ in range(5):
        run_step(scheduler)
    assert scheduler.num_preemptions == 2
    # Those who made room come before the rest of their request, and what they had computed is still there.
    scheduler.remove(smaller[0])
    run_step(scheduler)
    assert scheduler.running[-1] is small[1]
    for sequence in small:
        scheduler.remove(sequence)
    run_step(scheduler)
    assert scheduler.running == big[:4]
    assert scheduler.num_preemptions == 2


def test_one_at_a_time_requests_take_turns() -> None:
    scheduler = scheduler_of(max_parallel=1)
    big, small, last = many(3, Owner("a", 1), 0), many(2, Owner("a", 2), 100), many(1, Owner("a", 3), 200)
    for sequence in (*big, *small, *last):
        scheduler.add(sequence)
    order = []
    while scheduler.has_work:
        run_step(scheduler)
        order.append(scheduler.running[0])
        scheduler.remove(order[-1])
    assert order == [big[0], small[0], last[0], big[1], small[1], big[2]]


def test_a_client_with_many_requests_counts_as_one() -> None:
    scheduler = scheduler_of(max_parallel=4)
    busy = [many(1, Owner("busy", i), 10 * i)[0] for i in range(8)]
    for sequence in busy:
        scheduler.add(sequence)
    run_step(scheduler)
    others = many(3, Owner("other", 0), 500)
    for sequence in others:
        scheduler.add(sequence)
    run_step(scheduler)
    assert set(scheduler.running) == {*busy[:2], *others[:2]}
    scheduler.remove(others[0])
    run_step(scheduler)
    assert set(scheduler.running) == {*busy[:2], *others[1:]}


def test_the_first_prompt_of_each_request_is_read_before_the_second_of_any() -> None:
    scheduler = scheduler_of(num_blocks=128, max_step_tokens=16)
    long = [sequence_of(numbers(100, 200 * i), owner=Owner("a", 1)) for i in range(3)]
    short = sequence_of(numbers(4, 900), owner=Owner("a", 2))
    for sequence in (*long, short):
        scheduler.add(sequence)
    plan = run_step(scheduler)
    assert list(plan)[:2] == [long[0], short]
    assert plan[short] == 4


@pytest.mark.usefixtures("parts_of_one_token")
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_everything_finishes_and_nothing_is_lost(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(5, 12))
    limits = Limits(
        max_parallel=data.draw(st.integers(1, 5)),
        max_step_tokens=data.draw(st.integers(1, 20)),
        max_mixed_tokens=data.draw(st.integers(1, 8)),
        max_output_rows=data.draw(st.integers(1, 8)),
    )
    contents = Contents(num_blocks)
    scheduler = Scheduler(BlockPool(num_blocks, BLOCK), limits, data.draw(st.sampled_from([None, contents.copy])))
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6), st.booleans()), max_size=8))
    # Prompts that begin alike, so that sharing, waiting for each other and preemption all meet.
    owners = st.builds(Owner, st.integers(0, 1), st.integers(0, 1))
    goals = {
        sequence_of(
            [*numbers(n), *[50 + i] * (n % 4)], owner=data.draw(owners), prompt_logprobs=0 if scored else None
        ): n + n % 4 + new
        for i, (n, new, scored) in enumerate(lengths)
    }
    for sequence in goals:
        scheduler.add(sequence)
    for _ in range(2000):
        if not scheduler.has_work:
            break
        plan = run_step(scheduler, contents)
        assert plan
        held = [block for sequence in scheduler.running for block in sequence.blocks]
        assert scheduler.pool.num_held == len(set(held))
        for sequence in scheduler.running:
            contents.check(sequence)
        assert len({s.slot for s in scheduler.running}) == len(scheduler.running) <= limits.max_parallel
        prompt_tokens = sum(n for n in plan.values() if n > 1)
        assert prompt_tokens <= limits.max_step_tokens
        for sequence in plan:
            sequence.num_read = max(sequence.num_read, sequence.num_computed) if sequence.reads_every_row else 0
            if len(sequence.token_ids) >= goals[sequence]:
                scheduler.remove(sequence)
    assert not scheduler.has_work
    assert scheduler.pool.num_held == 0
    assert (len(scheduler.waiting), scheduler.waiting.num_tokens) == (0, 0)
    assert not any(scheduler.waiting._num_running.values())
