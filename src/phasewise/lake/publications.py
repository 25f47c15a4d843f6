"""What was published: the batches that lake snapshots carry. Read one as it was, compare two."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Literal

import duckdb
from pydantic import TypeAdapter

from phasewise.errors import LakeError, PublishConflict
from phasewise.lake.queries import fetch_int
from phasewise.lake.quoting import quote_identifier
from phasewise.lake.session import open_session
from phasewise.lake.warehouse import attach_lake, list_extensions, list_snapshots
from phasewise.project.config import Mode, Project
from phasewise.settings import Settings

#: How a snapshot came to carry its batch: published, published again by a rollback, its marts built again, or rows that
#: had been set aside put back.
Kind = Literal["publish", "rollback", "marts", "replay"]


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    name: str
    rows: int
    #: Of the Parquet files, compressed.
    size_bytes: int
    #: Columns that the source or the project declares unique and not null.
    key: tuple[str, ...] = ()
    #: Rows of the batch that were set aside, and not among *rows*.
    quarantined: int = 0
    mode: Mode = "full"
    #: Rows that the batch added, changed and removed (in a history: closed), where the table was not replaced.
    added: int = 0
    changed: int = 0
    removed: int = 0


@dataclass(frozen=True, kw_only=True)
class TableState:
    """What the lake remembers of a table's last load, for the next one to continue from."""

    table: str
    mode: Mode
    key: tuple[str, ...]
    cursor: str | None
    where: str | None
    version: int
    #: The highest cursor read so far, as DuckDB prints it.
    mark: str | None
    #: The batch that was the last to load the table.
    batch: str


@dataclass(frozen=True, kw_only=True)
class Publication:
    """One batch in one snapshot; stored with the snapshot's commit."""

    batch: str
    snapshot: int
    at: datetime
    #: When the batch began.
    staged_at: datetime
    #: What the batch brought; other tables of the lake are as they were before.
    tables: tuple[PublishedTable, ...]
    marts: tuple[str, ...]
    kind: Kind = "publish"
    #: Of all tables that are not loaded whole, also those that the batch did not bring.
    states: tuple[TableState, ...] = ()
    #: The key of each table that has one, also of those that the batch did not bring: its snapshot may be gone.
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: True: this call found the batch published and changed nothing.
    was_published: bool = False

    def to_extra_info(self) -> str:
        """Return what the commit carries; ``phasewise.lake.warehouse.list_snapshots`` reads its ``batch``."""
        data = asdict(self)
        # The commit itself knows these, and better.
        for name in ("snapshot", "at", "was_published"):
            del data[name]
        return json.dumps(data, default=datetime.isoformat)


_ADAPTER = TypeAdapter(Publication)


@dataclass(frozen=True, kw_only=True)
class TableDiff:
    """How one table differs between two batches, in rows."""

    name: str
    added: int
    removed: int
    #: Rows whose key is in both, with other values; without a key such a row counts as removed and added.
    changed: int
    added_columns: tuple[str, ...] = ()
    removed_columns: tuple[str, ...] = ()

    @property
    def is_same(self) -> bool:
        return not (self.added or self.removed or self.changed or self.added_columns or self.removed_columns)


def list_publications(connection: duckdb.DuckDBPyConnection) -> list[Publication]:
    """Return the publications that the attached lake still has a snapshot of, oldest first."""
    return list(_read_publications(connection, order="asc"))


def find_publication(connection: duckdb.DuckDBPyConnection, batch: str) -> Publication:
    """Return the newest publication of *batch*.

    Raises:
        PublishConflict: no snapshot of the attached lake carries it.
    """
    publications = list_publications(connection)
    for publication in reversed(publications):
        if publication.batch == batch:
            return publication
    known = list(dict.fromkeys(publication.batch for publication in reversed(publications)))
    raise PublishConflict(
        f'The warehouse has no snapshot of the batch "{batch}".',
        hint=f"It has: {', '.join(known[:10])}." if known else "Nothing was published yet.",
    )


@contextmanager
def open_reader(project: Project, settings: Settings, *, at: str | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a session whose default catalog is the warehouse, read-only: as it is now, or as batch *at* left it.

    The session sees one snapshot for as long as it is open, whatever is published meanwhile.

    Raises:
        LakeError: there is no warehouse.
        PublishConflict: no snapshot carries the batch *at*.
    """
    with open_session(settings, extensions=list_extensions(project)) as connection:
        attach_lake(connection, project, read_only=True)
        snapshot = find_publication(connection, at).snapshot if at else list_snapshots(connection)[-1].id
        connection.execute("detach lake")
        attach_lake(connection, project, snapshot=snapshot)
        connection.execute("set search_path = 'lake.main,lake.marts'")
        yield connection


def query_warehouse(
    project: Project, settings: Settings, sql: str, *, at: str | None = None
) -> tuple[list[str], list[tuple[object, ...]]]:
    """Run one query on the warehouse as it is now, or as batch *at* left it; return its column names and rows.

    Tables are found by their names, marts too, and as ``marts.<name>``.

    Raises:
        PublishConflict: no snapshot carries the batch *at*.
        LakeError: nothing was published yet, or DuckDB refuses the query; its words are in the message.
    """
    with open_reader(project, settings, at=at) as connection:
        try:
            result = connection.execute(sql)
            return [column[0] for column in result.description or ()], result.fetchall()
        except duckdb.Error as exc:
            raise LakeError(f"The query failed: {exc}") from exc


def diff_batches(project: Project, settings: Settings, before: str, after: str) -> list[TableDiff]:
    """Compare the published tables of two batches, row by row, in name order; the marts follow from them.

    Raises:
        PublishConflict: no snapshot carries one of the two.
    """
    with open_session(settings, extensions=list_extensions(project)) as connection:
        attach_lake(connection, project, read_only=True)
        publications = {name: find_publication(connection, name) for name in (before, after)}
        keys = list_keys(connection)
        connection.execute("detach lake")
        attach_lake(connection, project, snapshot=publications[before].snapshot, name="before")
        attach_lake(connection, project, snapshot=publications[after].snapshot, name="after")
        names = sorted({*list_tables(connection, "before.main"), *list_tables(connection, "after.main")})
        return [_diff_table(connection, name, keys.get(name, ())) for name in names]


def list_tables(connection: duckdb.DuckDBPyConnection, schema: str) -> list[str]:
    """Return the names of the tables of *schema*, such as ``lake.main``, in name order; none when it does not exist."""
    catalog, _, name = schema.rpartition(".")
    rows = connection.execute(
        "select table_name from duckdb_tables() where database_name = ? and schema_name = ? order by 1", [catalog, name]
    ).fetchall()
    return [str(table) for (table,) in rows]


def list_columns(connection: duckdb.DuckDBPyConnection, table: str) -> dict[str, str]:
    """Return the columns of *table*, quoted as in SQL, with their types."""
    rows = connection.execute(f"describe from {table}").fetchall()
    return {str(column): str(type_) for column, type_, *_ in rows}


def _read_publications(
    connection: duckdb.DuckDBPyConnection, *, order: Literal["asc", "desc"]
) -> Iterator[Publication]:
    query = f"select snapshot_id, snapshot_time, commit_extra_info from lake.snapshots() order by 1 {order}"
    rows = connection.execute(query).fetchall()
    # One after the other: what a publication says of thousands of tables takes milliseconds to read.
    for row in rows:
        # Maintenance, and commits that somebody else made in the lake, carry none.
        with suppress(ValueError, TypeError):
            data = json.loads(row[2] or "null")
            yield _ADAPTER.validate_python({**data, "snapshot": int(row[0]), "at": row[1].astimezone(UTC)})


def list_keys(connection: duckdb.DuckDBPyConnection) -> dict[str, tuple[str, ...]]:
    """Return the key of each table that has one, as the newest publication that brought it says."""
    latest = latest_publication(connection)
    if latest is not None and latest.keys:
        return dict(latest.keys)
    # One that was published before they were kept says nothing of other tables.
    publications = list_publications(connection)
    return {table.name: table.key for publication in publications for table in publication.tables}


def _diff_table(connection: duckdb.DuckDBPyConnection, table: str, key: tuple[str, ...]) -> TableDiff:
    target = quote_identifier(table)
    columns = {name: _columns_or_none(connection, f"{name}.main.{target}") for name in ("before", "after")}
    old, new = columns["before"], columns["after"]
    shared = [column for column in old if column in new]
    if not shared:
        removed = fetch_int(connection, f"select count(*) from before.main.{target}") if old else 0
        added = fetch_int(connection, f"select count(*) from after.main.{target}") if new else 0
        return TableDiff(
            name=table, added=added, removed=removed, changed=0, added_columns=tuple(new), removed_columns=tuple(old)
        )
    selected = ", ".join(map(quote_identifier, shared))
    for name, first, second in (("gone", "before", "after"), ("come", "after", "before")):
        connection.execute(
            f"create or replace temp table {name} as select {selected} from {first}.main.{target} "
            f"except all select {selected} from {second}.main.{target}"
        )
    removed, added = (fetch_int(connection, f"select count(*) from {name}") for name in ("gone", "come"))
    changed = 0
    if key and set(key) <= set(shared):
        same = ", ".join(map(quote_identifier, key))
        changed = fetch_int(connection, f"select count(*) from gone semi join come using ({same})")
    return TableDiff(
        name=table,
        added=added - changed,
        removed=removed - changed,
        changed=changed,
        added_columns=tuple(column for column in new if column not in old),
        removed_columns=tuple(column for column in old if column not in new),
    )


def _columns_or_none(connection: duckdb.DuckDBPyConnection, table: str) -> Mapping[str, str]:
    """Return the columns of *table*; none when it does not exist."""
    try:
        return list_columns(connection, table)
    except duckdb.CatalogException:
        return {}


def latest_publication(connection: duckdb.DuckDBPyConnection) -> Publication | None:
    """Return the publication that readers of the attached lake see; None when nothing was published."""
    return next(_read_publications(connection, order="desc"), None)


def require_publication(connection: duckdb.DuckDBPyConnection, project: Project) -> Publication:
    """Return the publication that readers see.

    Raises:
        LakeError: nothing was published yet.
    """
    latest = latest_publication(connection)
    if latest is None:
        raise LakeError(
            f"Nothing was published to the warehouse {project.warehouse_name} yet.", hint="Run: make run-distributed"
        )
    return latest
