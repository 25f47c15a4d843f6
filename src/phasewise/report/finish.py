"""Finish a batch: audit what is staged, publish it and write its report, which also tells of a batch that failed.

Runs in the process of ``final_etl``, which gives it a logger and the flow runs of the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import duckdb

from phasewise.errors import NothingStaged, PhasewiseError
from phasewise.lake.marts import read_mart
from phasewise.lake.publications import latest_publication
from phasewise.lake.session import open_session
from phasewise.lake.warehouse import attach_lake, has_lake, list_extensions, reach_warehouse
from phasewise.outcomes import StepOutcome
from phasewise.project.config import Project
from phasewise.publishing.audit_batch import audit_staged
from phasewise.publishing.audits import AuditResult, audit_published, raise_for
from phasewise.publishing.publish import publish_batch, renew_marts
from phasewise.report.from_batch import BatchData, describe_moments, write_batch_report
from phasewise.settings import Settings
from phasewise.staging.batch import find_publishable_batch, read_given_up, read_plan
from phasewise.staging.manifest import list_manifests


def finish_batch(
    project: Project,
    settings: Settings,
    batch: str | None,
    *,
    logger: logging.Logger | logging.LoggerAdapter[Any],
    read_runs: Callable[[str], Sequence[StepOutcome]],
) -> dict[str, Any]:
    """Audit, publish and report *batch*; return what ``final_etl`` returns.

    Without *batch* it takes the newest staged batch that is not published; when there is none, it audits the published
    tables again and renews marts and report. *read_runs* returns the flow runs of a batch, for its report.

    Raises:
        AuditFailed: a blocking audit found bad rows; nothing was published.
        NothingStaged: there is no staged batch, and nothing was ever published.
    """
    work = _Work(project=project, settings=settings, logger=logger, read_runs=read_runs)
    found = batch or find_publishable_batch(project, since=_find_start(work))
    if found is not None:
        return _publish(work, found, is_partial=batch is None)
    if not has_lake(project):
        raise NothingStaged(
            f'Nothing is staged for "{project.name}", and its warehouse is empty.',
            hint="Load it first: make run-distributed (or process_table_etl for single tables).",
        )
    return _renew(work)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What every step needs."""

    project: Project
    settings: Settings
    logger: logging.Logger | logging.LoggerAdapter[Any]
    read_runs: Callable[[str], Sequence[StepOutcome]]


def _publish(work: _Work, batch: str, *, is_partial: bool) -> dict[str, Any]:
    """Audit *batch*, publish it and write its report; when that fails write the report alone.

    With *is_partial* (single tables, staged by hand) audits and marts that need other tables may wait for them.
    """
    project = work.project
    plan, manifests = read_plan(project, batch), list_manifests(project, batch)
    given_up = read_given_up(project, batch)
    data = BatchData(project=project, batch=batch, manifests=manifests, audits=[], given_up=given_up)
    try:
        with _open_warehouse(work) as connection:
            found = audit_staged(connection, project, manifests, plan, without=given_up, is_partial=is_partial)
        _log_audits(work, found.results)
        data = replace(data, audits=found.results, set_aside=found.set_aside)
        raise_for(found.results)
        publication = publish_batch(
            project, work.settings, batch, without=given_up, is_partial=is_partial, set_aside=found.set_aside
        )
    except Exception as exc:
        if plan or manifests:  # else there is no such batch
            _report_failure(work, data, exc)
        raise
    work.logger.info("Published %d tables as snapshot %d", len(publication.tables), publication.snapshot)
    return _report(
        work, replace(data, publication=publication), status="published", message=describe_moments(manifests)
    )


def _find_start(work: _Work) -> datetime | None:
    """Return when the batch began that readers see; None when nothing was published."""
    with _open_warehouse(work) as connection:
        latest = latest_publication(connection) if has_lake(work.project) else None
    return latest.staged_at if latest else None


def _renew(work: _Work) -> dict[str, Any]:
    """Audit the published tables again, build the marts from them again and write a report."""
    with _open_warehouse(work) as connection:
        results = audit_published(connection, work.project)
    _log_audits(work, results)
    raise_for(results)
    publication = renew_marts(work.project, work.settings)
    data = BatchData(
        project=work.project, batch=publication.batch, manifests=[], audits=results, publication=publication
    )
    return _report(work, data, status="renewed")


def _report(
    work: _Work, data: BatchData, *, status: Literal["published", "renewed"], message: str = ""
) -> dict[str, Any]:
    """Write the report and return what the flow returns.

    Readers see the batch already: a report that cannot be written does not make it a failed one.
    """
    publication = data.publication
    assert publication is not None  # both callers have published
    html, report_error = None, None
    try:
        with _open_warehouse(work) as connection:
            marts = [read_mart(connection, mart) for mart in work.project.marts if mart.name in publication.marts]
        html = _write_report(work, replace(data, marts=marts), status=status, message=message)
    except Exception as exc:  # whatever it is, the batch is published
        report_error = (
            f'The batch "{data.batch}" is published, as snapshot {publication.snapshot}. Its report is missing: '
            f"{_describe_error(exc)}"
        )
        work.logger.error(report_error, exc_info=not isinstance(exc, PhasewiseError))
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


def _report_failure(work: _Work, data: BatchData, failure: Exception) -> None:
    """Write the report of a batch that was not published, whatever *failure* is; that is raised in any case."""
    try:
        _write_report(work, data, status="failed", message=_describe_error(failure))
    except Exception:  # the failure itself is what must be seen
        work.logger.exception("The report of batch %s is missing", data.batch)


def _describe_error(exc: Exception) -> str:
    """Return the message of *exc*; not that of one that is not ours, which may quote a login."""
    return str(exc) if isinstance(exc, PhasewiseError) else f"{type(exc).__name__}, see the log of final-etl-job."


def _write_report(
    work: _Work, data: BatchData, *, status: Literal["published", "failed", "renewed"], message: str
) -> str:
    files = write_batch_report(replace(data, runs=work.read_runs(data.batch)), status=status, message=message)
    work.logger.info("Report: %s", files.html)
    return str(files.html)


@contextmanager
def _open_warehouse(work: _Work) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a session with the lake attached for reading, as ``lake``; without it while nothing was published."""
    with open_session(work.settings, extensions=list_extensions(work.project)) as connection:
        reach_warehouse(connection, work.project)
        if has_lake(work.project):
            attach_lake(connection, work.project, read_only=True)
        yield connection


def _log_audits(work: _Work, results: Sequence[AuditResult]) -> None:
    for result in results:
        if not result.passed:
            work.logger.log(logging.ERROR if result.severity == "blocking" else logging.WARNING, result.message)
    work.logger.info("%d of %d audits passed", sum(result.passed for result in results), len(results))
