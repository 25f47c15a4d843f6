"""The sources that need no server keep the contract of sources."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import duckdb
import pytest

from phasewise.lake.session import preload_extensions
from phasewise.testing.source_contract import ROWS, SourceContract

DDL = "CREATE TABLE contract (id BIGINT PRIMARY KEY, label TEXT)"
EMPTY = "CREATE TABLE contract_empty (id BIGINT PRIMARY KEY, label TEXT)"


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner",))


class TestSqlite(SourceContract):
    def make_url(self, tmp_path: Path) -> str:
        with closing(sqlite3.connect(tmp_path / "contract.db")) as source, source:
            source.execute(DDL)
            source.execute(EMPTY)
            source.executemany("INSERT INTO contract VALUES (?, ?)", ROWS)
        return f"sqlite:///{tmp_path}/contract.db"


class TestDuckdb(SourceContract):
    def make_url(self, tmp_path: Path) -> str:
        with duckdb.connect(str(tmp_path / "contract.duckdb"), config={"threads": 1}) as source:
            source.execute(DDL)
            source.execute(EMPTY)
            source.executemany("INSERT INTO contract VALUES (?, ?)", ROWS)
        return f"duckdb:///{tmp_path}/contract.duckdb"


class TestCsv(SourceContract):
    def make_url(self, tmp_path: Path) -> str:
        folder = tmp_path / "files"
        folder.mkdir()
        for name, rows in (("contract", ROWS), ("contract_empty", [])):
            lines = ["id,label"]
            for number, label in rows:
                # A quoted empty field is an empty text, an unquoted one is NULL.
                quoted = "" if label is None else '"' + label.replace('"', '""') + '"'
                lines.append(f"{number},{quoted}")
            (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return f"file:///{folder}"


class TestParquet(SourceContract):
    def make_url(self, tmp_path: Path) -> str:
        folder = tmp_path / "files"
        folder.mkdir()
        with duckdb.connect(config={"threads": 1}) as connection:
            connection.execute(DDL)
            connection.execute(EMPTY)
            connection.executemany("INSERT INTO contract VALUES (?, ?)", ROWS)
            for name in ("contract", "contract_empty"):
                connection.execute(f"COPY {name} TO '{folder}/{name}.parquet'")
        return f"file:///{folder}"


class TestSourceOfAnotherPackage(SourceContract):
    """Found by the entry point of an installed package, without a line in ours."""

    @pytest.fixture(autouse=True)
    def _installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        site = tmp_path / "site"
        info = site / "acme_source-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-source\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[phasewise.sources]\nacme = acme_source:AcmeSource\n")
        shutil.copy(Path(__file__).with_name("acme_source.py"), site)
        monkeypatch.syspath_prepend(site)
        yield
        sys.modules.pop("acme_source", None)

    def make_url(self, tmp_path: Path) -> str:
        lines = [{"table": "contract", "id": number, "label": label} for number, label in ROWS]
        lines.append({"table": "contract_empty", "id": None, "label": None})
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return f"acme:///{tmp_path}/log.jsonl"


def test_json_files_keep_texts_and_nulls(tmp_path: Path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "contract.json").write_text(json.dumps([{"id": i, "label": label} for i, label in ROWS]))

    contract = SourceContract()
    contract.make_url = lambda tmp_path: f"file:///{folder}"
    contract.test_rows_arrive_as_they_are_in_the_types_described(tmp_path)


def test_conditions_look_at_fields_of_json_that_are_left_out(tmp_path: Path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "contract.json").write_text(json.dumps([{"id": i, "label": label} for i, label in ROWS]))

    contract = SourceContract()
    contract.make_url = lambda tmp_path: f"file:///{folder}"
    contract.test_a_condition_may_look_at_a_column_that_is_left_out(tmp_path)
