"""Staged rows as Parquet: how they are encoded, and that other readers than DuckDB can read them too.

Those of a large table are encoded with what version 2 of Parquet added (differences of numbers, lengths of texts apart
from their letters), which costs less to write and to read and takes less room (docs/decisions/0027).
"""

from __future__ import annotations

from pathlib import Path

import duckdb

from phasewise.lake.object_store import File
from phasewise.lake.quoting import quote_literal
from phasewise.lake.session import read_parquet
from phasewise.sources import SourceTable
from phasewise.system.files import replace_whole

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


def write_parquet(connection: duckdb.DuckDBPyConnection, query: str, file: File, table: SourceTable) -> int:
    """Write the rows of *query*, which are those of *table*, to *file*, in any order; return how many they are."""
    # DuckDB bounds row groups by size only where it need not keep the order of rows, which a table does not have.
    connection.execute("SET preserve_insertion_order = false")
    is_large = (table.row_estimate or 0) >= _GROUP_ROWS and len(table.columns) <= _COMPACT_COLUMNS
    # What is on S3 cannot be fixed in place.
    options = _COMPACT if is_large and isinstance(file, Path) else _PLAIN
    copied = connection.execute(f"COPY ({query}) TO {quote_literal(str(file))} ({options})").fetchone()
    assert copied is not None  # COPY returns the number of rows
    return int(copied[0])


def fix_parquet(connection: duckdb.DuckDBPyConnection, file: File) -> None:
    """Write *file*, of ``write_parquet``, again where it holds numbers that only DuckDB could read."""
    if not isinstance(file, Path):
        return
    found = connection.execute(_IS_WIDE.format(file=quote_literal(str(file)))).fetchone()
    if found == (True,):
        with replace_whole(file) as draft:
            connection.execute(f"COPY (FROM {read_parquet([file])}) TO {quote_literal(str(draft))} ({_PLAIN})")
