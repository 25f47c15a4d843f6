"""Finish a batch: audit what is staged, publish it and write its report, which also tells of a batch that failed.

Runs in the process of ``final_etl``, which gives it a logger and the flow runs of the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from phasewise.errors import NothingStaged, PhasewiseError
from phasewise.lake.marts import read_mart
from phasewise.lake.warehouse import has_lake
from phasewise.outcomes import StepOutcome
from phasewise.project.config import Project
from phasewise.publishing.audit_batch import audit_batch
from phasewise.publishing.audits import AuditResult, audit_published, raise_for
from phasewise.publishing.publish import publish_batch, renew_marts
from phasewise.publishing.session import open_auditor
from phasewise.report.from_batch import BatchData, describe_moments, write_batch_report
from phasewise.settings import Settings
from phasewise.staging.batch import find_publishable_batch, read_batch


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
    staged = read_batch(project, batch)
    data = BatchData(project=project, batch=batch, manifests=staged.manifests, given_up=staged.given_up)
    try:
        with open_auditor(project, work.settings) as session:
            audited = audit_batch(session, staged, is_partial=is_partial)
        _log_audits(work, audited.results)
        data = replace(data, audits=audited.results, set_aside=audited.set_aside)
        publication = publish_batch(project, work.settings, audited)
    except Exception as exc:
        if staged.plan or staged.manifests:  # else there is no such batch
            _report_failure(work, data, exc)
        raise
    work.logger.info("Published %d tables as snapshot %d", len(publication.tables), publication.snapshot)
    message = describe_moments(staged.manifests)
    return _report(work, replace(data, publication=publication, status="published", message=message))


def _find_start(work: _Work) -> datetime | None:
    """Return when the batch began that readers see; None when nothing was published."""
    with open_auditor(work.project, work.settings) as session:
        return session.latest.staged_at if session.latest else None


def _renew(work: _Work) -> dict[str, Any]:
    """Audit the published tables again, build the marts from them again and write a report."""
    with open_auditor(work.project, work.settings) as session:
        results = audit_published(session)
    _log_audits(work, results)
    raise_for(results)
    publication = renew_marts(work.project, work.settings)
    batch = publication.batch
    data = BatchData(project=work.project, batch=batch, status="renewed", audits=results, publication=publication)
    return _report(work, data)


def _report(work: _Work, data: BatchData) -> dict[str, Any]:
    """Write the report and return what the flow returns.

    Readers see the batch already: a report that cannot be written does not make it a failed one.
    """
    publication = data.publication
    assert publication is not None  # both callers have published
    html, report_error = None, None
    try:
        with open_auditor(work.project, work.settings) as session:
            marts = [
                read_mart(session.connection, mart) for mart in work.project.marts if mart.name in publication.marts
            ]
        html = _write_report(work, replace(data, marts=marts))
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
        _write_report(work, replace(data, message=_describe_error(failure)))
    except Exception:  # the failure itself is what must be seen
        work.logger.exception("The report of batch %s is missing", data.batch)


def _describe_error(exc: Exception) -> str:
    """Return the message of *exc*; not that of one that is not ours, which may quote a login."""
    return str(exc) if isinstance(exc, PhasewiseError) else f"{type(exc).__name__}, see the log of final-etl-job."


def _write_report(work: _Work, data: BatchData) -> str:
    files = write_batch_report(replace(data, runs=work.read_runs(data.batch)))
    work.logger.info("Report: %s", files.html)
    return str(files.html)


def _log_audits(work: _Work, results: Sequence[AuditResult]) -> None:
    for result in results:
        if not result.passed:
            work.logger.log(logging.ERROR if result.severity == "blocking" else logging.WARNING, result.message)
    work.logger.info("%d of %d audits passed", sum(result.passed for result in results), len(results))
