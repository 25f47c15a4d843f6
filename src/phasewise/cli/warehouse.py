"""Commands that look at source, staging and warehouse: plan, audit, snapshots, diff, rollback. They need no server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from phasewise.errors import AuditFailed, NothingStaged, SourceError
from phasewise.project.config import Project, find_project, load_project, resolve_table
from phasewise.settings import Settings

if TYPE_CHECKING:
    from phasewise.lake.publications import TableDiff
    from phasewise.publishing.audits import AuditResult


def add_warehouse_commands(app: App) -> None:
    for command in (plan, audit, snapshots, diff, rollback):
        app.command(command)


def plan() -> None:
    """Show what the next batch would load from each table, and which columns changed. Loads nothing."""
    from phasewise.staging.forecast import forecast_tables

    forecasts = forecast_tables(*_load())
    rows = [
        (entry.table, entry.mode, entry.since or "all", "?" if entry.rows is None else entry.rows, len(entry.notes))
        for entry in forecasts
    ]
    _print_rows(("table", "mode", "from", "rows", "notes"), rows)
    for entry in forecasts:
        for note in entry.notes:
            print(f"{entry.table}: {note}")
    problems = [entry.problem for entry in forecasts if entry.problem]
    if problems:
        raise SourceError("\n".join(problems))


def audit(
    table: str | None = None,
    /,
    *,
    batch: Annotated[str | None, Parameter(help="Default: the newest that is not published.")] = None,
    show: Annotated[bool, Parameter(help="Print the first bad rows of each audit that failed.")] = False,
    replay: Annotated[bool, Parameter(help="Put quarantined rows that pass now back into their tables.")] = False,
) -> None:
    """Audit a staged batch, or the published tables if nothing is staged. Publishes nothing without --replay."""
    project, settings = _load()
    if replay:
        _replay(project, settings, table)
        return
    results = _audit(project, settings, batch)
    if table is not None:
        audited = sorted({result.table for result in results if result.table})
        name = resolve_table(table, audited)
        results = [result for result in results if result.table == name]
    failed = [result for result in results if not result.passed]
    for result in failed:
        print(result.message)
        if show and result.sample:
            _print_rows(result.columns, [tuple(row.values()) for row in result.sample])
    print(f"{len(results)} audits, {len(results) - len(failed)} passed.")
    blocking = [result for result in failed if result.severity == "blocking"]
    if blocking:
        raise AuditFailed(f"{len(blocking)} blocking {'audit' if len(blocking) == 1 else 'audits'} failed.")


def snapshots() -> None:
    """List the batches that the warehouse still has a snapshot of, newest first."""
    from phasewise.lake.publications import list_publications, open_reader

    project, settings = _load()
    with open_reader(project, settings) as connection:
        publications = list_publications(connection)
    rows = [
        (
            publication.snapshot,
            publication.at.strftime("%Y-%m-%d %H:%M:%S"),
            publication.kind,
            publication.batch,
            len(publication.tables),
            sum(table.rows for table in publication.tables),
        )
        for publication in reversed(publications)
    ]
    _print_rows(("snapshot", "at (UTC)", "kind", "batch", "tables", "rows"), rows)


def diff(before: str, after: str, /) -> None:
    """Compare the tables of two published batches, row by row."""
    from phasewise.lake.publications import diff_batches

    differences = diff_batches(*_load(), before, after)
    rows = [
        (entry.name, entry.added, entry.removed, entry.changed, _describe_columns(entry))
        for entry in differences
        if not entry.is_same
    ]
    if rows:
        _print_rows(("table", "rows added", "removed", "changed", "columns"), rows)
    noun = "table" if len(differences) == 1 else "tables"
    print(f"{len(differences)} {noun}, {len(differences) - len(rows)} without a difference.")


def rollback(batch: str, /) -> None:
    """Restore the warehouse to what it was when BATCH was published, as a new snapshot."""
    from phasewise.publishing.rollback import rollback_batch

    publication = rollback_batch(*_load(), batch)
    print(f"Rolled back to batch {batch}: snapshot {publication.snapshot}.")


def _print_rows(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    from phasewise.cli.console import render_rows

    render_rows(columns, rows)


def _load() -> tuple[Project, Settings]:
    settings = Settings()
    return load_project(find_project(settings)), settings


def _replay(project: Project, settings: Settings, table: str | None) -> None:
    from phasewise.publishing.replay import replay_quarantine

    for replay in replay_quarantine(project, settings, None if table is None else [table]):
        print(f'Table "{replay.table}": {replay.returned} rows put back, {replay.left} still in quarantine.')


def _audit(project: Project, settings: Settings, batch: str | None) -> Sequence[AuditResult]:
    from phasewise.publishing.audit_batch import audit_batch
    from phasewise.publishing.audits import audit_published
    from phasewise.publishing.session import open_auditor
    from phasewise.staging.batch import list_batches, read_batch

    with open_auditor(project, settings) as session:
        batches = list_batches(project)
        staged = [entry.id for entry in batches if not entry.is_published]
        if batch is None and staged:
            # What is older than what readers see is not of interest; the staging of that may be gone already.
            latest = session.latest
            is_newest = not batches[-1].is_published and not (latest and batches[-1].created_at < latest.staged_at)
            batch = staged[-1] if is_newest else None
        if batch is None and not session.has_lake:
            raise NothingStaged("Nothing is staged and nothing was published.", hint="Run: make run-distributed")
        if batch is None:
            print("Auditing the published tables.")
            return audit_published(session)
        print(f"Auditing batch {batch}.")
        found = next((entry for entry in batches if entry.id == batch), None) or read_batch(project, batch)
        if not found.manifests:
            raise NothingStaged(f'Nothing is staged for the batch "{batch}".', hint=f"Staged: {', '.join(staged)}.")
        return audit_batch(session, found).results


def _describe_columns(entry: TableDiff) -> str:
    return " ".join(
        [f"+{column}" for column in entry.added_columns] + [f"-{column}" for column in entry.removed_columns]
    )
