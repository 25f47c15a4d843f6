"""A catalog in PostgreSQL, for a warehouse that machines share: reach it, prepare its schema, be its one writer.

A catalog is one schema of a database, ``postgresql://user@host:5432/database?schema=name``. DuckLake keeps its tables
there, and this module one more, which says what format the warehouse has.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

from phasewise.errors import LakeError, WarehouseBusy
from phasewise.lake.credentials import find_own_password
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.refusals import POSTGRES_ADVICE, explain_refusal
from phasewise.project.urls import DatabaseUrl, read_database_url, redact_url

#: The secret that DuckLake and the scanner take the login from; kept in the session's memory, printed by nothing.
SECRET = "phasewise_catalog"  # noqa: S105 - its name

#: The small files of staging, for machines that share no folder (``phasewise.staging.replication``).
STAGING_TABLE = "phasewise_staging"

_FORMAT = "phasewise_format"
#: What the database is attached as, in a session of its own.
_SERVER = "catalog"


def create_catalog_secret(connection: duckdb.DuckDBPyConnection, url: str) -> None:
    """Let *connection* log in to the catalog *url*."""
    parts = _read_url(url)
    ports = [port for _, port in parts.servers]
    login = {
        "host": ",".join(host for host, _ in parts.servers),
        "port": ",".join(ports) if any(ports) else None,
        "database": parts.database,
        "user": parts.user,
        "password": _find_password(parts),
    }
    fields = "".join(f", {name} {quote_literal(value)}" for name, value in login.items() if value)
    connection.execute(f"CREATE OR REPLACE SECRET {SECRET} (TYPE postgres{fields})")


def _read_url(url: str) -> DatabaseUrl:
    return read_database_url(url, "postgresql://user@host:5432/database")


def _find_password(url: DatabaseUrl) -> str | None:
    return url.password or find_own_password("PGPASSWORD")


def find_schema(url: str) -> str:
    """Return the schema of the catalog *url*."""
    return _read_url(url).options.get("schema", "public")


def list_options(url: str, *, is_writer: bool = False) -> str:
    """Return what *url* says besides login and schema, such as ``sslmode``, in libpq's form.

    Connections of a writer of the warehouse have a name by which ``lock_catalog`` finds them.
    """
    parts = _read_url(url)
    query = {"connect_timeout": "10", "application_name": "phasewise", **parts.options}
    if is_writer:
        query["application_name"] = _name_writer(url)
    query.pop("schema", None)
    query["client_encoding"] = "UTF8"  # what DuckDB's texts are, whatever the database or PGCLIENTENCODING says
    if _find_password(parts) is None:
        query["password"] = ""  # else libpq would take the one that a source has put into the environment
    escaped = {name: value.replace("\\", "\\\\").replace("'", "\\'") for name, value in query.items()}
    return " ".join(f"{name}='{value}'" for name, value in escaped.items())


def attach_server(connection: duckdb.DuckDBPyConnection, url: str) -> None:
    """Attach the database of the catalog *url*, for ``ask_server`` and ``tell_server``.

    Raises:
        LakeError: it does not answer, or refuses the login.
    """
    create_catalog_secret(connection, url)
    try:
        connection.execute(
            f"ATTACH {quote_literal(list_options(url))} AS {_SERVER} "
            f"(TYPE postgres, SECRET {SECRET}, SCHEMA {quote_literal(find_schema(url))})"
        )
    except duckdb.Error as exc:
        raise explain_unreachable(url, exc) from exc


def explain_unreachable(url: str, exc: Exception) -> LakeError:
    reason, hint = explain_refusal(exc, "[warehouse] catalog", POSTGRES_ADVICE)
    return LakeError(f"The warehouse's catalog {redact_url(url)} cannot be used: {reason}.", hint=hint)


def ask_server(connection: duckdb.DuckDBPyConnection, sql: str) -> list[tuple[object, ...]]:
    """Run *sql*, a query in PostgreSQL's words, on the attached server; return its rows."""
    return connection.execute(f"FROM postgres_query('{_SERVER}', {quote_literal(sql)})").fetchall()


def tell_server(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Run *sql*, statements in PostgreSQL's words that return nothing, on the attached server."""
    connection.execute(f"CALL postgres_execute('{_SERVER}', {quote_literal(sql)})")


def has_catalog(connection: duckdb.DuckDBPyConnection, url: str) -> bool:
    """Tell whether DuckLake has its tables in the catalog *url*, whose server is attached."""
    return _has_table(connection, url, "ducklake_snapshot")  # DuckLake creates all of them in one transaction


def has_staging(connection: duckdb.DuckDBPyConnection, url: str) -> bool:
    """Tell whether ``prepare_catalog`` has made the table of staging."""
    return _has_table(connection, url, STAGING_TABLE)


def _has_table(connection: duckdb.DuckDBPyConnection, url: str, table: str) -> bool:
    name = f"{quote_identifier(find_schema(url))}.{table}"
    return ask_server(connection, f"SELECT to_regclass({quote_literal(name)}) IS NOT NULL")[0][0] is True


def prepare_catalog(connection: duckdb.DuckDBPyConnection, url: str, *, format_number: int) -> None:
    """Create the schema of the catalog *url* where it is missing, and note the format of the warehouse.

    Raises:
        LakeError: the login may not create it.
    """
    schema = quote_identifier(find_schema(url))
    # Two that create the same schema at the same time would fail one of them. And it is asked first whether it is
    # there, since who may use it need not be allowed to create it.
    statements = f"""
        BEGIN;
        SELECT pg_advisory_xact_lock({_lock_key(url, "prepare")});
        DO $do$ BEGIN
            IF to_regnamespace({quote_literal(schema)}) IS NULL THEN CREATE SCHEMA {schema}; END IF;
            CREATE TABLE IF NOT EXISTS {schema}.{_FORMAT} (format integer NOT NULL);
            CREATE TABLE IF NOT EXISTS {schema}.{STAGING_TABLE} (batch text NOT NULL, folder text NOT NULL,
                name text NOT NULL, content text NOT NULL, PRIMARY KEY (batch, folder, name));
            IF NOT EXISTS (SELECT FROM {schema}.{_FORMAT}) THEN
                INSERT INTO {schema}.{_FORMAT} VALUES ({format_number:d});
            END IF;
        END $do$;
        COMMIT
    """
    try:
        tell_server(connection, statements)
    except duckdb.Error as exc:
        raise explain_unreachable(url, exc) from exc


def read_format(connection: duckdb.DuckDBPyConnection, url: str) -> int | None:
    """Return the format that ``prepare_catalog`` noted; None where it did not, as for a plain DuckLake."""
    if not _has_table(connection, url, _FORMAT):
        return None
    rows = ask_server(connection, f"SELECT max(format) FROM {quote_identifier(find_schema(url))}.{_FORMAT}")
    return int(str(rows[0][0])) if rows[0][0] is not None else None


@contextmanager
def lock_catalog(connection: duckdb.DuckDBPyConnection, url: str, *, timeout: float) -> Iterator[None]:
    """Be the one writer of the catalog *url*, whose server is attached to *connection*, which serves the lock alone.

    An advisory lock of the server: it ends with the connection, and so with the process, however that ends.

    Raises:
        WarehouseBusy: another process still held the lock after *timeout* seconds; it names that process.
    """
    key = _lock_key(url, "writer")
    # In a transaction, since the scanner gives a connection back to its pool at the end of each; without it a lock of
    # the session could be left on one that nobody finds again.
    connection.execute("BEGIN")
    try:
        # A publish may take longer than what the server allows those who hold a transaction and do nothing. And it
        # must find out soon that a machine is gone that could not say so.
        tell_server(
            connection,
            "SET LOCAL idle_in_transaction_session_timeout = 0; SET LOCAL tcp_keepalives_idle = 10; "
            "SET LOCAL tcp_keepalives_interval = 5; SET LOCAL tcp_keepalives_count = 3; "
            f"SET LOCAL application_name = {quote_literal(f'phasewise {os.getpid()} on {socket.gethostname()}'[:63])}",
        )
        deadline = time.monotonic() + timeout
        while not ask_server(connection, f"SELECT pg_try_advisory_xact_lock({key})")[0][0]:
            if time.monotonic() >= deadline:
                raise WarehouseBusy(
                    f"{_find_holder(connection, key)} is writing to the warehouse {redact_url(url)}.",
                    hint=f"Waited {timeout:g} s. Retry once it is done.",
                )
            time.sleep(0.1)
        # Of a writer that was killed the connection with the lock may end before the one that is just committing.
        while (left := _count_writers(connection, url)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            raise WarehouseBusy(
                f"A writer of the warehouse {redact_url(url)} has ended, and the server is still busy with its work.",
                hint=f"Waited {timeout:g} s. Retry once it is done.",
            )
    except duckdb.Error as exc:
        raise explain_unreachable(url, exc) from exc
    # The session ends with the caller's connection, and the lock with the session.
    yield


def _lock_key(url: str, what: str) -> int:
    """Return a key for *what* in the catalog *url*; advisory locks are the database's own, so the schema suffices."""
    digest = hashlib.sha256(f"phasewise {what} {find_schema(url)}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


def _name_writer(url: str) -> str:
    return f"phasewise writer {find_schema(url)}"[:63]


def _count_writers(connection: duckdb.DuckDBPyConnection, url: str) -> int:
    name = quote_literal(_name_writer(url))
    tell_server(connection, "SELECT pg_stat_clear_snapshot()")  # else a transaction sees the same all the time
    query = f"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = {name}"
    return int(str(ask_server(connection, query)[0][0]))


def _find_holder(connection: duckdb.DuckDBPyConnection, key: int) -> str:
    rows = ask_server(
        connection,
        "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'advisory' "
        f"AND l.granted AND (l.classid::bigint << 32) | l.objid::bigint = {key}",
    )
    name = str(rows[0][0] or "") if rows else ""
    return f"Process {name.removeprefix('phasewise ')}" if name.startswith("phasewise ") else "Another process"
