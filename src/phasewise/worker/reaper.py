"""Cancel what is below a run that ended, and end runs whose worker died. Runs in the worker's process.

Every worker runs one. They do the same work and do not know of each other: each step is safe to do twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.objects import FlowRun, State, StateType, Worker
from prefect.events import Event
from prefect.exceptions import Abort, ObjectNotFound, Pause
from prefect.logging import get_logger
from prefect.states import AwaitingRetry, Cancelled, Crashed
from prefect.utilities.engine import propose_state

from phasewise.orchestration.batches import PROCESS_LABEL, read_main_runs
from phasewise.orchestration.cancel import CANCELLED_FROM_ABOVE, cancel_below
from phasewise.orchestration.run_reads import of_types, read_pages, read_runs
from phasewise.system.processes import is_process_gone

_LABEL = "prefect.worker.name"
#: Seconds between two looks at the heartbeats of the other workers.
_LOOK_SECONDS = 3.0
#: Seconds between two looks at the runs that are claimed and not begun, or being cancelled.
_STUCK_SECONDS = 15.0
#: Seconds in which events are gathered, so that a burst of them costs one read.
_GATHER_SECONDS = 0.03
#: Seconds that the worker which has a run in hand gets to end what is below it, before the others look after it.
_TURN_SECONDS = 0.5
#: Seconds that a flow run has to report its state when its worker ends without a drain.
END_SECONDS = 5.0
#: Seconds after which a claimed run that no worker put its name to was left by a worker that died.
_UNCLAIMED_SECONDS = 60.0
#: Seconds that a worker gets to put its name to a run that it has claimed.
_NAMING_SECONDS = 10.0


class Caretaker:
    """Runs in the worker *name* of the work pool *pool*.

    *own_runs* returns the ids of the runs it has in hand. *on_cancelling* is told each run that was asked to end, as
    soon as that is known: the event of it would come later.
    """

    def __init__(
        self,
        client: PrefectClient,
        *,
        pool: str,
        name: str,
        own_runs: Callable[[], Collection[UUID]],
        on_cancelling: Callable[[UUID], None],
        lost_after_seconds: float,
    ) -> None:
        self._client = client
        self._pool = pool
        self._name = name
        self._own_runs = own_runs
        self._on_cancelling = on_cancelling
        self._lost_after_seconds = lost_after_seconds
        self._silence = Silence()
        self._ended: asyncio.Queue[UUID] = asyncio.Queue()
        self._without_process: set[UUID] = set()
        #: Runs that nobody seemed to have in hand at the last look.
        self._stuck: set[UUID] = set()
        #: Names of the workers of the pool that were heard of lately.
        self.living: frozenset[str] = frozenset()
        self._logger = get_logger("phasewise.worker.reaper")

    def on_event(self, event: Event) -> None:
        """Note that a flow run ended in a way that must end what is below it, or was cancelled while it waited."""
        if must_cascade(event) or was_waiting(event):
            run_id = UUID(event.resource.id.removeprefix("prefect.flow-run."))
            # All workers hear of it. If all of them did the same at once, the server would be busy with that.
            delay = 0 if run_id in self._own_runs() else _TURN_SECONDS
            if was_waiting(event):
                self._without_process.add(run_id)
            asyncio.get_running_loop().call_later(delay, self._ended.put_nowait, run_id)

    async def cascade(self) -> None:
        """Cancel, for ever, what is below the runs that were noted."""
        while True:
            run_ids = {await self._ended.get()}
            await asyncio.sleep(_GATHER_SECONDS)
            while not self._ended.empty():
                run_ids.add(self._ended.get_nowait())
            try:
                await self._cancel_below(run_ids)
            except httpx.HTTPError as exc:
                self._logger.warning("Could not cancel what is below %d flow runs (%s); again.", len(run_ids), exc)
                await asyncio.sleep(1)
                for run_id in run_ids:
                    self._ended.put_nowait(run_id)

    async def _cancel_below(self, run_ids: Collection[UUID]) -> None:
        # After a reconnect the events of the last minute come again, and one that failed to be handled is tried again:
        # a run that was resumed meanwhile, and what it has started since, must not be ended by how it ended before.
        runs = await read_runs(self._client, run_ids)
        ended = [run.id for run in runs if run.state and (run.state.is_final() or run.state.is_cancelling())]
        await cancel_below(self._client, ended, on_asked=self._on_cancelling)
        for run in runs:
            if run.id in self._without_process and run.state and run.state.is_cancelling():
                with suppress(ObjectNotFound):  # deleted meanwhile
                    await self._client.set_flow_run_state(run.id, Cancelled(message="Cancelled before it ran again."))
        self._without_process -= set(run_ids)

    async def find_lost(self) -> None:
        """Look, for ever, for runs whose worker died: those of our own name at first, then those of the others."""
        is_first = True
        while True:
            try:
                await self._find_lost(is_first)
                await self._find_orphans()
                is_first = False
            except httpx.HTTPError as exc:
                self._logger.debug("Could not look for lost flow runs: %s", exc)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _find_lost(self, is_first: bool) -> None:
        workers = await self._client.read_workers_for_work_pool(self._pool)
        dead = find_dead(workers, self._name, self._silence, self._lost_after_seconds)
        self.living = frozenset(worker.name for worker in workers if worker.name not in dead)
        if is_first:
            # A worker that starts under our name again has none of the runs of the one before.
            dead[self._name] = "it was started again"
        running = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
        runs = await self._read(running) if dead or is_first else []
        own = self._own_runs()
        for run in runs:
            worker = str(run.labels.get(_LABEL, ""))
            if worker in dead and run.id not in own and (worker == self._name or not _is_just_claimed(run)):
                await self._give_up(run, f"Its worker {worker} died: {dead[worker]}.")

    async def find_stuck(self) -> None:
        """Look, for ever, for runs that are claimed, or being cancelled, and in nobody's hands."""
        while True:
            await asyncio.sleep(_STUCK_SECONDS)
            try:
                await self._find_stuck()
            except httpx.HTTPError as exc:
                self._logger.warning("Could not look for runs that are stuck (%s); again.", exc)

    async def _find_stuck(self) -> None:
        own = self._own_runs()  # before the read: what we end meanwhile has ended
        stuck: set[UUID] = set()
        for run in await self._read([StateType.PENDING, StateType.CANCELLING]):
            is_cancelling = run.state is not None and run.state.is_cancelling()
            if run.id in own:
                if is_cancelling:  # and the event of it was lost, or we would be at it
                    self._on_cancelling(run.id)
            elif reason := self._why_stuck(run, is_cancelling):
                stuck.add(run.id)
                # Not at the first look: the worker that has it may just be about to put its name to it.
                if run.id in self._stuck:
                    await self._give_up(run, reason)
        self._stuck = stuck

    def _why_stuck(self, run: FlowRun, is_cancelling: bool) -> str | None:
        """Say why *run*, which we have not in hand, is in nobody's hands; None when another worker may have it."""
        worker = run.labels.get(_LABEL)
        if worker == self._name and is_cancelling:
            return "Its process had ended before it was cancelled."
        if worker is None and _seconds_in_state(run) > _UNCLAIMED_SECONDS:
            return "Its worker died before it started."
        return None

    async def _find_orphans(self) -> None:
        """Crash the batches whose process, one of a user's on this machine, is gone: no worker watches those."""
        for run in await read_main_runs(self._client, [StateType.RUNNING, StateType.CANCELLING]):
            if _LABEL not in run.labels and is_process_gone(str(run.labels.get(PROCESS_LABEL, ""))):
                await self._give_up(run, "The process that ran it was killed.")
                # Its events do not name our work pool, so nobody hears of it.
                self._ended.put_nowait(run.id)

    async def _give_up(self, run: FlowRun, message: str) -> None:
        with suppress(ObjectNotFound):  # deleted meanwhile: that must not end the looks of a worker
            now = (await self._client.read_flow_run(run.id)).state
            # All workers find it at about the same time: what the first did, and came of it, must not be undone.
            if now and run.state and now.id == run.state.id:
                await self._end(run, message)

    async def _end(self, run: FlowRun, message: str) -> None:
        self._logger.warning("Flow run %s (%s) is lost. %s", run.name, run.id, message)
        state: State[Any]
        if run.state is not None and run.state.is_cancelling():
            state = Cancelled(message=message)
        elif run.state is not None and run.state.is_pending():
            # Nothing of it was done: whichever worker is there runs it, also where it has no parent that would.
            state = AwaitingRetry(message=message)
        else:
            state = Crashed(message=message)
        await self._client.set_flow_run_state(run.id, state)

    async def _read(self, types: Sequence[StateType]) -> list[FlowRun]:
        """Return the runs of the work pool whose state is of one of *types*."""
        of_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[self._pool]))
        return await read_pages(self._client.read_flow_runs, flow_run_filter=of_types(types), work_pool_filter=of_pool)


async def schedule_again(client: PrefectClient, flow_run_id: UUID) -> None:
    """Schedule a flow run again whose process has ended, unless it has come to its own end."""
    state = (await client.read_flow_run(flow_run_id)).state
    if state is None or not state.is_final():
        with suppress(Abort, Pause):
            await propose_state(client, AwaitingRetry(), flow_run_id=flow_run_id)


def must_cascade(event: Event) -> bool:
    """Tell whether what is below the event's flow run must end.

    Cancelling goes down from wherever it begins. A run that failed or crashed ends what is below it only when it has
    no parent: otherwise its parent decides, and may run it again.
    """
    state = event.event.removeprefix("prefect.flow-run.")
    if state == "Cancelling":
        message = (event.payload.get("validated_state") or {}).get("message")
        return bool(message != CANCELLED_FROM_ABOVE)  # whoever wrote that has seen to all levels
    if state == "Cancelled":
        return True  # it may have started children after its children were cancelled
    has_parent = any(resource.id.startswith("prefect.task-run.") for resource in event.related)
    return state in ("Failed", "Crashed", "TimedOut") and not has_parent


def was_waiting(event: Event) -> bool:
    """Tell whether the event's flow run was cancelled while it waited to be run again.

    The server ends one that never ran by itself. One that did might still have a process, as far as it knows, and is
    left in Cancelling.
    """
    before = (event.payload.get("initial_state") or {}).get("type")
    return event.event == "prefect.flow-run.Cancelling" and before == "SCHEDULED"


class Silence:
    """Measures for how long another worker has been silent, on a clock that stands still when nobody could be heard.

    That clock is our own heartbeats, as the server got them. When more than *outage_seconds* pass between two looks of
    ours at them, the machine or the server stood still. Then nobody counts as silent until half as long again has
    passed, at most *return_seconds*: clients that lost the server ask it again after pauses that double.
    """

    def __init__(self, *, outage_seconds: float = 8.0, return_seconds: float = 45.0) -> None:
        self._outage_seconds = outage_seconds
        self._return_seconds = return_seconds
        self._looked_at: float | None = None
        self._returning_until = float("-inf")
        self._own_beat = self._counts_from = datetime.min.replace(tzinfo=UTC)

    def note(self, own_beat: datetime, now: float) -> None:
        """Note what our last heartbeat was when we looked at *now*, in seconds of whatever clock."""
        # What was before our first look is not known.
        pause = float("inf") if self._looked_at is None else now - self._looked_at
        if pause > self._outage_seconds:
            self._returning_until = now if self._looked_at is None else now + min(1.5 * pause, self._return_seconds)
        if now <= self._returning_until:
            self._counts_from = own_beat
        self._own_beat, self._looked_at = own_beat, now

    def measure(self, last_beat: datetime) -> float:
        """Return the seconds of silence since *last_beat* of another worker."""
        return max((self._own_beat - max(last_beat, self._counts_from)).total_seconds(), 0.0)


def find_dead(workers: Sequence[Worker], own_name: str, silence: Silence, lost_after_seconds: float) -> dict[str, str]:
    """Return worker name → reason for those that are not heard of any more."""
    beats = {worker.name: worker.last_heartbeat_time for worker in workers}
    if (own := beats.pop(own_name, None)) is None:
        return {}
    silence.note(own, time.monotonic())
    dead: dict[str, str] = {}
    for worker in workers:
        if (last := beats.get(worker.name)) is None:
            continue
        seconds = silence.measure(last)
        # A worker that beats slowly (stock ones every 30 s) is given three of its own beats.
        if seconds > max(lost_after_seconds, 3 * (worker.heartbeat_interval_seconds or 0)):
            dead[worker.name] = f"no heartbeat for {seconds:.0f} s"
    return dead


def _is_just_claimed(run: FlowRun) -> bool:
    """Tell whether the worker that the run names may be that of an attempt before: a new one comes after Pending."""
    return run.state is not None and run.state.is_pending() and _seconds_in_state(run) < _NAMING_SECONDS


def _seconds_in_state(run: FlowRun) -> float:
    return 0.0 if run.state is None else (datetime.now(UTC) - run.state.timestamp).total_seconds()
