"""Audits: queries that return bad rows. A blocking one that finds any keeps the whole batch from being published."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import duckdb

from phasewise.errors import AuditFailed, PhasewiseError, ProjectError, StagingError
from phasewise.lake.publications import list_keys
from phasewise.lake.queries import JsonValue, check_select, fetch_rows, find_missing_tables, first_line
from phasewise.lake.quoting import quote_identifier
from phasewise.lake.session import normalize_type, read_parquet
from phasewise.project.config import Audit, Project, Reference, Severity, Table
from phasewise.publishing.increments import Increment, describe_increment, select_result
from phasewise.publishing.quarantine import BAD_ROWS
from phasewise.publishing.session import Stage, WarehouseSession
from phasewise.staging.batch import Batch
from phasewise.staging.load_plan import HISTORY
from phasewise.staging.manifest import Manifest, staged_files
from phasewise.staging.schema_drift import holds_all

#: Bad rows that a result carries; ``bad_rows`` counts all of them.
SAMPLE_ROWS = 20


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What one audit found."""

    name: str
    table: str | None = None
    severity: Severity = "blocking"
    bad_rows: int = 0
    #: The first bad rows, at most ``SAMPLE_ROWS``, fit for JSON.
    sample: tuple[dict[str, JsonValue], ...] = ()
    columns: tuple[str, ...] = ()
    seconds: float = 0.0
    #: Why the audit could not run, which counts as failed.
    error: str | None = None
    #: What was found, where the count and the name do not say it.
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.error is None and self.bad_rows == 0

    @property
    def message(self) -> str:
        """One sentence: the table, the count and what broke."""
        subject = f'Table "{self.table}"' if self.table else "The batch"
        if self.passed:
            return f"{subject} passed its audit: {self.name}."
        if self.error is not None:
            return f"{subject} could not be audited: {self.name}: {self.error}"
        verb = _VERBS[self.severity]
        found = self.detail or f"{self.bad_rows} {'row breaks' if self.bad_rows == 1 else 'rows break'} {self.name}"
        return f"{subject} {verb}: {found}."


_VERBS = {"blocking": "failed its audit", "warning": "has a warning", "quarantine": "has rows set aside"}


def show_staged(session: WarehouseSession, batch: Batch) -> dict[str, Increment]:
    """Show the warehouse as it will be once *batch* is published.

    A staged table is read from its Parquet files, together with the rows of the lake that stay; any other from the
    lake, when that is attached. Returns how each staged table changes.

    Raises:
        StagingError: the staged files of a table are missing or damaged.
        SchemaDrift: the lake's table cannot take the columns that were staged.
        PublishConflict: what was staged continues another batch than the lake's.
    """
    session.show_published()
    increments: dict[str, Increment] = {}
    for table, parts in batch.by_table.items():
        try:
            increments[table] = describe_increment(session, parts, at=batch.created_at)
            session.show(table, select_result(session, increments[table]))
        except duckdb.Error as exc:
            raise StagingError(
                f'The staged files of table "{table}" cannot be read: {first_line(exc)}', hint="Start a new batch."
            ) from exc
    return increments


def audit_tables(
    session: WarehouseSession, batch: Batch, *, is_partial: bool = False, isolated: Collection[str] = ()
) -> list[AuditResult]:
    """Audit what is staged, after ``show_staged``: the built-in audits of each table, then those of the project.

    Complete means that every table of the plan is staged or given up; there is no such audit without a plan.
    With *is_partial* an audit that needs a table which is neither staged nor published is a warning that says so:
    single tables can be published before the rest is there.
    Audits that set rows aside are left out for the tables *isolated*: ``phasewise.publishing.audit_batch`` has run
    them. For any other table they block.
    """
    present = session.shown if is_partial else None
    results = [_audit_completeness(batch)]
    for table, parts in batch.by_table.items():
        files = read_parquet(file for part in parts for file in staged_files(session.project, part))
        results.append(_guard("row count", table, partial(_audit_row_count, session, table, parts, files)))
        written = {column.name: column.type for column in parts[0].columns}
        compare = partial(_compare_types, session, table, written, "manifest", files=files)
        results.append(_guard("columns", table, compare))
        results += [run_audit(session, audit) for audit in _audit_cursor(table, parts[0], files)]
        results += _audit_table(session, table, key=parts[0].key, present=present, isolated=isolated)
    return results + _run_all(session, session.project.audits, present=present, isolated=isolated)


def audit_published(session: WarehouseSession) -> list[AuditResult]:
    """Audit the published tables again, with the keys that they were published with."""
    session.show_published()
    return audit_shown(session)


def audit_shown(session: WarehouseSession) -> list[AuditResult]:
    """Audit the published tables as *session* shows them."""
    keys = list_keys(session.connection)
    results: list[AuditResult] = []
    for table in sorted(session.tables):
        results += _audit_table(session, table, key=keys.get(table, ()), present=session.tables)
    return results + _run_all(session, session.project.audits, present=session.tables)


def raise_for(results: Iterable[AuditResult]) -> None:
    """Do nothing when no blocking audit failed.

    Raises:
        AuditFailed: lists each blocking audit that failed, with its count and its first rows.
    """
    failed = tuple(result for result in results if result.severity == "blocking" and not result.passed)
    if not failed:
        return
    lines = [_describe_failure(result) for result in failed]
    table = next((result.table for result in failed if result.table), None)
    command = f"phasewise audit {table} --show" if table else "phasewise audit --show"
    raise AuditFailed("\n".join([*lines, "Nothing was published."]), hint=f"See them: {command}")


def _audit_completeness(batch: Batch) -> AuditResult:
    """Every planned table is staged, and no two have names that the lake takes for one."""
    spelled: dict[str, str] = {}
    clashes = [table for table in batch.tables if spelled.setdefault(table.casefold(), table) != table]
    details = [f'table "{table}" is not staged: start a new batch' for table in batch.missing]
    details += [
        f'table "{table}" and table "{spelled[table.casefold()]}" differ by case only, which the warehouse does not'
        for table in clashes
    ]
    return AuditResult(
        name="complete",
        bad_rows=len(details),
        columns=("table",),
        sample=tuple({"table": table} for table in [*batch.missing, *clashes][:SAMPLE_ROWS]),
        detail="; ".join(details),
    )


def _audit_row_count(session: WarehouseSession, table: str, parts: Sequence[Manifest], files: str) -> AuditResult:
    """The files hold as many rows as their manifests say, and as the source had: of each part, and of the whole."""
    staged = session.count(files)
    written = sum(part.rows for part in parts)
    in_source = sum(part.source_rows for part in parts)
    whole = in_source if parts[0].table_rows is None else parts[0].table_rows
    bad = max(abs(staged - in_source), abs(staged - written), abs(staged - whole))
    detail = f"{staged} rows are staged, {written} were written and the source had {in_source}" if bad else ""
    if whole != in_source:
        detail += f" in {len(parts)} partitions, {whole} in the whole table: it was rewritten while it was read"
    return AuditResult(name="row count", table=table, bad_rows=bad, detail=detail)


def _audit_cursor(table: str, part: Manifest, files: str) -> list[Audit]:
    """Every row of a table to which rows are added by their cursor alone has one, or it would be added each time."""
    column = next((column for column in part.columns if column.name == part.load.cursor), None)
    if part.load.mode != "append" or part.load.key or column is None:
        return []
    name = quote_identifier(column.name)
    is_endless = f" or not isfinite({name})" if column.type.startswith(("DATE", "TIMESTAMP")) else ""
    sql = f"from {files} where {name} is null{is_endless}"
    return [Audit(name=f"cursor({column.name})", table=table, sql=sql)]


def _audit_table(
    session: WarehouseSession,
    table: str,
    *,
    key: Sequence[str],
    present: Collection[str] | None,
    isolated: Collection[str] = (),
) -> list[AuditResult]:
    """The audits that follow from what project and source say about *table*."""
    declared = session.project.find_table(table)
    results: list[AuditResult] = []
    if declared.columns:
        compare = partial(_compare_types, session, table, declared.columns, "contract", of=declared)
        results.append(_guard("contract", table, compare))
    is_history = declared.mode == "history" and session.list_columns(quote_identifier(table)).keys() >= HISTORY.keys()
    audits = list_row_audits(session.project, table, key, is_history=is_history)
    return results + _run_all(session, audits, present=present, isolated=isolated)


def list_row_audits(project: Project, table: str, key: Sequence[str], *, is_history: bool = False) -> list[Audit]:
    """Return the built-in audits of *table* that return its bad rows, with what the project wants done with them.

    Of a history they look at the current rows.
    """
    declared = project.find_table(table)
    columns = tuple(declared.key or key)
    rows = f"(from {quote_identifier(table)} where is_current)" if is_history else quote_identifier(table)
    of_key = [_not_null(table, columns, rows), _unique(table, columns, rows)] if columns else []
    of_references = [_references(table, reference, rows) for reference in declared.references]
    return [
        audit.model_copy(update={"severity": "quarantine"}) if kind in declared.quarantine else audit
        for kind, audits in (("key", of_key), ("references", of_references))
        for audit in audits
    ]


def _run_all(
    session: WarehouseSession,
    audits: Iterable[Audit],
    *,
    present: Collection[str] | None,
    isolated: Collection[str] = (),
) -> list[AuditResult]:
    wanted = [audit for audit in audits if audit.severity != "quarantine" or audit.table not in isolated]
    return [skip_audit(session, audit, present) or run_audit(session, _block(audit)) for audit in wanted]


def _block(audit: Audit) -> Audit:
    """Return *audit* as one that blocks, where it would set aside rows that cannot be."""
    return audit.model_copy(update={"severity": "blocking"}) if audit.severity == "quarantine" else audit


def skip_audit(session: WarehouseSession, audit: Audit, present: Collection[str] | None) -> AuditResult | None:
    """Return a warning when *audit* reads a table that is not *present*; None when it can run."""
    missing = find_missing_tables(session.connection, audit.sql, present) if present is not None else []
    if not missing:
        return None
    names = ", ".join(f'"{name}"' for name in missing)
    error = f"it needs {names}, which {'is' if len(missing) == 1 else 'are'} neither staged nor published"
    return AuditResult(name=audit.name, table=audit.table, severity="warning", error=error)


def _not_null(table: str, key: Sequence[str], rows: str) -> Audit:
    is_null = " or ".join(f"{quote_identifier(column)} is null" for column in key)
    return Audit(name=f"not_null({', '.join(key)})", table=table, sql=f"from {rows} where {is_null}")


def _unique(table: str, key: Sequence[str], rows: str) -> Audit:
    # NULLs are the business of not_null: here they would make rows without a key look like duplicates.
    columns = ", ".join(quote_identifier(column) for column in key)
    has_key = " and ".join(f"{quote_identifier(column)} is not null" for column in key)
    return Audit(
        name=f"unique({', '.join(key)})",
        table=table,
        # One bad row per key that occurs more than once.
        sql=f"select {columns}, count(*) as {quote_identifier('rows')} from {rows} "
        f"where {has_key} group by {columns} having count(*) > 1",
    )


def _references(table: str, reference: Reference, rows: str) -> Audit:
    pairs = list(zip(reference.columns, reference.to, strict=True))
    has_value = " and ".join(f"child.{quote_identifier(column)} is not null" for column, _ in pairs)
    matches = " and ".join(f"parent.{quote_identifier(to)} = child.{quote_identifier(column)}" for column, to in pairs)
    return Audit(
        name=f"references({', '.join(reference.columns)} → {reference.table})",
        table=table,
        sql=f"from {rows} as child where {has_value} and not exists "
        f"(from {quote_identifier(reference.table)} as parent where {matches})",
    )


def run_audit(session: WarehouseSession, audit: Audit) -> AuditResult:
    """Run one query and keep its rows as ``BAD_ROWS``; a query that fails is a failed blocking audit and says why."""
    session.expect(Stage.SHOWING)
    started = perf_counter()
    result = AuditResult(name=audit.name, table=audit.table, severity=audit.severity)
    try:
        check_select(audit.sql, where=f'The audit "{audit.name}"')
        # One pass: the bad rows are few, and a second run of the query would cost as much as the first.
        bad_rows = session.keep(BAD_ROWS, audit.sql)
        count = session.count(bad_rows)
        rows = fetch_rows(session.connection, f"from {bad_rows}", limit=SAMPLE_ROWS)
    except (duckdb.Error, PhasewiseError) as exc:
        # An audit that cannot run has not passed, and a warning that nobody can see is none.
        error = first_line(exc) if isinstance(exc, duckdb.Error) else str(exc)
        return replace(result, severity="blocking", error=error, seconds=perf_counter() - started)
    return replace(
        result, bad_rows=count, sample=rows.as_records(), columns=rows.columns, seconds=perf_counter() - started
    )


def _guard(name: str, table: str, run: Callable[[], AuditResult]) -> AuditResult:
    """Time *run*; when it cannot read the table, say so in the result."""
    started = perf_counter()
    try:
        result = run()
    except duckdb.Error as exc:
        result = AuditResult(name=name, table=table, error=first_line(exc))
    return replace(result, seconds=perf_counter() - started)


def _compare_types(
    session: WarehouseSession,
    table: str,
    expected: Mapping[str, str],
    promised_by: str,
    *,
    files: str | None = None,
    of: Table | None = None,
) -> AuditResult:
    """Compare the table's columns with *expected*; of its *files*, where they are given, there must be no others.

    With *of*, what the project says of the table, it is said where the warehouse keeps a type that it has.
    """
    actual = session.list_columns(files or quote_identifier(table))
    problems = [
        f'column "{column}" is {actual.get(column, "missing")}, its {promised_by} says {type_}'
        + (_explain_kept_type(table, of, actual.get(column), type_) if of else "")
        for column, type_ in expected.items()
        if actual.get(column) != _canonical_type(type_)
    ]
    if files:
        problems += [f'column "{column}" is not in its {promised_by}' for column in actual if column not in expected]
    name = "columns" if files else "contract"
    return AuditResult(name=name, table=table, bad_rows=len(problems), detail="; ".join(problems))


def _explain_kept_type(table: str, declared: Table, actual: str | None, type_: str) -> str:
    """Return why a column has a wider type than its contract, and what to do; empty where it does not."""
    is_kept = declared.mode != "full" or declared.drift == "discard"
    if actual is None or not is_kept or not holds_all(actual, _canonical_type(type_)):
        return ""
    is_replaceable = declared.mode in ("append", "merge") and declared.drift != "discard"
    again = f', or raise [table."{table}"] version to load the table again' if is_replaceable else ""
    return f" (the warehouse keeps the wider type that it has: write {actual} into the contract{again})"


def _canonical_type(type_: str) -> str:
    """Return *type_* as DuckDB spells it; as it is when DuckDB does not know it, so that it equals no column's."""
    try:
        return normalize_type(type_)
    except ProjectError:
        return type_


def _describe_failure(result: AuditResult) -> str:
    sample = "".join(f"\n    {json.dumps(row, ensure_ascii=False)}" for row in result.sample[:3])
    more = "\n    …" if len(result.sample) > 3 else ""
    return f"{result.message}{sample}{more}"
