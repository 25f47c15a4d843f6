"""Read the rows of a table into Parquet files, at one moment, and have the source count them too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import duckdb

from phasewise.errors import PhasewiseError, StagingError
from phasewise.lake.object_store import File, StoredFile, explain_storage
from phasewise.sources import SnapshotToken, Source, SourceTable, StagedRows
from phasewise.staging.load_plan import Load
from phasewise.staging.parquet import fix_parquet, write_parquet
from phasewise.staging.write_errors import explain_write, explaining_writes
from phasewise.system.files import sync_path


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
    try:
        source.begin(connection, table, snapshot)
        rows = write_parquet(connection, source.select(table), path, table)
        if keys is not None:
            # After the rows: where the source holds no moment, a row that came meanwhile must not count as deleted.
            write_parquet(connection, source.select(keys), keys_path, keys)
        files = [path, *([keys_path] if keys is not None else [])]
        for file in files:
            fix_parquet(connection, file)
        with _syncing(files):
            source_rows = source.count_rows(connection, table, StagedRows(rows=rows, file=path))
        connection.execute("COMMIT")
    except PhasewiseError:
        _abandon(connection, path)
        raise
    # UnicodeDecodeError: DuckDB quotes bytes of the source in messages, whether they are UTF-8 or not.
    except (duckdb.Error, UnicodeDecodeError) as exc:
        _abandon(connection, path)
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
    try:
        connection.execute("ROLLBACK")
    except duckdb.Error:
        pass  # the failed statement may have ended the transaction itself


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
