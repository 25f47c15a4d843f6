"""Partitions: the parts in which a large table is staged, each by a process of its own, and published as one table.

    staging/<batch>/partitions.json     which tables are split, and into which parts

Where a table is divided is decided once for one moment of the source, so that a resume means the same parts. At
another moment a row may have come to another part: what was staged of the table before then counts for nothing, and
its new parts have other names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import duckdb
from pydantic import TypeAdapter

from phasewise.errors import PhasewiseError, SourceUnavailable, StagingError
from phasewise.lake.session import open_session
from phasewise.project.config import Project
from phasewise.settings import Settings
from phasewise.sources import SnapshotToken, Source, SourceTable, describe_project_table, find_snapshot, open_source
from phasewise.staging.replication import read_shared, write_shared

_FILE = "partitions.json"


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One part of a table."""

    #: Such as ``2/4``; unlike that of any other part of the table in its batch.
    name: str
    #: In the SQL of the source; holds for the rows of this part.
    condition: str


@dataclass(frozen=True, kw_only=True)
class SplitTable:
    """A table and its parts at one moment of the source."""

    table: str
    #: Rows of the whole table, as the source counted them: so many its parts must have together. 0 without parts.
    rows: int
    #: The id of the moment; None where the source holds none.
    moment: str | None
    #: How often the table was split in its batch, this time included.
    attempt: int
    #: Empty where it was split before, and is staged whole at this moment; and where it could not be split.
    partitions: tuple[Partition, ...]
    #: Why it could not be split, though it may have more rows than its limit.
    note: str | None = None

    def list_names(self) -> list[str | None]:
        """Return the names of the parts that make up the table; None alone for the whole."""
        return [part.name for part in self.partitions] or [None]


def name_item(table: str, partition: str | None) -> str:
    """Return the name under which *table*, or a part of it, is staged and its flow run is known: ``orders 2/4``."""
    return table if partition is None else f"{table} {partition}"


def read_splits(folder: Path) -> dict[str, SplitTable]:
    """Return table → how it is split, for the tables of the batch in *folder* that are.

    Raises:
        StagingError: the file is damaged.
    """
    splits = read_shared(folder / _FILE, TypeAdapter(list[SplitTable]).validate_json)
    return {split.table: split for split in splits or ()}


def write_splits(project: Project, folder: Path, splits: Mapping[str, SplitTable]) -> None:
    """Write down how the tables of the batch in *folder* are split.

    Raises:
        StagingError: it cannot be written.
    """
    write_shared(project, folder / _FILE, json.dumps([asdict(split) for split in splits.values()], indent=1))


def find_partition(
    split: SplitTable | None, table: str, name: str | None, snapshot: SnapshotToken | None
) -> Partition | None:
    """Return the part *name* of *table*; None where the table is staged whole, and was asked for so.

    Raises:
        StagingError: it has no such part, or not at this moment of the source.
    """
    parts = {part.name: part for part in split.partitions} if split else {}
    if not parts and name is None:
        return None
    if name is None:
        raise StagingError(
            f'Table "{table}" is split into {len(parts)} partitions in this batch.',
            hint="Extract each of them, or the table in a batch of its own.",
        )
    if name not in parts:
        raise StagingError(f'Table "{table}" has no partition "{name}".', hint="Resume the batch, or extract it whole.")
    assert split is not None  # it has parts
    if split.moment != (snapshot["id"] if snapshot else None):
        raise StagingError(
            f'Table "{table}" was split at a moment of the source that is gone.', hint="Resume the batch."
        )
    return parts[name]


def split_tables(
    project: Project,
    settings: Settings,
    tables: Sequence[str],
    snapshot: SnapshotToken | None,
    *,
    before: Mapping[str, SplitTable],
) -> dict[str, SplitTable]:
    """Divide those of *tables* that have more rows than their limit, as they are at *snapshot*.

    *before* says how they were split at other moments of the same batch. A table that cannot be divided is staged
    whole, and its ``note`` says why. One that does not fit its contract is left out: its own flow run says so.

    Raises:
        SourceUnavailable: the source does not answer, or stopped answering.
        duckdb.FatalException, duckdb.InternalException: the session is broken.
    """
    limits = {table: limit for table in tables if (limit := _find_limit(project, settings, table, snapshot))}
    if not limits:
        return {}
    if snapshot is not None and snapshot["id"] is None:
        snapshot = None  # none could be held
    source = open_source(project, settings)
    found: dict[str, SplitTable] = {}
    with open_session(settings, extensions=source.extensions) as connection:
        source.attach(connection, snapshot)
        for table in _list_candidates(project, source, limits):
            split = _split(connection, source, table, limits[table.name], snapshot, before.get(table.name))
            found |= {table.name: split} if split else {}
    # There is one name for a flow run: no part may have that of a table.
    return {
        table: split
        for table, split in found.items()
        if not any(name_item(table, part.name) in tables for part in split.partitions)
    }


def _find_limit(project: Project, settings: Settings, table: str, snapshot: SnapshotToken | None) -> int:
    """Return the rows above which *table* is split; 0: it never is."""
    wanted = project.find_table(table).partition_rows
    if wanted is not None:
        return wanted
    # Where no moment is held, the parts of a table would be of different moments: only who asks for it gets that.
    held, _ = find_snapshot(snapshot, table)
    return settings.partition_rows if held is not None else 0


def _list_candidates(project: Project, source: Source, limits: Mapping[str, int]) -> list[SourceTable]:
    """Return the tables that may have more rows than their limit."""
    found = []
    for name, limit in limits.items():
        try:
            table = describe_project_table(project, source, name)
        except SourceUnavailable:
            raise
        except PhasewiseError:
            continue  # it fails in its own flow run, by the same call
        # An estimate may be old. A table that has a limit of its own is counted in any case.
        is_asked_for = project.find_table(name).partition_rows is not None
        if is_asked_for or table.row_estimate is None or table.row_estimate > limit:
            found.append(table)
    return found


def _split(
    connection: duckdb.DuckDBPyConnection,
    source: Source,
    table: SourceTable,
    limit: int,
    snapshot: SnapshotToken | None,
    previous: SplitTable | None,
) -> SplitTable | None:
    """Divide *table* in a transaction of its own; None where it has no more rows than *limit*."""
    try:
        source.begin(connection, table, snapshot)
        conditions = source.split(connection, table, limit)
        rows = source.count_rows(connection, _narrow(table)) if conditions else 0
        connection.execute("COMMIT")
    except (SourceUnavailable, duckdb.FatalException, duckdb.InternalException):
        raise
    # UnicodeDecodeError: DuckDB quotes bytes of the source in messages, whether they are UTF-8 or not.
    except (duckdb.Error, PhasewiseError, UnicodeDecodeError) as exc:
        with suppress(duckdb.Error):
            connection.execute("ROLLBACK")
        # A source that went away is no reason to read its largest tables whole, one after another.
        explained = source.explain(connection, _narrow(table), exc)
        if isinstance(explained, SourceUnavailable):
            raise explained from exc
        note = f"staged whole, as it could not be split: {_shorten(exc)}"
        return replace(_number(table.name, [], 0, snapshot, previous), note=note)
    return _number(table.name, conditions, rows, snapshot, previous) if conditions else None


def _shorten(error: Exception) -> str:
    """Return the message of *error* on one line: its beginning, and its end, where the server's words are."""
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else f"{text[:200]} … {text[-300:]}"


def _narrow(table: SourceTable) -> SourceTable:
    """Return *table* with its first column alone: its rows are counted, and its values looked at later."""
    return replace(table, columns=table.columns[:1], key=())


def _number(
    table: str, conditions: Sequence[str], rows: int, snapshot: SnapshotToken | None, previous: SplitTable | None
) -> SplitTable:
    held, _ = find_snapshot(snapshot, table)
    attempt = previous.attempt + 1 if previous else 1
    again = f" at moment {attempt}" if attempt > 1 else ""
    return SplitTable(
        table=table,
        rows=rows,
        moment=held["id"] if held else None,
        attempt=attempt,
        partitions=tuple(
            Partition(name=f"{number}/{len(conditions)}{again}", condition=condition)
            for number, condition in enumerate(conditions, start=1)
        ),
    )
