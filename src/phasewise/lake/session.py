"""A DuckDB session with bounded memory and its extensions, which are wheels next to the engine."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import duckdb

from phasewise.errors import LakeError, ProjectError
from phasewise.lake.object_store import File
from phasewise.lake.postgres_catalog import attach_server
from phasewise.lake.quoting import quote_literal
from phasewise.settings import Settings

#: What a session of the data plane may need; the warm worker preloads them all.
EXTENSIONS = ("ducklake", "sqlite_scanner", "postgres_scanner", "mysql_scanner", "httpfs")

#: Extension files whose signature this process, or the one it was forked from, has checked: path → identity.
_checked: dict[Path, tuple[int, int, int]] = {}


@contextmanager
def open_session(
    settings: Settings, *, extensions: tuple[str, ...] = ("ducklake", "sqlite_scanner")
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open an in-memory DuckDB with bounded memory, threads and temporary files, and *extensions* loaded.

    Nothing is downloaded: extensions are the wheels next to the engine. Times are UTC. The temporary folder is
    removed when the session ends.

    Raises:
        LakeError: an extension is not installed, or does not fit the engine.
        ProjectError: a setting, such as ``memory_limit``, is not one that DuckDB understands.
    """
    spill = Path(tempfile.gettempdir()) / f"phasewise-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    connection = _connect(settings, spill, is_checked=all(_is_checked(name) for name in extensions))
    try:
        for name in extensions:
            load_extension(connection, name)
        # From here on nobody may load unsigned code, whatever SQL a project brings.
        connection.execute("SET allow_unsigned_extensions = false")
        yield connection
    finally:
        # Closed within a transaction whose server is gone, DuckDB 1.5 aborts the whole process.
        with suppress(duckdb.Error):
            connection.rollback()
        connection.close()
        shutil.rmtree(spill, ignore_errors=True)


def use_one_thread(connection: duckdb.DuckDBPyConnection) -> None:
    """Give the session one thread: for a source that is read by one scan.

    All that follows such a scan is done by its thread. A second one waits, for up to as much processor time again
    (DuckDB 1.5: 600,000 rows of MariaDB took 1.8 s of it with two threads, and 0.9 s with one).
    """
    connection.execute("SET threads = 1")


def preload_extensions(extensions: tuple[str, ...] = EXTENSIONS) -> None:
    """Check the signatures of *extensions* once; processes forked from this one then load them in a millisecond.

    For the warm process. It leaves no connection and no thread behind.

    Raises:
        LakeError: an extension is not installed, or does not fit the engine.
    """
    # Importing duckdb opens a default instance with a thread for each further core. A fork would not have them.
    duckdb.default_connection().execute("SET threads = 1")
    with closing(duckdb.connect(":memory:", config={"threads": 1, **_OFFLINE})) as connection:
        for name in extensions:
            load_extension(connection, name)
            path = find_extension(name)
            _checked[path] = _identify(path)


def find_extension(name: str) -> Path:
    """Return the file of an extension wheel.

    Raises:
        LakeError: the wheel is missing, or is of another version than the engine.
    """
    spec = importlib.util.find_spec(f"duckdb_extension_{name}")
    if spec is None or not spec.submodule_search_locations:
        raise LakeError(
            f'The DuckDB extension "{name}" is not installed.',
            hint=f'Install the wheel "duckdb-extension-{name.replace("_", "-")}=={duckdb.__version__}".',
        )
    folder = Path(spec.submodule_search_locations[0]) / "extensions"
    path = folder / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.glob("v*"))) or "none"
        raise LakeError(
            f'The DuckDB extension "{name}" is of version {found}, the engine of v{duckdb.__version__}.',
            hint="Install the versions of the lock file together.",
        )
    return path


@contextmanager
def open_server(url: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a session that is connected to the server of the catalog *url*, and used for nothing else."""
    settings = Settings(threads=1, memory_limit="128MB")
    with open_session(settings, extensions=("postgres_scanner",)) as connection:
        attach_server(connection, url)
        yield connection


def read_parquet(files: Iterable[File]) -> str:
    """Return the table function over *files*: their columns and no others, whatever their folders are called."""
    # Without the option a folder such as ``year=2024`` above the files would add a column.
    paths = ", ".join(quote_literal(str(file)) for file in files)
    return f"read_parquet([{paths}], hive_partitioning = false)"


@functools.lru_cache(maxsize=1024)
def normalize_type(text: str) -> str:
    """Return DuckDB's own name of a type: ``text`` → ``VARCHAR``, ``numeric(9,2)`` → ``DECIMAL(9,2)``.

    Raises:
        ProjectError: DuckDB has no such type.
    """
    with closing(duckdb.connect(":memory:", config={"threads": 1, **_OFFLINE})) as connection:
        try:
            return str(connection.type(text))
        except (duckdb.Error, RuntimeError) as exc:
            raise ProjectError(
                f'"{text}" is not a DuckDB type.', hint="Such as VARCHAR, BIGINT, DECIMAL(18,3)."
            ) from exc


_OFFLINE: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}


def _connect(settings: Settings, spill: Path, *, is_checked: bool) -> duckdb.DuckDBPyConnection:
    config: dict[str, str | bool | int | float | list[str]] = {
        **_OFFLINE,
        "threads": settings.threads,
        "memory_limit": settings.memory_limit,
        "temp_directory": str(spill),
        "max_temp_directory_size": settings.temp_limit,
        # A signature check takes 0.15 s of CPU and extension. Where it has been made, on the same file, it is
        # not made again: what is loaded is then the library that is mapped into this process already.
        "allow_unsigned_extensions": is_checked,
    }
    try:
        connection = duckdb.connect(":memory:", config=config)
        connection.execute("SET TimeZone = 'UTC'")
    except duckdb.Error as exc:
        raise ProjectError(
            f"DuckDB refuses a setting: {str(exc).rstrip('.')}.", hint="Check the PHASEWISE_* variables."
        ) from exc
    return connection


def load_extension(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    path = find_extension(name)
    try:
        connection.execute(f"LOAD {quote_literal(str(path))}")
    except duckdb.Error as exc:
        raise LakeError(
            f'The DuckDB extension "{name}" cannot be loaded: {exc}',
            hint="Install the versions of the lock file together.",
        ) from exc


def _is_checked(name: str) -> bool:
    path = find_extension(name)
    return _checked.get(path) == _identify(path)


def _identify(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
