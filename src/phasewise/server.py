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
import os
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import set_database_config
from prefect.settings import get_current_settings
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


class OneWriterAtATime(AioSqliteConfiguration):
    """SQLite with its transactions in a queue: each begins as the only writer, none is upgraded from a reader."""

    def __init__(self, connection_url: str, **options: Any) -> None:
        super().__init__(connection_url, **options)
        self._turn = asyncio.Lock()
        self._writer: asyncio.Task[Any] | None = None

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
                    yield transaction
            finally:
                self._writer = None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phasewise.server", description="Started by the stack.")
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the listening socket")
    options = parser.parse_args(argv)
    settings = get_current_settings()
    url = settings.server.database.connection_url
    if url is not None and url.get_secret_value().startswith("sqlite"):
        set_database_config(OneWriterAtATime(url.get_secret_value()))
    os.set_inheritable(options.socket, False)
    # Imported late: building the app reads the database configuration.
    from prefect.server.api.server import create_app

    config = uvicorn.Config(
        create_app(final=True),
        timeout_keep_alive=settings.server.api.keepalive_timeout,
        timeout_graceful_shutdown=3,
        log_level="warning",
    )
    with socket.socket(fileno=options.socket) as listening:
        uvicorn.Server(config).run(sockets=[listening])
    return 0


if __name__ == "__main__":
    sys.exit(main())
