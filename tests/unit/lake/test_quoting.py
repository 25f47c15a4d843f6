"""Names and texts as SQL."""

from __future__ import annotations

import pytest

from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import open_session, preload_extensions
from phasewise.settings import Settings

SETTINGS = Settings(threads=2, memory_limit="256MB")


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("ducklake", "sqlite_scanner"))


@pytest.mark.parametrize("name", ['a"b', "select", "a b", "😀", "a'b", "ümlaut"])
def test_any_name_can_be_quoted(name: str):
    with open_session(SETTINGS, extensions=()) as connection:
        connection.execute(f"CREATE TABLE {quote_identifier(name)} (a INTEGER)")
        query = f"SELECT count(*) FROM duckdb_tables() WHERE table_name = {quote_literal(name)}"
        assert connection.execute(query).fetchone() == (1,)
