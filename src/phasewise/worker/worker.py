"""The Prefect worker of the type ``warm-process``. Runs in the worker's process.

It is Prefect's process worker with two parts replaced. A flow run is forked from a process that has imported
everything already (``phasewise.forkserver``) instead of starting three Pythons, and new runs are claimed on the event
of their scheduling instead of at the next poll; the poll stays, as the fallback. What a fork cannot serve exactly as a
new process would (see ``_why_not_warm``) takes the process worker's own way, and the run's log says why.

Private names of Prefect are used for Prefect ``>=3.9.1,<4``; ``phasewise.patches`` lists them. The oldest and the
newest of these versions are tested (``make test-prefect-range``: 3.9.1).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast
from uuid import UUID

import anyio
import anyio.abc
import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.events import Event
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventAnyResourceFilter, EventFilter, EventNameFilter
from prefect.events.related import object_as_related_resource
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect.states import Pending
from prefect.utilities.filesystem import relative_path_to_current_platform
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult
from pydantic import BaseModel, PrivateAttr

from phasewise.forkserver.pool import ForkserverPool
from phasewise.forkserver.protocol import ForkserverDied
from phasewise.patches import entries
from phasewise.patches.registry import apply, may_apply, why_not
from phasewise.settings import Settings
from phasewise.system.memory import limit_memory
from phasewise.worker.claiming import LEAVE_SECONDS, Questions, Turns
from phasewise.worker.fork_job import (
    BEGUN,
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
from phasewise.worker.read_cache import Reads
from phasewise.worker.reaper import END_SECONDS, Caretaker, schedule_again

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Flow as APIFlow
    from prefect.client.schemas.objects import WorkPool
    from prefect.client.schemas.responses import DeploymentResponse, WorkerFlowRunResponse

    from phasewise.worker.executor import Executors

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
    "phasewise.worker.child",
    "duckdb",
    "phasewise.flows",
)
#: Called once, after the imports and before the first fork.
SETUP = ("phasewise.worker.warm_up:warm_up", "phasewise.lake.session:preload_extensions")

_CLAIM_ON = ("Scheduled", "Late", "AwaitingRetry", "AwaitingConcurrencySlot", "Resuming")
_FREES_A_SLOT = ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut", "Paused", "Suspended")
_HEARTBEAT_SECONDS = 5
#: Seconds after which a worker reports the process id of a run that has not yet done so itself.
_BEGIN_SECONDS = 3.0
#: Seconds for which a worker takes the flow of a deployment, and the server's default for results, as it read them.
_SETTLED_SECONDS = 5.0

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
        env = {**os.environ, **get_current_settings().to_environment_variables(exclude_unset=True)}
        max_runs = Settings().forkserver_runs
        self._forkservers = ForkserverPool(PRELOAD, SETUP, env=env, max_runs=max_runs, logger=self._logger)
        #: Deployment id → version of its code at its last run.
        self._versions: dict[UUID, str] = {}
        self._had_terminal = _has_terminal()
        self._jobs: dict[UUID, Job] = {}
        #: Those that run, whether forked or in a new Python.
        self._in_hand: set[UUID] = set()
        self._executors: Executors
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
            await self._warm.enter_async_context(self._forkservers)
            if may_apply(entries.FORK_RUNS):
                from phasewise.worker.executor import Executors  # which needs private names of Prefect

                self._executors = await self._warm.enter_async_context(Executors(self._forkservers, self._jobs))
            else:
                self._executors = cast("Executors", _NoExecutors())
            self._services = await self._warm.enter_async_context(anyio.create_task_group())
            self._warm.callback(self._services.cancel_scope.cancel)
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
        apply(entries.SHARE_READS, self._sharing, on=self.client)
        apply(entries.PID_WITH_BEGIN, lambda stock: functools.partial(self._update_flow_run, stock), on=self.client)

    def _sharing(self, read: Callable[[UUID], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        seconds = _SETTLED_SECONDS if read.__name__ == "read_flow" else 0
        return functools.partial(self._reads.share, read, seconds=seconds)

    async def _update_flow_run(self, update: Callable[..., Awaitable[Any]], flow_run_id: UUID, **changes: Any) -> None:
        """Leave it to a run to report its own process id, with what else it reports when it begins."""
        if flow_run_id in self._jobs and list(changes) == ["infrastructure_pid"]:
            self._services.start_soon(self._report_pid, update, flow_run_id, changes["infrastructure_pid"])
        else:
            await update(flow_run_id, **changes)

    async def _report_pid(self, update: Callable[..., Awaitable[Any]], flow_run_id: UUID, pid: str) -> None:
        await anyio.sleep(_BEGIN_SECONDS)
        if flow_run_id in self._jobs and not self._executors.has_said(flow_run_id, BEGUN):
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
            task_status = _Tells(task_status, lambda pid: limit_memory(pid, limit))
        self._in_hand.add(flow_run.id)
        try:
            return await self._run(flow_run, configuration, task_status)
        finally:
            self._in_hand.discard(flow_run.id)

    async def _run(
        self, flow_run: FlowRun, configuration: ProcessJobConfiguration, task_status: anyio.abc.TaskStatus[int] | None
    ) -> ProcessWorkerResult:
        reason = await self._why_not_warm(configuration)
        if reason is not None:
            self.get_flow_run_logger(flow_run).info("Starting a new Python for this run: %s", reason)
            with contextlib.ExitStack() as guards:  # until its end the process is killed along with the worker
                guarding = _Tells(task_status, lambda pid: guards.callback(self._forkservers.guard(pid)))
                try:
                    return await super().run(flow_run, configuration, guarding)
                except asyncio.CancelledError:  # the worker is ending, and the process of the run has
                    if self._draining:
                        with anyio.move_on_after(END_SECONDS, shield=True):
                            await schedule_again(self.client, flow_run.id)
                    raise
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
        if reason := why_not(entries.FORK_RUNS):
            return f"nothing is forked with this version of Prefect: {reason}."
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
        if names := differing_variables(self._forkservers.env, configuration.env):
            return f"its environment differs in {', '.join(names)}, which is read when Python or Prefect starts."
        try:
            await self._forkservers.current()
        except ForkserverDied as exc:
            return f"the forkserver does not start: {exc}"
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
        self._forkservers.replace(f"{deployment.name} has a new version.")

    def _on_hangup(self) -> None:
        if self._had_terminal and not _has_terminal():
            os.kill(os.getpid(), signal.SIGTERM)  # as without us: the terminal that it was started in is gone
        else:
            self._forkservers.replace("SIGHUP.")

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

        It replaces the process worker's observers: one for the worker, and one more for each run.
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
            except Exception as exc:  # noqa: BLE001 - whatever breaks the socket, polling continues and we reconnect
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


class _NoExecutors:
    """What a worker has where runs cannot be forked: each is run by Prefect's own code."""

    reported: ClassVar[frozenset[UUID]] = frozenset()

    def is_running(self, flow_run_id: UUID) -> bool:
        del flow_run_id
        return False

    def running(self) -> frozenset[UUID]:
        return frozenset()

    def suspend(self, flow_run_id: UUID) -> None:
        """Leave it to the run: it listens for itself."""


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


def _has_terminal() -> bool:
    try:
        os.close(os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class _Tells(anyio.abc.TaskStatus[int]):
    """Calls *tell* with the process id as soon as it is known which process runs the flow."""

    task_status: anyio.abc.TaskStatus[int] | None
    tell: Callable[[int], object]

    def started(self, value: int | None = None) -> None:
        assert value is not None
        self.tell(value)
        if self.task_status is not None:
            self.task_status.started(value)
