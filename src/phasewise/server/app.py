"""The command of the embedded stack's Prefect server. Runs in the server's process."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import socket
import sqlite3
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvicorn
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, get_current_settings
from sqlalchemy.engine import make_url

from phasewise.patches import entries
from phasewise.patches.registry import apply, may_apply
from phasewise.system.files import replace_whole
from phasewise.worker.fork_job import WARM_DESCRIPTION, WARM_NAME


def create_database(path: Path) -> None:
    """Create the server's database at *path*, unless it exists, in a state that Prefect's migrations continue from.

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


def _offering_warm_process(read_view: Callable[[str], Any]) -> Callable[[str], Any]:
    """Have the server tell the UI of our type of work pool, where it asks for those that can be created."""

    async def read_view_with_ours(view: str) -> dict[str, Any]:
        found: dict[str, Any] = await read_view(view)
        stock = found.get("prefect", {}).get("process")
        if view != "aggregate-worker-metadata" or stock is None:
            return found
        # It takes the variables of the process type.
        ours = {**stock, "type": "warm-process", "display_name": WARM_NAME, "description": WARM_DESCRIPTION}
        return {**found, "phasewise": {"warm-process": ours}}

    return read_view_with_ours


def _use_one_writer(url: str) -> None:
    if may_apply(entries.ONE_WRITER):
        from prefect.server.database.dependencies import set_database_config

        from phasewise.server.database import OneWriterAtATime

        set_database_config(OneWriterAtATime(url))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phasewise.server.app", description="Started by the stack.")
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the listening socket")
    options = parser.parse_args(argv)
    settings = get_current_settings()
    url = make_url(PREFECT_API_DATABASE_CONNECTION_URL.value())
    if url.get_backend_name() == "sqlite" and url.database:
        create_database(Path(url.database))
        _use_one_writer(url.render_as_string(hide_password=False))
    os.set_inheritable(options.socket, False)
    # Imported late: building the app reads the database configuration.
    from prefect.server.api.server import create_app

    from phasewise.server.statements import spare_statements

    apply(entries.OFFER_WORK_POOL, _offering_warm_process)
    spare_statements(on_sqlite=url.get_backend_name() == "sqlite")
    app = create_app(final=True)
    config = uvicorn.Config(
        app, timeout_keep_alive=settings.server.api.keepalive_timeout, timeout_graceful_shutdown=3, log_level="warning"
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
