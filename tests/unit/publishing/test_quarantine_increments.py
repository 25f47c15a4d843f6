"""The quarantine of tables that are not replaced: no bad row is lost, and none takes the place of a newer version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phasewise.errors import AuditFailed
from phasewise.lake.publications import query_warehouse
from phasewise.lake.session import open_session, preload_extensions
from phasewise.lake.warehouse import attach_lake
from phasewise.project.config import Project
from phasewise.publishing.audit_batch import AuditedBatch
from phasewise.publishing.audits import AuditResult
from phasewise.publishing.maintenance import maintain_lake
from phasewise.publishing.publish import Publication
from phasewise.publishing.replay import replay_quarantine
from phasewise.publishing.rollback import rollback_batch
from phasewise.publishing.session import open_writer
from phasewise.testing.projects import SAMPLE_SETTINGS as SETTINGS
from phasewise.testing.projects import audit_sample, change_source, publish_sample, stage_batch, write_project
from tests.staged import change_project

SOURCE = """
create table t (id integer, n integer, at integer);
insert into t values (1, 5, 10), (2, 6, 20);
"""
TABLE = '[table.t]\nkey = ["id"]\nquarantine = ["key"]\nquarantine_limit = "100%"\n'
AUDIT = """
[[audit]]
name = "positive"
table = "t"
severity = "quarantine"
sql = "from t where n < 0"
"""
MODES = {
    "append": 'mode = "append"\ncursor = "at"\n',
    "merge": 'mode = "merge"\ncursor = "at"\n',
    "history": 'mode = "history"\ncursor = "at"\n',
}
CURRENT = {"history": 'select id, n, "at" from t where is_current order by all'}


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "ducklake"))


def begin(root: Path, mode: str, *, more: str = "", source: str = SOURCE) -> Project:
    """Write a project and publish its first batch, ``b0``."""
    project = write_project(root, source=source, toml=TABLE + MODES.get(mode, mode) + more + AUDIT)
    load(project, "b0")
    return project


def load(project: Project, batch: str, sql: str = "") -> Publication:
    """Change the source, then stage, audit and publish a batch."""
    change_source(project.root, sql)
    stage_batch(project, batch=batch)
    return publish_sample(project, SETTINGS, batch)


def rows(project: Project, mode: str = "", *, at: str | None = None) -> list[tuple[Any, ...]]:
    return query_warehouse(project, SETTINGS, CURRENT.get(mode, "from t order by all"), at=at)[1]


def quarantined(project: Project) -> list[tuple[Any, ...]]:
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        tables = connection.execute("select table_name from duckdb_tables() where schema_name = '_quarantine'")
        if not tables.fetchall():
            return []
        return connection.execute('select id, n, "at", _reason, _batch from lake._quarantine.t order by all').fetchall()


def mend(project: Project, sql: str) -> None:
    with open_writer(project, SETTINGS) as session:
        session.connection.execute(sql)


def find(found: AuditedBatch, name: str) -> AuditResult:
    return next(result for result in found.results if result.name == name)


@pytest.mark.parametrize("mode", MODES)
def test_bad_rows_of_an_increment_are_set_aside_and_the_rest_is_published(tmp_path: Path, mode: str):
    project = begin(tmp_path, mode)

    published = load(
        project, "b1", "insert into t values (3, -1, 30), (4, 7, 40), (5, 1, 41), (5, 2, 42), (null, 8, 43)"
    )

    assert rows(project, mode) == [(1, 5, 10), (2, 6, 20), (4, 7, 40)]
    assert quarantined(project) == [
        (3, -1, 30, "positive", "b1"),
        (5, 1, 41, "unique(id)", "b1"),
        (5, 2, 42, "unique(id)", "b1"),
        (None, 8, 43, "not_null(id)", "b1"),
    ]
    table = published.tables[0]
    assert (table.rows, table.added, table.quarantined) == (3, 1, 4)
    assert published.states[0].mark == "43"  # the rows are not read again; they are in quarantine


@pytest.mark.parametrize("mode", ["merge", "history"])
def test_readers_keep_the_version_before_a_bad_one(tmp_path: Path, mode: str):
    project = begin(tmp_path, mode, more="deletes = true\n")

    load(project, "b1", "update t set n = -6, at = 30 where id = 2; delete from t where id = 1")

    assert rows(project, mode) == [(2, 6, 20)]
    assert quarantined(project) == [(2, -6, 30, "positive", "b1")]


def test_a_merge_of_all_rows_does_not_take_a_bad_row_for_a_deleted_one(tmp_path: Path):
    project = begin(tmp_path, 'mode = "merge"\ndeletes = true\n')

    load(project, "b1", "update t set n = -6 where id = 2; insert into t values (3, -1, 0)")
    assert rows(project) == [(1, 5, 10), (2, 6, 20)]
    assert [row[0] for row in quarantined(project)] == [2, 3]

    # All rows were read: what is in quarantine is what is bad now.
    load(project, "b2", "update t set n = 8 where id = 2; delete from t where id = 3")
    assert rows(project) == [(1, 5, 10), (2, 8, 20)]
    assert quarantined(project) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_good_version_that_comes_later_takes_the_place_of_the_bad_one(tmp_path: Path, mode: str):
    project = begin(tmp_path, mode)
    load(project, "b1", "insert into t values (3, -1, 30), (4, -2, 40)")

    load(project, "b2", "update t set n = 1, at = 50 where id = 3")

    assert rows(project, mode) == [(1, 5, 10), (2, 6, 20), (3, 1, 50)]
    # 4 has the last cursor of b1, so it was read again: it is bad as before, and there once.
    assert quarantined(project) == [(4, -2, 40, "positive", "b2")]


def test_rows_without_a_key_are_in_quarantine_once_however_often_they_are_read(tmp_path: Path):
    project = begin(tmp_path, "merge")

    for batch in ("b1", "b2"):
        load(project, batch, "insert into t values (null, 8, 43)" if batch == "b1" else "")

    assert quarantined(project) == [(None, 8, 43, "not_null(id)", "b2")]


def test_of_two_rows_with_one_key_none_is_forgotten_before_both_were_read_again(tmp_path: Path):
    project = begin(tmp_path, "merge")
    load(project, "b1", "insert into t values (5, 1, 41), (5, 2, 42), (6, 6, 43)")

    load(project, "b2", "update t set at = 50 where n = 2")
    assert rows(project)[-1] == (6, 6, 43)
    load(project, "b3", "update t set id = 7, at = 60 where n = 1; update t set at = 60 where n = 2")

    assert rows(project)[-3:] == [(5, 2, 60), (6, 6, 43), (7, 1, 60)]


def test_rows_that_the_source_no_longer_has_leave_the_quarantine(tmp_path: Path):
    project = begin(tmp_path, "merge", more="deletes = true\n")
    load(project, "b1", "insert into t values (3, -1, 30), (4, -2, 40), (8, 8, 80)")

    load(project, "b2", "delete from t where id = 3")

    assert [row[0] for row in quarantined(project)] == [4]


@pytest.mark.parametrize("mode", MODES)
def test_mended_rows_come_back_and_the_next_batches_go_on(tmp_path: Path, mode: str):
    project = begin(tmp_path, mode)
    load(project, "b1", "insert into t values (3, -1, 30), (4, 7, 40); update t set n = -6, at = 35 where id = 2")
    mend(project, "update lake._quarantine.t set n = abs(n)")

    [replay] = replay_quarantine(project, SETTINGS)

    newer = mode != "append"  # an append leaves a row that is there as it is
    shown = [(1, 5, 10), (2, 6, 35) if newer else (2, 6, 20), (3, 1, 30), (4, 7, 40)]
    assert rows(project, mode) == shown
    assert (replay.returned, replay.left) == ((2, 0) if newer else (1, 0))
    load(project, "b2", "insert into t values (9, 9, 90)")
    assert rows(project, mode) == [*shown, (9, 9, 90)]
    assert quarantined(project) == []


def test_a_history_closes_the_version_that_a_mended_row_replaces(tmp_path: Path):
    project = begin(tmp_path, "history")
    load(project, "b1", "update t set n = -6, at = 35 where id = 2")
    mend(project, "update lake._quarantine.t set n = 60")

    replay_quarantine(project, SETTINGS)

    sql = "select n, is_current, valid_to is null, valid_to from t where id = 2 order by valid_from"
    old, new = query_warehouse(project, SETTINGS, sql)[1]
    assert (old[:3], new[:3]) == ((6, False, False), (60, True, True))
    assert query_warehouse(project, SETTINGS, "select valid_from from t where n = 60")[1] == [(old[3],)]


@pytest.mark.parametrize("mode", ["merge", "history"])
def test_a_mended_row_never_takes_the_place_of_a_newer_one(tmp_path: Path, mode: str):
    project = begin(tmp_path, mode, more="lookback = 9\n")
    load(project, "b1", "insert into t values (null, 3, 15), (null, 4, 20), (null, 5, 25)")
    mend(project, "update lake._quarantine.t set id = 2")
    mend(project, "delete from lake._quarantine.t where n = 5")

    [replay] = replay_quarantine(project, SETTINGS)

    assert (replay.returned, replay.left) == (0, 2)
    assert rows(project, mode) == [(1, 5, 10), (2, 6, 20)]


def test_a_mended_row_of_a_merge_without_a_cursor_stays_until_the_source_is_read(tmp_path: Path):
    project = begin(tmp_path, 'mode = "merge"\n')
    load(project, "b1", "update t set n = -6 where id = 2; insert into t values (3, -7, 0)")
    mend(project, "update lake._quarantine.t set n = abs(n) + 100")

    replay_quarantine(project, SETTINGS)

    assert rows(project) == [(1, 5, 10), (2, 6, 20), (3, 107, 0)]


@pytest.mark.parametrize("mode", MODES)
def test_the_same_batch_twice_gives_the_same_lake_and_says_the_same(tmp_path: Path, mode: str):
    project = begin(tmp_path, mode)
    load(project, "b1", "insert into t values (3, -1, 30), (4, 7, 40)")
    before = rows(project), quarantined(project)

    again = load(project, "b1")

    assert again.was_published
    assert (rows(project), quarantined(project)) == before
    [aside] = audit_sample(project, "b1").set_aside
    assert aside.describe() == "1 row is in quarantine: positive 1"


@pytest.mark.parametrize("mode", MODES)
def test_a_rollback_takes_the_quarantine_back_and_the_rows_are_read_again(tmp_path: Path, mode: str):
    project = begin(tmp_path, mode)
    load(project, "b1", "insert into t values (3, -1, 30), (4, 7, 40)")
    load(project, "b2", "update t set n = 1, at = 50 where id = 3")
    expected = rows(project, mode)

    rollback_batch(project, SETTINGS, "b1")
    assert rows(project, mode) == [(1, 5, 10), (2, 6, 20), (4, 7, 40)]
    assert [row[0] for row in quarantined(project)] == [3]
    load(project, "b3")

    assert rows(project, mode) == expected
    assert quarantined(project) == []


def test_rows_that_are_published_already_stop_the_batch_when_they_break_an_audit(tmp_path: Path):
    project = begin(
        tmp_path,
        "merge",
        more='references = [{ columns = ["n"], table = "u", to = ["id"] }]\n',
        source="""
        create table t (id integer, n integer, at integer); insert into t values (1, 5, 10);
        create table u (id integer primary key); insert into u values (5);""",
    )
    project = change_project(project, '["key"]', '["key", "references"]')

    with pytest.raises(AuditFailed, match=r"references.*1 rows that are not among those that can be set aside"):
        load(project, "b1", "delete from u; insert into t values (2, 6, 20)")


def test_a_bad_version_with_a_published_one_that_is_bad_too_stops_the_batch(tmp_path: Path):
    project = begin(tmp_path, "merge")
    project = change_project(project, "from t where n < 0", "select id from t where n > 5 or n < 0")

    change_source(project.root, "update t set n = -6, at = 30 where id = 2")
    stage_batch(project, batch="b1")

    result = find(audit_sample(project, "b1"), "positive")
    assert (result.severity, result.passed) == ("blocking", False)


def test_the_limit_counts_the_rows_that_the_batch_read(tmp_path: Path):
    project = begin(tmp_path, "append")
    project = change_project(project, '"100%"', '"40%"')

    with pytest.raises(AuditFailed, match="1 rows would be set aside, and quarantine_limit = 40% allows 0"):
        load(project, "b1", "insert into t values (3, -1, 30)")  # and the last row again


def test_an_append_without_a_key_sets_whole_rows_aside_and_adds_the_others(tmp_path: Path):
    toml = '[table.t]\nmode = "append"\ncursor = "at"\nquarantine_limit = 9\n' + AUDIT
    project = write_project(tmp_path, source=SOURCE, toml=toml)
    load(project, "b0")
    load(project, "b1", "insert into t values (3, -1, 30), (3, -1, 30), (4, 7, 40)")
    load(project, "b2", "insert into t values (5, -5, 50)")

    assert rows(project) == [(1, 5, 10), (2, 6, 20), (4, 7, 40)]
    assert [row[:3] for row in quarantined(project)] == [(3, -1, 30), (3, -1, 30), (5, -5, 50)]
    mend(project, "update lake._quarantine.t set n = 1")
    replay_quarantine(project, SETTINGS)
    assert len(rows(project)) == 6


@pytest.mark.parametrize("mode", ["full", "append", "merge"])
def test_a_table_that_discards_columns_has_a_quarantine_with_the_columns_that_it_keeps(tmp_path: Path, mode: str):
    project = begin(tmp_path, MODES.get(mode, ""), more='drift = "discard"\n')

    load(project, "b1", "alter table t add x text; insert into t values (3, -1, 30, 'new'), (4, 7, 40, 'new')")

    assert rows(project) == [(1, 5, 10), (2, 6, 20), (4, 7, 40)]
    assert quarantined(project) == [(3, -1, 30, "positive", "b1")]


def test_the_quarantine_gets_the_columns_that_the_table_gets(tmp_path: Path):
    project = begin(tmp_path, "merge")
    load(project, "b1", "insert into t values (3, -1, 30), (4, 7, 40)")

    load(project, "b2", "alter table t add x text; insert into t values (5, -5, 50, 'new')")

    sql = "select id, x from _quarantine.t order by id"
    assert query_warehouse(project, SETTINGS, sql)[1] == [(3, None), (5, "new")]
    mend(project, "update lake._quarantine.t set n = 1")
    replay_quarantine(project, SETTINGS)
    assert query_warehouse(project, SETTINGS, "select id, x from t where id in (3, 5) order by id")[1] == [
        (3, None),
        (5, "new"),
    ]


@pytest.mark.parametrize("mode", MODES)
def test_a_table_that_is_loaded_whole_once_more_gets_a_new_quarantine(tmp_path: Path, mode: str):
    project = begin(tmp_path, mode)
    load(project, "b1", "insert into t values (3, -1, 30), (4, -7, 40)")
    project = change_project(project, "[table.t]", "[table.t]\nversion = 2")

    load(project, "b2", "update t set n = 3 where id = 3")

    assert rows(project, mode) == [(1, 5, 10), (2, 6, 20), (3, 3, 30)]
    assert quarantined(project) == [(4, -7, 40, "positive", "b2")]


def test_maintenance_keeps_the_rows_of_a_table_with_a_quarantine(tmp_path: Path):
    project = begin(tmp_path, "merge")
    settings = SETTINGS.model_copy(update={"snapshot_retention_days": 0})
    for number in range(3):
        load(project, f"b{number + 1}", f"insert into t values ({number + 3}, {1 - number}, {30 + number})")
        maintain_lake(project, settings)

    assert rows(project) == [(1, 5, 10), (2, 6, 20), (3, 1, 30), (4, 0, 31)]
    assert [row[0] for row in quarantined(project)] == [5]
