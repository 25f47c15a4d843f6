"""Replay: rows of the quarantine that pass the audits now go back into their tables, as a snapshot of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import duckdb

from phasewise.audit import audit_tables, list_row_audits, open_published, raise_for
from phasewise.errors import NothingStaged
from phasewise.isolation import isolate
from phasewise.lake import quote_identifier
from phasewise.marts import MARTS_SCHEMA, build_marts, find_buildable
from phasewise.project import Audit, Project
from phasewise.publish import open_writer, transaction
from phasewise.quarantine import (
    BATCH,
    FILE,
    QUARANTINE_SCHEMA,
    REASON,
    ROW,
    SET_ASIDE_AT,
    Pool,
    count_rows,
    open_pools,
    put_back,
    show_rest,
)
from phasewise.queries import fetch_int
from phasewise.settings import Settings
from phasewise.snapshots import Publication, PublishedTable, list_keys, list_tables, require_publication


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What became of the quarantine of one table."""

    table: str
    #: Rows that went back into the table.
    returned: int
    #: Rows that still break an audit.
    left: int


def replay_quarantine(project: Project, settings: Settings, tables: Collection[str] | None = None) -> list[Replay]:
    """Put the rows of the quarantine that pass all row-wise audits back into their tables, and build the marts again.

    All in one transaction; nothing is written when no row goes back. *tables* are those to look at: default all.

    Raises:
        LakeError: nothing was published yet.
        NothingStaged: there is no such table in the quarantine.
        AuditFailed: another audit would fail with these rows. Nothing was changed.
        WarehouseBusy: another process was writing for longer than ``lock_timeout`` seconds.
    """
    with open_writer(project, settings) as connection:
        latest = require_publication(connection, project)
        pools = _open_quarantine(connection, project, tables)
        _audit(connection, project, pools)
        replays = [_count(connection, pool) for pool in pools.values()]
        if any(replay.returned for replay in replays):
            only = find_buildable(connection, project, list_tables(connection, "lake.main"))
            marts = tuple(mart.name for mart in only)
            planned = replace(latest, kind="replay", marts=marts, tables=_add(latest, replays))
            with transaction(connection, planned, "Put back rows of the quarantine"):
                for replay in replays:
                    put_back(connection, replay.table)
                build_marts(connection, project, schema=f"lake.{MARTS_SCHEMA}", only=only)
        return replays


def _open_quarantine(
    connection: duckdb.DuckDBPyConnection, project: Project, tables: Collection[str] | None
) -> Mapping[str, Pool]:
    found = [
        table for table in list_tables(connection, f"lake.{QUARANTINE_SCHEMA}") if tables is None or table in tables
    ]
    if not found:
        what = ", ".join(sorted(tables)) if tables else "any table"
        raise NothingStaged(f"There are no rows of {what} in quarantine.", hint="See: phasewise snapshots")
    keys = list_keys(connection)
    return {table: _pool_quarantined(table, project.find_table(table).key or keys.get(table, ())) for table in found}


def _pool_quarantined(table: str, key: Sequence[str]) -> Pool:
    name = quote_identifier(table)
    return Pool(
        table=table,
        key=tuple(key),
        rows=f'select * exclude ({REASON}, {BATCH}, {SET_ASIDE_AT}), \'\' as "{FILE}", rowid as "{ROW}" '
        f"from lake.{QUARANTINE_SCHEMA}.{name}",
        fixed=f"lake.main.{name}",
    )


def _audit(connection: duckdb.DuckDBPyConnection, project: Project, pools: Mapping[str, Pool]) -> None:
    """Keep the rows out that break a row-wise audit, then run the others over what the tables will be."""
    open_published(connection)
    open_pools(connection, pools.values())
    for pool in pools.values():
        show_rest(connection, pool)
    audits = [audit for pool in pools.values() for audit in _list_audits(project, pool)]
    results = isolate(connection, pools, audits)
    raise_for([*results, *audit_tables(connection, project)])


def _list_audits(project: Project, pool: Pool) -> Iterable[Audit]:
    """Return what a row must pass to come back: the audits of its key and its references, and those that set aside."""
    own = [audit for audit in project.audits if audit.table == pool.table and audit.severity == "quarantine"]
    return [
        audit.model_copy(update={"severity": "quarantine"})
        for audit in [*list_row_audits(project, pool.table, pool.key), *own]
    ]


def _count(connection: duckdb.DuckDBPyConnection, pool: Pool) -> Replay:
    left = count_rows(connection, pool.table)
    return Replay(
        table=pool.table, returned=fetch_int(connection, f"select count(*) from ({pool.rows})") - left, left=left
    )


def _add(latest: Publication, replays: Iterable[Replay]) -> tuple[PublishedTable, ...]:
    by_table = {replay.table: replay for replay in replays}
    return tuple(
        replace(table, rows=table.rows + replay.returned, quarantined=replay.left)
        if (replay := by_table.get(table.name))
        else table
        for table in latest.tables
    )
