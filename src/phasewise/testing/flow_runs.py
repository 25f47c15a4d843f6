"""For tests, ours and those of projects built on Phasewise: flow runs in memory, without a server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from phasewise.errors import DeploymentMissing
from phasewise.orchestration.flow_runs import RunRequest
from phasewise.outcomes import StepOutcome

#: A flow's body: gets the parameters, returns the summary; whatever it raises makes the run Failed.
Body = Callable[..., Awaitable[Mapping[str, Any] | None]]


class ProcessDied(Exception):
    """Raised by a body: its flow run ends Crashed, as if its process had been killed."""


@dataclass
class MemoryRun:
    """One flow run of ``MemoryFlowRuns``."""

    request: RunRequest
    run_id: str
    attempts: int = 0
    outcome: StepOutcome | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    is_final: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def conclude(self, state: str, **details: Any) -> StepOutcome:
        request = self.request
        return StepOutcome(
            name=request.name or self.run_id,
            run_id=self.run_id,
            state_type=state,
            state_name=state.title(),
            phase=request.phase,
            step=request.step,
            item=request.item,
            attempts=self.attempts,
            **details,
        )


class MemoryFlowRuns:
    """``FlowRuns`` whose deployments are async functions of this process.

    It keeps the same promises as the adapter to a server: one run per key, completed runs are not run again, runs
    that did not complete are run again under their own id, a cancelled run ends Cancelled.
    """

    def __init__(self, deployments: Mapping[str, Body]) -> None:
        self._deployments = dict(deployments)
        self.runs: dict[str, MemoryRun] = {}

    async def submit(self, requests: Sequence[RunRequest]) -> list[str]:
        for request in requests:
            if request.deployment not in self._deployments:
                raise DeploymentMissing(f'The deployment "{request.deployment}" does not exist.')
        return [self._submit_one(request).run_id for request in requests]

    def _submit_one(self, request: RunRequest) -> MemoryRun:
        known = [run for run in self.runs.values() if request.key is not None and run.request.key == request.key]
        run = known[0] if known else MemoryRun(request=request, run_id=str(uuid.uuid4()))
        self.runs[run.run_id] = run
        self._start(run)
        return run

    def _start(self, run: MemoryRun) -> None:
        if run.attempts == 0 or (run.outcome is not None and not run.outcome.is_completed):
            run.attempts += 1
            run.outcome = None
            run.is_final.clear()
            run.task = asyncio.create_task(self._execute(run))

    async def _execute(self, run: MemoryRun) -> None:
        started_at = datetime.now(UTC)
        body = self._deployments[run.request.deployment]
        state, message, summary = "COMPLETED", "", {}
        try:
            summary = dict(await body(**run.request.parameters) or {})
        except asyncio.CancelledError:
            state = "CANCELLED"
        except ProcessDied as exc:
            state, message = "CRASHED", str(exc)
        except Exception as exc:  # noqa: BLE001 - a flow may raise anything; the run records it
            state, message = "FAILED", str(exc)
        run.outcome = run.conclude(
            state, message=message, started_at=started_at, ended_at=datetime.now(UTC), summary=summary
        )
        run.is_final.set()

    async def watch(self, run_ids: Sequence[str]) -> AsyncIterator[StepOutcome]:
        for finished in asyncio.as_completed([self._wait_for(run_id) for run_id in dict.fromkeys(run_ids)]):
            yield await finished

    async def _wait_for(self, run_id: str) -> StepOutcome:
        run = self.runs[run_id]
        await run.is_final.wait()
        assert run.outcome is not None, "a final run has an outcome"
        return run.outcome

    async def restart(self, run_ids: Collection[str]) -> None:
        for run_id in run_ids:
            self._start(self.runs[run_id])

    async def cancel(self, run_ids: Collection[str]) -> None:
        for run_id in run_ids:
            run = self.runs[run_id]
            if run.task is not None and run.outcome is None:
                run.task.cancel()
                # A task that never ran a step is cancelled without running its handler.
                run.task.add_done_callback(partial(self._settle, run))

    def _settle(self, run: MemoryRun, _task: asyncio.Task[None]) -> None:
        if run.outcome is None:
            run.outcome = run.conclude("CANCELLED")
            run.is_final.set()

    def find(self, name: str) -> MemoryRun:
        """Return the run with that name.

        Raises:
            KeyError: there is none.
        """
        for run in self.runs.values():
            if run.request.name == name:
                return run
        raise KeyError(name)
