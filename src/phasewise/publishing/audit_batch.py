"""Audit a batch, with the rows that break a row-wise audit set aside as far as the project allows.

Setting rows aside can break what held before: a row refers to one that is gone now. So the audits that set rows aside
are run again until they find nothing new; only then the others are run, over what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from phasewise.project.config import Audit, Project, count_share
from phasewise.publishing.audits import AuditResult, audit_tables, list_row_audits, run_audit, show_staged, skip_audit
from phasewise.publishing.quarantine import (
    Pool,
    SetAside,
    count_reasons,
    count_rows,
    make_pool,
    open_pools,
    read_set_aside,
    set_aside,
    take_bad_rows,
    write_set_aside,
)
from phasewise.publishing.session import WarehouseSession
from phasewise.staging.batch import Batch
from phasewise.staging.manifest import Manifest, name_manifest


@dataclass(frozen=True, kw_only=True)
class AuditedBatch:
    """A batch as it was audited, and the one thing that publishing takes: files with other bytes are refused."""

    #: What was audited: the manifests with the digest of each file, and what was given up.
    batch: Batch
    results: tuple[AuditResult, ...]
    #: Per table, what is published without the rows that were set aside.
    set_aside: tuple[SetAside, ...] = ()
    #: Whether tables that are neither staged nor published may be missing.
    is_partial: bool = False


def audit_batch(session: WarehouseSession, batch: Batch, *, is_partial: bool = False) -> AuditedBatch:
    """Audit *batch*, as it was read from staging; see ``audit_tables``.

    Which rows are set aside is written down next to the staged files.

    Raises:
        StagingError: staged files are missing or damaged, or staging cannot be written.
        ProjectError: rows of a table are to be set aside, which its column names do not allow.
    """
    project, staged = session.project, batch.by_table
    increments = show_staged(session, batch)
    # What is published already has its bad rows in quarantine, and is audited as it is.
    fresh = {table: increment for table, increment in increments.items() if not increment.is_published}
    audits = [audit for table in fresh for audit in _list_audits(project, staged[table][0])]
    present = session.shown if is_partial else None
    skipped = {id(audit): result for audit in audits if (result := skip_audit(session, audit, present))}
    audits = [audit for audit in audits if id(audit) not in skipped]
    pools = {
        table: make_pool(session, increments[table], project.find_table(table).key or staged[table][0].key)
        for table in dict.fromkeys(audit.table or "" for audit in audits)
    }
    open_pools(session, pools.values())
    isolated = isolate(session, pools, audits)
    budgets = [_audit_budget(session, table, staged[table]) for table in pools]
    results = audit_tables(session, batch, is_partial=is_partial, isolated=list(pools))
    folders = {table: (project.staging / name_manifest(staged[table][0])).parent for table in pools}
    found = [write_set_aside(session, table, folder) for table, folder in folders.items()]
    found += [read_set_aside(session, table, batch.id) for table in increments.keys() - fresh.keys()]
    return AuditedBatch(
        batch=batch,
        results=(*results, *skipped.values(), *isolated, *budgets),
        set_aside=tuple(aside for aside in found if aside is not None),
        is_partial=is_partial,
    )


def isolate(session: WarehouseSession, pools: Mapping[str, Pool], audits: Sequence[Audit]) -> list[AuditResult]:
    """Take rows out of the tables of *pools* until none is left that breaks one of *audits*.

    Returns one result per audit: its ``bad_rows`` are the rows that were set aside for it.
    """
    results: dict[tuple[str | None, str], AuditResult] = {}
    while True:
        for audit in audits:
            result = _run_and_mark(session, pools[audit.table or ""], audit)
            first = results.setdefault((audit.table, audit.name), result)
            # The rows to show are those that it found first.
            if result.error or first.passed:
                results[audit.table, audit.name] = result
        if not set_aside(session, pools.values()):
            return [_count_set_aside(session, result) for result in results.values()]


def _run_and_mark(session: WarehouseSession, pool: Pool, audit: Audit) -> AuditResult:
    result = run_audit(session, audit)
    if result.passed or result.error:
        return result
    problem = take_bad_rows(session, pool, audit.name)
    return replace(result, severity="blocking", error=problem) if problem else result


def _count_set_aside(session: WarehouseSession, result: AuditResult) -> AuditResult:
    if result.error or result.table is None:
        return result
    rows = dict(count_reasons(session, result.table)).get(result.name, 0)
    return replace(result, bad_rows=rows)


def _list_audits(project: Project, part: Manifest) -> list[Audit]:
    """Return the audits that set rows of the table of *part* aside."""
    own = [audit for audit in project.audits if audit.table == part.table]
    built_in = list_row_audits(project, part.table, part.key, is_history=part.load.mode == "history")
    return [audit for audit in [*built_in, *own] if audit.severity == "quarantine"]


def _audit_budget(session: WarehouseSession, table: str, parts: Sequence[Manifest]) -> AuditResult:
    """No more rows of those that were read of *table* are set aside than the project allows."""
    limit = session.project.find_table(table).quarantine_limit
    allowed = count_share(limit, sum(part.rows for part in parts))
    rows = count_rows(session, table)
    passed = AuditResult(name="quarantine_limit", table=table)
    detail = f"{rows} rows would be set aside, and quarantine_limit = {limit} allows {allowed}"
    return replace(passed, bad_rows=rows, detail=detail) if rows > allowed else passed
