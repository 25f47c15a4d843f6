"""Flow runs in one process tree, without a server. Runs in the main process.

Each flow run is forked from a forkserver, as on a worker of ours. Flows that wait for others (async, on the
work queue ``orchestrators``) run in the event loop of the main process instead: they have no work of their own, and
there they share one list of runs, one limit and one history.

Nothing is recorded beyond the process: a batch that failed is resumed from what lies in its staging.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from prefect import Flow

from phasewise.errors import DeploymentMissing
from phasewise.forkserver.client import ForkedProcess
from phasewise.forkserver.pool import ForkserverPool
from phasewise.local.engine import (
    FLOWS,
    OUTCOMES,
    Ending,
    call_flow,
    describe_failure,
    entering_flow_run,
    install,
    load_flow,
)
from phasewise.orchestration.deployments import Deployment
from phasewise.orchestration.flow_runs import LOCAL_RUN, LocalRun, RunRequest
from phasewise.outcomes import StepOutcome

#: Imported before the first fork; what a flow imports lazily it pays for once a run.
PRELOAD = (
    "prefect",
    "prefect.logging.handlers",
    "prefect.utilities.visualization",
    "pydantic.v1",
    "phasewise.local.child",
    "phasewise.orchestration.phases",
)

#: What flow runs see: no server, and none that Prefect would start by itself.
_WITHOUT_SERVER = {"PREFECT_LOGGING_TO_API_ENABLED": "false", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false"}
#: Bytes of one message of a flow run.
_LINE_LIMIT = 64 * 1024 * 1024
#: Seconds for what a process wrote before its end to be read; it matters only where something else holds its socket.
_READ_REST_SECONDS = 1.0


@dataclass(kw_only=True, eq=False)
class _Run:
    request: RunRequest
    run_id: str
    parent_id: str | None
    attempts: int = 0
    expected_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    #: Start of the first attempt, start of this one, and seconds of those before it.
    started_at: datetime | None = None
    resumed_at: datetime | None = None
    seconds: float = 0.0
    outcome: StepOutcome | None = None
    task: asyncio.Task[Ending] | None = None
    is_cancelling: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def describe(self) -> StepOutcome:
        state = "PENDING" if self.resumed_at is None else "RUNNING"
        return self.outcome or self.conclude(Ending(state_type=state), None)

    def conclude(self, ending: Ending, ended_at: datetime | None) -> StepOutcome:
        if ended_at is not None and self.resumed_at is not None:
            self.seconds += (ended_at - self.resumed_at).total_seconds()
        return StepOutcome(
            name=self.request.name or self.run_id,
            run_id=self.run_id,
            state_type=ending.state_type,
            state_name=ending.state_type.title(),
            message=ending.message,
            expected_at=self.expected_at,
            started_at=self.started_at,
            ended_at=ended_at,
            seconds=self.seconds if ended_at is not None else None,
            attempts=self.attempts,
            phase=self.request.phase,
            step=self.request.step,
            item=self.request.item,
            parent_id=self.parent_id,
            summary=ending.summary,
        )


class LocalFlowRuns:
    """``FlowRuns`` in the processes of ``async with LocalFlowRuns(…) as flow_runs:``; nothing is left after it.

    *deployments* maps ``flow/deployment`` to what it runs. At most *table_concurrency* runs of the work queue
    ``tables`` run at a time, in the order of their submission; orchestrators have no limit, so a parent never holds
    what its children wait for. A cancelled process gets SIGTERM, and SIGKILL after *cancel_grace_seconds*.
    *preload* and *setup* are modules and callables for the forkserver (see ``Forkserver.start``); *environment*
    is added to that of the flow runs.
    """

    def __init__(
        self,
        deployments: Mapping[str, Deployment],
        *,
        table_concurrency: int = 8,
        cancel_grace_seconds: float = 10.0,
        preload: Sequence[str] = (),
        setup: Sequence[str] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._deployments = dict(deployments)
        self._slots = asyncio.Semaphore(table_concurrency)
        self._cancel_grace_seconds = cancel_grace_seconds
        flows = json.dumps([(one.entrypoint, str(one.root) if one.root else None) for one in deployments.values()])
        setup = ("phasewise.local.child:load_flows", *setup)
        own = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
        self._forkservers = ForkserverPool(
            (*PRELOAD, *preload), setup, env={**own, **environment, FLOWS: flows, **_WITHOUT_SERVER}
        )
        self._runs: dict[str, _Run] = {}
        self._by_key: dict[str, _Run] = {}

    async def __aenter__(self) -> Self:
        install()
        await self._forkservers.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.cancel(self._runs)
            await asyncio.gather(*(run.ended.wait() for run in self._runs.values() if run.task is not None))
        finally:
            await self._forkservers.__aexit__()

    @asynccontextmanager
    async def running(self, name: str, run_id: str) -> AsyncIterator[None]:
        """Make the code of the block the flow run *run_id*: what is submitted in it is below that run.

        It is on record as long as this object; its state is how the block ends.
        """
        run = _Run(request=RunRequest(deployment="", name=name), run_id=run_id, parent_id=None, attempts=1)
        run.started_at = run.resumed_at = datetime.now(UTC)
        self._runs[run_id] = run
        with entering_flow_run(self._local(run), name=name):
            try:
                yield
            except BaseException as exc:
                self._finish(run, Ending(state_type="FAILED", message=str(exc)))
                raise
        self._finish(run, Ending(state_type="COMPLETED"))

    def read_runs(self) -> list[StepOutcome]:
        """Return all flow runs as they are now, parents before children."""
        return [run.describe() for run in self._runs.values()]

    async def submit(self, requests: Sequence[RunRequest]) -> list[str]:
        for request in requests:
            if request.deployment not in self._deployments:
                raise DeploymentMissing(
                    f'No step of the project brings the deployment "{request.deployment}".',
                    hint="Name its code in the step: entrypoint=…",
                )
        return [(await self._submit(request)).run_id for request in requests]

    async def _submit(self, request: RunRequest) -> _Run:
        run = self._by_key.get(request.key) if request.key is not None else None
        if run is None:
            parent = LOCAL_RUN.get()
            run = _Run(request=request, run_id=str(uuid.uuid4()), parent_id=parent.run_id if parent else None)
            self._runs[run.run_id] = run
            if request.key is not None:
                self._by_key[request.key] = run
        elif run.is_cancelling:  # only what is final can be started again
            await run.ended.wait()
        self._start(run)
        return run

    def _start(self, run: _Run) -> None:
        """Start *run* unless it is on its way or completed."""
        if run.task is not None and (run.outcome is None or run.outcome.is_completed):
            return
        run.attempts += 1
        run.expected_at, run.resumed_at = datetime.now(UTC), None
        run.outcome, run.is_cancelling = None, False
        run.ended.clear()
        run.task = asyncio.create_task(self._execute(run))
        run.task.add_done_callback(lambda task: self._settle(run, task))

    async def watch(self, run_ids: Sequence[str]) -> AsyncIterator[StepOutcome]:
        for finished in asyncio.as_completed([self._wait_for(run_id) for run_id in dict.fromkeys(run_ids)]):
            yield await finished

    async def _wait_for(self, run_id: str) -> StepOutcome:
        run = self._runs.get(run_id)
        if run is None:
            message = "No such flow run was started here."
            return StepOutcome(name=run_id, run_id=run_id, state_type="LOST", state_name="Lost", message=message)
        await run.ended.wait()
        assert run.outcome is not None, "a run that ended has an outcome"
        return run.outcome

    async def restart(self, run_ids: Collection[str]) -> None:
        for run_id in run_ids:
            if (run := self._runs.get(run_id)) is not None:
                self._start(run)

    async def cancel(self, run_ids: Collection[str]) -> None:
        level = set(run_ids)
        while level:
            for run_id in level:
                if (run := self._runs.get(run_id)) is not None:
                    self._cancel_one(run)
            level = {run.run_id for run in self._runs.values() if run.parent_id in level}

    def _cancel_one(self, run: _Run) -> None:
        # Once only: a second cancellation would interrupt the clean-up after the first.
        if run.task is not None and run.outcome is None and not run.is_cancelling:
            run.is_cancelling = True
            run.task.cancel()

    async def _execute(self, run: _Run) -> Ending:
        deployment = self._deployments[run.request.deployment]
        if deployment.work_queue == "orchestrators":
            flow = load_flow(deployment.entrypoint, deployment.root)
            if flow.isasync:
                self._note_start(run)
                name = run.request.name or flow.name
                return await _run_orchestrator(flow, run.request.parameters, self._local(run), name)
        async with self._slots if deployment.work_queue == "tables" else nullcontext():
            return await self._run_process(run, deployment)

    def _local(self, run: _Run) -> LocalRun:
        return LocalRun(run_id=run.run_id, flow_runs=self, read_runs=self.read_runs)

    def _note_start(self, run: _Run) -> None:
        run.resumed_at = datetime.now(UTC)
        run.started_at = run.started_at or run.resumed_at

    async def _run_process(self, run: _Run, deployment: Deployment) -> Ending:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours, limit=_LINE_LIMIT)
        try:
            with theirs:
                fork = asyncio.create_task(self._fork(run, deployment, theirs.fileno()))
                try:
                    process = await asyncio.shield(fork)
                except asyncio.CancelledError:
                    await self._stop(await fork)  # not known yet, but on its way
                    raise
            self._note_start(run)
            return await self._follow(process, reader, writer)
        finally:
            writer.close()

    async def _fork(self, run: _Run, deployment: Deployment, descriptor: int) -> ForkedProcess:
        arguments = {
            "entrypoint": deployment.entrypoint,
            "root": str(deployment.root) if deployment.root else None,
            "parameters": dict(run.request.parameters),
            "run_id": run.run_id,
            "name": run.request.name or run.request.deployment.partition("/")[0],
        }
        return await self._forkservers.fork(
            "phasewise.local.child:run_flow_run",
            arguments,
            env=self._forkservers.env | {"PREFECT__FLOW_RUN_ID": run.run_id},
            cwd=str(deployment.root or Path.cwd()),
            descriptor=descriptor,
        )

    async def _follow(
        self, process: ForkedProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Ending:
        """Answer the process until it has ended, and return how."""
        conversation = asyncio.create_task(self._converse(reader, writer))
        try:
            code = await process.wait()
            ending = await asyncio.wait_for(conversation, _READ_REST_SECONDS)
        except TimeoutError:
            ending = None
        except asyncio.CancelledError:
            await self._stop(process)
            raise
        finally:
            conversation.cancel()
        return ending or _explain_crash(code)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Ending | None:
        with suppress(ConnectionError):
            while line := await reader.readline():
                message = json.loads(line)
                if message["kind"] == "ended":
                    return Ending(**message["ending"])
                writer.write(OUTCOMES.dump_json(self.read_runs()) + b"\n")
                await writer.drain()
        return None

    async def _stop(self, process: ForkedProcess) -> None:
        _signal_group(process, signal.SIGTERM)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait_signalled(), self._cancel_grace_seconds)
        if process.returncode is None:
            _signal_group(process, signal.SIGKILL)
            await process.wait()

    def _settle(self, run: _Run, task: asyncio.Task[Ending]) -> None:
        """Turn how the task of an attempt ended into the outcome of its run."""
        if task.cancelled():
            ending = Ending(state_type="CANCELLED", message="Cancelled.")
        elif (exc := task.exception()) is not None:
            ending = Ending(state_type="CRASHED", message=f"{type(exc).__name__}: {exc}")
        else:
            ending = task.result()
        self._finish(run, ending)
        if ending.state_type != "COMPLETED":  # nothing outlives its parent, however that ended
            for child in self._runs.values():
                if child.parent_id == run.run_id:
                    self._cancel_one(child)

    def _finish(self, run: _Run, ending: Ending) -> None:
        run.outcome = run.conclude(ending, datetime.now(UTC))
        run.ended.set()


async def _run_orchestrator(flow: Flow[..., Any], parameters: Mapping[str, Any], local: LocalRun, name: str) -> Ending:
    """Run a flow that waits for others, in this event loop."""
    with entering_flow_run(local, name=name, flow=flow, parameters=parameters):
        try:
            await call_flow(flow, parameters)
        except Exception as exc:  # noqa: BLE001 - a flow may raise anything; the run records it
            return describe_failure(exc)
    return Ending(state_type="COMPLETED", summary=local.summary)


def _signal_group(process: ForkedProcess, signum: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def _explain_crash(code: int) -> Ending:
    reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Ending(state_type="CRASHED", message=f"Its process {reason} before it could say how the flow run went.")
