"""Reads of the server that flow runs which start together share. Runs in the worker's process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar
from uuid import UUID

from pydantic import BaseModel

T = TypeVar("T", bound=BaseModel)


class Reads:
    """What was read lately. Who asks for what is being read gets the same answer; a failure is not kept."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: Function and its argument → the answer, and until when it holds.
        self._answers: dict[tuple[object, UUID], tuple[asyncio.Future[BaseModel], float]] = {}

    def begin(self) -> None:
        """Read again from here on, except what was said to hold longer."""
        now = self._clock()
        self._answers = {key: answer for key, answer in self._answers.items() if answer[1] > now}

    async def share(self, read: Callable[[UUID], Awaitable[T]], id_: UUID, *, seconds: float = 0) -> T:
        """Return ``read(id_)``, or what it returned since ``begin``; or within *seconds*, also before it."""
        key = (read, id_)
        if key not in self._answers:
            self._answers[key] = (asyncio.ensure_future(read(id_)), self._clock() + seconds)
        answer = self._answers[key][0]
        try:
            found = await asyncio.shield(answer)
        except Exception:
            if self._answers.get(key, (None,))[0] is answer:
                del self._answers[key]
            raise
        copy: T = found.model_copy(deep=True)  # type: ignore[assignment] # Prefect merges a run's variables into what it got
        return copy
