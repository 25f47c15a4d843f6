"""URLs are taken apart in one place, and what cannot be read is said without its password."""

from __future__ import annotations

import ast
import traceback
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

import phasewise
from phasewise.errors import ProjectError
from phasewise.lake.object_store import create_storage_secret
from phasewise.lake.postgres_catalog import create_catalog_secret, find_schema, list_options
from phasewise.lake.session import open_session
from phasewise.project.urls import find_local_path, read_database_url, redact_url
from phasewise.settings import Settings
from phasewise.sources.duckdb_file import DuckdbSource
from phasewise.sources.files import FilesSource
from phasewise.sources.mysql import MysqlSource
from phasewise.sources.postgres import PostgresSource
from phasewise.sources.sqlite import SqliteSource

EXAMPLE = "postgresql://user@host:5432/database"
SECRET = "s3cret"


def open_catalog(url: str) -> object:
    with open_session(Settings(), extensions=("postgres_scanner",)) as connection:
        create_catalog_secret(connection, url)
    return None


#: Everything that takes the URL of a database on a server.
SERVERS: dict[str, Callable[[str], object]] = {
    "postgresql source": lambda url: PostgresSource(f"postgresql{url}", Path("/"), Settings()),
    "mysql source": lambda url: MysqlSource(f"mysql{url}", Path("/"), Settings()),
    "catalog": lambda url: open_catalog(f"postgresql{url}"),
    "schema of the catalog": lambda url: find_schema(f"postgresql{url}"),
    "options of the catalog": lambda url: list_options(f"postgresql{url}"),
}
#: Everything that takes the URL of a place on this machine.
PLACES: dict[str, Callable[[str], object]] = {
    "sqlite source": lambda url: SqliteSource(f"sqlite{url}", Path("/"), Settings()),
    "duckdb source": lambda url: DuckdbSource(f"duckdb{url}", Path("/"), Settings()),
    "files source": lambda url: FilesSource(f"file{url}", Path("/"), Settings()),
}
MALFORMED = [
    f"://etl:{SECRET}@[::1/db",
    f"://etl:{SECRET}@[::1]x/db",
    f"://etl:{SECRET}@host:port/db",
    f"://etl:{SECRET}@host:99999/db",
    f"://etl:a/{SECRET}@host/db",
    f"://etl:12/{SECRET}@host/db",
    f"://etl:12#{SECRET}@host/db",
    f"://etl:12?{SECRET}@host/db",
    f"://etl:a@b/{SECRET}@host/db",
    f"://etl:{SECRET}%ff@host/db",
    f"://etl:{SECRET}@ho℀st/db",
    f"://etl:{SECRET}@host",
    f"://etl:{SECRET}%00@host/db",
    f":/etl:{SECRET}@host/db",
]


@pytest.mark.parametrize("url", MALFORMED)
@pytest.mark.parametrize("caller", [*SERVERS, *PLACES])
def test_a_malformed_url_is_a_sentence_without_the_password(caller: str, url: str):
    with pytest.raises(ProjectError) as caught:
        (SERVERS | PLACES)[caller](url)

    shown = "".join(traceback.format_exception(caught.value)) + str(caught.value.hint)
    assert "***@" in str(caught.value)
    assert SECRET not in "".join(line for line in shown.splitlines() if "PASSWORD" not in line)
    assert "Write " in str(caught.value.hint)


@pytest.mark.parametrize("caller", SERVERS)
def test_a_password_among_the_options_is_hidden_to_its_end(caller: str):
    with pytest.raises(ProjectError) as caught:
        SERVERS[caller](f"://etl@host/db?password=12#{SECRET}")

    assert SECRET not in f"{caught.value}"


def test_a_path_that_looks_like_a_secret_is_shown():
    assert redact_url("sqlite:///keys/a=b.db?key=c") == "sqlite:///keys/a=b.db?key=***"


@pytest.mark.parametrize("caller", SERVERS)
@pytest.mark.parametrize("password", ["p@ss", "p%40ss", "50%", "%25", "a:b", "a+b", "ä%20b"])
def test_a_password_that_can_be_read_is(caller: str, password: str):
    SERVERS[caller](f"://etl:{password}@host/db")

    assert password not in redact_url(f"postgresql://etl:{password}@host/db")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://etl:p%40s@db:5433/shop?a=b", ("etl", "p@s", (("db", "5433"),), "shop", {"a": "b"})),
        ("postgresql://etl:p@s@db/a%2Fb%40c", ("etl", "p@s", (("db", ""),), "a/b@c", {})),
        ("postgresql://db/shop?password=x%26y", (None, "x&y", (("db", ""),), "shop", {})),
        ("postgresql://[::1]:5433/shop", (None, None, (("::1", "5433"),), "shop", {})),
        ("postgresql://a:1,b/shop", (None, None, (("a", "1"), ("b", "")), "shop", {})),
        ("postgresql:///shop?host=/run", (None, None, (("", ""),), "shop", {"host": "/run"})),
        ("postgresql://%2Frun/shop", (None, None, (("/run", ""),), "shop", {})),
    ],
)
def test_the_parts_of_a_url_are_decoded_and_written_again_without_the_password(url: str, expected: object):
    parts = read_database_url(url, EXAMPLE)

    assert (parts.user, parts.password, parts.servers, parts.database, parts.options) == expected
    again = read_database_url(parts.write("postgresql", parts.options), EXAMPLE)
    assert (again.user, again.servers, again.database, again.options) == (
        parts.user,
        parts.servers,
        parts.database,
        parts.options,
    )
    assert again.password is None
    assert not parts.write("mysql", {}).endswith("?")  # which DuckDB's scanner of MySQL refuses
    assert parts.password is None or parts.password not in repr(parts)


def test_a_path_may_have_any_character():
    assert find_local_path("sqlite:///a#b:c@d.db", Path("/shop")) == Path("/shop/a#b:c@d.db")
    assert find_local_path("file:////var/a b", Path("/shop")) == Path("/var/a b")


@pytest.mark.parametrize("url", ["mysql:///shop", "mysql://a,b/shop"])
def test_mysql_is_one_server(url: str):
    with pytest.raises(ProjectError, match="names (no server|several servers)"):
        MysqlSource(url, Path("/"), Settings())


@pytest.mark.parametrize("endpoint", ["https://[::1", f"https://etl:{SECRET}@host", f"https://etl:{SECRET}@[::1"])
def test_a_malformed_endpoint_is_a_sentence_without_the_password(monkeypatch: pytest.MonkeyPatch, endpoint: str):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)

    with duckdb.connect() as connection, pytest.raises(ProjectError) as caught:
        create_storage_secret(connection)

    assert SECRET not in f"{caught.value} {caught.value.hint}"


def test_urls_are_taken_apart_in_one_place():
    sources = Path(phasewise.__file__).parent
    found = {
        str(path.relative_to(sources))
        for path in sources.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "urllib.parse"
        if {alias.name for alias in node.names} & {"urlsplit", "urlparse", "parse_qsl", "parse_qs", "unquote"}
    }

    assert found == {"project/urls.py"}
