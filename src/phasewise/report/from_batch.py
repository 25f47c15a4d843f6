"""Put together what the report of a batch shows, from the records of both planes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version

from phasewise.lake.marts import MartData
from phasewise.lake.publications import Publication
from phasewise.outcomes import StepOutcome
from phasewise.project.config import Project
from phasewise.project.urls import redact_url
from phasewise.publishing.audits import AuditResult
from phasewise.publishing.quarantine import SetAside
from phasewise.report.records import AuditReport, BatchReport, BatchStatus, MartReport, RunSpan, TableReport
from phasewise.report.write import ReportFiles, write_report
from phasewise.staging.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class BatchData:
    """What is known of a batch when its report is written."""

    project: Project
    batch: str
    #: Failed as long as nothing was published.
    status: BatchStatus = "failed"
    #: What went wrong, or what a reader should know.
    message: str = ""
    manifests: Sequence[Manifest] = ()
    audits: Sequence[AuditResult] = ()
    #: The flow runs of the batch, parents before children; empty when it was run without a server.
    runs: Sequence[StepOutcome] = ()
    marts: Sequence[MartData] = ()
    #: Tables that failed within the failure budget, with the reason.
    given_up: Mapping[str, str] = field(default_factory=dict)
    publication: Publication | None = None
    #: Rows of staged tables that are in quarantine, or would be.
    set_aside: Sequence[SetAside] = ()


def write_batch_report(data: BatchData) -> ReportFiles:
    """Write ``<reports>/<batch>.html`` and its data as JSON next to it."""
    now = datetime.now(UTC)
    starts = [run.started_at for run in data.runs if run.started_at] + [one.started_at for one in data.manifests]
    report = BatchReport(
        project=data.project.name,
        batch=data.batch,
        status=data.status,
        started_at=min(starts, default=now),
        ended_at=now,
        snapshot=data.publication.snapshot if data.publication else None,
        message=data.message,
        source=redact_url(data.project.source.url),
        warehouse=data.project.warehouse_name,
        runs=[RunSpan.from_outcome(run) for run in data.runs],
        tables=_describe_tables(data),
        audits=[_describe_audit(result) for result in data.audits],
        marts=[MartReport(**vars(mart)) for mart in data.marts],
        versions={name: version(name) for name in ("phasewise", "prefect", "duckdb")},
    )
    return write_report(report, data.project.reports)


def describe_moments(manifests: Sequence[Manifest]) -> str:
    """Return what a reader should know about the moments at which the tables were read; empty when it was one."""
    moments = {manifest.snapshot for manifest in manifests}
    if len(manifests) == 1 or (len(moments) == 1 and None not in moments):
        return ""
    loose = sorted({manifest.table for manifest in manifests if manifest.partition and manifest.snapshot is None})
    but = f" but for those whose partitions were read one after another: {', '.join(loose)}" if loose else ""
    return (
        "The tables were not read at one moment of the source: the batch was resumed after the source was fixed, or "
        "the source could not hold the moment for all of them. Those of another moment are marked. "
        f"Each table is consistent in itself{but}."
    )


def _describe_tables(data: BatchData) -> list[TableReport]:
    by_table: dict[str, list[Manifest]] = {}
    for manifest in data.manifests:
        by_table.setdefault(manifest.table, []).append(manifest)
    set_aside = {aside.table: aside for aside in data.set_aside}
    shared = _find_shared_moment(data.manifests)
    kept = [
        TableReport(name=table, rows=0, size_bytes=0, seconds=0, status="kept", notes=[reason])
        for table, reason in data.given_up.items()
    ]
    return kept + [
        TableReport(
            name=table,
            rows=sum(part.rows for part in parts) - (set_aside[table].rows if table in set_aside else 0),
            size_bytes=sum(part.size_bytes for part in parts),
            seconds=sum(part.seconds for part in parts),
            status="staged" if data.status == "failed" else "published",
            notes=[
                *([set_aside[table].describe()] if table in set_aside else []),
                *_describe_partitions(parts),
                *_describe_load(parts, data.publication),
                *(f"{column.name}: {column.note}" for column in parts[0].columns if column.note),
                *_note_moment(parts, shared, is_alone=len(data.manifests) == 1),
            ],
        )
        for table, parts in by_table.items()
    ]


def _describe_partitions(parts: Sequence[Manifest]) -> list[str]:
    if len(parts) == 1:
        return [parts[0].split_note] if parts[0].split_note else []
    rows = [part.rows for part in parts]
    return [f"staged in {len(parts)} partitions of {min(rows):,} to {max(rows):,} rows"]


def _describe_load(parts: Sequence[Manifest], publication: Publication | None) -> list[str]:
    """Say which rows were read, what they changed, and how the columns differ from those before."""
    load, table = parts[0].load, parts[0].table
    notes = [*load.describe()]
    if load.is_replaced:
        return notes
    published = next((one for one in (publication.tables if publication else ()) if one.name == table), None)
    if published is not None:
        done = f"rows added {published.added:,}, changed {published.changed:,}, removed {published.removed:,}"
        notes.insert(0, f"{load.mode}: {done}; {published.rows:,} in the table")
    if load.since is not None:
        notes.insert(1 if published else 0, f"read from {load.cursor} {load.since} to {load.until}")
    return notes


def _find_shared_moment(manifests: Sequence[Manifest]) -> str | None:
    """Return the moment of the source at which most tables were read; None when each was read at one of its own."""
    counts = Counter(one.snapshot for one in manifests if one.snapshot is not None)
    return counts.most_common(1)[0][0] if counts else None


def _note_moment(parts: Sequence[Manifest], shared: str | None, *, is_alone: bool) -> list[str]:
    if is_alone or (shared is not None and all(part.snapshot == shared for part in parts)):
        return []
    reason = next((f" ({part.snapshot_note})" for part in parts if part.snapshot_note), "")
    return [f"not read at the moment of the other tables, so it may not be consistent with them{reason}"]


def _describe_audit(result: AuditResult) -> AuditReport:
    same = {field.name: getattr(result, field.name) for field in fields(AuditReport)}
    return AuditReport(**same | {"sample": [[row.get(column) for column in result.columns] for row in result.sample]})
