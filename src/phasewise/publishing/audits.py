"""Audits: queries that return bad rows. A blocking one that finds any keeps the whole batch from being published."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from time import perf_counter

import duckdb

from phasewise.errors import AuditFailed, PhasewiseError, ProjectError, StagingError
from phasewise.lake.publications import list_columns, list_keys, list_tables
from phasewise.lake.queries import JsonValue, check_select, fetch_int, fetch_rows, find_missing_tables, first_line
from phasewise.lake.quoting import quote_identifier
from phasewise.lake.session import normalize_type
from phasewise.lake.session import read_parquet as read_parquet
from phasewise.project.config import Audit, Project, Reference, Severity, Table
from phasewise.publishing.increments import Increment, describe_increment, select_result
from phasewise.publishing.quarantine import BAD_ROWS
from phasewise.staging.batch import BatchPlan, advise_again
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


def open_staged(
    connection: duckdb.DuckDBPyConnection, project: Project, manifests: Iterable[Manifest]
) -> dict[str, Increment]:
    """Give *connection* the warehouse as it will be once *manifests* are published: one view per table.

    A staged table is read from its Parquet files, together with the rows of the lake that stay; any other from the
    lake, when that is attached. Returns how each staged table changes.

    Raises:
        StagingError: the staged files of a table are missing or damaged.
        SchemaDrift: the lake's table cannot take the columns that were staged.
        PublishConflict: what was staged goes on from another batch than the lake's.
    """
    open_published(connection)
    # A bare name is the view from here on, also where the session looked into the lake first.
    connection.execute("use memory")
    increments: dict[str, Increment] = {}
    for table, parts in group_by_table(manifests).items():
        files = [file for part in parts for file in staged_files(project, part)]
        view = f"memory.main.{quote_identifier(table)}"
        try:
            increments[table] = describe_increment(connection, project, parts)
            result = select_result(connection, increments[table])
            connection.execute(f"create or replace view {view} as {result}")
        except duckdb.Error as exc:
            raise StagingError(
                f'The staged files of table "{table}" cannot be read: {first_line(exc)}',
                hint=advise_again(files[0]),
            ) from exc
    return increments


def open_published(connection: duckdb.DuckDBPyConnection) -> None:
    """Give *connection* one view per published table of the attached lake; none when no lake is attached."""
    for table in list_tables(connection, "lake.main"):
        name = quote_identifier(table)
        connection.execute(f"create or replace view memory.main.{name} as from lake.main.{name}")


def list_views(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """Return the names under which audits find tables, after ``open_staged`` or ``open_published``."""
    rows = connection.execute(
        "select view_name from duckdb_views() where database_name = 'memory' and schema_name = 'main' and not internal"
    ).fetchall()
    return {str(name) for (name,) in rows}


def audit_batch(
    connection: duckdb.DuckDBPyConnection,
    project: Project,
    manifests: Iterable[Manifest],
    plan: BatchPlan | None = None,
    *,
    without: Collection[str] = (),
    is_partial: bool = False,
    isolated: Collection[str] = (),
) -> list[AuditResult]:
    """Audit what is staged, after ``open_staged``: the built-in audits of each table, then those of the project.

    Complete means that every table of *plan* is staged but for those *without*; there is no such audit without a plan.
    With *is_partial* an audit that needs a table which is neither staged nor published is a warning that says so:
    single tables can be published before the rest is there.
    Audits that set rows aside are left out for the tables *isolated*: ``phasewise.publishing.audit_batch`` has run
    them. For any other table they block.
    """
    present = list_views(connection) if is_partial else None
    staged = group_by_table(manifests)
    planned = [table for table in (plan.tables if plan else ()) if table not in without]
    results = [_audit_completeness(list(staged), planned)]
    for table, parts in staged.items():
        files = read_parquet(file for part in parts for file in staged_files(project, part))
        results.append(_guard("row count", table, partial(_audit_row_count, connection, table, parts, files)))
        results.append(_guard("columns", table, partial(_audit_staged_types, connection, table, parts, files)))
        results += [run_audit(connection, audit) for audit in _audit_cursor(table, parts[0], files)]
        results += _audit_table(connection, project, table, key=parts[0].key, present=present, isolated=isolated)
    return results + _audit_project(connection, project, present=present, isolated=isolated)


def audit_published(connection: duckdb.DuckDBPyConnection, project: Project) -> list[AuditResult]:
    """Audit the tables of the attached lake again, with the keys that they were published with."""
    open_published(connection)
    return audit_tables(connection, project)


def audit_tables(connection: duckdb.DuckDBPyConnection, project: Project) -> list[AuditResult]:
    """Audit the published tables as the views of *connection* show them."""
    keys = list_keys(connection)
    published = list_tables(connection, "lake.main")
    results: list[AuditResult] = []
    for table in published:
        results += _audit_table(connection, project, table, key=keys.get(table, ()), present=published)
    return results + _audit_project(connection, project, present=published)


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


def group_by_table(manifests: Iterable[Manifest]) -> dict[str, list[Manifest]]:
    """Return the manifests of each table, tables in name order, its partitions in theirs."""
    ordered = sorted(manifests, key=lambda manifest: (manifest.table, manifest.partition or ""))
    return {table: list(parts) for table, parts in groupby(ordered, key=lambda manifest: manifest.table)}


def _audit_completeness(staged: Sequence[str], planned: Sequence[str]) -> AuditResult:
    """Every planned table is staged, and no two have names that the lake takes for one."""
    missing = [table for table in planned if table not in staged]
    spelled: dict[str, str] = {}
    clashes = [table for table in staged if spelled.setdefault(table.casefold(), table) != table]
    details = [f'table "{table}" is not staged' for table in missing]
    details += [
        f'table "{table}" and table "{spelled[table.casefold()]}" differ by case only, which the warehouse does not'
        for table in clashes
    ]
    return AuditResult(
        name="complete",
        bad_rows=len(details),
        columns=("table",),
        sample=tuple({"table": table} for table in (missing + clashes)[:SAMPLE_ROWS]),
        detail="; ".join(details),
    )


def _audit_row_count(
    connection: duckdb.DuckDBPyConnection, table: str, parts: Sequence[Manifest], files: str
) -> AuditResult:
    """The files hold as many rows as their manifests say, and as the source had: of each part, and of the whole."""
    staged = fetch_int(connection, f"select count(*) from {files}")
    written = sum(part.rows for part in parts)
    in_source = sum(part.source_rows for part in parts)
    whole = in_source if parts[0].table_rows is None else parts[0].table_rows
    bad = max(abs(staged - in_source), abs(staged - written), abs(staged - whole))
    detail = f"{staged} rows are staged, {written} were written and the source had {in_source}" if bad else ""
    if whole != in_source:
        detail += f" in {len(parts)} partitions, {whole} in the whole table: it was rewritten while it was read"
    return AuditResult(name="row count", table=table, bad_rows=bad, detail=detail)


def _audit_staged_types(
    connection: duckdb.DuckDBPyConnection, table: str, parts: Sequence[Manifest], files: str
) -> AuditResult:
    """The files have the columns and types of the manifest."""
    expected = {column.name: column.type for column in parts[0].columns}
    return _compare_types(
        connection, table, expected, name="columns", promised_by="manifest", is_complete=True, relation=files
    )


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
    connection: duckdb.DuckDBPyConnection,
    project: Project,
    table: str,
    *,
    key: Sequence[str],
    present: Collection[str] | None,
    isolated: Collection[str] = (),
) -> list[AuditResult]:
    """The audits that follow from what project and source say about *table*."""
    declared = project.find_table(table)
    results: list[AuditResult] = []
    if declared.columns:
        compare = partial(
            _compare_types, connection, table, declared.columns, name="contract", promised_by="contract", of=declared
        )
        results.append(_guard("contract", table, compare))
    is_history = (
        declared.mode == "history" and HISTORY.keys() <= list_columns(connection, quote_identifier(table)).keys()
    )
    audits = list_row_audits(project, table, key, is_history=is_history)
    return results + _run_all(connection, audits, present=present, isolated=isolated)


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


def _audit_project(
    connection: duckdb.DuckDBPyConnection,
    project: Project,
    *,
    present: Collection[str] | None,
    isolated: Collection[str] = (),
) -> list[AuditResult]:
    return _run_all(connection, project.audits, present=present, isolated=isolated)


def _run_all(
    connection: duckdb.DuckDBPyConnection,
    audits: Iterable[Audit],
    *,
    present: Collection[str] | None,
    isolated: Collection[str],
) -> list[AuditResult]:
    wanted = [audit for audit in audits if audit.severity != "quarantine" or audit.table not in isolated]
    return [skip_audit(connection, audit, present) or run_audit(connection, _block(audit)) for audit in wanted]


def _block(audit: Audit) -> Audit:
    """Return *audit* as one that blocks, where it would set aside rows that cannot be."""
    return audit.model_copy(update={"severity": "blocking"}) if audit.severity == "quarantine" else audit


def skip_audit(
    connection: duckdb.DuckDBPyConnection, audit: Audit, present: Collection[str] | None
) -> AuditResult | None:
    """Return a warning when *audit* reads a table that is not *present*; None when it can run."""
    missing = find_missing_tables(connection, audit.sql, present) if present is not None else []
    if not missing:
        return None
    names = ", ".join(f'"{name}"' for name in missing)
    error = f"it needs {names}, which {'is' if len(missing) == 1 else 'are'} neither staged nor published"
    return AuditResult(name=audit.name, table=audit.table, severity="warning", error=error)


def _not_null(table: str, key: Sequence[str], rows: str) -> Audit:
    is_null = " or ".join(f"{quote_identifier(column)} is null" for column in key)
    return Audit(
        name=f"not_null({', '.join(key)})",
        table=table,
        sql=f"from {rows} where {is_null}",
    )


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


def run_audit(connection: duckdb.DuckDBPyConnection, audit: Audit) -> AuditResult:
    """Run one query and leave its rows in ``BAD_ROWS``; a query that fails is a failed blocking audit and says why."""
    started = perf_counter()
    result = AuditResult(name=audit.name, table=audit.table, severity=audit.severity)
    try:
        check_select(audit.sql, where=f'The audit "{audit.name}"')
        # One pass: the bad rows are few, and a second run of the query would cost as much as the first.
        connection.execute(f"create or replace temp table {BAD_ROWS} as {audit.sql}")
        count = fetch_int(connection, f"select count(*) from {BAD_ROWS}")
        rows = fetch_rows(connection, f"from {BAD_ROWS}", limit=SAMPLE_ROWS)
    except duckdb.Error as exc:
        # An audit that cannot run has not passed, and a warning that nobody can see is none.
        return replace(result, severity="blocking", error=first_line(exc), seconds=perf_counter() - started)
    except PhasewiseError as exc:
        return replace(result, severity="blocking", error=str(exc), seconds=perf_counter() - started)
    return replace(
        result,
        bad_rows=count,
        sample=rows.as_records(),
        columns=rows.columns,
        seconds=perf_counter() - started,
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
    connection: duckdb.DuckDBPyConnection,
    table: str,
    expected: Mapping[str, str],
    *,
    name: str,
    promised_by: str,
    is_complete: bool = False,
    relation: str | None = None,
    of: Table | None = None,
) -> AuditResult:
    """Compare the table's columns with *expected*; with *is_complete* there must be no others.

    With *of*, what the project says of the table, it is said where the warehouse keeps a type that it has.
    """
    actual = list_columns(connection, relation or quote_identifier(table))
    problems = [
        f'column "{column}" is {actual.get(column, "missing")}, its {promised_by} says {type_}'
        + (_explain_kept_type(table, of, actual.get(column), type_) if of else "")
        for column, type_ in expected.items()
        if actual.get(column) != _canonical_type(type_)
    ]
    if is_complete:
        problems += [f'column "{column}" is not in its {promised_by}' for column in actual if column not in expected]
    return AuditResult(name=name, table=table, bad_rows=len(problems), detail="; ".join(problems))


def _explain_kept_type(table: str, declared: Table, actual: str | None, type_: str) -> str:
    """Return why a column has a wider type than its contract, and what to do; empty where it does not."""
    is_kept = declared.mode != "full" or declared.drift == "discard"
    if actual is None or not is_kept or not holds_all(actual, _canonical_type(type_)):
        return ""
    is_replaceable = declared.mode in ("append", "merge") and declared.drift != "discard"
    anew = f', or raise [table."{table}"] version to load the table again' if is_replaceable else ""
    return f" (the warehouse keeps the wider type that it has: write {actual} into the contract{anew})"


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
