"""Publish an earlier batch again, as a new snapshot with the tables and marts of then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import duckdb

from phasewise.lake.marts import MARTS_SCHEMA
from phasewise.lake.object_store import FILE_PREFIX
from phasewise.lake.publications import Publication, find_publication, list_columns, list_tables
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import read_parquet
from phasewise.lake.warehouse import attach_lake
from phasewise.project.config import Project
from phasewise.publishing.file_links import explain_link_error, link_file, sync_folders
from phasewise.publishing.publish import publish_table
from phasewise.publishing.session import QUARANTINE_SCHEMA, WarehouseSession, open_writer
from phasewise.settings import Settings


def rollback_batch(project: Project, settings: Settings, batch: str) -> Publication:
    """Make all tables and marts what they were when *batch* was published, as a new snapshot.

    Tables that came later are dropped. Nothing is lost: the batches since then stay in their own snapshots until
    they are older than ``snapshot_retention_days``.

    Raises:
        PublishConflict: no snapshot carries *batch*.
    """
    with open_writer(project, settings) as session:
        connection = session.connection
        target = find_publication(connection, batch)
        attach_lake(connection, project, snapshot=target.snapshot, name="past")
        files = _link_past_files(connection, project, target.snapshot)
        with session.change(replace(target, kind="rollback"), f"Roll back to batch {batch}"):
            for schema in ("main", MARTS_SCHEMA, QUARANTINE_SCHEMA):
                _restore_schema(session, schema, files if schema == "main" else {})
        return session.require_latest()


def _link_past_files(connection: duckdb.DuckDBPyConnection, project: Project, snapshot: int) -> dict[str, list[Path]]:
    """Return new links to the files of each table of ``past`` that was published and not changed by others since."""
    if project.is_stored:
        return {}  # a file cannot belong to two tables, and S3 has no links: the rows are written again
    try:
        linked = {
            table: [link_file(file, file.parent) for file in files]
            for table in list_tables(connection, "past.main")
            if (files := _find_published_files(connection, table, snapshot))
        }
        sync_folders({file.parent for files in linked.values() for file in files})
    except OSError as exc:
        raise explain_link_error(project, exc) from exc
    return linked


def _find_published_files(connection: duckdb.DuckDBPyConnection, table: str, snapshot: int) -> list[Path]:
    """Return the files that make up *table* of ``past``; none when it has rows, or lacks some, that they do not say."""
    past = f"past.main.{quote_identifier(table)}"
    rows = connection.execute(
        f"select data_file, delete_file from ducklake_list_files('lake', {quote_literal(table)}, "
        f"schema => 'main', snapshot_version => {snapshot})"
    ).fetchall()
    files = [Path(data) for data, _ in rows]
    if not files or any(deleted or not Path(data).name.startswith(FILE_PREFIX) for data, deleted in rows):
        return []
    columns = list_columns(connection, past)
    if "filename" in {name.casefold() for name in columns}:
        return []  # it hides the name of the file
    # Files of increments may have other columns each.
    has_all = all(list_columns(connection, read_parquet([file])) == columns for file in files)
    is_same = has_all and _count_by_file(connection, past) == _count_by_file(connection, read_parquet(files))
    return files if is_same else []


def _count_by_file(connection: duckdb.DuckDBPyConnection, relation: str) -> dict[str, int]:
    """Return how many rows of *relation* come of each file.

    A few changed rows are in DuckLake's catalog: one removed there and one added leave the number of all as it was.
    """
    return dict(connection.execute(f"select filename, count(*) from {relation} group by 1").fetchall())


def _restore_schema(session: WarehouseSession, schema: str, files: Mapping[str, Sequence[Path]]) -> None:
    """Make the tables of *schema* those of the attached ``past``: from *files* where they are given, else rewritten."""
    connection = session.connection
    then = list_tables(connection, f"past.{schema}")
    if then:
        connection.execute(f"create schema if not exists lake.{schema}")
    for table in list_tables(connection, f"lake.{schema}"):
        if table not in then:
            connection.execute(f"drop table lake.{schema}.{quote_identifier(table)}")
    for table in then:
        past = f"past.{schema}.{quote_identifier(table)}"
        if table in files:
            publish_table(session, table, files[table], rows=session.count(past))
        else:
            connection.execute(f"create or replace table lake.{schema}.{quote_identifier(table)} as from {past}")
