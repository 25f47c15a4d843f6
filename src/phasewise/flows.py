"""The seven flows, where both planes meet: Prefect around, DuckDB inside.

Each flow also runs alone, as a plain call: with ``PREFECT_API_URL`` set it is recorded on that server, without a
server it just runs in this process; those that wait for others run them in a process tree below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from prefect import task

from phasewise.errors import FlowRunsFailed
from phasewise.local.batch import etl_flow
from phasewise.orchestration.batch_lock import lock_batch
from phasewise.orchestration.fan_out_order import order_longest_first
from phasewise.orchestration.flow_runs import FlowRuns, current_logger, current_run_id, may_help, report_summary
from phasewise.orchestration.phases import StartedPhase, describe_failures, run_phases, start_phase
from phasewise.orchestration.prefect_runs import current_flow_runs
from phasewise.orchestration.run_history import read_batch_runs, read_durations
from phasewise.project import pipeline
from phasewise.project.config import Project, find_project, load_project, resolve_table
from phasewise.project.pipeline import FanOut, Phase, load_phases
from phasewise.project.urls import redact_url
from phasewise.publishing.maintenance import LakeMaintenance, maintain_lake
from phasewise.publishing.staging_cleanup import StagingCleanup, remove_finished_staging
from phasewise.report.finish import finish_batch
from phasewise.settings import Settings
from phasewise.staging.batch import begin_batch, give_up_tables, new_batch_id, remember_lake
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import Manifest, summarize
from phasewise.staging.partition_plan import estimate_rows, list_items, plan_partitions
from phasewise.staging.partitions import SplitTable, name_item
from phasewise.staging.preparation import list_source_tables, prepare_batch
from phasewise.staging.source_snapshot import forget_snapshot, open_snapshot


def _load() -> tuple[Project, Settings]:
    settings = Settings()
    return load_project(find_project(settings)), settings


def _flow_runs(project: Project, settings: Settings) -> FlowRuns:
    # All projects of a server share the deployments, which name the project that was deployed last: what belongs to
    # a batch is told which project the batch is of.
    environment = {"PHASEWISE_PROJECT": str(project.root)}
    return current_flow_runs(poll_seconds=settings.poll_seconds, environment=environment)


@etl_flow(pipeline.MAIN_ETL)
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
    batch = current_run_id()
    assert batch is not None, "without a server it is called within a local run"
    async with lock_batch(project.root, project.staging, on_overlap=project.pipeline.on_overlap):
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


@etl_flow(pipeline.PRE_ETL)
def pre_etl(batch_id: str | None = None) -> dict[str, Any]:
    """Validate the sources, set up connections and prepare the workspace; report every failure, not the first alone."""
    del batch_id  # every step is told which batch it belongs to; validation is the same for all of them
    return pre_etl_task()


@task(name="pre-etl-task", tags={"pre-processing"})
def pre_etl_task() -> dict[str, Any]:
    project, settings = _load()
    tables = prepare_batch(project, settings)
    current_logger().info("%d tables found in %s", len(tables), redact_url(project.source.url))
    return {"status": "pre_etl_complete", "sources_validated": True, "tables": len(tables)}


@etl_flow(pipeline.SUB_ETL)
async def sub_etl(batch_id: str | None = None) -> dict[str, Any]:
    """Stage all tables of the project in parallel, large ones in parts, then run both cleanups in parallel."""
    project, settings = _load()
    batch = batch_id or current_run_id() or new_batch_id()
    table_phase, cleanup_phase = pipeline.SUB_ETL.phases
    tables = list(begin_batch(project, batch, list_source_tables(project, settings)).tables)
    remember_lake(project, settings, batch)
    with open_snapshot(project, settings, batch) as snapshot:
        if snapshot is not None and snapshot.get("remark"):
            current_logger().warning("Source: %s", snapshot["remark"])
        splits = plan_partitions(project, settings, batch, snapshot)
        for split in splits.values():
            if split.note:
                current_logger().warning("%s: %s", split.table, split.note)
        fan_out = _order_fan_out(project, settings, tables, splits)
        failed = await _stage_tables(project, settings, batch, table_phase, fan_out)
    current_logger().info("Starting cleanup subflows...")
    await (await _start(cleanup_phase, batch, project, settings)).wait()
    current_logger().info("Cleanup completed")
    return {"completed_tables": len(tables) - failed} | ({"failed_tables": failed} if failed else {})


def _order_fan_out(project: Project, settings: Settings, tables: list[str], splits: Mapping[str, SplitTable]) -> FanOut:
    """Return one flow run per table, or per part of a table that is split, those first that will take longest."""
    parts = list_items(tables, splits)
    durations = read_durations(pipeline.PROCESS_TABLE_ETL.flow_name, max_runs=3 * len(parts))
    sizes = estimate_rows(project, settings, parts, splits)
    items = order_longest_first(list(parts), durations=durations, sizes=sizes)
    return replace(pipeline.PROCESS_TABLE_ETL, items=items, parts=parts, allow_failed=project.pipeline.allow_failed)


async def _stage_tables(project: Project, settings: Settings, batch: str, phase: Phase, fan_out: FanOut) -> int:
    """Stage the items of *fan_out* and return how many tables failed within the failure budget."""
    logger = current_logger()
    logger.info("Triggering %d instances of %s...", len(fan_out.items), fan_out.flow_name)
    started = await _start(replace(phase, steps=[fan_out]), batch, project, settings)
    logger.info("Waiting for all %d ETL subflows to complete...", len(fan_out.items))
    try:
        failed = (await started.wait()).tolerated
    except FlowRunsFailed as exc:
        if exc.blames_source():
            forget_snapshot(project, batch)
        raise
    reasons = describe_failures(fan_out, failed)
    give_up_tables(project, batch, reasons)
    if failed:
        logger.warning("%d of %d ETL subflows failed, within the budget", len(failed), len(fan_out.items))
    else:
        logger.info("All %d ETL subflows completed successfully", len(fan_out.items))
    return len(reasons)


async def _start(phase: Phase, batch: str, project: Project, settings: Settings) -> StartedPhase:
    flow_runs = _flow_runs(project, settings)
    return await start_phase(phase, batch=batch, crash_retries=settings.crash_retries, flow_runs=flow_runs)


@etl_flow(pipeline.PROCESS_TABLE_ETL)
def process_table_etl(table: str, batch_id: str | None = None, partition: str | None = None) -> dict[str, Any]:
    """Extract *table* into the staging of the batch (a new batch when none is given) and write its manifest.

    With *partition* only that part of a table which the batch has split, such as ``2/4``.
    """
    manifest = sql_query_task(table, batch_id or new_batch_id(), partition)
    summary = summarize(manifest)
    report_summary(summary)
    return {"status": "table_complete", "batch_id": manifest.batch, **summary}


@task(name="sql-query-task", tags={"database"}, retries=2, retry_delay_seconds=[1, 5], retry_condition_fn=may_help)
def sql_query_task(table: str, batch: str, partition: str | None) -> Manifest:
    project, settings = _load()
    table = resolve_table(table, list_source_tables(project, settings))
    manifest = extract_table(project, settings, batch=batch, table=table, partition=partition)
    current_logger().info(
        "%s: %d rows, %d bytes staged in %.2f s",
        name_item(table, partition),
        manifest.rows,
        manifest.size_bytes,
        manifest.seconds,
    )
    return manifest


@etl_flow(pipeline.CLEANUP_FLOW1)
def cleanup_flow1(batch_id: str | None = None) -> dict[str, Any]:
    """Remove the staging of batches that are published or given up; never of *batch_id*, the one that is running."""
    removed = cleanup_task_1(batch_id)
    summary = {"removed_batches": len(removed.removed), "freed_bytes": removed.freed_bytes}
    report_summary(summary)
    return {"status": "cleanup_complete", **summary}


@task(name="cleanup-task-1")
def cleanup_task_1(batch: str | None) -> StagingCleanup:
    project, settings = _load()
    return remove_finished_staging(project, settings, keep={batch} if batch else set())


@etl_flow(pipeline.CLEANUP_FLOW2)
def cleanup_flow2(batch_id: str | None = None) -> dict[str, Any]:
    """Maintain the lake: expire snapshots past their retention, compact, delete files that nothing refers to."""
    del batch_id  # the lake's maintenance is the same for every batch
    done = asdict(cleanup_task_2())
    report_summary(done)
    return {"status": "cleanup_complete", **done}


@task(name="cleanup-task-2")
def cleanup_task_2() -> LakeMaintenance:
    project, settings = _load()
    return maintain_lake(project, settings)


@etl_flow(pipeline.FINAL_ETL)
def final_etl(batch_id: str | None = None) -> dict[str, Any]:
    """Audit the staged tables, publish all of them at once, build the marts and write the report.

    Without *batch_id* it takes the newest staged batch that is not published; when there is none, it audits the
    published tables again and renews marts and report.

    Raises:
        AuditFailed: a blocking audit found bad rows; nothing was published.
        NothingStaged: there is no staged batch, and nothing was ever published.
    """
    result = final_etl_task(batch_id)
    report_summary({key: value for key, value in result.items() if key != "status"})
    return result


@task(name="final-etl-task", tags={"post-processing"})
def final_etl_task(batch_id: str | None) -> dict[str, Any]:
    project, settings = _load()
    return finish_batch(project, settings, batch_id, logger=current_logger(), read_runs=read_batch_runs)
