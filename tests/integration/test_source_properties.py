"""Whatever tables a database holds, the published lake holds the same names, types and values."""

from __future__ import annotations

import datetime as dt
import math
import sqlite3
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pymysql
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from phasewise.lake.publications import open_reader
from phasewise.lake.quoting import quote_identifier
from phasewise.lake.session import preload_extensions
from phasewise.project.config import load_project
from phasewise.testing.projects import SAMPLE_SETTINGS, publish_sample, stage_batch
from tests.servers import find_mariadb, find_postgres, psql

POSTGRES_SERVER, MARIADB_SERVER = find_postgres(), find_mariadb()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A type of a source, values of it, how they are written in its SQL, and what the lake shows for them."""

    declared: str
    values: st.SearchStrategy[Any]
    type: str
    write: Callable[[Any], str] = str
    expect: Callable[[Any], Any] = lambda value: value


def quote(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def quote_mysql(value: object) -> str:
    return quote(str(value).replace("\\", "\\\\"))


def integers(declared: str, bits: int, type_name: str, *, is_signed: bool = True) -> Kind:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    return Kind(declared=declared, values=st.integers(low, high), type=type_name)


def decimals(precision: int, scale: int) -> st.SearchStrategy[Decimal]:
    limit = 10**precision - 1
    return st.integers(-limit, limit).map(lambda number: Decimal(f"{number}e-{scale}"))


def fixed(value: Decimal) -> str:
    return format(value or abs(value), "f")  # not value + 0, which rounds to 28 digits


def parse_in_sqlite(value: float) -> float:
    """Return what SQLite stores for the literal of *value*, which is not always the nearest double."""
    with closing(sqlite3.connect(":memory:")) as connection:
        return float(connection.execute(f"SELECT {value!r}").fetchone()[0])


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
moments = st.datetimes()
blobs = st.binary(max_size=20)
utc_moments = st.datetimes(dt.datetime(1, 1, 2), dt.datetime(9999, 12, 30), timezones=st.just(dt.UTC))

POSTGRES = [
    integers("int2", 16, "SMALLINT"),
    integers("int4", 32, "INTEGER"),
    integers("int8", 64, "BIGINT"),
    Kind(declared="float8", values=st.floats(), type="DOUBLE", write=lambda value: quote(repr(value))),
    Kind(declared="bool", values=st.booleans(), type="BOOLEAN"),
    Kind(declared="text", values=texts, type="VARCHAR", write=quote),
    Kind(declared="json", values=st.just('{"a":  [1, "x"]}'), type="VARCHAR", write=quote),
    Kind(declared="numeric(38,7)", values=decimals(38, 7), type="DECIMAL(38,7)"),
    Kind(declared="numeric", values=decimals(60, 20), type="VARCHAR", expect=fixed),
    Kind(declared="date", values=st.dates(), type="DATE", write=quote),
    Kind(declared="timestamp", values=moments, type="TIMESTAMP", write=quote),
    Kind(declared="timestamptz", values=utc_moments, type="TIMESTAMP WITH TIME ZONE", write=quote),
    Kind(declared="time", values=st.times(), type="TIME", write=quote),
    Kind(declared="uuid", values=st.uuids(), type="UUID", write=quote),
    Kind(declared="bytea", values=blobs, type="BLOB", write=lambda value: f"'\\x{value.hex()}'"),
    Kind(
        declared="int[]",
        values=st.lists(st.integers(-99, 99), max_size=3),
        type="VARCHAR",
        write=lambda value: "'{" + ",".join(map(str, value)) + "}'",
        expect=lambda value: "{" + ",".join(map(str, value)) + "}",
    ),
]
MARIADB = [
    integers("tinyint(1)", 8, "TINYINT"),
    integers("mediumint", 24, "INTEGER"),
    integers("bigint", 64, "BIGINT"),
    integers("bigint unsigned", 64, "UBIGINT", is_signed=False),
    Kind(declared="double", values=st.floats(allow_nan=False, allow_infinity=False), type="DOUBLE", write=repr),
    # Not 1E-8, which is a double there.
    Kind(declared="decimal(38,7)", values=decimals(38, 7), type="DECIMAL(38,7)", write=fixed),
    Kind(declared="decimal(65,30)", values=decimals(65, 30), type="VARCHAR", write=fixed, expect=fixed),
    Kind(declared="longtext", values=texts, type="VARCHAR", write=quote_mysql),
    Kind(declared="date", values=st.dates(), type="DATE", write=quote),
    Kind(declared="datetime(6)", values=moments, type="TIMESTAMP", write=quote),
    Kind(
        declared="time(6)",
        values=st.times(),
        type="VARCHAR",
        write=quote,
        expect=lambda value: value.isoformat("microseconds"),
    ),
    Kind(declared="bit(1)", values=st.booleans(), type="BOOLEAN", write=lambda value: f"b'{value:d}'"),
    Kind(declared="blob", values=blobs, type="BLOB", write=lambda value: f"x'{value.hex()}'"),
]
SQLITE = [
    integers("INTEGER", 64, "BIGINT"),
    Kind(declared="REAL", values=st.floats(-1e300, 1e300), type="DOUBLE", write=repr, expect=parse_in_sqlite),
    Kind(declared="TEXT", values=texts, type="VARCHAR", write=quote),
    Kind(declared="BLOB", values=blobs, type="BLOB", write=lambda value: f"x'{value.hex()}'"),
    Kind(declared="BOOLEAN", values=st.booleans(), type="BOOLEAN", write=lambda value: f"{value:d}"),
    Kind(declared="DATE", values=st.dates(), type="DATE", write=quote),
    Kind(declared="DATETIME", values=moments, type="TIMESTAMP", write=quote),
    Kind(declared="TIME", values=st.times(), type="TIME", write=quote),
    Kind(declared="DECIMAL(12,3)", values=decimals(12, 3), type="DECIMAL(12,3)"),
    Kind(declared="JSON", values=st.just("{}"), type="VARCHAR", write=quote),
]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A table: its columns beside ``id``, which counts the rows from 0."""

    name: str
    columns: dict[str, Kind]
    rows: Sequence[Sequence[Any]]

    def write(self, quote_name: Callable[[str], str]) -> list[str]:
        columns = "".join(f", {quote_name(name)} {kind.declared} NULL" for name, kind in self.columns.items())
        statements = [f"CREATE TABLE {quote_name(self.name)} (id int PRIMARY KEY{columns})"]
        for number, row in enumerate(self.rows):
            values = [
                "NULL" if value is None else kind.write(value)
                for value, kind in zip(row, self.columns.values(), strict=True)
            ]
            statements.append(f"INSERT INTO {quote_name(self.name)} VALUES ({', '.join([str(number), *values])})")
        return statements

    def expect(self) -> list[tuple[Any, ...]]:
        return [
            (
                number,
                *(
                    None if value is None else kind.expect(value)
                    for value, kind in zip(row, self.columns.values(), strict=True)
                ),
            )
            for number, row in enumerate(self.rows)
        ]


@st.composite
def tables(draw: st.DrawFn, kinds: Sequence[Kind], alphabet: str) -> list[Generated]:
    names = st.text(alphabet, min_size=1, max_size=6).filter(lambda name: name.strip() == name and name != "id")
    found = []
    for name in draw(st.lists(names, min_size=3, max_size=6, unique_by=str.casefold)):
        columns = {
            column: draw(st.sampled_from(kinds))
            for column in draw(st.lists(names, min_size=3, max_size=8, unique_by=str.casefold))
        }
        row = st.tuples(*(st.none() | kind.values for kind in columns.values()))
        found.append(Generated(name=name, columns=columns, rows=draw(st.lists(row, min_size=1, max_size=12))))
    return found


HARD_NAMES = "aBc0_ \"'`\\$?%;-,()é"
#: Few and always the same, as each is created, staged and published.
few = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a smaller example would take minutes to find
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions()


def connect_mariadb(database: str | None = None) -> pymysql.connections.Connection:
    host, port = MARIADB_SERVER.host, MARIADB_SERVER.port
    return pymysql.connect(host=host, port=port, user="root", database=database, autocommit=True, charset="utf8mb4")


def check_round_trip(root: Path, url: str, generated: Sequence[Generated]) -> None:
    (root / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n')
    project = load_project(root)

    publish_sample(project, SAMPLE_SETTINGS, stage_batch(project))

    with open_reader(project, SAMPLE_SETTINGS) as connection:
        for table in generated:
            result = connection.execute(f"FROM {quote_identifier(table.name)} ORDER BY id")
            assert [column[0] for column in result.description] == ["id", *table.columns]
            assert [str(column[1]) for column in result.description[1:]] == [
                kind.type for kind in table.columns.values()
            ]
            assert [tuple(map(comparable, row)) for row in result.fetchall()] == [
                tuple(map(comparable, row)) for row in table.expect()
            ]


def comparable(value: object) -> object:
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


@POSTGRES_SERVER.needed()
@few
@given(generated=tables(POSTGRES, HARD_NAMES + "😀"))
def test_any_postgresql_table_is_published_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, generated: list[Generated]
):
    schema = f"pw_{uuid.uuid4().hex[:10]}"
    psql(f"CREATE SCHEMA {schema}")
    try:
        psql(";\n".join(line for table in generated for line in table.write(quote_identifier)), schema)
        url = f"postgresql://postgres@{POSTGRES_SERVER}/test?schema={schema}"
        check_round_trip(tmp_path_factory.mktemp("any"), url, generated)
    finally:
        psql(f"DROP SCHEMA {schema} CASCADE")


@MARIADB_SERVER.needed()
@few
@given(generated=tables(MARIADB, HARD_NAMES))
def test_any_mariadb_table_is_published_as_it_is(tmp_path_factory: pytest.TempPathFactory, generated: list[Generated]):
    database = f"pw_{uuid.uuid4().hex[:10]}"
    with closing(connect_mariadb()) as connection:
        connection.query(f"CREATE DATABASE {database} CHARACTER SET utf8mb4")
        try:
            connection.select_db(database)
            for statement in [line for table in generated for line in table.write(quote_mysql_name)]:
                connection.query(statement)
            url = f"mysql://root@{MARIADB_SERVER}/{database}"
            check_round_trip(tmp_path_factory.mktemp("any"), url, generated)
        finally:
            connection.query(f"DROP DATABASE {database}")


def quote_mysql_name(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


@few
@given(generated=tables(SQLITE, HARD_NAMES + "😀"))
def test_any_sqlite_table_is_published_as_it_is(tmp_path_factory: pytest.TempPathFactory, generated: list[Generated]):
    root = tmp_path_factory.mktemp("any")
    with closing(sqlite3.connect(root / "source.db")) as source, source:
        for statement in [line for table in generated for line in table.write(quote_identifier)]:
            source.execute(statement)

    check_round_trip(root, "sqlite:///source.db", generated)
