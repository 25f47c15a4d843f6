"""Read the rows of a table into Parquet files, at one moment, and have the source count them too.

Those of a large table are encoded with what version 2 of Parquet added (differences of numbers, lengths of texts apart
from their letters), which costs less to write and to read and takes less room (docs/decisions/0027).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import duckdb

from phasewise.errors import PhasewiseError, StagingError
from phasewise.lake.object_store import File, StoredFile, explain_storage
from phasewise.lake.queries import fetch_int
from phasewise.lake.quoting import quote_literal
from phasewise.lake.session import read_parquet
from phasewise.sources import SnapshotToken, Source, SourceTable, StagedRows
from phasewise.staging.load_plan import Load
from phasewise.staging.replication import explain_write, explaining_writes
from phasewise.system.files import replace_whole, sync_path

#: Rows of a full row group. It ends at a number of bytes too: a few of them are what memory must hold.
_GROUP_ROWS = 122_880
_PLAIN = f"FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_GROUP_ROWS}, ROW_GROUP_SIZE_BYTES '64MB'"
# A column whose values occur ten times each has a dictionary. DuckDB's own limit is five times: twice the work for
# each that is given up in the end. Room for one of that size is made at once, half a megabyte a column, and long texts
# are held once more than in version 1. So row groups end at fewer bytes, and none of it is for tables that have few
# rows or many columns.
_COMPACT = (
    f"FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_GROUP_ROWS}, ROW_GROUP_SIZE_BYTES '32MB', "
    f"PARQUET_VERSION V2, DICTIONARY_SIZE_LIMIT {_GROUP_ROWS // 10}"
)
_COMPACT_COLUMNS = 100

# DuckDB 1.5 takes differences of 32-bit numbers in 64 bits, where Parquet lets them wrap around. Those of values that
# are further apart than 2^31 so take 33 bits or more, which Arrow refuses (apache/arrow#20374). Infinite dates are the
# outermost ones. Decimals of 9 digits are never that far apart.
_DAYS = (
    "CASE {value} WHEN 'infinity' THEN 2147483647 WHEN '-infinity' THEN -2147483647 "
    "ELSE date_diff('day', DATE '1970-01-01', TRY_CAST({value} AS DATE)) END"
)
_NUMBER = f"coalesce(TRY_CAST({{value}} AS BIGINT), {_DAYS})"
_IS_WIDE = (
    "SELECT count(*) > 0 FROM parquet_metadata({file}) "
    "WHERE type = 'INT32' AND contains(encodings, 'DELTA_BINARY_PACKED') "
    f"AND {_NUMBER.format(value='stats_max_value')} - {_NUMBER.format(value='stats_min_value')} > 2147483647"
)


def read_rows(
    connection: duckdb.DuckDBPyConnection,
    source: Source,
    table: SourceTable,
    path: File,
    snapshot: SnapshotToken | None,
    *,
    keys: SourceTable | None,
    keys_path: File,
) -> tuple[int, int]:
    """Write the table's rows to *path*; return how many they are, here and as the source counts.

    The rows of *keys*, the table without a cursor and with its key alone, are written to *keys_path*. Both files are on
    the disk then.

    Raises:
        SourceUnavailable: the source stopped answering.
        UnfaithfulValue: a value would change; the message names column, sample row and the option that decides.
        StagingError: a file cannot be written, or the memory limit is too small.
    """
    files = [path, *([keys_path] if keys is not None else [])]
    try:
        source.begin(connection, table, snapshot)
        rows = write_parquet(connection, source.select(table), path, table)
        if keys is not None:
            # After the rows: where the source holds no moment, a row that came meanwhile must not count as deleted.
            write_parquet(connection, source.select(keys), keys_path, keys)
        for file in files:
            fix_parquet(connection, file)
        with _syncing(files):
            source_rows = source.count_rows(connection, table, StagedRows(rows=rows, file=path))
        connection.execute("COMMIT")
    # UnicodeDecodeError: DuckDB quotes bytes of the source in messages, whether they are UTF-8 or not.
    except (PhasewiseError, duckdb.Error, UnicodeDecodeError) as exc:
        _abandon(connection, path)
        if isinstance(exc, PhasewiseError):
            raise
        raise _find_staging_error(path, exc) or source.explain(connection, table, exc) from exc
    return rows, source_rows


@contextmanager
def _syncing(files: Sequence[File]) -> Iterator[None]:
    """Let *files* reach the disk, next to the block: the manifest says that they are there, and comes after them.

    Raises:
        StagingError: one could not be written.
    """
    with ThreadPoolExecutor(1) as thread:
        synced = {file: thread.submit(sync_path, file) for file in files if isinstance(file, Path)}
        yield
        for file, done in synced.items():
            with explaining_writes(file.parent):
                done.result()


def find_key_table(table: SourceTable, load: Load) -> SourceTable | None:
    """Return *table* with the columns of its key alone, where deleted rows are found by them."""
    if not load.deletes or load.is_replaced or load.reads_all:
        return None
    return replace(table, columns=tuple(column for column in table.columns if column.name in load.key))


def _abandon(connection: duckdb.DuckDBPyConnection, path: File) -> None:
    if isinstance(path, Path):  # an upload to S3 that is not finished leaves nothing that could be seen
        path.unlink(missing_ok=True)
    with suppress(duckdb.Error):  # the failed statement may have ended the transaction itself
        connection.execute("ROLLBACK")


def _find_staging_error(path: File, exc: Exception) -> StagingError | None:
    """Tell a failure to write from a failure to read: DuckDB raises one class for both."""
    text = str(exc)
    if isinstance(exc, duckdb.OutOfMemoryException):
        return StagingError(
            f"Extracting into {path.parent} needs more memory than allowed: {text.splitlines()[0]}.",
            hint="Raise PHASEWISE_EXTRACT_MEMORY_LIMIT, or lower PHASEWISE_THREADS.",
        )
    if not isinstance(exc, duckdb.IOException):
        return None
    if isinstance(path, StoredFile):
        return explain_storage(path, exc)
    return explain_write(path.parent, text) if str(path.parent) in text or "No space left" in text else None


def write_parquet(connection: duckdb.DuckDBPyConnection, query: str, file: File, table: SourceTable) -> int:
    """Write the rows of *query*, which are those of *table*, to *file*, in any order; return how many they are."""
    # DuckDB bounds row groups by size only where it need not keep the order of rows, which a table does not have.
    connection.execute("SET preserve_insertion_order = false")
    is_large = (table.row_estimate or 0) >= _GROUP_ROWS and len(table.columns) <= _COMPACT_COLUMNS
    # What is on S3 cannot be fixed in place.
    options = _COMPACT if is_large and isinstance(file, Path) else _PLAIN
    return fetch_int(connection, f"COPY ({query}) TO {quote_literal(str(file))} ({options})")


def fix_parquet(connection: duckdb.DuckDBPyConnection, file: File) -> None:
    """Write *file*, of ``write_parquet``, again where it holds numbers that only DuckDB could read."""
    if not isinstance(file, Path):
        return
    if fetch_int(connection, _IS_WIDE.format(file=quote_literal(str(file)))):
        with replace_whole(file) as draft:
            connection.execute(f"COPY (FROM {read_parquet([file])}) TO {quote_literal(str(draft))} ({_PLAIN})")
