"""Write src/phasewise/server/server_schema.sql: the empty database of the installed Prefect, as migrations leave it.

Run it when the oldest supported Prefect moves. The migrations take some 10 seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import tempfile
from pathlib import Path

TARGET = Path(__file__).parents[1] / "src" / "phasewise" / "server" / "server_schema.sql"
HEAD = """\
-- The tables of a Prefect {version} server on SQLite, as its migrations leave them. Running those for a new database
-- takes 4 s of CPU and up to 12 s of waiting for the disk, running this 0.1 s; Prefect migrates on from the revision
-- at the end. Written by tools/dump_server_schema.py.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PREFECT_HOME"] = folder  # read when Prefect is imported
        os.environ["PREFECT_API_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{folder}/empty.db"
        import prefect
        from prefect.server.database.dependencies import provide_database_interface

        asyncio.run(provide_database_interface().create_db())
        with contextlib.closing(sqlite3.connect(f"{folder}/empty.db")) as database:
            statements = "\n".join(line.rstrip() for line in "\n".join(database.iterdump()).splitlines())
        TARGET.write_text(HEAD.format(version=prefect.__version__) + statements + "\n")


if __name__ == "__main__":
    main()
