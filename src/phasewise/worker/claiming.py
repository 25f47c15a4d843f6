"""When a worker asks the server for work, and which worker of a pool goes first. Runs in the worker's process.

It asks on the event of a scheduling, and when slots of a limit become free.
It also polls, slowly, by Prefect's own clock: that is the fallback, and not done here.

All workers of a pool hear of every run at once and would all try to claim it: the server refuses all but one, after
having done most of the work of a claim for each. So each run has one worker that claims it at once, the same in the
eyes of all. The others leave it alone for a moment, and try only when it is still there then: a worker that is full,
busy or gone costs that moment and nothing else. The server decides as before; this only says who asks first.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from uuid import UUID

#: Seconds between two questions for work, so that runs that end one by one are not a question each.
_ASK_SECONDS = 0.15
#: Seconds at most in which slots that a fan-out frees are gathered for one question: ten times what the last one took,
#: so that a busy server does not spend its time on being asked.
_GATHER_SECONDS = 1.0
#: Seconds that a worker leaves a run to the one whose turn it is.
LEAVE_SECONDS = 1.0


class Questions:
    """The questions of one worker; *ask* puts one, and takes what the server answers."""

    def __init__(
        self, ask: Callable[[], Awaitable[object]], *, logger: logging.Logger | logging.LoggerAdapter[logging.Logger]
    ) -> None:
        self._ask = ask
        self._logger = logger
        self._wanted = asyncio.Event()
        self._gathering: asyncio.TimerHandle | None = None
        self._is_looking_again = False
        #: Something may wait for a slot, so that one that is freed is a reason to ask.
        self.may_have_more = False
        #: Seconds that the last question took.
        self.seconds = 0.0

    async def ask_when_wanted(self) -> None:
        """Ask, for ever, as soon as there is a reason to."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._ask()
            except Exception as exc:  # noqa: BLE001 - the poll, which is the fallback, has the error handling
                self._logger.warning("Could not ask for new flow runs: %s", exc)
                await asyncio.sleep(1)
            await asyncio.sleep(_ASK_SECONDS)

    def something_is_new(self) -> None:
        """Note that a run was scheduled, or may have been."""
        self.may_have_more = True
        self._wanted.set()

    def slot_is_free(self, *, has_runs: bool) -> None:
        """Note that a run ended, of whichever worker; *has_runs* tells whether this one still has some."""
        # On a worker that has nothing to do, asking after every run that ends would be a read a run for nothing.
        if not self.may_have_more or self._gathering is not None:
            return
        if has_runs:  # of a fan-out, others are about to end
            pause = min(max(_ASK_SECONDS, 10 * self.seconds), _GATHER_SECONDS)
            self._gathering = asyncio.get_running_loop().call_later(pause, self._ask_for_gathered)
        else:
            self._wanted.set()

    def _ask_for_gathered(self) -> None:
        self._gathering = None
        self._wanted.set()

    async def look_again(self, after_seconds: float) -> None:
        """Ask once more when the worker whose turn it was must have claimed what was left to it."""
        if not self._is_looking_again:
            self._is_looking_again = True
            await asyncio.sleep(after_seconds)
            self._is_looking_again = False
            self.something_is_new()


class Turns:
    """The turns of the worker *name*."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        #: Run → when it was first seen and left to another.
        self._left: dict[UUID, float] = {}

    def choose(self, run_ids: Collection[UUID], workers: Collection[str]) -> set[UUID]:
        """Return those of *run_ids*, all that may be claimed now, that this worker claims; *workers* are the living."""
        now = self._clock()
        others = [run_id for run_id in run_ids if first_of(run_id, {*workers, self._name}) != self._name]
        self._left = {run_id: self._left.get(run_id, now) for run_id in others}
        waiting = {run_id for run_id, since in self._left.items() if now < since + LEAVE_SECONDS}
        return {run_id for run_id in run_ids if run_id not in waiting}

    @property
    def has_left(self) -> bool:
        """Tell whether the last choice left a run to another worker."""
        return bool(self._left)


def first_of(run_id: UUID, workers: Collection[str]) -> str:
    """Return the worker that goes first for a run; when one comes or goes, few runs change hands."""
    return max(workers, key=lambda name: hashlib.blake2b(f"{name}/{run_id}".encode(), digest_size=8).digest())
