"""Execute the runs of a worker in forked processes: start, watch, cancel, report. Runs in the worker's process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import anyio
import anyio.abc
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.logging import get_logger
from prefect.runner._cancellation_manager import CancellationManager
from prefect.runner._control_channel import ControlChannel, ControlSignalStatus
from prefect.runner._event_emitter import EventEmitter
from prefect.runner._flow_run_executor import FlowRunExecutor
from prefect.runner._process_manager import ProcessHandle, ProcessManager, create_isolated_termination_scope
from prefect.runner._state_proposer import StateProposer
from prefect.workers.process import ProcessWorkerResult

from phasewise.forkserver.client import ForkedProcess
from phasewise.forkserver.pool import ForkserverPool
from phasewise.settings import Settings
from phasewise.system.memory import count_oom_kills
from phasewise.worker.event_relay import Inlet, Intake
from phasewise.worker.fork_job import NO_HOOKS, Job
from phasewise.worker.reaper import END_SECONDS, schedule_again

_OUT_OF_MEMORY = "The kernel killed it because memory ran out"


# ── one flow run ─────────────────────────────────────────────────────────────────────────────────────────────────


class Executors:
    """What Prefect's process worker sets up for each run, once for all runs of a worker.

    One client, one control channel, one process table and one cancellation manager; ``FlowRunExecutor``, the state
    machine of a single run, is Prefect's own.
    """

    def __init__(self, forkservers: ForkserverPool, jobs: dict[UUID, Job]) -> None:
        self._forkservers = forkservers
        self._jobs = jobs
        self._channel = ControlChannel()
        self._processes = _Processes(Settings().cancel_grace_seconds, self._channel)
        self._hooks = _ForkedHooks(forkservers, jobs, partial(self.has_said, what=NO_HOOKS))
        self._cancelling: dict[UUID, asyncio.Task[None]] = {}
        #: Where a run's process hears of a suspension, says what its flow needs, and hands over its events and logs.
        self._lines: dict[UUID, Inlet] = {}
        self._stack = AsyncExitStack()
        self._intake: Intake
        self._proposer: _Proposer
        self._cancellation: CancellationManager
        self._client: PrefectClient

    async def __aenter__(self) -> Executors:
        client = self._client = await self._stack.enter_async_context(get_client())
        self._intake = await self._stack.enter_async_context(Intake(client))
        await self._stack.enter_async_context(self._processes)
        emitter = await self._stack.enter_async_context(EventEmitter(runner_name="standalone", client=client))
        await self._stack.enter_async_context(self._channel)
        self._proposer = _Proposer(client=client)
        self._cancellation = CancellationManager(
            process_manager=self._processes,
            hook_runner=self._hooks,
            state_proposer=self._proposer,
            event_emitter=emitter,
            client=client,
            control_channel=self._channel,
        )
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self._stack.__aexit__(*exc_info)

    def running(self) -> set[UUID]:
        return self._processes.flow_run_ids()

    def is_running(self, flow_run_id: UUID) -> bool:
        return self._processes.get(flow_run_id) is not None

    async def run(self, flow_run: FlowRun, task_status: anyio.abc.TaskStatus[int]) -> ProcessWorkerResult:
        ours, theirs = socket.socketpair()
        self._lines[flow_run.id] = Inlet(ours, self._intake)
        try:
            with theirs:
                return await self._run(flow_run, task_status, theirs.fileno())
        finally:
            self._lines.pop(flow_run.id).close()

    def has_said(self, flow_run_id: UUID, what: str) -> bool:
        """Tell whether the process of a flow run has said *what*; False also when it has not yet come so far."""
        return flow_run_id in self._lines and what in self._lines[flow_run_id].notes

    async def _run(self, flow_run: FlowRun, task_status: anyio.abc.TaskStatus[int], line: int) -> ProcessWorkerResult:
        executor = FlowRunExecutor(
            flow_run=flow_run,
            starter=_ForkStarter(self._forkservers, self._channel, self._jobs[flow_run.id], line, self._proposer.notes),
            process_manager=self._processes,
            state_proposer=self._proposer,
            hook_runner=self._hooks,
            propose_submitting=False,  # the worker has done it
            get_attempt_conclusion=self._channel.get_conclusion,
        )
        execution = await executor.submit(task_status=_ReportsPid(task_status))
        # Hooks need the run's folder and environment: stay until a cancellation of this run is through.
        if cancelling := self._cancelling.get(flow_run.id):
            await asyncio.wait([cancelling])
        if cancelling or (execution and execution.status_code):
            await self._end_cancelling(flow_run.id)
        if execution is None or execution.status_code is None:
            raise RuntimeError("Failed to start flow run process.")
        code = 0 if flow_run.id in self._proposer.released else execution.status_code
        self._proposer.released.discard(flow_run.id)
        return ProcessWorkerResult(status_code=code, identifier=str(execution.handle.pid))

    async def _end_cancelling(self, flow_run_id: UUID) -> None:
        """See to the end of a run whose process ended before its cancellation came to it, and found no process.

        One that is cancelled just before it begins is not allowed to, and ends by itself.
        """
        try:
            flow_run = await self._client.read_flow_run(flow_run_id)
            if flow_run.state is not None and flow_run.state.is_cancelling():
                await self._hooks.run_cancellation_hooks(flow_run, flow_run.state)
                await self._cancellation._finalize_cancelled_state(flow_run)
        except Exception as exc:  # noqa: BLE001 - what the process ended with must be reported all the same
            get_logger("phasewise.worker.worker").warning("Could not end flow run %s: %s", flow_run_id, exc)

    @property
    def reported(self) -> set[UUID]:
        return self._proposer.reported

    async def reschedule(self, flow_run_id: UUID) -> None:
        """Stop a flow run and schedule it again, for whichever worker is there then."""
        status = await self._channel.signal(flow_run_id, "reschedule")
        if status is ControlSignalStatus.ALREADY_CONCLUDED:
            return
        self._proposer.released.add(flow_run_id)
        # An engine that did not hear what this is about would report a crash: it gets no chance to.
        await self._processes.kill(flow_run_id, force=status is not ControlSignalStatus.ACKNOWLEDGED)
        await schedule_again(self._client, flow_run_id)

    def suspend(self, flow_run_id: UUID) -> None:
        """Tell the process of a flow run, if it is one of ours, that the run was suspended."""
        if flow_run_id in self._lines:
            self._lines[flow_run_id].send(b"s")

    def cancel_soon(self, flow_run_id: UUID) -> None:
        if flow_run_id not in self._cancelling:
            task = asyncio.create_task(self._cancel(flow_run_id))
            self._cancelling[flow_run_id] = task
            task.add_done_callback(lambda _: self._cancelling.pop(flow_run_id, None))

    async def _cancel(self, flow_run_id: UUID) -> None:
        # After a reconnect the events of the last minute come again: one of them may be of an attempt before this one.
        flow_run = await self._client.read_flow_run(flow_run_id)
        if flow_run.state is not None and (flow_run.state.is_cancelling() or flow_run.state.is_cancelled()):
            await self._cancellation.cancel(flow_run)


@dataclass(frozen=True)
class _ReportsPid:
    """Passes the process id on where Prefect's executor reports the process."""

    task_status: anyio.abc.TaskStatus[int]

    def started(self, value: ProcessHandle | None = None) -> None:
        assert value is not None
        assert value.pid is not None
        self.task_status.started(value.pid)


class _ForkStarter:
    """Starts a flow run by a fork; it has the shape of Prefect's ``ProcessStarter``."""

    def __init__(
        self, forkservers: ForkserverPool, channel: ControlChannel, job: Job, line: int, notes: dict[UUID, str]
    ) -> None:
        self._notes = notes
        self._forkservers = forkservers
        self._channel = channel
        self._job = job
        self._line = line

    async def start(
        self, flow_run: FlowRun, task_status: anyio.abc.TaskStatus[ProcessHandle] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        env = dict(self._job.env)
        with contextlib.suppress(RuntimeError):  # no loopback listener: cancelling falls back to the signal alone
            port, token = self._channel.register(flow_run.id)
            env |= {"PREFECT__CONTROL_PORT": str(port), "PREFECT__CONTROL_TOKEN": token}
        arguments = {"entrypoint": self._job.entrypoint, "known": self._job.known}
        try:
            where = {**self._job.where, "env": env, "descriptor": self._line}
            process = await self._forkservers.fork("phasewise.worker.child:run_flow_run", arguments, **where)
        except BaseException:
            self._channel.unregister(flow_run.id)
            raise
        oom_kills = count_oom_kills()
        scope = create_isolated_termination_scope(process.pid)
        try:
            task_status.started(ProcessHandle(process, scope))  # type: ignore[arg-type] # it reads pid and returncode
            is_oom_kill = await process.wait() == -signal.SIGKILL and count_oom_kills() > oom_kills
            if process.is_lost:
                note = "The forkserver that it was forked from has ended, and with it all of its runs."
                self._notes[flow_run.id] = f"{note} {_OUT_OF_MEMORY}." if is_oom_kill else note
            elif is_oom_kill:
                peak = process.peak_rss_bytes // 2**20
                self._notes[flow_run.id] = f"{_OUT_OF_MEMORY}; it used up to {peak} MiB."
        except BaseException:  # the worker is ending
            with contextlib.suppress(ProcessLookupError), anyio.move_on_after(END_SECONDS, shield=True):
                scope.graceful_kill(process.pid)
                await process.wait_signalled()
            raise


class _Proposer(StateProposer):
    """Prefect's, which reports no crash of a run that the worker itself has stopped and released."""

    def __init__(self, *, client: PrefectClient) -> None:
        super().__init__(client=client)
        self.released: set[UUID] = set()
        #: What is known of why a run crashed, next to its exit code.
        self.notes: dict[UUID, str] = {}
        #: Runs whose crash is on the server.
        self.reported: set[UUID] = set()

    async def propose_crashed(self, flow_run: FlowRun, message: str) -> State[Any] | None:
        if flow_run.id in self.released:
            return None
        self.reported.add(flow_run.id)
        note = self.notes.pop(flow_run.id, None)
        return await super().propose_crashed(flow_run, f"{message} {note}" if note else message)


class _Processes(ProcessManager):
    """Prefect's table of processes, which kills as soon as the process has ended instead of looking every 3 s."""

    def __init__(self, grace_seconds: float, channel: ControlChannel) -> None:
        async def forget(flow_run_id: UUID) -> None:
            channel.unregister(flow_run_id)

        super().__init__(on_remove=forget)
        self._grace_seconds = grace_seconds

    async def kill(self, flow_run_id: UUID, grace_seconds: float = 30, *, force: bool = False) -> None:
        handle = self.get(flow_run_id)
        process: object = handle.raw_process if handle is not None else None
        if handle is None or force or not isinstance(process, ForkedProcess):
            return await super().kill(flow_run_id, grace_seconds, force=force)
        with contextlib.suppress(ProcessLookupError):
            handle.graceful_kill()
            with anyio.move_on_after(min(grace_seconds, self._grace_seconds)):
                await process.wait_signalled()
                # What the flow itself started, in the same process group: nobody tells us when it ends.
                while handle.is_alive():  # noqa: ASYNC110
                    await anyio.sleep(0.02)
            if handle.is_alive():
                handle.hard_kill()
                await process.wait()
        return None


class _ForkedHooks:
    """Runs on_cancellation and on_crashed hooks in a fork of their own; it has the shape of ``FlowRunHookRunner``."""

    def __init__(self, forkservers: ForkserverPool, jobs: dict[UUID, Job], has_none: Callable[[UUID], bool]) -> None:
        self._forkservers = forkservers
        self._jobs = jobs
        self._has_none = has_none

    async def run_cancellation_hooks(self, flow_run: FlowRun, state: State) -> None:
        if state.is_cancelling():
            await self._run(flow_run, state)

    async def run_crashed_hooks(self, flow_run: FlowRun, state: State) -> None:
        if state.is_crashed():
            await self._run(flow_run, state)

    async def _run(self, flow_run: FlowRun, state: State) -> None:
        # A process that finds out that there is nothing to run is most of what a cancellation costs.
        if self._has_none(flow_run.id):
            return
        job = self._jobs[flow_run.id]
        arguments = {
            "entrypoint": job.entrypoint,
            "flow_run": flow_run.model_dump(mode="json"),
            "state": state.model_dump(mode="json"),
        }
        process = await self._forkservers.fork("phasewise.worker.child:run_hooks", arguments, **job.where)
        await process.wait()
