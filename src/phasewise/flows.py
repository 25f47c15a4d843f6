"""The seven flows. The only module that imports both planes: Prefect around, DuckDB inside.

Each flow also runs alone, as a plain call: with ``PREFECT_API_URL`` set it is recorded on that server, without a
server it just runs in this process; those that wait for others run them in a process tree below it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar, cast
from uuid import uuid4

import duckdb
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
    NothingStaged,
    PhasewiseError,
    SchemaDrift,
    SourceError,
    SourceUnavailable,
    TableMissing,
    UnfaithfulValue,
    UnknownBatch,
)
from phasewise.lake.marts import read_mart
from phasewise.lake.publications import latest_publication
from phasewise.lake.session import open_session
from phasewise.lake.warehouse import attach_lake, has_lake, list_extensions, prepare_lake, reach_warehouse
from phasewise.local.runs import LocalFlowRuns
from phasewise.orchestration.batch_lock import claiming_project, ending_when_cancelled, hold_project, identify_process
from phasewise.orchestration.batches import resume_batch
from phasewise.orchestration.deployments import plan_deployments
from phasewise.orchestration.fan_out_order import order_longest_first
from phasewise.orchestration.flow_runs import LOCAL_RUN, FlowRuns, current_logger, report_summary
from phasewise.orchestration.phases import run_phases, start_phase
from phasewise.orchestration.prefect_runs import current_flow_runs
from phasewise.orchestration.run_history import read_batch_runs, read_durations
from phasewise.outcomes import StepOutcome
from phasewise.project.config import Project, find_project, load_project, resolve_table
from phasewise.project.pipeline import BATCH, FanOut, Phase, Step, load_phases
from phasewise.project.urls import redact_url
from phasewise.publishing.audit_batch import audit_staged
from phasewise.publishing.audits import AuditResult, audit_published, raise_for
from phasewise.publishing.maintenance import LakeMaintenance, maintain_lake
from phasewise.publishing.publish import publish_batch, renew_marts
from phasewise.publishing.staging_cleanup import StagingCleanup, remove_finished_staging
from phasewise.report.from_batch import BatchData, describe_moments, write_batch_report
from phasewise.settings import Settings
from phasewise.staging.batch import (
    begin_batch,
    find_publishable_batch,
    give_up_tables,
    list_batches,
    new_batch_id,
    prepare_staging,
    read_given_up,
    read_plan,
    remember_lake,
)
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import Manifest, list_manifests, name_manifest
from phasewise.staging.partition_plan import plan_partitions
from phasewise.staging.partitions import SplitTable, name_item
from phasewise.staging.source_snapshot import forget_snapshot, open_snapshot

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
    batch = batch_id or find_publishable_batch(project, since=_find_start(project, settings))
    if batch is not None:
        return _publish(project, settings, batch, is_partial=batch_id is None)
    if not has_lake(project):
        raise NothingStaged(
            f'Nothing is staged for "{project.name}", and its warehouse is empty.',
            hint="Load it first: make run-distributed (or process_table_etl for single tables).",
        )
    return _renew(project, settings)


def _publish(project: Project, settings: Settings, batch: str, *, is_partial: bool) -> dict[str, Any]:
    """Audit *batch*, publish it and write its report; when that fails write the report alone.

    With *is_partial* (single tables, staged by hand) audits and marts that need other tables may wait for them.
    """
    plan, manifests = read_plan(project, batch), list_manifests(project, batch)
    given_up = read_given_up(project, batch)
    data = BatchData(project=project, batch=batch, manifests=manifests, audits=[], given_up=given_up)
    try:
        with _open_warehouse(project, settings) as connection:
            found = audit_staged(connection, project, manifests, plan, without=given_up, is_partial=is_partial)
        _log_audits(found.results)
        data = replace(data, audits=found.results, set_aside=found.set_aside)
        raise_for(found.results)
        publication = publish_batch(
            project, settings, batch, without=given_up, is_partial=is_partial, set_aside=found.set_aside
        )
    except Exception as exc:
        if plan or manifests:  # else there is no such batch
            _report_failure(data, exc)
        raise
    current_logger().info("Published %d tables as snapshot %d", len(publication.tables), publication.snapshot)
    return _report(
        project,
        settings,
        replace(data, publication=publication),
        status="published",
        message=describe_moments(manifests),
    )


def _find_start(project: Project, settings: Settings) -> datetime | None:
    """Return when the batch began that readers see; None when nothing was published."""
    with _open_warehouse(project, settings) as connection:
        latest = latest_publication(connection) if has_lake(project) else None
    return latest.staged_at if latest else None


def _renew(project: Project, settings: Settings) -> dict[str, Any]:
    """Audit the published tables again, build the marts from them anew and write a report."""
    with _open_warehouse(project, settings) as connection:
        results = audit_published(connection, project)
    _log_audits(results)
    raise_for(results)
    publication = renew_marts(project, settings)
    data = BatchData(project=project, batch=publication.batch, manifests=[], audits=results, publication=publication)
    return _report(project, settings, data, status="renewed")


def _report(
    project: Project,
    settings: Settings,
    data: BatchData,
    *,
    status: Literal["published", "renewed"],
    message: str = "",
) -> dict[str, Any]:
    """Write the report and return what the flow returns.

    Readers see the batch already: a report that cannot be written does not make it a failed one.
    """
    publication = data.publication
    assert publication is not None  # both callers have published
    html, report_error = None, None
    try:
        with _open_warehouse(project, settings) as connection:
            mart_data = [read_mart(connection, mart) for mart in project.marts if mart.name in publication.marts]
        data = replace(data, marts=mart_data, runs=_batch_runs(data.batch))
        html = _write_report(data, status=status, message=message)
    except Exception as exc:  # noqa: BLE001 - whatever it is, the batch is published
        report_error = (
            f'The batch "{data.batch}" is published, as snapshot {publication.snapshot}. Its report is missing: '
            f"{_describe_error(exc)}"
        )
        current_logger().error(report_error, exc_info=not isinstance(exc, PhasewiseError))
    return {
        "status": "final_etl_complete",
        "reports_generated": html is not None,
        "batch_id": data.batch,
        "snapshot": publication.snapshot,
        "tables": len(publication.tables),
        "rows": sum(table.rows for table in publication.tables),
        "marts": len(publication.marts),
        "audits": len(data.audits),
        "warnings": sum(not result.passed and result.severity == "warning" for result in data.audits),
        "quarantined": sum(table.quarantined for table in publication.tables),
        "report": html,
        **({"report_error": report_error} if report_error else {}),
    }


def _report_failure(data: BatchData, failure: Exception) -> None:
    """Write the report of a batch that was not published, whatever *failure* is; that is raised in any case."""
    try:
        _write_report(replace(data, runs=_batch_runs(data.batch)), status="failed", message=_describe_error(failure))
    except Exception:  # noqa: BLE001 - the failure itself is what must be seen
        current_logger().exception("The report of batch %s is missing", data.batch)


def _describe_error(exc: Exception) -> str:
    """Return the message of *exc*; not that of one that is not ours, which may quote a login."""
    return str(exc) if isinstance(exc, PhasewiseError) else f"{type(exc).__name__}, see the log of final-etl-job."


def _write_report(data: BatchData, *, status: Literal["published", "failed", "renewed"], message: str = "") -> str:
    files = write_batch_report(data, status=status, message=message)
    current_logger().info("Report: %s", files.html)
    return str(files.html)


@contextmanager
def _open_warehouse(project: Project, settings: Settings) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a session with the lake attached for reading, as ``lake``; without it while nothing was published."""
    with open_session(settings, extensions=list_extensions(project)) as connection:
        reach_warehouse(connection, project)
        if has_lake(project):
            attach_lake(connection, project, read_only=True)
        yield connection


def _batch_runs(batch: str) -> list[StepOutcome]:
    """Return the flow runs of a batch that a ``main_etl`` run stands for; none where no server recorded them."""
    if (local := LOCAL_RUN.get()) is not None:
        return local.read_runs()
    if not _has_server() or batch.startswith("manual-"):
        return []
    return read_batch_runs(batch)


def _log_audits(results: Sequence[AuditResult]) -> None:
    logger = current_logger()
    for result in results:
        if not result.passed:
            logger.log(logging.ERROR if result.severity == "blocking" else logging.WARNING, result.message)
    logger.info("%d of %d audits passed", sum(result.passed for result in results), len(results))
