"""A Prefect worker whose flow runs start in milliseconds: the work-pool type ``warm-process``.

It is Prefect's process worker with two parts replaced. A flow run is forked from a process that has imported
everything already (``phasewise.forkserver``) instead of starting three Pythons, and new runs are claimed on the event
of their scheduling instead of at the next poll; the poll stays, as the fallback. What a fork cannot serve exactly as a
new process would (see ``_why_not_warm``) takes the process worker's own way, and the run's log says why.

Every private name of Prefect that Phasewise touches stands in this module, for Prefect ``>=3.9.1,<4``. The oldest and
the newest of them are tested (``make test-prefect-range``: 3.9.1); these are the modules to look at when it moves:
``prefect.runner._*``, ``prefect._internal.*``, ``prefect.flow_engine._*`` and the underscored methods of
``BaseWorker``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import contextvars
import copy
import functools
import io
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

import anyio
import anyio.abc
import certifi
import httpx
import prefect
from prefect._flow_run_suspension import FlowRunSuspensionRequest, is_suspended_flow_run_state
from prefect._internal.version_checking import _api_version_check_key, _cache_api_version_check
from prefect.client.orchestration import PrefectClient, SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events import Event, RelatedResource
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventAnyResourceFilter, EventFilter, EventNameFilter
from prefect.events.related import RESOURCE_CACHE, object_as_related_resource
from prefect.exceptions import Abort, Pause, PrefectHTTPStatusError
from prefect.logging import get_logger
from prefect.runner._cancellation_manager import CancellationManager
from prefect.runner._control_channel import ControlChannel, ControlSignalStatus
from prefect.runner._event_emitter import EventEmitter
from prefect.runner._flow_run_executor import FlowRunExecutor
from prefect.runner._hook_runner import HookRunner
from prefect.runner._process_manager import (
    ProcessHandle,
    ProcessManager,
    create_isolated_termination_scope,
)
from prefect.runner._state_proposer import StateProposer
from prefect.settings import get_current_settings
from prefect.states import AwaitingRetry, Pending
from prefect.utilities.engine import propose_state
from prefect.utilities.filesystem import relative_path_to_current_platform
from prefect.workers.base import BaseWorker
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult
from pydantic import BaseModel, PrivateAttr

from phasewise.caretaker import Caretaker
from phasewise.forkserver import ForkedProcess, ForkserverDied
from phasewise.jobs import (
    WARM_DESCRIPTION,
    WARM_NAME,
    Job,
    differing_variables,
    has_prefect_settings,
    pulled_directory,
    version_of,
    why_not_workspace,
    working_directory,
)
from phasewise.memory import count_oom_kills, limit_memory
from phasewise.questions import Questions
from phasewise.reads import Reads
from phasewise.relay import Inlet, Intake, Outlet
from phasewise.settings import Settings
from phasewise.turns import LEAVE_SECONDS, Turns
from phasewise.zygotes import Zygotes

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Flow as APIFlow
    from prefect.client.schemas.objects import WorkPool
    from prefect.client.schemas.responses import DeploymentResponse, WorkerFlowRunResponse
    from prefect.flow_engine import BaseFlowRunEngine
    from prefect.flows import Flow

#: Imported before the first fork. What a flow run imports lazily after the fork, it pays for once a run.
PRELOAD = (
    "anyio._backends._asyncio",
    "encodings.idna",
    "rich._emoji_codes",
    "prefect",
    "prefect.flow_engine",
    "prefect.task_engine",
    "prefect.engine",
    "prefect.client.orchestration",
    "prefect.deployments.steps.core",
    "prefect.events.clients",
    "prefect.events.worker",
    "prefect.logging.handlers",
    "prefect.utilities.visualization",
    "phasewise.worker",
    "duckdb",
    "phasewise.flows",
)
#: Called once, after the imports and before the first fork.
SETUP = ("phasewise.worker:warm_up", "phasewise.lake:preload_extensions")

_CLAIM_ON = ("Scheduled", "Late", "AwaitingRetry", "AwaitingConcurrencySlot", "Resuming")
_FREES_A_SLOT = ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut", "Paused", "Suspended")
#: Seconds that a flow run has to report its state when its worker ends without a drain.
_END_SECONDS = 5.0
_HEARTBEAT_SECONDS = 5
#: What the process of a flow run tells its worker: that its flow has no hooks for a cancellation or a crash, and that
#: it has begun.
_NO_HOOKS = "no hooks"
_BEGUN = "begun"
#: Seconds after which a worker reports the process id of a run that has not yet done so itself.
_BEGIN_SECONDS = 3.0
#: Seconds for which a worker takes the flow of a deployment, and the server's default for results, as it read them.
_SETTLED_SECONDS = 5.0

_OUT_OF_MEMORY = "The kernel ended it for want of memory"

#: The settings that were in force at the last run, and the environment variables that set them.
_environment: tuple[Any, dict[str, str]] | None = None


class WarmProcessJobConfiguration(ProcessJobConfiguration):
    """The process worker's job configuration, which also remembers the deployment that it was made for."""

    _deployment: DeploymentResponse | None = PrivateAttr(default=None)
    _flow: APIFlow | None = PrivateAttr(default=None)
    _work_pool: WorkPool | None = PrivateAttr(default=None)

    def prepare_for_flow_run(
        self,
        flow_run: FlowRun,
        deployment: DeploymentResponse | None = None,
        flow: APIFlow | None = None,
        work_pool: WorkPool | None = None,
        worker_name: str | None = None,
        worker_id: UUID | None = None,
    ) -> None:
        self._deployment, self._flow, self._work_pool = deployment, flow, work_pool
        super().prepare_for_flow_run(flow_run, deployment, flow, work_pool, worker_name, worker_id)

    @classmethod
    def _base_environment(cls) -> dict[str, str]:
        # A quarter of what a run costs its worker, and the same for each as long as the settings are.
        global _environment
        settings = get_current_settings()
        if _environment is None or _environment[0] is not settings:
            _environment = (settings, super()._base_environment())
        return dict(_environment[1])


class WarmProcessWorker(ProcessWorker):
    """Execute flow runs as processes forked from one that has imported everything they need."""

    type = "warm-process"
    job_configuration = WarmProcessJobConfiguration
    _display_name = WARM_NAME
    _description = WARM_DESCRIPTION

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Others find out by our heartbeats that we died; Prefect's 30 s would make that a matter of minutes.
        self.heartbeat_interval_seconds = min(self.heartbeat_interval_seconds, _HEARTBEAT_SECONDS)
        self._warm = AsyncExitStack()
        self._zygotes = Zygotes(PRELOAD, SETUP, max_runs=Settings().forkserver_runs, logger=self._logger)
        #: Deployment id → version of its code at its last run.
        self._versions: dict[UUID, str] = {}
        self._had_terminal = _has_terminal()
        self._jobs: dict[UUID, Job] = {}
        #: Those that run, whether forked or in a new Python.
        self._in_hand: set[UUID] = set()
        self._executors: _Executors
        self._questions = Questions(self.get_and_submit_flow_runs, logger=self._logger)
        self._claiming = asyncio.Lock()
        self._turns = Turns(self.name)
        self._draining = False
        self._reads = Reads()
        self._listening: anyio.abc.TaskGroup | None = None
        self._services: anyio.abc.TaskGroup
        self._caretaker: Caretaker

    async def __aenter__(self) -> WarmProcessWorker:
        # Entered before, so left after, the task group of the runs: they need all of it until they end.
        try:
            self._devnull = os.open(os.devnull, os.O_WRONLY)
            self._warm.callback(os.close, self._devnull)
            await self._warm.enter_async_context(self._zygotes)
            self._executors = await self._warm.enter_async_context(_Executors(self._zygotes, self._jobs))
            self._services = await self._warm.enter_async_context(_background())
            with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread: no signals to hear
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_hangup)
                self._warm.callback(asyncio.get_running_loop().remove_signal_handler, signal.SIGHUP)
            await super().__aenter__()
        except BaseException:
            await self._warm.__aexit__(*sys.exc_info())
            raise
        return self

    async def setup(self) -> None:
        await super().setup()
        # Prefect reads the deployment twice and the flow once for each run that it submits.
        client: Any = self.client
        client.read_deployment = functools.partial(self._reads.share, client.read_deployment)
        client.read_flow = functools.partial(self._reads.share, client.read_flow, seconds=_SETTLED_SECONDS)
        client.update_flow_run = functools.partial(self._update_flow_run, client.update_flow_run)

    async def _update_flow_run(self, update: Callable[..., Awaitable[Any]], flow_run_id: UUID, **changes: Any) -> None:
        """Leave it to a run to report its own process id, with what else it reports when it begins."""
        if flow_run_id in self._jobs and list(changes) == ["infrastructure_pid"]:
            self._services.start_soon(self._report_pid, update, flow_run_id, changes["infrastructure_pid"])
        else:
            await update(flow_run_id, **changes)

    async def _report_pid(self, update: Callable[..., Awaitable[Any]], flow_run_id: UUID, pid: str) -> None:
        await anyio.sleep(_BEGIN_SECONDS)
        if flow_run_id in self._jobs and not self._executors.has_said(flow_run_id, _BEGUN):
            try:
                await update(flow_run_id, infrastructure_pid=pid)
            except Exception as exc:  # noqa: BLE001 - the run will report it
                self._logger.warning("Could not report the process of flow run %s: %s", flow_run_id, exc)

    async def __aexit__(self, *exc_info: Any) -> None:
        try:
            await super().__aexit__(*exc_info)
        finally:
            await self._warm.__aexit__(*exc_info)

    # ── running ──────────────────────────────────────────────────────────────────────────────────────────────

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        if limit := Settings().run_memory_limit:
            task_status = _LimitsMemory(task_status or anyio.TASK_STATUS_IGNORED, limit)
        self._in_hand.add(flow_run.id)
        try:
            return await self._run(flow_run, configuration, task_status)
        finally:
            self._in_hand.discard(flow_run.id)

    async def _run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None,
    ) -> ProcessWorkerResult:
        reason = await self._why_not_warm(configuration)
        if reason is not None:
            self.get_flow_run_logger(flow_run).info("Starting a new Python for this run: %s", reason)
            guards = _Guards(task_status or anyio.TASK_STATUS_IGNORED, self._zygotes)
            try:
                return await super().run(flow_run, configuration, guards)
            except asyncio.CancelledError:  # the worker is ending, and the process of the run has
                if self._draining:
                    with anyio.move_on_after(_END_SECONDS, shield=True):
                        await self._executors.schedule_again(flow_run.id)
                raise
            finally:
                guards.release()
        with working_directory(configuration.working_dir) as folder:
            assert isinstance(configuration, WarmProcessJobConfiguration)
            self._jobs[flow_run.id] = await self._plan(configuration, flow_run, folder)
            try:
                return await self._executors.run(flow_run, task_status or anyio.TASK_STATUS_IGNORED)
            finally:
                del self._jobs[flow_run.id]
                self._questions.slot_is_free(has_runs=bool(self._jobs))

    async def _why_not_warm(self, configuration: ProcessJobConfiguration) -> str | None:
        """Say why a forked process could not do for this run exactly what a new one would; None when it can."""
        if configuration._command_configured:
            return "it has a command of its own."
        if get_current_settings().runner.auto_install_dependencies:
            return "PREFECT_RUNNER_AUTO_INSTALL_DEPENDENCIES is on."
        deployment = getattr(configuration, "_deployment", None)
        if deployment is None or deployment.entrypoint is None:
            return "it has no deployment with an entrypoint."
        if reason := why_not_workspace(deployment):
            return reason
        await self._see_version(deployment)
        folder = pulled_directory(deployment)
        if folder is not None and folder != Path.cwd() and has_prefect_settings(folder):
            return f"{folder} has Prefect settings of its own."
        if names := differing_variables(self._zygotes.env, configuration.env):
            return f"its environment differs in {', '.join(names)}, which is read when Python or Prefect starts."
        try:
            await self._zygotes.current()
        except ForkserverDied as exc:
            return f"the warm process does not start: {exc}"
        return None

    async def _see_version(self, deployment: DeploymentResponse) -> None:
        """Fork from a new process when *deployment* has another version than at its last run."""
        version = version_of(deployment)
        known = self._versions.setdefault(deployment.id, version)
        if known == version:
            return
        # Those of the other deployments that we know are read too: what was deployed along with this one is in what
        # the new process imports, and need not replace it again.
        ids = DeploymentFilterId(any_=list(self._versions))
        for found in await self.client.read_deployments(deployment_filter=DeploymentFilter(id=ids)):
            self._versions[found.id] = version_of(found)
        self._versions[deployment.id] = version
        self._zygotes.replace(f"{deployment.name} has a new version.")

    def _on_hangup(self) -> None:
        if self._had_terminal and not _has_terminal():
            os.kill(os.getpid(), signal.SIGTERM)  # as without us: the terminal that it was started in is gone
        else:
            self._zygotes.replace("SIGHUP.")

    async def _plan(self, configuration: WarmProcessJobConfiguration, flow_run: FlowRun, folder: str) -> Job:
        deployment = configuration._deployment
        assert deployment is not None
        assert deployment.entrypoint is not None
        entrypoint = deployment.entrypoint
        if ":" in entrypoint:
            entrypoint = str(relative_path_to_current_platform(entrypoint))
        cwd = str(pulled_directory(deployment) or folder)
        env = {key: value for key, value in configuration.env.items() if value is not None}
        path = env.get("PYTHONPATH", "").split(os.pathsep)
        env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([cwd, *filter(None, path)]))
        env["PREFECT__FLOW_ENTRYPOINT"] = entrypoint
        # The worker runs these hooks, in a process of their own: the flow run's may be gone by then.
        env["PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS"] = "false"
        stdio = (1, 2) if configuration.stream_output else (self._devnull, self._devnull)
        known = {
            "flow_run": self._as_submitted(flow_run).model_dump(mode="json"),
            "result_storage": await self._read_result_storage(),
            "related": _known(configuration, flow_run),
        }
        return Job(entrypoint=entrypoint, cwd=cwd, env=env, stdio=stdio, known=known)

    def _as_submitted(self, flow_run: FlowRun) -> FlowRun:
        """Return *flow_run*, which was read before it was claimed, as it would be read now."""
        state: State[Any] = Pending(name="Submitting")
        changes = {"state": state, "state_type": state.type, "state_name": state.name}
        return flow_run.model_copy(update={**changes, "work_pool_name": self._work_pool_name})

    async def _read_result_storage(self) -> str | None:
        """Return the id of the server's default block for results, read once for all runs of a claim."""
        try:
            found: Any = await self._reads.share(self._read_default_storage, UUID(int=0), seconds=_SETTLED_SECONDS)
        except (PrefectHTTPStatusError, httpx.HTTPError, RuntimeError, ValueError):  # as a run would take it
            return None
        block = found.default_result_storage_block_id
        return block and str(block)

    async def _read_default_storage(self, _: UUID) -> BaseModel:
        return await self.client.read_server_default_result_storage()

    async def _propose_crashed_state(
        self, flow_run: FlowRun, message: str, client: PrefectClient | None = None
    ) -> None:
        # The base class reports the exit code of a run once more. By then its parent may have scheduled it again, and
        # the second report would crash an attempt that has not begun.
        if flow_run.id in self._executors.reported:
            self._executors.reported.discard(flow_run.id)
            return
        await super()._propose_crashed_state(flow_run, message, client)

    async def drain(self, seconds: float) -> None:
        """Claim nothing more, let running flow runs finish for *seconds*, then stop and reschedule the others."""
        self._draining = True
        with anyio.move_on_after(seconds):
            while self._in_hand or self._submitting_flow_run_ids:  # noqa: ASYNC110 - two sets that empty by themselves
                await anyio.sleep(0.05)
        async with anyio.create_task_group() as group:
            for flow_run_id in self._executors.running():
                group.start_soon(self._executors.reschedule, flow_run_id)

    # ── claiming and cancelling ──────────────────────────────────────────────────────────────────────────────

    async def _setup_cancellation_observer(self) -> None:
        """Start the worker's one events subscription; called after each sync with the server.

        It stands in for the process worker's observers: one for the worker, and one more for each run.
        """
        if self._listening is None and self._work_pool is not None:
            self._listening = self._services
            self._services.start_soon(self._listen, self._work_pool.id)
            self._services.start_soon(self._questions.ask_when_wanted)
            self._caretaker = Caretaker(
                self.client,
                pool=self._work_pool_name,
                name=self.name,
                own_runs=lambda: {*self._in_hand, *self._submitting_flow_run_ids},
                on_cancelling=self._cancel_soon,
                lost_after_seconds=Settings().lost_after_seconds,
            )
            self._services.start_soon(self._caretaker.cascade)
            self._services.start_soon(self._caretaker.find_lost)
            self._services.start_soon(self._caretaker.find_stuck)

    async def _listen(self, work_pool_id: UUID) -> None:
        names = [f"prefect.flow-run.{name}" for name in ("Cancelling", *_CLAIM_ON, *_FREES_A_SLOT)]
        while True:
            events = EventFilter(
                event=EventNameFilter(name=names),
                any_resource=EventAnyResourceFilter(id=[f"prefect.work-pool.{work_pool_id}"]),
            )
            try:
                # The subscriber's own reconnects would hide the gap in which events were lost.
                async with get_events_subscriber(filter=events, reconnection_attempts=0) as subscriber:
                    self._questions.something_is_new()  # for what was scheduled while nobody listened
                    async for event in subscriber:
                        self._on_event(event)
            except Exception as exc:  # noqa: BLE001 - whatever breaks the socket, polling goes on and we reconnect
                self._logger.warning("Lost the events of the work pool (%s); polling until it is back.", exc)
            await anyio.sleep(1)

    def _on_event(self, event: Event) -> None:
        name = event.event.removeprefix("prefect.flow-run.")
        flow_run_id = UUID(event.resource.id.removeprefix("prefect.flow-run."))
        self._caretaker.on_event(event)
        if name == "Suspended":
            self._executors.suspend(flow_run_id)
        if name == "Cancelling":
            self._cancel_soon(flow_run_id)
        elif name in _CLAIM_ON:
            self._questions.something_is_new()
        else:
            self._questions.slot_is_free(has_runs=bool(self._jobs))

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        async with self._claiming:
            return [] if self._draining else await super().get_and_submit_flow_runs()

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        start = time.monotonic()
        try:
            return await super()._get_scheduled_flow_runs()
        finally:
            self._questions.seconds = time.monotonic() - start

    async def _submit_scheduled_flow_runs(self, flow_run_response: list[WorkerFlowRunResponse]) -> list[FlowRun]:
        # An empty answer may mean that a limit is reached. Who holds its slots is likely one of ours, so as long as we
        # have any run the next slot that is freed is a reason to ask again: else what waits would wait for the poll.
        self._questions.may_have_more = bool(flow_run_response or self._jobs or self._submitting_flow_run_ids)
        # What is read from here on is at least as new as these runs, so they may share it, but no older reads.
        self._reads.begin()
        living = self._caretaker.living if self._listening else ()
        chosen = self._turns.choose([entry.flow_run.id for entry in flow_run_response], living)
        if self._turns.has_left:
            self._services.start_soon(self._questions.look_again, LEAVE_SECONDS)
        return await super()._submit_scheduled_flow_runs(
            [entry for entry in flow_run_response if entry.flow_run.id in chosen]
        )

    def _cancel_soon(self, flow_run_id: UUID) -> None:
        if self._executors.is_running(flow_run_id):
            self._executors.cancel_soon(flow_run_id)
        elif flow_run_id in self._submitting_flow_run_ids:
            self._services.start_soon(self._cancel_submitting, flow_run_id)

    async def _cancel_submitting(self, flow_run_id: UUID) -> None:
        """Cancel a run that is not in the table of processes: it never starts, or began before we noted its process."""
        try:
            await self._cancel_run(flow_run_id)  # does nothing to a run that has begun
            while flow_run_id in self._submitting_flow_run_ids:  # noqa: ASYNC110 - a set that empties by itself
                await anyio.sleep(0.05)
            state = (await self.client.read_flow_run(flow_run_id)).state
        except Exception as exc:  # noqa: BLE001 - it is looked for again, see find_stuck
            self._logger.warning("Could not cancel flow run %s: %s", flow_run_id, exc)
            return
        if state is not None and state.is_cancelling() and self._executors.is_running(flow_run_id):
            self._executors.cancel_soon(flow_run_id)


def _known(configuration: WarmProcessJobConfiguration, flow_run: FlowRun) -> list[dict[str, Any]]:
    """Return the objects that a flow run relates its events to, as far as its worker knows them.

    ``key`` is what the run looks an object up by: the id, or the name of the work pool. ``labels`` are what Prefect
    makes of the object.
    """
    objects: dict[str, Any] = {
        "flow": configuration._flow,
        "deployment": configuration._deployment,
        "work-pool": configuration._work_pool,
    }
    if flow_run.work_queue_id and flow_run.work_queue_name:
        objects["work-queue"] = SimpleNamespace(id=flow_run.work_queue_id, name=flow_run.work_queue_name)
    return [
        {
            "kind": kind,
            "key": found.name if kind == "work-pool" else str(found.id),
            "labels": object_as_related_resource(kind, kind, found).root,
            "tags": list(getattr(found, "tags", [])),
        }
        for kind, found in objects.items()
        if found is not None
    ]


@contextlib.asynccontextmanager
async def _background() -> Any:
    """A task group whose tasks end with the block."""
    async with anyio.create_task_group() as group:
        try:
            yield group
        finally:
            group.cancel_scope.cancel()


def _has_terminal() -> bool:
    try:
        os.close(os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


# ── one flow run ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Executors:
    """What Prefect's process worker sets up for each run, once for all runs of a worker.

    One client, one control channel, one process table and one cancellation manager; ``FlowRunExecutor``, the state
    machine of a single run, is Prefect's own.
    """

    def __init__(self, zygotes: Zygotes, jobs: dict[UUID, Job]) -> None:
        self._zygotes = zygotes
        self._jobs = jobs
        self._channel = ControlChannel()
        self._processes = _Processes(Settings().cancel_grace_seconds, self._channel)
        self._hooks = _ForkedHooks(zygotes, jobs, self._has_no_hooks)
        self._cancelling: dict[UUID, asyncio.Task[None]] = {}
        #: Where a run's process hears of a suspension, says what its flow needs, and hands over its events and logs.
        self._lines: dict[UUID, Inlet] = {}
        self._stack = AsyncExitStack()
        self._intake: Intake
        self._proposer: _Proposer
        self._cancellation: CancellationManager
        self._client: PrefectClient

    async def __aenter__(self) -> _Executors:
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

    def _has_no_hooks(self, flow_run_id: UUID) -> bool:
        return self.has_said(flow_run_id, _NO_HOOKS)

    async def _run(self, flow_run: FlowRun, task_status: anyio.abc.TaskStatus[int], line: int) -> ProcessWorkerResult:
        executor = FlowRunExecutor(
            flow_run=flow_run,
            starter=_ForkStarter(self._zygotes, self._channel, self._jobs[flow_run.id], line, self._proposer.notes),
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
            get_logger("phasewise.worker").warning("Could not end flow run %s: %s", flow_run_id, exc)

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
        await self.schedule_again(flow_run_id)

    async def schedule_again(self, flow_run_id: UUID) -> None:
        """Schedule a flow run again whose process has ended, unless it has come to its own end."""
        state = (await self._client.read_flow_run(flow_run_id)).state
        if state is None or not state.is_final():
            with contextlib.suppress(Abort, Pause):
                await propose_state(self._client, AwaitingRetry(), flow_run_id=flow_run_id)

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
class _LimitsMemory(anyio.abc.TaskStatus[int]):
    """Limits the memory of a process as soon as it is known which one runs the flow."""

    task_status: anyio.abc.TaskStatus[int]
    size_bytes: int

    def started(self, value: int | None = None) -> None:
        assert value is not None
        limit_memory(value, self.size_bytes)
        self.task_status.started(value)


class _Guards(anyio.abc.TaskStatus[int]):
    """Has a process that is not forked killed along with the worker, from when it is known until ``release``."""

    def __init__(self, task_status: anyio.abc.TaskStatus[int], zygotes: Zygotes) -> None:
        self._task_status = task_status
        self._zygotes = zygotes
        self.release: Callable[[], None] = lambda: None

    def started(self, value: int | None = None) -> None:
        assert value is not None
        self.release = self._zygotes.guard(value)
        self._task_status.started(value)


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

    def __init__(self, zygotes: Zygotes, channel: ControlChannel, job: Job, line: int, notes: dict[UUID, str]) -> None:
        self._notes = notes
        self._zygotes = zygotes
        self._channel = channel
        self._job = job
        self._line = line

    async def start(
        self,
        flow_run: FlowRun,
        task_status: anyio.abc.TaskStatus[ProcessHandle] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        env = dict(self._job.env)
        with contextlib.suppress(RuntimeError):  # no loopback listener: cancelling falls back to the signal alone
            port, token = self._channel.register(flow_run.id)
            env |= {"PREFECT__CONTROL_PORT": str(port), "PREFECT__CONTROL_TOKEN": token}
        arguments = {"entrypoint": self._job.entrypoint, "known": self._job.known, "api_url": env["PREFECT_API_URL"]}
        try:
            process = await self._zygotes.fork("phasewise.worker:run_flow_run", arguments, self._job, env, self._line)
        except BaseException:
            self._channel.unregister(flow_run.id)
            raise
        oom_kills = count_oom_kills()
        scope = create_isolated_termination_scope(process.pid)
        try:
            task_status.started(ProcessHandle(process, scope))  # type: ignore[arg-type] # it reads pid and returncode
            is_oom_kill = await process.wait() == -signal.SIGKILL and count_oom_kills() > oom_kills
            if process.is_lost:
                note = "The warm process that it was forked from has ended, and so have all runs that came from it."
                self._notes[flow_run.id] = f"{note} {_OUT_OF_MEMORY}." if is_oom_kill else note
            elif is_oom_kill:
                peak = process.peak_rss_bytes // 2**20
                self._notes[flow_run.id] = f"{_OUT_OF_MEMORY}; it used up to {peak} MiB."
        except BaseException:  # the worker is ending
            with contextlib.suppress(ProcessLookupError), anyio.move_on_after(_END_SECONDS, shield=True):
                scope.graceful_kill(process.pid)
                await process.wait_signalled()
            raise


class _Proposer(StateProposer):
    """Prefect's, which reports no crash of a run that the worker itself has stopped and released."""

    def __init__(self, *, client: PrefectClient) -> None:
        super().__init__(client=client)
        self.released: set[UUID] = set()
        #: What is known of why a run crashed, beside its exit code.
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

    def __init__(self, zygotes: Zygotes, jobs: dict[UUID, Job], has_none: Callable[[UUID], bool]) -> None:
        self._zygotes = zygotes
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
        process = await self._zygotes.fork("phasewise.worker:run_hooks", arguments, job, job.env)
        await process.wait()


# ── in the forkserver, before it forks ───────────────────────────────────────────────────────────────────────────


def warm_up() -> None:
    """Do once what Prefect would do in every flow run: none of it depends on the run."""
    import prefect._internal.version_checking as version_checking
    import prefect._internal.websockets as websockets
    import prefect.client.orchestration as orchestration
    from prefect import flow_engine
    from prefect.logging.handlers import PrefectConsoleHandler

    # Each client and socket reads the certificate authorities anew: five times a run, 22 ms and 1 MiB each.
    shared = _SharedContexts("ssl")
    for module in (version_checking, websockets, orchestration):
        module.ssl = shared  # type: ignore[attr-defined]
    shared.create_default_context(cafile=get_current_settings().api.ssl_cert_file or certifi.where())
    for model in _subclasses(BaseModel):
        if model.__module__.startswith("prefect.") and not model.__pydantic_complete__:
            with contextlib.suppress(Exception):  # it stays as it was: pydantic tries again on first use
                model.model_rebuild()
    # The console's highlighter compiles its twenty patterns when it has something to show.
    record = logging.LogRecord("prefect.flow_runs", logging.INFO, __file__, 1, "Warm.", None, None)
    PrefectConsoleHandler(stream=io.StringIO()).emit(record)
    flow_engine._send_heartbeats = _send_heartbeats
    flow_engine.observe_flow_run_suspension = _observe_suspension  # type: ignore[attr-defined] # its import of it


class _SharedContexts(ModuleType):
    """The module ``ssl``, but a default context is made once for the same arguments."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ssl, name)

    @functools.cached_property
    def create_default_context(self) -> Callable[..., ssl.SSLContext]:
        return functools.cache(ssl.create_default_context)


def _subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for subclass in model.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


# ── in the forked process ────────────────────────────────────────────────────────────────────────────────────────


def run_flow_run(entrypoint: str, api_url: str, known: dict[str, Any], descriptor: int) -> int:
    """Run the flow run that the environment names, as ``python -m prefect.engine`` would.

    ``known`` is what the worker has read already and the run would read again; what is missing there is read. On the
    socket ``descriptor`` the worker says when the run is suspended; the run says whether its flow has hooks, and hands
    over its events and logs.
    """
    from prefect.flow_engine import _main

    os.set_inheritable(descriptor, False)
    _use_known(known, api_url)
    _describe_flows_lazily()
    _Line.descriptor = descriptor
    _Line.outlet = Outlet(descriptor)
    _Line.outlet.install()
    for client in (SyncPrefectClient, PrefectClient):
        update = _with_pid(client.update_flow_run, os.environ["PREFECT__FLOW_RUN_ID"])
        client.update_flow_run = update  # type: ignore[method-assign]
    return _main([entrypoint])


def _use_known(known: dict[str, Any], api_url: str) -> None:
    """Put what the worker has read where Prefect would look for it, or instead of the function that would read it."""
    from prefect import flow_engine, results

    for url in (api_url, f"{api_url}/"):  # as the events client and as the others write it
        _cache_api_version_check(_api_version_check_key(url, prefect.__version__))
    now = datetime.now(UTC)
    for item in known.get("related", []):
        entry: dict[str, Any] = {"kind": item["kind"], "object": _KnownObject(item["labels"], item["tags"])}
        RESOURCE_CACHE[f"{item['kind']}.{item['key']}"] = (entry, now)  # type: ignore[assignment] # Prefect's own DateTime
    if "flow_run" in known:
        flow_run = FlowRun.model_validate(known["flow_run"])
        flow_engine.load_flow_run = lambda flow_run_id: flow_run
    if "result_storage" in known:
        block = known["result_storage"] and UUID(known["result_storage"])

        async def read_block() -> UUID | None:
            return block

        results._aread_server_default_result_storage_block_id = read_block
        results._read_server_default_result_storage_block_id = lambda: block


def _describe_flows_lazily() -> None:
    """Make the model and the schema of a flow's parameters when they are asked for, which a run does for its own alone.

    Prefect makes both for each flow that a file decorates: 3 ms for each, of a file with seven that is a seventh of all
    that a run costs.
    """
    from prefect import flows

    for name in ("parameter_schema", "ValidatedFunction"):
        setattr(flows, name, functools.partial(_Lazily, getattr(flows, name)))


class _Lazily:
    """What ``make`` returns for these arguments, made when something of it is asked for."""

    def __init__(self, make: Callable[..., Any], *args: Any, **options: Any) -> None:
        self._make = functools.cache(functools.partial(make, *args, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make(), name)

    def __reduce__(self) -> tuple[Any, ...]:  # a flow may be pickled to run elsewhere
        return copy.copy, (self._make(),)


def _with_pid(update: Callable[..., Any], own_id: str) -> Callable[..., Any]:
    """Let the update that the engine begins with carry the process id too, which a worker reports otherwise."""

    @functools.wraps(update)
    def update_flow_run(client: Any, flow_run_id: UUID, *args: Any, **changes: Any) -> Any:
        if str(flow_run_id) == own_id:
            _Line.outlet.note(_BEGUN)
            changes.setdefault("infrastructure_pid", str(os.getpid()))
        return update(client, flow_run_id, *args, **changes)

    return update_flow_run


@dataclass(frozen=True)
class _KnownObject:
    """What Prefect needs of an object to relate an event to it."""

    labels: dict[str, str]
    tags: list[str]

    def as_related_resource(self, role: str) -> RelatedResource:
        return RelatedResource({**self.labels, "prefect.resource.role": role})


class _Line:
    """The socket to the worker: where this process hears that its flow run was suspended."""

    descriptor: ClassVar[int]
    outlet: ClassVar[Outlet]
    _has_told: ClassVar[bool] = False

    @classmethod
    def tell_hooks(cls, flow: Flow[Any, Any]) -> None:
        """Say whether the flow of the run has hooks; flows that it calls, which come later, do not count."""
        if not cls._has_told:
            cls._has_told = True
            if not (flow.on_cancellation_hooks or flow.on_crashed_hooks):
                cls.outlet.note(_NO_HOOKS)


@contextlib.contextmanager
def _observe_suspension(
    flow_run_id: UUID, suspension_request: FlowRunSuspensionRequest, polling_interval: float = 10
) -> Iterator[None]:
    """Stand in for Prefect's: the worker listens for all its runs, instead of one events subscription a run."""

    def wait() -> None:
        if not os.read(_Line.descriptor, 1):
            return
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run_id).state
        if state is None or not is_suspended_flow_run_state(state):
            # It has been resumed already, elsewhere: this process must stop all the same.
            state = State(type=StateType.PAUSED, name="Suspended")
        suspension_request.mark_requested(state)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(wait,), name="suspension", daemon=True).start()
    yield


@contextlib.contextmanager
def _send_heartbeats(engine: BaseFlowRunEngine[Any, Any], join_on_exit: bool = True) -> Iterator[None]:
    """Stand in for Prefect's, which looks once a second whether to end, and every run waits for that look."""
    _Line.tell_hooks(engine.flow)
    try:
        with _heartbeats(engine, join_on_exit):
            yield
    except MemoryError as exc:
        if not exc.args and (limit := Settings().run_memory_limit):  # it becomes the message of the run's state
            exc.args = (f"A flow run may use {limit.human_readable()} of memory (PHASEWISE_RUN_MEMORY_LIMIT).",)
        raise


@contextlib.contextmanager
def _heartbeats(engine: BaseFlowRunEngine[Any, Any], join_on_exit: bool) -> Iterator[None]:
    seconds = engine.heartbeat_seconds
    if seconds is None:
        yield
        return
    resource, related = engine._build_heartbeat_event_template()
    ended = threading.Event()

    def beat() -> None:
        while not (engine.flow_run and engine.flow_run.state and engine.flow_run.state.is_final()):
            try:
                engine._emit_flow_run_heartbeat(resource, related)
            except Exception:
                engine.logger.debug("Failed to emit heartbeat", exc_info=True)
            if ended.wait(seconds):
                return

    # With the settings of the run, which a new thread would not have.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(beat,), name="heartbeats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        if join_on_exit:
            thread.join(timeout=2)


def run_hooks(entrypoint: str, flow_run: dict[str, Any], state: dict[str, Any]) -> None:
    """Run the hooks of the flow at *entrypoint* for *state*: those for a cancellation or those for a crash."""
    from prefect.flow_engine import _load_flow_from_runtime_entrypoint

    async def resolve(_: FlowRun) -> Flow[Any, Any]:
        return await asyncio.to_thread(_load_flow_from_runtime_entrypoint, entrypoint)

    hooks = HookRunner(resolve_flow=resolve)
    run, entered = FlowRun.model_validate(flow_run), State.model_validate(state)
    if entered.is_crashed():
        asyncio.run(hooks.run_crashed_hooks(run, entered))
    else:
        asyncio.run(hooks.run_cancellation_hooks(run, entered))


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phasewise.worker", description="Started by the stack.")
    parser.add_argument("--pool", required=True, help="name of the work pool")
    parser.add_argument("--name", required=True, help="name of this worker")
    parser.add_argument("--type", default=WarmProcessWorker.type, help="type of the worker and of a new pool")
    options = parser.parse_args(argv)
    worker_class = BaseWorker.get_worker_class_from_type(options.type)
    if worker_class is None:
        parser.error(f"unknown type {options.type!r}")
    asyncio.run(_serve(worker_class(work_pool_name=options.pool, name=options.name)))
    return 0


async def _serve(worker: BaseWorker[Any, Any, Any]) -> None:
    """Run *worker* until SIGTERM or SIGINT."""
    stop = anyio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    async with anyio.create_task_group() as group:

        async def work() -> None:
            await worker.start(printer=worker._logger.info)
            group.cancel_scope.cancel()

        group.start_soon(work)
        await stop.wait()
        if isinstance(worker, WarmProcessWorker):
            await worker.drain(Settings().drain_seconds)
        group.cancel_scope.cancel()
