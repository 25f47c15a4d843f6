"""How long publishing takes: registering the staged files (phasewise) against writing them again (duckdb).

    python benchmarks/publish.py --tables 20 --rows 200000 --repeat 3 --json publish.json

The JSON is a list of ``{system, version, tables, rows, repeat, seconds}``, one record a run. Both publish the same
staged files in one transaction, as a full refresh of tables that are there already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import duckdb

from phasewise.lake.quoting import quote_identifier
from phasewise.lake.session import preload_extensions
from phasewise.project.config import Project
from phasewise.publishing.audits import read_parquet
from phasewise.publishing.session import open_writer
from phasewise.settings import Settings
from phasewise.staging.manifest import list_manifests, staged_files
from phasewise.testing.projects import publish_sample, stage_batch, write_project

SETTINGS = Settings(threads=2, memory_limit="1GB")


@dataclass(frozen=True, kw_only=True)
class Run:
    system: str
    version: str
    tables: int
    #: Of each table.
    rows: int
    repeat: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=20)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # Both systems begin with extensions whose signatures are checked, as flow runs of the warm worker do.
    preload_extensions(("ducklake", "sqlite_scanner"))
    with tempfile.TemporaryDirectory() as folder:
        project = build_project(Path(folder), tables=arguments.tables, rows=arguments.rows)
        runs = [
            Run(
                system=system,
                version=duckdb.__version__,
                tables=arguments.tables,
                rows=arguments.rows,
                repeat=repeat,
                seconds=measure(publish, project),
            )
            for repeat in range(arguments.repeat)
            for system, publish in (("phasewise", publish_registered), ("duckdb", publish_rewritten))
        ]
    for system in ("phasewise", "duckdb"):
        median = statistics.median(run.seconds for run in runs if run.system == system)
        print(f"{system:10} {arguments.tables} tables of {arguments.rows:,} rows: {median:.2f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(run) for run in runs], indent=1))


def build_project(root: Path, *, tables: int, rows: int) -> Project:
    statements = [
        f"create table t{number} (id integer primary key, customer integer, amount real, note text);"
        f"insert into t{number} with recursive n(i) as (select 1 union all select i + 1 from n where i < {rows}) "
        "select i, i * 7919 % 10007, i / 7.0, 'row ' || i from n;"
        for number in range(tables)
    ]
    return write_project(root, source="".join(statements))


def measure(publish: Callable[[Project, str], None], project: Project) -> float:
    batch = stage_batch(project, SETTINGS)
    started = time.perf_counter()
    publish(project, batch)
    return time.perf_counter() - started


def publish_registered(project: Project, batch: str) -> None:
    publish_sample(project, SETTINGS, batch)


def publish_rewritten(project: Project, batch: str) -> None:
    with open_writer(project, SETTINGS) as session:
        connection = session.connection
        connection.execute("begin")
        for manifest in list_manifests(project, batch):
            files = read_parquet(staged_files(project, manifest))
            name = quote_identifier(manifest.table)
            connection.execute(f"create or replace table lake.main.{name} as from {files}")
        connection.execute("commit")


if __name__ == "__main__":
    main()
