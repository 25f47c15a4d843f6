"""The protocol of flow runs: submit many, watch them end, restart and cancel them.

``FlowRuns`` is what the orchestrator works with. ``phasewise.orchestration.prefect_runs`` adapts it to a Prefect
server, ``phasewise.local.runs`` needs no server, and ``phasewise.testing.flow_runs`` keeps runs in memory for tests.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from prefect import Task
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext
from prefect.logging import get_logger
from prefect.settings import get_current_settings
from prefect.types import KeyValueLabels

from phasewise.errors import PhasewiseError, SourceUnavailable
from phasewise.orchestration.run_reads import SUMMARY_PREFIX
from phasewise.outcomes import StepOutcome


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """A flow run that should exist."""

    #: ``flow name/deployment name``.
    deployment: str
    #: Name of the flow run; None lets the server choose one.
    name: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    #: Idempotency key: two requests with one key are one flow run.
    key: str | None = None
    #: Requests with one group share a node of the parent's task runs; a fan-out is one group.
    group: str | None = None
    #: Phase and step of the pipeline that it is for, and its item in a fan-out; its outcomes say so.
    phase: str | None = None
    step: str | None = None
    item: str | None = None


class FlowRuns(Protocol):
    """Where flow runs live."""

    async def submit(self, requests: Sequence[RunRequest]) -> list[str]:
        """Make each request's flow run exist and be on its way; return the run ids in the order of *requests*.

        A run that exists for the key and has completed, or is still on its way, is returned as it is; one that
        failed, crashed or was cancelled is scheduled again under its own id.

        Raises:
            DeploymentMissing: a deployment does not exist.
        """
        ...

    def watch(self, run_ids: Sequence[str]) -> AsyncIterator[StepOutcome]:
        """Yield the outcome of each run once, as it becomes final."""
        ...

    async def restart(self, run_ids: Collection[str]) -> None:
        """Schedule each run again, under its own id, that is final and did not complete."""
        ...

    async def cancel(self, run_ids: Collection[str]) -> None:
        """Ask each run that is not final, and everything below all of them, to end; final ones stay as they are."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """The flow run that this code runs in, where a process tree replaces the server (``phasewise.local.runs``)."""

    run_id: str
    #: Where the runs below it live.
    flow_runs: FlowRuns
    #: Returns all flow runs of the batch, parents before children.
    read_runs: Callable[[], list[StepOutcome]]
    #: What ``report_summary`` was told.
    summary: dict[str, Any] = field(default_factory=dict)


#: Set while code runs below ``phasewise run --local``; None where a server records the runs, and outside of runs.
LOCAL_RUN: ContextVar[LocalRun | None] = ContextVar("LOCAL_RUN", default=None)


def has_server() -> bool:
    """Tell whether what runs now is recorded on a server."""
    if LOCAL_RUN.get() is not None:
        return False
    return FlowRunContext.get() is not None or get_current_settings().api.url is not None


def current_run_id() -> str | None:
    """Return the id of the flow run that this code runs in; None outside of one."""
    if (local := LOCAL_RUN.get()) is not None:
        return local.run_id
    context = FlowRunContext.get()
    return str(context.flow_run.id) if context is not None and context.flow_run is not None else None


def report_summary(summary: Mapping[str, Any]) -> None:
    """Keep small results (numbers, short texts) of the current flow run on the server, for its parent to read.

    They travel as labels of the flow run, so no result storage has to be shared between machines. Outside of a flow
    run this does nothing.
    """
    small = {key: value for key, value in summary.items() if isinstance(value, (str, int, float, bool))}
    if (local := LOCAL_RUN.get()) is not None:
        local.summary.update(small)
        return
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    labels: KeyValueLabels = {f"{SUMMARY_PREFIX}{key}": value for key, value in small.items()}
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(context.flow_run.id, labels)


def may_help(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Tell whether a task that failed could succeed again: a lost connection may come back, a missing table does not.

    The ``retry_condition_fn`` of a task.
    """
    try:
        state.result(raise_on_failure=True)
    except Exception as exc:  # noqa: BLE001 - whatever the task raised is what is looked at
        return isinstance(exc, SourceUnavailable) or not isinstance(exc, PhasewiseError)
    return False


def current_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Return the logger of the current flow run, or the package's own outside of one."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return get_logger("phasewise")
    from prefect.logging.loggers import flow_run_logger

    return flow_run_logger(context.flow_run, context.flow)
