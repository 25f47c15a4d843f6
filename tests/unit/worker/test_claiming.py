from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from uuid import UUID, uuid4

import pytest

from phasewise.worker import claiming
from phasewise.worker.claiming import LEAVE_SECONDS, Questions, Turns, first_of

WORKERS = ("one", "two", "three")


class Asked:
    """What a worker asks: each question is noted, and fails as long as *failures* says."""

    def __init__(self, *, failures: int = 0) -> None:
        self.count = 0
        self._failures = failures
        self._answered = asyncio.Queue[None]()

    async def __call__(self) -> None:
        self.count += 1
        if self.count <= self._failures:
            raise ConnectionError("the server is away")
        self._answered.put_nowait(None)

    async def answered(self) -> None:
        async with asyncio.timeout(10):
            await self._answered.get()


def create_questions(ask: Callable[[], Awaitable[object]]) -> Questions:
    return Questions(ask, logger=logging.getLogger("test"))


async def test_slots_that_a_fan_out_frees_are_gathered_for_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "_GATHER_SECONDS", 0.01)
    monkeypatch.setattr(claiming, "_ASK_SECONDS", 0)
    asked = Asked()
    one = create_questions(asked)
    one.may_have_more = True
    asking = asyncio.create_task(one.ask_when_wanted())

    for _ in range(3):
        one.slot_is_free(has_runs=True)
    assert not one._wanted.is_set()
    await asked.answered()
    assert asked.count == 1
    one.slot_is_free(has_runs=True)

    await asked.answered()  # and the next ones again
    asking.cancel()


async def test_a_slot_that_is_free_on_a_worker_without_runs_is_asked_for_at_once() -> None:
    one = create_questions(Asked())
    one.may_have_more = True

    one.slot_is_free(has_runs=False)

    assert one._wanted.is_set()


async def test_a_free_slot_is_no_reason_to_ask_when_nothing_waited_for_one() -> None:
    one = create_questions(Asked())

    one.slot_is_free(has_runs=False)

    assert not one._wanted.is_set()


async def test_a_worker_goes_on_asking_after_a_question_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = asyncio.sleep
    monkeypatch.setattr(claiming.asyncio, "sleep", lambda _: sleep(0))
    asked = Asked(failures=1)
    one = create_questions(asked)
    asking = asyncio.create_task(one.ask_when_wanted())

    one.something_is_new()
    while asked.count == 0:
        await sleep(0)
    one.something_is_new()

    await asked.answered()
    asking.cancel()


async def test_what_was_left_to_others_is_asked_for_once_more_however_often_it_was_left() -> None:
    asked = Asked()
    one = create_questions(asked)
    asking = asyncio.create_task(one.ask_when_wanted())

    await asyncio.gather(*(one.look_again(0.01) for _ in range(3)))
    await asked.answered()
    asking.cancel()

    assert asked.count == 1


def some_runs(count: int) -> list[UUID]:
    return [uuid4() for _ in range(count)]


def test_each_run_is_claimed_at_once_by_exactly_one_worker() -> None:
    runs = some_runs(90)

    chosen = [run for name in WORKERS for run in Turns(name).choose(runs, WORKERS)]

    assert sorted(chosen) == sorted(runs)


def test_runs_are_shared_about_evenly() -> None:
    runs = some_runs(900)

    shares = [sum(first_of(run, WORKERS) == name for run in runs) for name in WORKERS]

    assert min(shares) > 200


def test_a_worker_that_knows_of_no_other_claims_everything() -> None:
    runs = some_runs(5)

    assert Turns("one").choose(runs, ()) == set(runs)


def test_a_run_that_its_worker_does_not_claim_is_claimed_by_another_a_moment_later() -> None:
    now = 100.0
    turns = Turns("one", clock=lambda: now)
    runs = some_runs(20)
    first = turns.choose(runs, WORKERS)
    assert turns.has_left

    now += LEAVE_SECONDS / 2
    assert turns.choose(runs, WORKERS) == first

    now += LEAVE_SECONDS / 2
    assert turns.choose(runs, WORKERS) == set(runs)


def test_a_run_that_comes_back_later_is_left_again() -> None:
    now = 100.0
    turns = Turns("one", clock=lambda: now)
    [run] = [run for run in some_runs(20) if first_of(run, WORKERS) != "one"][:1]
    turns.choose([run], WORKERS)
    turns.choose([], WORKERS)

    now += 2 * LEAVE_SECONDS

    assert turns.choose([run], WORKERS) == set()


def test_when_a_worker_goes_only_its_runs_change_hands() -> None:
    for run in some_runs(50):
        before = first_of(run, WORKERS)
        assert before == "three" or first_of(run, ("one", "two")) == before
