"""The Prefect server of the embedded stack: on SQLite, but without its write collisions.

Prefect opens most of its transactions as readers and lets SQLite turn them into writers. When two do that at once,
one is told "database is locked" at once and whatever the busy timeout; the server answers 503 and the client backs
off for seconds (22 times in 25 flow runs, measured with 3.8.8). Here every transaction of the server takes the write
lock when it begins, one after the other, in the order in which they asked.

The configuration object goes in through Prefect's own injection point, ``set_database_config``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import socket
import sqlite3
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvicorn
from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration
from prefect.server.database.dependencies import set_database_config
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, get_current_settings
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

from phasewise.server.sqlite_driver import DRIVER
from phasewise.system.files import replace_whole
from phasewise.worker.fork_job import WARM_DESCRIPTION, WARM_NAME


class OneWriterAtATime(AioSqliteConfiguration):
    """SQLite with its transactions in a queue: each begins as the only writer, none is upgraded from a reader."""

    def __init__(self, connection_url: str, **options: Any) -> None:
        url = make_url(connection_url).set(drivername=DRIVER)
        super().__init__(url.render_as_string(hide_password=False), **options)
        self._turn = asyncio.Lock()
        self._writer: asyncio.Task[Any] | None = None

    def setup_sqlite(self, conn: Any, record: Any) -> None:
        conn.isolation_level = None  # the server begins its transactions itself
        super().setup_sqlite(conn, record)
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


def create_database(path: Path) -> None:
    """Create the server's database at *path*, unless it exists, in a state that Prefect's migrations go on from.

    They would take up to 12 seconds for a new one, most of it waiting for the disk after each of a hundred steps.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_whole(path) as draft, contextlib.closing(sqlite3.connect(draft)) as database:
        # No sync and no journal: a draft that a crash leaves half-written never gets the name.
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA journal_mode = OFF")
        database.executescript(files("phasewise.server").joinpath("server_schema.sql").read_text())


def offer_warm_process() -> None:
    """Have the server tell the UI of our type of work pool, where it asks for those that can be created."""
    from prefect.server.api import collections

    read_view = collections.get_collection_view

    async def read_view_with_ours(view: str) -> dict[str, Any]:
        found = await read_view(view)
        stock = found.get("prefect", {}).get("process")
        if view != "aggregate-worker-metadata" or stock is None:
            return found
        # It takes the variables of the process type.
        ours = {**stock, "type": "warm-process", "display_name": WARM_NAME, "description": WARM_DESCRIPTION}
        return {**found, "phasewise": {"warm-process": ours}}

    collections.get_collection_view = read_view_with_ours


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phasewise.server.app", description="Started by the stack.")
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the listening socket")
    options = parser.parse_args(argv)
    settings = get_current_settings()
    url = make_url(PREFECT_API_DATABASE_CONNECTION_URL.value())
    if url.get_backend_name() == "sqlite" and url.database:
        create_database(Path(url.database))
        set_database_config(OneWriterAtATime(url.render_as_string(hide_password=False)))
    os.set_inheritable(options.socket, False)
    # Imported late: building the app reads the database configuration.
    from prefect.server.api.server import create_app

    from phasewise.server.events import share_events
    from phasewise.server.requests import shorten_requests
    from phasewise.server.statements import spare_statements

    offer_warm_process()
    share_events()
    spare_statements(on_sqlite=url.get_backend_name() == "sqlite")
    app = create_app(final=True)
    shorten_requests(app)
    config = uvicorn.Config(
        app,
        timeout_keep_alive=settings.server.api.keepalive_timeout,
        timeout_graceful_shutdown=3,
        log_level="warning",
    )
    # What is imported lives as long as the server; to walk all of it at each full collection took 7 % of its CPU time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)
    with socket.socket(fileno=options.socket) as listening:
        uvicorn.Server(config).run(sockets=[listening])
    return 0


if __name__ == "__main__":
    sys.exit(main())
