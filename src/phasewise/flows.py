"""The seven flows. The only module that imports both planes: Prefect around, DuckDB inside.

Each flow also runs alone, as a plain call: with ``PREFECT_API_URL`` set it is recorded on that server, without a
server it just runs in this process; those that wait for others run them in a process tree below it.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast
from uuid import uuid4

import httpx
from prefect import Flow, Task, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext
from prefect.exceptions import Abort
from prefect.flow_engine import run_flow_async
from prefect.settings import get_current_settings

from phasewise import sources
from phasewise.errors import (
    BatchCancelled,
    FlowRunsFailed,
    PhasewiseError,
    SchemaDrift,
    SourceError,
    SourceUnavailable,
    TableMissing,
    UnfaithfulValue,
    UnknownBatch,
)
from phasewise.lake.warehouse import prepare_lake
from phasewise.local.runs import LocalFlowRuns
from phasewise.orchestration.batch_lock import claiming_project, ending_when_cancelled, hold_project
from phasewise.orchestration.batches import resume_batch
from phasewise.orchestration.deployments import plan_deployments
from phasewise.orchestration.fan_out_order import order_longest_first
from phasewise.orchestration.flow_runs import LOCAL_RUN, FlowRuns, current_logger, report_summary
from phasewise.orchestration.phases import run_phases, start_phase
from phasewise.orchestration.prefect_runs import current_flow_runs
from phasewise.orchestration.run_history import read_batch_runs, read_durations
from phasewise.outcomes import StepOutcome
from phasewise.project.config import Project, find_project, load_project, redact_url, resolve_table
from phasewise.project.pipeline import BATCH, FanOut, Phase, Step, load_phases
from phasewise.publishing.maintenance import LakeMaintenance, maintain_lake
from phasewise.publishing.staging_cleanup import StagingCleanup, remove_finished_staging
from phasewise.report.finish import finish_batch
from phasewise.settings import Settings
from phasewise.staging.batch import (
    begin_batch,
    give_up_tables,
    list_batches,
    new_batch_id,
    prepare_staging,
    remember_lake,
)
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import Manifest, name_manifest
from phasewise.staging.partition_plan import plan_partitions
from phasewise.staging.partitions import SplitTable, name_item
from phasewise.staging.source_snapshot import forget_snapshot, open_snapshot
from phasewise.system.processes import identify_process

P = ParamSpec("P")
R = TypeVar("R")


class _EtlFlow(Flow[P, R]):
    """A flow that is a plain function call where there is no server to record it."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:  # type: ignore[override]  # Prefect overloads it
        if _has_server():
            return super().__call__(*args, **kwargs)
        function: Callable[[], Any] = partial(self.fn, *args, **kwargs)
        if self.isasync and LOCAL_RUN.get() is None:  # those that wait for other flows
            return _run_locally(self.name, function, str(uuid4()))
        return function()


def _etl_flow(name: str, **options: Any) -> Callable[[Callable[P, R]], _EtlFlow[P, R]]:
    def decorate(function: Callable[P, R]) -> _EtlFlow[P, R]:
        # Results travel as labels of the run (report_summary); stored ones would have to be shared between machines.
        return _EtlFlow(function, name=name, persist_result=False, **options)

    return decorate


def _has_server() -> bool:
    if LOCAL_RUN.get() is not None:
        return False
    return FlowRunContext.get() is not None or get_current_settings().api.url is not None


def _run_task(the_task: Task[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a task; outside of a flow run call its function, with the same retries."""
    if FlowRunContext.get() is not None:
        return the_task(*args, **kwargs)
    for attempt in range(the_task.retries + 1):
        try:
            return the_task.fn(*args, **kwargs)
        except Exception as exc:
            if attempt == the_task.retries or not _is_passing(exc):
                raise
            current_logger().warning("%s; trying again.", exc)
            time.sleep(_RETRY_DELAYS[attempt])
    raise AssertionError("unreachable: the last attempt returns or raises")


#: Seconds before the second and the third attempt.
_RETRY_DELAYS: list[float] = [1, 5]


def _is_passing(exc: BaseException) -> bool:
    """Return whether trying again could help: a lost connection may come back, a missing table does not."""
    return isinstance(exc, SourceUnavailable) or not isinstance(exc, PhasewiseError)


def _should_retry(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    try:
        state.result(raise_on_failure=True)
    except Exception as exc:  # noqa: BLE001 - whatever the task raised is what is looked at
        return _is_passing(exc)
    return False


def _load() -> tuple[Project, Settings]:
    settings = Settings()
    return load_project(find_project(settings)), settings


def _own_run_id() -> str | None:
    if (local := LOCAL_RUN.get()) is not None:
        return local.run_id
    context = FlowRunContext.get()
    return str(context.flow_run.id) if context is not None and context.flow_run is not None else None


def _flow_runs(project: Project, settings: Settings) -> FlowRuns:
    # All projects of a server share the deployments, which name the project that was deployed last: what belongs to
    # a batch is told which project the batch is of.
    environment = {"PHASEWISE_PROJECT": str(project.root)}
    return current_flow_runs(poll_seconds=settings.poll_seconds, environment=environment)


async def run_here(resume: str | None = None) -> dict[str, Any]:
    """Run ``main_etl`` in this process, recorded on the server; *resume* is the id of a batch that did not complete.

    Raises:
        FlowRunsFailed: a step did not complete; no later phase was started.
        BatchRunning: another batch of the project is running, or *resume* has not ended.
        BatchCancelled: it was cancelled, in the UI or by command.
    """
    try:
        if resume is None:
            result = await main_etl()
        else:
            run = await resume_batch(resume, process=identify_process(os.getpid()))
            result = await run_flow_async(main_etl, flow_run=run)
    except Abort as exc:
        raise BatchCancelled(str(exc), hint="What it staged is kept for a resume: phasewise resume") from exc
    return cast("dict[str, Any]", result)


async def run_local(resume: str | None = None) -> dict[str, Any]:
    """Run ``main_etl`` and everything below it in one process tree, without a server.

    *resume* is the id of a batch that did not complete, or the beginning of it: what it staged is not extracted again.
    Returns what ``main_etl`` returns.

    Raises:
        FlowRunsFailed: a step did not complete; no later phase was started.
        BatchRunning: another batch of the project is running.
        UnknownBatch: nothing is staged for *resume*.
    """
    batch = str(uuid4()) if resume is None else _find_local_batch(resume)
    return await _run_locally(main_etl.name, main_etl.fn, batch)


def _find_local_batch(prefix: str) -> str:
    project, _ = _load()
    found = [batch.id for batch in list_batches(project) if batch.id.startswith(prefix.lower())]
    if len(found) != 1:
        raise UnknownBatch(
            f'{len(found) or "No"} batches in {project.staging} begin with "{prefix}".',
            hint="Name one of the folders there.",
        )
    return found[0]


async def _run_locally(name: str, function: Callable[[], Awaitable[dict[str, Any]]], run_id: str) -> dict[str, Any]:
    """Await *function* as the flow run *run_id*, with a process tree for the flow runs below it."""
    project, settings = _load()
    deployments = plan_deployments(load_phases(project.root, project.pipeline.phases), project.root)
    flow_runs = LocalFlowRuns(
        {deployment.full_name: deployment for deployment in deployments},
        table_concurrency=settings.table_concurrency,
        cancel_grace_seconds=settings.cancel_grace_seconds,
        preload=("duckdb", "phasewise.flows"),
        setup=("phasewise.lake.session:preload_extensions",),
        environment={"PHASEWISE_PROJECT": str(project.root)},
    )
    async with (
        hold_project(project.staging, run_id, on_overlap=project.pipeline.on_overlap),
        flow_runs,
        flow_runs.running(name, run_id),
    ):
        return await function()


@_etl_flow("main-etl-job")
async def main_etl() -> dict[str, Any]:
    """Load, audit and publish all tables of the project: one run is one batch.

    Returns ``{"<step>_run_id": id, ..., "status": "completed"}``.

    Raises:
        FlowRunsFailed: a step did not complete; it names each, and no later phase was started.
        BatchRunning: another batch of the project is running.
    """
    logger = current_logger()
    logger.info("Starting ETL flow...")
    project, settings = _load()
    batch = _own_run_id()
    assert batch is not None, "without a server it is called within a local run"
    async with _being_the_batch(project):
        outcome = await run_phases(
            load_phases(project.root, project.pipeline.phases),
            batch=batch,
            timeout=project.pipeline.timeout,
            crash_retries=settings.crash_retries,
            flow_runs=_flow_runs(project, settings),
        )
    logger.info("ETL flow completed successfully.")
    steps = [step for phase in outcome.phases for step in phase.steps]
    return {f"{step.step}_run_id": step.run_id for step in steps} | {"status": "completed"}


@asynccontextmanager
async def _being_the_batch(project: Project) -> AsyncIterator[None]:
    """Be the one batch of the project while the block runs; a local run holds it already."""
    context = FlowRunContext.get()
    if LOCAL_RUN.get() is not None or context is None or context.flow_run is None:
        yield
        return
    run = context.flow_run
    on_overlap = project.pipeline.on_overlap
    async with ending_when_cancelled(run), claiming_project(run, project.root, project.staging, on_overlap=on_overlap):
        yield


@_etl_flow("pre-etl-job")
def pre_etl(batch_id: str | None = None) -> dict[str, Any]:
    """Validate the sources, set up connections and prepare the workspace; report every failure, not the first alone."""
    del batch_id  # every step is told which batch it belongs to; validation is the same for all of them
    return _run_task(pre_etl_task)


@task(name="pre-etl-task", tags={"pre-processing"})
def pre_etl_task() -> dict[str, Any]:
    project, settings = _load()
    problems = sources.check_project(project, settings)
    for prepare in (prepare_staging, prepare_lake):
        try:
            prepare(project, settings)
        except PhasewiseError as exc:
            problems.append(exc)
    if problems:
        raise _combine(problems)
    tables = sources.list_project_tables(project, sources.open_source(project, settings))
    current_logger().info("%d tables found in %s", len(tables), redact_url(project.source.url))
    return {"status": "pre_etl_complete", "sources_validated": True, "tables": len(tables)}


def _combine(problems: list[PhasewiseError]) -> PhasewiseError:
    if len(problems) == 1:
        return problems[0]
    lines = "\n".join(f"- {problem}" for problem in problems)
    return PhasewiseError(f"{len(problems)} checks failed:\n{lines}")


@_etl_flow("sub-etl-job")
async def sub_etl(batch_id: str | None = None) -> dict[str, Any]:
    """Stage all tables of the project in parallel, large ones in parts, then run both cleanups in parallel."""
    project, settings = _load()
    batch = batch_id or _own_run_id() or new_batch_id()
    tables = sources.list_project_tables(project, sources.open_source(project, settings))
    tables = list(begin_batch(project, batch, tables).tables)
    remember_lake(project, settings, batch)
    with open_snapshot(project, settings, batch) as snapshot:
        if snapshot is not None and snapshot.get("remark"):
            current_logger().warning("Source: %s", snapshot["remark"])
        splits = plan_partitions(project, settings, batch, snapshot)
        for split in splits.values():
            if split.note:
                current_logger().warning("%s: %s", split.table, split.note)
        failed = await _stage_tables(project, settings, batch, _plan_fan_out(project, settings, tables, splits))
    await _clean_up(project, settings, batch)
    return {"completed_tables": len(tables) - failed} | ({"failed_tables": failed} if failed else {})


#: Errors that no retry mends before someone has changed the source.
_SOURCE_AT_FAULT = (TableMissing.__name__, SchemaDrift.__name__, UnfaithfulValue.__name__)


def _plan_fan_out(project: Project, settings: Settings, tables: list[str], splits: Mapping[str, SplitTable]) -> FanOut:
    """Return one flow run per table, or per part of a table that is split, those first that will take longest."""
    parts = {
        name_item(table, part.name): {"table": table, "partition": part.name}
        for table, split in splits.items()
        for part in split.partitions
    }
    items = [table for table in tables if table not in splits or not splits[table].partitions] + list(parts)
    return FanOut(
        name="process_table_etl",
        deployment="process-table-etl/process-table-etl-deployment",
        parameters={"batch_id": BATCH},
        over="table",
        items=_order(project, settings, items, splits),
        parts=parts,
        allow_failed=project.pipeline.allow_failed,
    )


def _order(project: Project, settings: Settings, items: list[str], splits: Mapping[str, SplitTable]) -> list[str]:
    """Return *items* with those first that will take longest: by past batches, else by the rows of the source."""
    durations: dict[str, float] = {}
    with suppress(httpx.HTTPError):  # the order is not worth a batch
        durations = read_durations("process-table-etl", max_runs=3 * len(items)) if _has_server() and items else {}
    source = sources.open_source(project, settings)
    sizes = {
        name_item(split.table, part.name): split.rows // len(split.partitions)
        for split in splits.values()
        for part in split.partitions
    }
    for table in items:
        if table in sizes:
            continue
        with suppress(SourceError):  # its own flow run reports what is wrong with it
            estimate = source.describe_table(table).row_estimate
            sizes |= {table: estimate} if estimate is not None else {}
    return order_longest_first(items, durations=durations, sizes=sizes)


async def _stage_tables(project: Project, settings: Settings, batch: str, fan_out: FanOut) -> int:
    """Stage the items of *fan_out* and return how many tables failed within the failure budget."""
    logger = current_logger()
    logger.info("Triggering %d instances of %s...", len(fan_out.items), fan_out.flow_name)
    phase = Phase(name="tables", steps=[fan_out])
    started = await start_phase(
        phase, batch=batch, crash_retries=settings.crash_retries, flow_runs=_flow_runs(project, settings)
    )
    logger.info("Waiting for all %d ETL subflows to complete...", len(fan_out.items))
    try:
        failed = (await started.wait()).tolerated
    except FlowRunsFailed as exc:
        if any(name in outcome.message for outcome in exc.outcomes for name in _SOURCE_AT_FAULT):
            forget_snapshot(project, batch)
        raise
    # The parts of one table give up the whole: readers never get some of them.
    reasons: dict[str, list[str]] = {}
    for run in failed:
        reasons.setdefault(fan_out.find_whole(run.item or ""), []).append(run.describe())
    give_up_tables(project, batch, {table: "; ".join(lines) for table, lines in reasons.items()})
    if failed:
        logger.warning("%d of %d ETL subflows failed, within the budget", len(failed), len(fan_out.items))
    else:
        logger.info("All %d ETL subflows completed successfully", len(fan_out.items))
    return len(reasons)


async def _clean_up(project: Project, settings: Settings, batch: str) -> None:
    current_logger().info("Starting cleanup subflows...")
    steps = [_cleanup_step("cleanup_flow1", "cleanup-flow-1"), _cleanup_step("cleanup_flow2", "cleanup-flow-2")]
    phase = Phase(name="cleanup", steps=steps)
    started = await start_phase(
        phase, batch=batch, crash_retries=settings.crash_retries, flow_runs=_flow_runs(project, settings)
    )
    await started.wait()
    current_logger().info("Cleanup completed")


def _cleanup_step(name: str, flow_name: str) -> Step:
    return Step(name=name, deployment=f"{flow_name}/{flow_name}-deployment", parameters={"batch_id": BATCH})


@_etl_flow("process-table-etl")
def process_table_etl(table: str, batch_id: str | None = None, partition: str | None = None) -> dict[str, Any]:
    """Extract *table* into the staging of the batch (a new batch when none is given) and write its manifest.

    With *partition* only that part of a table which the batch has split, such as ``2/4``.
    """
    manifest = _run_task(sql_query_task, table, batch_id or new_batch_id(), partition)
    summary = {
        "table": manifest.table,
        **({"partition": manifest.partition} if manifest.partition else {}),
        "rows": manifest.rows,
        "size_bytes": manifest.size_bytes,
        "seconds": round(manifest.seconds, 3),
        "manifest": name_manifest(manifest),
    }
    report_summary(summary)
    return {"status": "table_complete", "batch_id": manifest.batch, **summary}


@task(
    name="sql-query-task",
    tags={"database"},
    retries=2,
    retry_delay_seconds=_RETRY_DELAYS,
    retry_condition_fn=_should_retry,
)
def sql_query_task(table: str, batch: str, partition: str | None) -> Manifest:
    project, settings = _load()
    known = sources.list_project_tables(project, sources.open_source(project, settings))
    table = resolve_table(table, known)
    manifest = extract_table(project, settings, batch=batch, table=table, partition=partition)
    current_logger().info(
        "%s: %d rows, %d bytes staged in %.2f s",
        name_item(table, partition),
        manifest.rows,
        manifest.size_bytes,
        manifest.seconds,
    )
    return manifest


@_etl_flow("cleanup-flow-1")
def cleanup_flow1(batch_id: str | None = None) -> dict[str, Any]:
    """Remove the staging of batches that are published or given up; never of *batch_id*, the one that is running."""
    removed = _run_task(cleanup_task_1, batch_id)
    summary = {"removed_batches": len(removed.removed), "freed_bytes": removed.freed_bytes}
    report_summary(summary)
    return {"status": "cleanup_complete", **summary}


@task(name="cleanup-task-1")
def cleanup_task_1(batch: str | None) -> StagingCleanup:
    project, settings = _load()
    return remove_finished_staging(project, settings, keep={batch} if batch else set())


@_etl_flow("cleanup-flow-2")
def cleanup_flow2(batch_id: str | None = None) -> dict[str, Any]:
    """Maintain the lake: expire snapshots past their retention, compact, delete files that nothing refers to."""
    del batch_id  # the lake's maintenance is the same for every batch
    done = asdict(_run_task(cleanup_task_2))
    report_summary(done)
    return {"status": "cleanup_complete", **done}


@task(name="cleanup-task-2")
def cleanup_task_2() -> LakeMaintenance:
    project, settings = _load()
    return maintain_lake(project, settings)


@_etl_flow("final-etl-job")
def final_etl(batch_id: str | None = None) -> dict[str, Any]:
    """Audit the staged tables, publish all of them at once, build the marts and write the report.

    Without *batch_id* it takes the newest staged batch that is not published; when there is none, it audits the
    published tables again and renews marts and report.

    Raises:
        AuditFailed: a blocking audit found bad rows; nothing was published.
        NothingStaged: there is no staged batch, and nothing was ever published.
    """
    result = _run_task(final_etl_task, batch_id)
    report_summary({key: value for key, value in result.items() if key != "status"})
    return result


@task(name="final-etl-task", tags={"post-processing"})
def final_etl_task(batch_id: str | None) -> dict[str, Any]:
    project, settings = _load()
    return finish_batch(project, settings, batch_id, logger=current_logger(), read_runs=_batch_runs)


def _batch_runs(batch: str) -> list[StepOutcome]:
    """Return the flow runs of a batch that a ``main_etl`` run stands for; none where no server recorded them."""
    if (local := LOCAL_RUN.get()) is not None:
        return local.read_runs()
    if not _has_server() or batch.startswith("manual-"):
        return []
    return read_batch_runs(batch)
