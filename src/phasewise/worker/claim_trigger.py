"""When a worker asks the server for work. Runs in the worker's process.

On the event of a scheduling, and when slots of a limit become free.
It also polls, slowly, by Prefect's own clock: that is the fallback, and not done here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

#: Seconds between two questions for work, so that runs that end one by one are not a question each.
_ASK_SECONDS = 0.15
#: Seconds at most in which slots that a fan-out frees are gathered for one question: ten times what the last one took,
#: so that a busy server does not spend its time on being asked.
_GATHER_SECONDS = 1.0


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
