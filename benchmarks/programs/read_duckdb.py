"""Plain DuckDB: ``COPY (FROM source.table) TO … (FORMAT parquet, COMPRESSION zstd)``, its other options untouched.

With ``typed`` as the second argument the SELECT is the one of phasewise, which keeps every value as it was.
"""

import sys
from pathlib import Path

import duckdb
from reading import Job, run

from phasewise.lake.quoting import quote_literal
from phasewise.lake.session import find_extension
from phasewise.project.config import load_project
from phasewise.settings import Settings
from phasewise.sources import describe_project_table, open_source

_SCANNERS = {"postgresql": "postgres_scanner", "sqlite": "sqlite_scanner"}


def read(job: Job) -> int:
    # Not checking the extension's signature is what phasewise saves by its warm process.
    config: dict[str, str | bool | int | float | list[str]] = {
        "threads": job.threads,
        "memory_limit": job.memory_limit,
        "allow_unsigned_extensions": True,
    }
    with duckdb.connect(config=config) as connection:
        if scanner := _SCANNERS.get(job.source):
            connection.execute(f"LOAD {quote_literal(str(find_extension(scanner)))}")
        select = _select_typed(connection, job) if "typed" in sys.argv else _select_plain(connection, job)
        target = Path(job.folder) / "rows.parquet"
        options = "FORMAT parquet, COMPRESSION zstd"
        copied = connection.execute(f"COPY ({select}) TO {quote_literal(str(target))} ({options})").fetchone()
    assert copied is not None  # COPY returns the number of rows
    return int(copied[0])


def _select_plain(connection: duckdb.DuckDBPyConnection, job: Job) -> str:
    kind = {"postgresql": "TYPE postgres, ", "sqlite": "TYPE sqlite, ", "duckdb": ""}[job.source]
    connection.execute(f"ATTACH {quote_literal(job.address)} AS source ({kind}READ_ONLY)")
    return f"FROM source.{job.table}"


def _select_typed(connection: duckdb.DuckDBPyConnection, job: Job) -> str:
    project = Path(job.folder) / "phasewise.toml"
    project.write_text(f'[project]\nname = "benchmark"\n[source]\nurl = "{job.url()}"\n', encoding="utf-8")
    loaded = load_project(project.parent)
    source = open_source(loaded, Settings(threads=job.threads))
    source.attach(connection)
    return source.select(describe_project_table(loaded, source, job.table))


run(read)
