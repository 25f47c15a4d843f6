"""TPC-H in the databases that are read, made once in a folder."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import duckdb

from benchmarks.harness import environments, postgresql, processes
from phasewise.lake.quoting import quote_literal
from phasewise.lake.session import find_extension

TABLES = ("lineitem", "orders", "partsupp", "part", "customer", "supplier", "nation", "region")
SOURCES = ("postgresql", "sqlite", "duckdb")

_PROGRAM = Path(__file__).parents[1] / "programs" / "make_tpch.py"


@contextlib.contextmanager
def serving(sources: list[str], scale: float, folder: Path, peers: Path) -> Iterator[Mapping[str, str]]:
    """Make the tables in each of *sources*; yield where each is: the URL of a server, else the path of a file."""
    made = _make_once(folder / "tpch.duckdb", lambda path: _generate(path, scale, folder, peers))
    addresses = {"duckdb": str(made)}
    if "sqlite" in sources:
        addresses["sqlite"] = str(_make_once(folder / "tpch.sqlite", lambda path: _fill_sqlite(path, made)))
    with contextlib.ExitStack() as stack:
        if "postgresql" in sources:
            home = folder / "postgresql"
            url = f"postgresql://{stack.enter_context(postgresql.running(home, peers))}"
            _make_once(home / "filled", lambda path: _fill_postgresql(url, made, path))
            addresses["postgresql"] = url
        yield {source: addresses[source] for source in sources}


def _make_once(path: Path, make: Callable[[Path], None]) -> Path:
    if not path.exists():
        print(f"Making {path} ...", file=sys.stderr, flush=True)
        fresh = path.with_name(f"unfinished-{path.name}")
        fresh.unlink(missing_ok=True)
        make(fresh)
        fresh.rename(path)
    return path


def _generate(path: Path, scale: float, folder: Path, peers: Path) -> None:
    python = environments.ensure("tpch", peers) / "bin" / "python"
    env = processes.clean_environment()
    processes.run([python, _PROGRAM, path, str(scale)], log=folder / "tpch.log", env=env, cwd=folder)


def _fill_postgresql(url: str, made: Path, filled: Path) -> None:
    with _open(made, "postgres_scanner") as connection:
        connection.execute(f"ATTACH {quote_literal(url)} AS target (TYPE postgres, READ_WRITE)")
        for table in TABLES:
            connection.execute(f"CREATE OR REPLACE TABLE target.{table} AS FROM {table}")
        # Now, so that the server does not do it by itself while somebody is measured.
        connection.execute("CALL postgres_execute('target', 'VACUUM ANALYZE', use_transaction => false)")
        connection.execute("CALL postgres_execute('target', 'CHECKPOINT', use_transaction => false)")
    filled.touch()


def _fill_sqlite(path: Path, made: Path) -> None:
    with _open(made, "sqlite_scanner") as connection, closing(sqlite3.connect(path)) as target:
        for table in TABLES:
            # The types of the TPC-H specification, which the scanner would not declare.
            columns = connection.execute(f"DESCRIBE {table}").fetchall()
            target.execute(f"CREATE TABLE {table} ({', '.join(f'{name} {type_}' for name, type_, *_ in columns)})")
        target.commit()
        connection.execute(f"ATTACH {quote_literal(str(path))} AS target (TYPE sqlite, READ_WRITE)")
        for table in TABLES:
            connection.execute(f"INSERT INTO target.{table} FROM {table}")


@contextlib.contextmanager
def _open(made: Path, extension: str) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(str(made), read_only=True) as connection:
        connection.execute(f"LOAD {quote_literal(str(find_extension(extension)))}")
        yield connection
