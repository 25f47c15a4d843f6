"""Prefect's engine without a server: flows and tasks are called, with their retries. Runs in both processes.

A flow that runs here sees what it would see anywhere: ``get_run_logger``, ``prefect.runtime.flow_run``, tasks that
are called, submitted and mapped. Their caching, hooks, timeouts and concurrency limits by tag need a server and are
left out.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from uuid import UUID

from prefect import Flow, Task, task_engine
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.flows import load_flow_from_entrypoint
from prefect.futures import resolve_futures_to_results
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_LOGGING_TO_API_ENABLED,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    get_current_settings,
    temporary_settings,
)
from prefect.states import Completed, Failed
from prefect.utilities.callables import call_with_parameters
from prefect.utilities.importtools import load_script_as_module
from pydantic import TypeAdapter

from phasewise.errors import OrchestrationError, PhasewiseError, PipelineInvalid
from phasewise.orchestration.flow_runs import LOCAL_RUN, LocalRun, current_logger
from phasewise.outcomes import StepOutcome
from phasewise.patches import entries
from phasewise.patches.registry import apply, why_not

#: Variable that tells the forkserver which flows to load: JSON of their entry points, each with its root or null.
FLOWS = "PHASEWISE_LOCAL_FLOWS"

#: How a list of flow runs travels between processes.
OUTCOMES = TypeAdapter(list[StepOutcome])

_WITHOUT_SERVER = {PREFECT_LOGGING_TO_API_ENABLED: False, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False}

_stopping = threading.Event()


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one attempt at a flow run ended."""

    state_type: str
    message: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)


@functools.cache
def load_flow(entrypoint: str, root: Path | None) -> Flow[..., Any]:
    """Return the flow at *entrypoint*; one that names a file is relative to *root*. A file is run once a process."""
    if root is None:
        flow: Flow[..., Any] = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
        return flow
    file, _, function = entrypoint.rpartition(":")
    found: Any = getattr(_load_file(root / file), function, None)
    if not isinstance(found, Flow):
        raise PipelineInvalid(f'{root / file} has no flow "{function}".', hint="Decorate the function with @flow.")
    return found


@functools.cache
def _load_file(path: Path) -> ModuleType:
    return load_script_as_module(str(path))


@contextmanager
def entering_flow_run(
    local: LocalRun, *, name: str, flow: Flow[..., Any] | None = None, parameters: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Make *local* the current flow run of this context, for Phasewise and for Prefect, while the block runs."""
    # Prefect's own records, without what only a server knows.
    known: dict[str, Any] = {"id": UUID(local.run_id), "name": name, "flow_id": None, "tags": [], "labels": {}}
    seen: dict[str, Any] = {"flow": flow, "flow_run": FlowRun.model_construct(**known)}
    context = FlowRunContext.model_construct(**seen, parameters=dict(parameters or {}))
    with ExitStack() as stack:
        stack.callback(LOCAL_RUN.reset, LOCAL_RUN.set(local))
        settings = get_current_settings()
        # Where Prefect would talk to a server, or start one of its own.
        if settings.api.url is not None or settings.logging.to_api.enabled or settings.server.ephemeral.enabled:
            stack.enter_context(temporary_settings(_WITHOUT_SERVER, restore_defaults={PREFECT_API_URL}))
        if flow is not None:
            context.task_runner = stack.enter_context(flow.task_runner.duplicate())
        stack.enter_context(context)
        yield


def describe_failure(exc: Exception) -> Ending:
    """Return how an attempt ended that raised *exc*, which is logged."""
    if not isinstance(exc, PhasewiseError):  # ours say all there is to say in their message
        current_logger().exception("Encountered exception during execution")
    return Ending(state_type="FAILED", message=f"{type(exc).__name__}: {exc}")


class NoFlowRuns:
    """``FlowRuns`` of a flow that cannot have any below it, since it has a process of its own or is no async flow."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise OrchestrationError(
            f"{self._name} cannot start flow runs in a local run: it has a process of its own.",
            hint='Make it an async flow, and give its step work_queue="orchestrators".',
        )

    submit = watch = restart = cancel = _refuse


# ── calls of flows and tasks ─────────────────────────────────────────────────────────────────────────────────────


def install() -> None:
    """Have flows and tasks that are called within a local run run here; outside of one Prefect's engine stays.

    Raises:
        OrchestrationError: Prefect's engine cannot be replaced, and it records all runs at a server.
    """
    if getattr(task_engine.run_task, "__module__", "") == __name__:
        return
    ours: dict[str, Callable[..., Any]] = {
        "run_task": _run_task,
        "run_task_sync": _run_task_sync,
        "run_task_async": _run_task_async,
        "run_flow": _run_flow,
    }
    for patch in (entries.LOCAL_TASKS, entries.LOCAL_FLOWS):
        if not apply(patch, lambda stock: _choose(ours[stock.__name__], stock)):
            raise OrchestrationError(
                f"A local run needs the patch {patch.name}: {why_not(patch)}.",
                hint="Use a server: phasewise run-distributed.",
            )


def _choose(local: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if LOCAL_RUN.get() is None else local(*args, **kwargs)

    return run


def _run_flow(flow: Flow[..., Any], parameters: dict[str, Any] | None = None, **options: Any) -> Any:
    if options.get("return_type") == "state":
        raise OrchestrationError(f"{flow.name} was called with return_state=True, which a local run does not know.")
    return call_flow(flow, parameters or {})


def stop_retrying() -> None:
    """Try nothing again from now on: this process was asked to end."""
    _stopping.set()


def call_flow(flow: Flow[..., Any], parameters: Mapping[str, Any]) -> Any:
    arguments = flow.validate_parameters(dict(parameters)) if flow.should_validate_parameters else dict(parameters)
    attempts = _Attempts(name=flow.name, retries=flow.retries or 0, delays=flow.retry_delay_seconds)
    return _call_async(flow.fn, arguments, attempts) if flow.isasync else _call(flow.fn, arguments, attempts)


def _run_task(task: Task[..., Any], **options: Any) -> Any:
    return _run_task_async(task, **options) if task.isasync else _run_task_sync(task, **options)


def _run_task_sync(task: Task[..., Any], **options: Any) -> Any:
    arguments, attempts, is_state = _prepare(task, options)
    if not is_state:
        return _call(task.fn, arguments, attempts)
    try:
        return Completed(data=_call(task.fn, arguments, attempts))
    except Exception as exc:  # noqa: BLE001 - the state carries it to whoever asks for the result
        return Failed(data=exc, message=str(exc))


async def _run_task_async(task: Task[..., Any], **options: Any) -> Any:
    arguments, attempts, is_state = _prepare(task, options)
    if not is_state:
        return await _call_async(task.fn, arguments, attempts)
    try:
        return Completed(data=await _call_async(task.fn, arguments, attempts))
    except Exception as exc:  # noqa: BLE001 - as above
        return Failed(data=exc, message=str(exc))


def _prepare(task: Task[..., Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], _Attempts, bool]:
    resolve_futures_to_results(options.get("wait_for") or ())
    arguments: dict[str, Any] = resolve_futures_to_results(options.get("parameters") or {})
    attempts = _Attempts(name=task.name, retries=task.retries, delays=task.retry_delay_seconds, task=task)
    return arguments, attempts, options.get("return_type") == "state"


@dataclass(kw_only=True)
class _Attempts:
    """Counts attempts, and says whether there is another one."""

    name: str
    retries: int
    delays: float | list[float] | None
    task: Task[..., Any] | None = None
    failed: int = 0

    def has_another(self, exc: Exception) -> bool:
        self.failed += 1
        if self.failed > self.retries or _stopping.is_set() or not self._may_help(exc):
            return False
        current_logger().warning("%s: %s; trying again.", self.name, exc)
        return True

    def _may_help(self, exc: Exception) -> bool:
        if self.task is None or self.task.retry_condition_fn is None:
            return True
        state: State[Any] = Failed(data=exc, message=str(exc))
        # There is no task run to show; conditions look at the state.
        condition: Callable[..., Any] = self.task.retry_condition_fn
        return bool(condition(self.task, None, state))

    @property
    def delay(self) -> float:
        if isinstance(self.delays, list):
            return self.delays[min(self.failed, len(self.delays)) - 1] if self.delays else 0.0
        return self.delays or 0.0


def _call(function: Callable[..., Any], arguments: dict[str, Any], attempts: _Attempts) -> Any:
    while True:
        try:
            return call_with_parameters(function, arguments)
        except Exception as exc:
            if not attempts.has_another(exc):
                raise
            time.sleep(attempts.delay)


async def _call_async(function: Callable[..., Any], arguments: dict[str, Any], attempts: _Attempts) -> Any:
    while True:
        try:
            result: Any = call_with_parameters(function, arguments)
            return await result
        except Exception as exc:
            if not attempts.has_another(exc):
                raise
            await asyncio.sleep(attempts.delay)
