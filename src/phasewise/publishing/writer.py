"""The one writer of the lake: its session and its transactions, each signed with what it published."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

from phasewise.errors import LakeError
from phasewise.lake.object_store import File as File
from phasewise.lake.publications import Publication as Publication
from phasewise.lake.publications import PublishedTable as PublishedTable
from phasewise.lake.queries import first_line
from phasewise.lake.session import open_session
from phasewise.lake.warehouse import attach_lake, list_extensions, lock_lake
from phasewise.project.config import Project
from phasewise.settings import Settings


@contextmanager
def open_writer(project: Project, settings: Settings) -> Iterator[duckdb.DuckDBPyConnection]:
    """Be the one writer of the warehouse, with it attached as ``lake``.

    Raises:
        WarehouseBusy: another process was writing for longer than ``lock_timeout`` seconds.
    """
    with (
        lock_lake(project, timeout=settings.lock_timeout),
        open_session(settings, extensions=list_extensions(project)) as connection,
    ):
        attach_lake(connection, project)
        yield connection


@contextmanager
def transaction(connection: duckdb.DuckDBPyConnection, publication: Publication, message: str) -> Iterator[None]:
    """Run the block in one transaction of the lake, whose commit carries *message* and *publication*.

    Raises:
        LakeError: DuckDB refused something; everything is as it was.
    """
    try:
        connection.execute("begin")
        sign(connection, publication, message)
        yield
        connection.execute("commit")
    except duckdb.Error as exc:
        _roll_back(connection)
        raise LakeError(
            f"{message} failed: {first_line(exc).rstrip('.')}. The warehouse is unchanged.",
            hint="Check the free space and the permissions of its folder, then try again.",
        ) from exc
    except BaseException:
        _roll_back(connection)
        raise


def sign(connection: duckdb.DuckDBPyConnection, publication: Publication, message: str) -> None:
    """Say what the commit of the open transaction will carry; the last word counts."""
    connection.execute(
        "call lake.set_commit_message('phasewise', $message, extra_info => $extra_info)",
        {"message": message, "extra_info": publication.to_extra_info()},
    )


def _roll_back(connection: duckdb.DuckDBPyConnection) -> None:
    try:
        connection.execute("rollback")
    except duckdb.Error:
        pass  # a failed commit has ended the transaction itself
