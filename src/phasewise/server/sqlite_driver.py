"""SQLite for SQLAlchemy's asyncio, in the thread of the event loop. Runs in the server's process.

A statement of the Prefect server takes SQLite some 20 µs. ``aiosqlite`` hands each step of it (cursor, execute, fetch,
close) to a thread of the connection and back, which costs ten times that; here it is executed where it was asked for.
Nothing blocks the loop for it: what another connection has locked is asked for again after a pause in which the loop
runs, and a statement that has taken long once goes to a thread from then on.

For sessions, which is what the server uses. ``AsyncConnection.execute`` refuses a driver that has nothing to wait for.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import URL
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool
from sqlalchemy.util import await_only

#: What stands before ``:///`` in the URL of such a database.
DRIVER = "sqlite+inline"

#: Seconds for which a statement waits for what another connection has locked, and between two attempts.
_BUSY_SECONDS = 60.0
_LOOK_SECONDS = 0.005
#: CPU seconds from which a statement is slow. Of CPU time, because on a busy machine each may wait for its core.
_SLOW_SECONDS = 0.01
#: Statements that may be known to be slow; the server writes no more texts than that.
_KNOWN = 1000


class _Cursor(sqlite3.Cursor):
    """A cursor that has all its rows when it has executed: no reader stays open while the loop runs."""

    connection: _Connection

    def __init__(self, connection: _Connection) -> None:
        super().__init__(connection)
        self._rows: deque[Any] = deque()

    def execute(self, statement: str, parameters: Any = (), /) -> _Cursor:
        return self._execute(super().execute, statement, parameters)

    def executemany(self, statement: str, parameters: Iterable[Any], /) -> _Cursor:
        return self._execute(self._execute_all, statement, parameters)

    def _execute_all(self, statement: str, parameters: Iterable[Any]) -> None:
        """Execute *statement* for all *parameters* or for none: the server writes events outside of transactions."""
        if self.connection.in_transaction:
            super().executemany(statement, parameters)
            return
        super().execute("BEGIN IMMEDIATE")
        try:
            super().executemany(statement, parameters)
        except BaseException:
            self.connection.rollback()
            raise
        self.connection.commit()

    def _execute(self, execute: Callable[..., Any], statement: str, parameters: Any) -> _Cursor:
        def run() -> None:
            execute(statement, parameters)
            self._rows = deque(super(_Cursor, self).fetchall())

        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self.connection.run(statement, run)
            except sqlite3.OperationalError as exc:
                # A transaction that has read what is outdated by now (SQLITE_BUSY_SNAPSHOT) would wait for nothing.
                is_locked = exc.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_BUSY_RECOVERY)
                if not is_locked or time.monotonic() > deadline:
                    raise
                await_only(asyncio.sleep(_LOOK_SECONDS))
            else:
                return self

    def fetchone(self) -> Any:
        return self._rows.popleft() if self._rows else None

    def fetchmany(self, size: int | None = None) -> list[Any]:
        count = min(self.arraysize if size is None else size, len(self._rows))
        return [self._rows.popleft() for _ in range(count)]

    def fetchall(self) -> list[Any]:
        rows, self._rows = self._rows, deque()
        return list(rows)

    async def _async_soft_close(self) -> None:
        """Be one of SQLAlchemy's cursors for asyncio: nothing is left to be read."""


class _Connection(sqlite3.Connection):
    _slow: set[str] = set()  # noqa: RUF012 - of all connections: what is slow on one is slow on the next

    def cursor(self, factory: Any = _Cursor) -> Any:
        return super().cursor(factory)

    def run(self, statement: str, run: Callable[[], None]) -> None:
        if statement in self._slow:
            await_only(_in_thread(run))
            return
        start = time.thread_time()
        run()
        if time.thread_time() - start > _SLOW_SECONDS and len(self._slow) < _KNOWN:
            self._slow.add(statement)


async def _in_thread(run: Callable[[], None]) -> None:
    running = asyncio.ensure_future(asyncio.to_thread(run))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])  # the connection is in use until then
        raise


class InlineSQLite(SQLiteDialect_pysqlite):
    driver = "inline"
    is_async = True
    supports_statement_cache = True

    @classmethod
    def get_pool_class(cls, url: URL) -> type[Pool]:
        return AsyncAdaptedQueuePool

    def create_connect_args(self, url: URL) -> tuple[Any, Any]:
        positional, named = super().create_connect_args(url)
        # One thread at a time uses a connection, though not always the same.
        return positional, {**named, "factory": _Connection, "check_same_thread": False}


registry.register("sqlite.inline", __name__, InlineSQLite.__name__)
