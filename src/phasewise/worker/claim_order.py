"""Which worker of a pool goes first for a flow run. Runs in the worker's process.

All workers of a pool hear of every run at once and would all try to claim it: the server refuses all but one, after
having done most of the work of a claim for each. So each run has one worker that claims it at once, the same in the
eyes of all. The others leave it alone for a moment, and try only when it is still there then: a worker that is full,
busy or gone costs that moment and nothing else. The server decides as before; this only says who asks first.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection
from uuid import UUID

#: Seconds that a worker leaves a run to the one whose turn it is.
LEAVE_SECONDS = 1.0


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
