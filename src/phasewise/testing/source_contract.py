"""What every source must do, as tests that a source can run against itself.

    class TestMySource(SourceContract):
        def make_url(self, tmp_path: Path) -> str:
            ...  # fill a database with ROWS, and return its URL

The database must have a table ``contract`` with the columns ``id`` (an integer, the primary key where the source has
such a thing) and ``label`` (a text) that holds ``ROWS``, a table ``contract_empty`` of the same columns without rows,
and no table ``contract_missing``. pytest finds the tests by their names; nothing here imports it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import duckdb

from phasewise.errors import PhasewiseError, SourceError, SourceUnavailable, TableMissing
from phasewise.lake.quoting import quote_literal
from phasewise.lake.session import open_session
from phasewise.project.config import Project, load_project
from phasewise.settings import Settings
from phasewise.sources import Source, check_project, describe_project_table, open_source
from phasewise.staging.batch import begin_batch
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import list_manifests, staged_files
from phasewise.staging.partition_plan import plan_partitions
from phasewise.staging.source_snapshot import open_snapshot

#: What the table ``contract`` holds.
ROWS = [(1, "plain"), (2, ""), (3, None), (4, 'ü "quoted" \\ \' 😀\nnext line')]
#: A password that ``make_url`` may put into its URL: it must not come back.
PASSWORD = "contract-secret"  # noqa: S105 - the tests look for it in what must not show it

E = TypeVar("E", bound=Exception)


class SourceContract:
    """The tests; a subclass gives the database."""

    settings = Settings(threads=2, memory_limit="512MB", connect_timeout=5)
    #: Whether the source can hold one moment for several processes.
    holds_snapshots = True

    def make_url(self, tmp_path: Path) -> str:
        """Create the database and return its URL."""
        raise NotImplementedError

    def test_it_answers_and_the_project_checks_out(self, tmp_path: Path) -> None:
        project, source = self._open(tmp_path)

        source.check()

        assert check_project(project, self.settings) == []

    def test_tables_are_listed_in_name_order(self, tmp_path: Path) -> None:
        _, source = self._open(tmp_path)

        tables = source.list_tables()

        assert tables == sorted(tables)
        assert {"contract", "contract_empty"} <= set(tables)

    def test_columns_are_described_with_types_that_duckdb_knows(self, tmp_path: Path) -> None:
        _, source = self._open(tmp_path)

        table = source.describe_table("contract")

        assert [column.name for column in table.columns] == ["id", "label"]
        with open_session(self.settings, extensions=()) as connection:
            assert [str(connection.type(column.type)) for column in table.columns] == [c.type for c in table.columns]

    def test_a_missing_table_is_named(self, tmp_path: Path) -> None:
        _, source = self._open(tmp_path)

        assert _catch(TableMissing, lambda: source.describe_table("contract_missing")).table == "contract_missing"

    def test_rows_arrive_as_they_are_in_the_types_described(self, tmp_path: Path) -> None:
        project, _ = self._open(tmp_path)

        manifest = extract_table(project, self.settings, batch="b1", table="contract")

        assert (manifest.rows, manifest.source_rows) == (len(ROWS), len(ROWS))
        with open_session(self.settings, extensions=()) as connection:
            files = [str(path) for path in staged_files(project, manifest)]
            result = connection.execute("FROM read_parquet(?, hive_partitioning = false) ORDER BY id", [files])
            assert [str(column[1]) for column in result.description or ()] == [c.type for c in manifest.columns]
            assert [(int(row[0]), row[1]) for row in result.fetchall()] == ROWS

    def test_a_condition_selects_the_rows_that_are_read_and_counted(self, tmp_path: Path) -> None:
        project, _ = self._open(tmp_path, "[table.contract]\nwhere = \"id <> '1' and label <> ''  -- not the first\"\n")

        manifest = extract_table(project, self.settings, batch="b1", table="contract")

        assert (manifest.rows, manifest.source_rows) == (1, 1)

    def test_a_condition_may_look_at_a_column_that_is_left_out(self, tmp_path: Path) -> None:
        project, _ = self._open(tmp_path, '[table.contract]\nwhere = "label is null"\nexclude = ["lab*"]\n')

        manifest = extract_table(project, self.settings, batch="b1", table="contract")

        assert [column.name for column in manifest.columns] == ["id"]
        assert (manifest.rows, manifest.source_rows) == (1, 1)

    def test_a_condition_that_the_source_does_not_understand_is_an_error_that_no_retry_mends(
        self, tmp_path: Path
    ) -> None:
        project, _ = self._open(tmp_path, '[table.contract]\nwhere = "id >"\n')

        raised = _catch(SourceError, lambda: extract_table(project, self.settings, batch="b1", table="contract"))

        assert not isinstance(raised, SourceUnavailable)
        assert '"contract"' in str(raised)

    def test_the_parts_of_a_table_have_each_of_its_rows_once(self, tmp_path: Path) -> None:
        project, _ = self._open(tmp_path, "[table.contract]\npartition_rows = 2\n")
        begin_batch(project, "b1", ["contract"])

        with open_snapshot(project, self.settings, "b1") as token:
            split = plan_partitions(project, self.settings, "b1", token).get("contract")
            for name in split.list_names() if split else [None]:
                extract_table(project, self.settings, batch="b1", table="contract", partition=name)

        parts = list_manifests(project, "b1")
        assert all(part.rows == part.source_rows for part in parts)
        with open_session(self.settings, extensions=()) as connection:
            files = [str(path) for part in parts for path in staged_files(project, part)]
            rows = connection.execute("FROM read_parquet(?, hive_partitioning = false) ORDER BY id", [files]).fetchall()
        assert [(int(row[0]), row[1]) for row in rows] == ROWS

    def test_a_table_without_rows_keeps_its_columns(self, tmp_path: Path) -> None:
        project, _ = self._open(tmp_path)

        manifest = extract_table(project, self.settings, batch="b1", table="contract_empty")

        assert (manifest.rows, manifest.source_rows) == (0, 0)
        assert [column.name for column in manifest.columns] == ["id", "label"]

    def test_nothing_is_written_to_the_source(self, tmp_path: Path) -> None:
        project, source = self._open(tmp_path)
        with open_session(self.settings, extensions=source.extensions) as connection:
            source.attach(connection)
            attached = connection.execute("SELECT count(*) FROM duckdb_databases() WHERE database_name = 'source'")
            if attached.fetchone() == (0,):
                return  # files, which are only ever read

            _catch(duckdb.Error, lambda: connection.execute("CREATE TABLE source.contract_written (a INTEGER)"))

        assert "contract_written" not in open_source(project, self.settings).list_tables()

    def test_a_snapshot_can_be_handed_to_another_process(self, tmp_path: Path) -> None:
        project, _ = self._open(tmp_path)

        with open_snapshot(project, self.settings, "b1") as token:
            handed = json.loads(json.dumps(token))
            manifest = extract_table(project, self.settings, batch="b1", table="contract", snapshot=handed)

        assert manifest.rows == len(ROWS)
        assert manifest.snapshot == (token["id"] if token else None)
        assert (token is not None and token["id"] is not None) == self.holds_snapshots

    def test_a_failed_read_is_explained_as_an_error_of_phasewise(self, tmp_path: Path) -> None:
        project, source = self._open(tmp_path)
        table = describe_project_table(project, source, "contract")
        with open_session(self.settings, extensions=source.extensions) as connection:
            source.attach(connection)

            found = source.explain(connection, table, duckdb.IOException("something broke"))

        assert isinstance(found, PhasewiseError)
        assert "something broke" in str(found)

    def test_no_password_comes_back(self, tmp_path: Path) -> None:
        project, source = self._open(tmp_path)

        with open_snapshot(project, self.settings, "b1") as token:
            manifest = extract_table(project, self.settings, batch="b1", table="contract")

        for shown in (source.url, repr(project), manifest.to_json(), json.dumps(token)):
            assert PASSWORD not in shown

    def _open(self, tmp_path: Path, more: str = "") -> tuple[Project, Source]:
        root = tmp_path / "project"
        root.mkdir()
        url = quote_literal(self.make_url(tmp_path)).replace("''", "%27")  # a TOML literal string
        text = f"[project]\nname = 'contract'\n[source]\nurl = {url}\n{more}"
        (root / "phasewise.toml").write_text(text, encoding="utf-8")
        project = load_project(root)
        return project, open_source(project, self.settings)


def _catch(kind: type[E], call: Callable[[], object]) -> E:
    try:
        call()
    except kind as exc:
        return exc
    raise AssertionError(f"no {kind.__name__} was raised")
