"""The session and its extensions."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import duckdb
import pytest

from phasewise.errors import LakeError, ProjectError
from phasewise.lake.session import find_extension, normalize_type, open_session, preload_extensions
from phasewise.settings import Settings

SETTINGS = Settings(threads=2, memory_limit="256MB")


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("ducklake", "sqlite_scanner"))


def test_a_session_is_bounded_offline_and_in_utc():
    with open_session(SETTINGS) as connection:
        names = ["memory_limit", "threads", "TimeZone", "autoinstall_known_extensions", "allow_unsigned_extensions"]
        values = connection.execute(f"SELECT {', '.join(f'current_setting({n!r})' for n in names)}").fetchone()

    assert values == ("244.1 MiB", 2, "UTC", False, False)


def test_a_session_removes_its_temporary_folder():
    with open_session(SETTINGS) as connection:
        folder = Path(connection.execute("SELECT current_setting('temp_directory')").fetchone()[0])
        connection.execute("SET memory_limit = '40MB'")
        connection.execute("CREATE TABLE t AS SELECT md5(i::VARCHAR) AS k FROM range(1_500_000) t(i)")
        assert folder.is_dir()

    assert not folder.exists()


def test_a_setting_that_duckdb_refuses_is_named():
    with pytest.raises(ProjectError, match="PHASEWISE_"), open_session(Settings(memory_limit="lots")):
        pass


def test_an_unsigned_extension_is_not_loaded_even_when_others_were_preloaded(tmp_path: Path):
    forged = tmp_path / "httpfs.duckdb_extension"
    content = bytearray(find_extension("httpfs").read_bytes())
    content[-1] ^= 0xFF
    forged.write_bytes(content)

    with open_session(SETTINGS) as connection, pytest.raises(duckdb.Error, match="signature"):
        connection.execute(f"LOAD '{forged}'")


def test_an_extension_that_is_missing_names_its_wheel():
    with pytest.raises(LakeError, match=r"duckdb-extension-no-such==\d"):
        find_extension("no_such")


def test_preloading_leaves_one_thread_and_forked_children_load_without_checking():
    code = textwrap.dedent("""
        import os, time
        from phasewise.lake import session, warehouse
        from phasewise.settings import Settings
        session.preload_extensions()
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, threads
        pid = os.fork()
        if pid == 0:
            before = time.process_time()
            with session.open_session(Settings(), extensions=session.EXTENSIONS) as connection:
                took = time.process_time() - before
                total = connection.execute("SELECT sum(i) FROM range(1000000) t(i)").fetchone()[0]
            os._exit(0 if total == 499999500000 and took < 0.4 else 1)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """)

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)

    assert done.returncode == 0, done.stderr


def test_types_are_normalised_to_the_names_of_duckdb():
    given = ["text", "int8", "numeric(9, 2)", "timestamptz"]

    assert [normalize_type(t) for t in given] == ["VARCHAR", "BIGINT", "DECIMAL(9,2)", "TIMESTAMP WITH TIME ZONE"]
    with pytest.raises(ProjectError, match="not a DuckDB type"):
        normalize_type("varchr")
