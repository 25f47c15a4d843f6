from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from phasewise.worker import claim_trigger
from phasewise.worker.claim_trigger import Questions


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
    monkeypatch.setattr(claim_trigger, "_GATHER_SECONDS", 0.01)
    monkeypatch.setattr(claim_trigger, "_ASK_SECONDS", 0)
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
    monkeypatch.setattr(claim_trigger.asyncio, "sleep", lambda _: sleep(0))
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
