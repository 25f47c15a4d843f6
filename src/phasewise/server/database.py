"""The embedded server's database: on SQLite, but without its write collisions. Runs in the server's process.

Prefect opens most of its transactions as readers and lets SQLite turn them into writers. When two do that at once,
one is told "database is locked" at once and whatever the busy timeout; the server answers 503 and the client backs
off for seconds (22 times in 25 flow runs, measured with 3.8.8). Here every transaction of the server takes the write
lock when it begins, one after the other, in the order in which they asked.

The configuration object goes in through Prefect's own injection point, ``set_database_config``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

from phasewise.patches import entries
from phasewise.patches.registry import may_apply


class OneWriterAtATime(AioSqliteConfiguration):
    """SQLite with its transactions in a queue: each begins as the only writer, none is upgraded from a reader."""

    def __init__(self, connection_url: str, **options: Any) -> None:
        url = make_url(connection_url)
        self._is_inline = may_apply(entries.INLINE_SQLITE)
        if self._is_inline:
            from phasewise.server.sqlite_driver import DRIVER

            url = url.set(drivername=DRIVER)
        super().__init__(url.render_as_string(hide_password=False), **options)
        self._turn = asyncio.Lock()
        self._writer: asyncio.Task[Any] | None = None

    def setup_sqlite(self, conn: Any, record: Any) -> None:
        conn.isolation_level = None  # the server begins its transactions itself
        super().setup_sqlite(conn, record)
        if self._is_inline:
            conn.execute("PRAGMA busy_timeout = 0")  # the driver waits, and does not block the event loop meanwhile
        # Pages. A checkpoint waits for the disk, and writes a page once however often it has changed since the last.
        conn.execute("PRAGMA wal_autocheckpoint = 10000")

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        task = asyncio.current_task()
        if self._writer is task:  # within its own transaction: waiting for its turn would be waiting for itself
            async with super().begin_transaction(session, with_for_update) as transaction:
                yield transaction
            return
        # Queueing here and not in SQLite: its busy handler sleeps up to 100 ms between two looks.
        async with self._turn:
            self._writer = task
            try:
                async with super().begin_transaction(session, with_for_update=True) as transaction:
                    # Begin now, and let what else this task opens begin as a reader: the server reads through a
                    # second session within a transaction (pausing a work queue does), which must not wait for it.
                    _ = await session.connection()
                    mode = SQLITE_BEGIN_MODE.set("DEFERRED")
                    try:
                        yield transaction
                    finally:
                        SQLITE_BEGIN_MODE.reset(mode)
            finally:
                self._writer = None
