"""The session in which a batch is audited, changed, set aside and published: its connection, its names, its order.

A session shows tables, audits them, and, where it is the warehouse's one writer, changes it in one transaction:

    opened → showing (one view per table, by its bare name) → changing (in the transaction) → opened

Each step says which of them it needs; called in another it is a mistake of ours, and raises RuntimeError.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from functools import cached_property

import duckdb

from phasewise.errors import LakeError
from phasewise.lake.publications import (
    Publication,
    TableState,
    latest_publication,
    list_columns,
    list_tables,
    require_publication,
)
from phasewise.lake.queries import fetch_int, first_line
from phasewise.lake.quoting import quote_identifier
from phasewise.lake.session import open_session
from phasewise.lake.warehouse import attach_lake, has_lake, list_extensions, lock_lake, reach_warehouse
from phasewise.project.config import Project
from phasewise.settings import Settings

#: Schema of the lake that holds the rows that were set aside.
QUARANTINE_SCHEMA = "_quarantine"


class Stage(Enum):
    OPENED = "opened"
    #: Bare names are the tables as they are, or will be.
    SHOWING = "showing"
    #: In the transaction.
    CHANGING = "changing"


class WarehouseSession:
    """A DuckDB session with the warehouse attached as ``lake``; without it while nothing was published."""

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, project: Project, *, is_writer: bool = False, has_lake: bool = True
    ) -> None:
        self.connection = connection
        self.project = project
        self.is_writer = is_writer
        self.has_lake = has_lake
        self.stage = Stage.OPENED
        #: The tables that are shown.
        self.shown: set[str] = set()
        # Temporary tables are found before all others of their name, and a transaction may write to no other database
        # than the lake. So they have names that no table can have, as nobody knew them before.
        self._prefix = f"_phasewise_{uuid.uuid4().hex}_"

    def name(self, purpose: str) -> str:
        """Return the name, quoted as in SQL, of a table of the session's own, which no query of users finds."""
        return f"temp.{quote_identifier(self._prefix + purpose)}"

    def keep(self, purpose: str, query: str) -> str:
        """Make the session's own table *purpose* of the rows of *query*; return its name."""
        self.connection.execute(f"create or replace temp table {self.name(purpose)} as {query}")
        return self.name(purpose)

    def expect(self, *stages: Stage) -> None:
        """Do nothing where the session is in one of *stages*.

        Raises:
            RuntimeError: it is in another one.
        """
        if self.stage not in stages:
            wanted = " or ".join(stage.value for stage in stages)
            raise RuntimeError(f"This session is {self.stage.value} tables; the call needs it {wanted}.")

    @cached_property
    def tables(self) -> frozenset[str]:
        """The tables that are published; asked for once, which takes a second with hundreds of them."""
        return frozenset(list_tables(self.connection, "lake.main") if self.has_lake else ())

    @cached_property
    def quarantined(self) -> frozenset[str]:
        """The tables that have rows in quarantine."""
        return frozenset(list_tables(self.connection, f"lake.{QUARANTINE_SCHEMA}") if self.has_lake else ())

    @cached_property
    def latest(self) -> Publication | None:
        """What readers see; None while nothing was published."""
        return latest_publication(self.connection) if self.has_lake else None

    @cached_property
    def states(self) -> dict[str, TableState]:
        """What the lake remembers of its tables, by casefolded name."""
        return {state.table.casefold(): state for state in (self.latest.states if self.latest else ())}

    @cached_property
    def folded(self) -> frozenset[str]:
        """Their names as the lake compares them: without regard to case."""
        return frozenset(table.casefold() for table in self.tables)

    def show(self, table: str, query: str) -> None:
        """Let the bare name *table* mean the rows of *query*."""
        self.expect(Stage.SHOWING)
        self.connection.execute(f"create or replace view {self.name_shown(table)} as {query}")
        self.shown.add(table)

    def name_shown(self, table: str) -> str:
        return f"memory.main.{quote_identifier(table)}"

    def show_published(self) -> None:
        """Show all published tables as they are."""
        self.expect(Stage.OPENED)
        self.stage = Stage.SHOWING
        for table in sorted(self.tables):
            self.show(table, f"from lake.main.{quote_identifier(table)}")
        # A bare name is the view from here on, also where the session looked into the lake first.
        self.connection.execute("use memory")

    def list_columns(self, relation: str) -> dict[str, str]:
        """Return the columns of *relation*, which is what follows FROM, with their types."""
        return list_columns(self.connection, relation)

    def count(self, relation: str) -> int:
        """Return the number of rows of *relation*, which is what follows FROM."""
        return fetch_int(self.connection, f"select count(*) from {relation}")

    @contextmanager
    def change(self, publication: Publication, message: str) -> Iterator[None]:
        """Change the lake in one transaction, whose commit carries *message* and *publication*.

        Raises:
            LakeError: DuckDB refused something; everything is as it was.
        """
        self.expect(Stage.OPENED, Stage.SHOWING)
        if not self.is_writer:
            raise RuntimeError("This session only reads the warehouse.")
        self.stage = Stage.CHANGING
        try:
            self.connection.execute("begin")
            self.sign(publication, message)
            yield
            self.connection.execute("commit")
        except duckdb.Error as exc:
            self._roll_back()
            raise LakeError(
                f"{message} failed: {first_line(exc).rstrip('.')}. The warehouse is unchanged.",
                hint="Check the free space and the permissions of its folder, then try again.",
            ) from exc
        except BaseException:
            self._roll_back()
            raise
        finally:
            self._forget()

    def sign(self, publication: Publication, message: str) -> None:
        """Say what the commit of the open transaction will carry; the last word counts."""
        self.expect(Stage.CHANGING)
        self.connection.execute(
            "call lake.set_commit_message('phasewise', $message, extra_info => $extra_info)",
            {"message": message, "extra_info": publication.to_extra_info()},
        )

    def require_latest(self) -> Publication:
        """Return what readers see.

        Raises:
            LakeError: nothing was published yet.
        """
        return self.latest or require_publication(self.connection, self.project)

    def _roll_back(self) -> None:
        with suppress(duckdb.Error):  # a failed commit has ended the transaction itself
            self.connection.execute("rollback")

    def _forget(self) -> None:
        """Ask again for what a transaction may have changed."""
        self.stage = Stage.OPENED
        for name in ("tables", "quarantined", "latest", "states", "folded"):
            self.__dict__.pop(name, None)


@contextmanager
def open_auditor(project: Project, settings: Settings) -> Iterator[WarehouseSession]:
    """Read the warehouse: with it attached as ``lake``, or, while nothing was published, without."""
    with open_session(settings, extensions=list_extensions(project)) as connection:
        reach_warehouse(connection, project)
        if is_there := has_lake(project):
            attach_lake(connection, project, read_only=True)
        yield WarehouseSession(connection, project, has_lake=is_there)


@contextmanager
def open_writer(project: Project, settings: Settings) -> Iterator[WarehouseSession]:
    """Be the one writer of the warehouse.

    Raises:
        WarehouseBusy: another process was writing for longer than ``lock_timeout`` seconds.
    """
    with (
        lock_lake(project, timeout=settings.lock_timeout),
        open_session(settings, extensions=list_extensions(project)) as connection,
    ):
        attach_lake(connection, project)
        yield WarehouseSession(connection, project, is_writer=True)
