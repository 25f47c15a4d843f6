"""Replay: rows of the quarantine that pass the audits now go back into their tables, as a snapshot of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from phasewise.errors import NothingStaged
from phasewise.lake.marts import build_marts, find_buildable
from phasewise.lake.publications import Publication, PublishedTable, TableState, list_keys
from phasewise.lake.quoting import quote_identifier
from phasewise.project.config import Audit, Project
from phasewise.publishing.audit_batch import isolate
from phasewise.publishing.audits import audit_shown, list_row_audits, raise_for
from phasewise.publishing.increments import Increment, apply_increment, is_same, name_touched
from phasewise.publishing.quarantine import (
    BATCH,
    REASON,
    SET_ASIDE_AT,
    Pool,
    count_rows,
    drop_put_back,
    keep_in,
    make_pool,
    open_pools,
    select_quarantined,
    show_rest,
)
from phasewise.publishing.session import QUARANTINE_SCHEMA, WarehouseSession, open_writer
from phasewise.settings import Settings
from phasewise.staging.load_plan import Load, drop_history
from phasewise.staging.schema_drift import compare_columns


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What became of the quarantine of one table."""

    table: str
    #: Rows that went back into the table.
    returned: int
    #: Rows that still break an audit, or whose key the table has a newer version of.
    left: int
    #: Rows of the table afterwards.
    rows: int


def replay_quarantine(project: Project, settings: Settings, tables: Collection[str] | None = None) -> list[Replay]:
    """Put the rows of the quarantine that pass all row-wise audits back into their tables, and build the marts again.

    All in one transaction; nothing is written when no row goes back. *tables* are those to look at: default all.

    Raises:
        LakeError: nothing was published yet.
        NothingStaged: there is no such table in the quarantine.
        AuditFailed: another audit would fail with these rows. Nothing was changed.
        WarehouseBusy: another process was writing for longer than ``lock_timeout`` seconds.
    """
    with open_writer(project, settings) as session:
        latest = session.require_latest()
        pools = _open_quarantine(session, tables, latest)
        _audit(session, pools)
        replays = [_count(session, pool) for pool in pools.values()]
        if any(replay.returned for replay in replays):
            only = find_buildable(session.connection, project, session.tables)
            marts = tuple(mart.name for mart in only)
            planned = replace(latest, kind="replay", marts=marts, tables=_add(latest, replays))
            with session.change(planned, "Put back rows of the quarantine"):
                for replay in replays:
                    apply_increment(session, pools[replay.table].increment)
                    drop_put_back(session, replay.table)
                build_marts(session.connection, only)
        return replays


def _open_quarantine(
    session: WarehouseSession, tables: Collection[str] | None, latest: Publication
) -> Mapping[str, Pool]:
    found = sorted(table for table in session.quarantined if tables is None or table in tables)
    if not found:
        what = ", ".join(sorted(tables)) if tables else "any table"
        raise NothingStaged(f"There are no rows of {what} in quarantine.", hint="See: phasewise snapshots")
    keys = list_keys(session.connection)
    states = {state.table: state for state in latest.states}
    pools = {}
    for table in found:
        state = states.get(table)
        key = session.project.find_table(table).key or (state.key if state else keys.get(table, ()))
        pools[table] = make_pool(session, _describe_return(session, table, state, latest.staged_at), key)
    return pools


def _describe_return(session: WarehouseSession, table: str, state: TableState | None, at: datetime) -> Increment:
    """Return how the rows in quarantine change *table*: as if they were read now, by its mode.

    To a table that is loaded whole, or to which rows are appended, they are added: the audit of its key keeps those in
    quarantine whose key is there. *at* is the moment for a history: no version of it begins later, and none ends
    earlier when a batch is published that runs now.
    """
    quarantined = session.list_columns(f"lake.{QUARANTINE_SCHEMA}.{quote_identifier(table)}")
    staged = {name: type_ for name, type_ in quarantined.items() if name not in (REASON, BATCH, SET_ASIDE_AT)}
    present = drop_history(session.list_columns(f"lake.main.{quote_identifier(table)}"), state)
    load = Load(mode="append", is_replaced=False)
    if state is not None and state.mode in ("merge", "history"):
        load = Load(mode=state.mode, key=state.key, cursor=state.cursor, is_replaced=False, base=state)
    return Increment(
        table=table,
        load=load,
        source=select_quarantined(table),
        at=at,
        drift=compare_columns(present, staged, "discard"),
        staged=staged,
        rule="discard",
        touched=name_touched(session, table),
    )


def _keep_older_in(session: WarehouseSession, pool: Pool) -> None:
    """Set those rows aside whose key is in the table, unless their cursor is higher: readers keep the newer version."""
    load, table = pool.increment.load, pool.increment.lake
    if not load.key:
        return
    cursor = quote_identifier(load.cursor) if load.cursor else None
    is_newer = f"coalesce(s.{cursor} > l.{cursor}, false)" if cursor else "false"
    current = " and l.is_current" if load.mode == "history" else ""
    keep_in(
        session, pool, f"exists (from {table} as l where {is_same(load.key, 'l', 's')}{current} and not {is_newer})"
    )


def _audit(session: WarehouseSession, pools: Mapping[str, Pool]) -> None:
    """Keep the rows out that break a row-wise audit, then run the others over what the tables will be."""
    session.show_published()
    open_pools(session, pools.values())
    for pool in pools.values():
        _keep_older_in(session, pool)
        show_rest(session, pool)
    audits = [audit for pool in pools.values() for audit in _list_audits(session.project, pool)]
    results = isolate(session, pools, audits)
    raise_for([*results, *audit_shown(session)])


def _list_audits(project: Project, pool: Pool) -> Iterable[Audit]:
    """Return what a row must pass to come back: the audits of its key and its references, and those that set aside."""
    own = [audit for audit in project.audits if audit.table == pool.table and audit.severity == "quarantine"]
    is_history = pool.increment.load.mode == "history"
    return [
        audit.model_copy(update={"severity": "quarantine"})
        for audit in [*list_row_audits(project, pool.table, pool.key, is_history=is_history), *own]
    ]


def _count(session: WarehouseSession, pool: Pool) -> Replay:
    left = count_rows(session, pool.table)
    return Replay(
        table=pool.table,
        returned=session.count(pool.increment.read) - left,
        left=left,
        rows=session.count(session.name_shown(pool.table)),
    )


def _add(latest: Publication, replays: Iterable[Replay]) -> tuple[PublishedTable, ...]:
    by_table = {replay.table: replay for replay in replays}
    return tuple(
        replace(table, rows=replay.rows, quarantined=replay.left) if (replay := by_table.get(table.name)) else table
        for table in latest.tables
    )
