"""A publisher that is killed at any instant leaves all of the old batch or all of the new; readers never see a mix."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from phasewise.lake.publications import list_publications, open_reader
from phasewise.lake.session import open_session, preload_extensions
from phasewise.lake.warehouse import attach_lake
from phasewise.project.config import Project
from phasewise.publishing.maintenance import maintain_lake
from phasewise.publishing.publish import publish_batch
from phasewise.testing.projects import (
    SAMPLE_SETTINGS,
    audit_sample,
    change_source,
    publish_sample,
    stage_batch,
    write_project,
)
from tests.integration.warehouses import drop_catalog, fork, postgres_catalog
from tests.servers import find_postgres

SETTINGS = SAMPLE_SETTINGS
TABLES = [f"t{number}" for number in range(3)]
KILLS = 32


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "postgres_scanner", "ducklake"))


@pytest.fixture(params=["sqlite", "postgresql"])
def warehouse(request: pytest.FixtureRequest) -> Iterator[str]:
    """What phasewise.toml says about the warehouse, for each kind of catalog."""
    if request.param == "sqlite":
        yield ""
        return
    if why_not := find_postgres().why_not:
        pytest.skip(why_not)
    with postgres_catalog() as url:
        yield f'[warehouse]\ncatalog = "{url}"\n'


@pytest.fixture
def project(tmp_path: Path, warehouse: str) -> Project:
    source = "".join(f"create table {table} (id integer primary key, generation integer);" for table in TABLES)
    rows = "".join(
        f"insert into {table} with recursive n(i) as (select 1 union all select i + 1 from n where i < 500) "
        "select i, 0 from n;"
        for table in TABLES
    )
    union = " union all ".join(f"select generation from {table}" for table in TABLES)
    marts = {
        "generations": f"select distinct generation from ({union})",
        "total": f"select count(*) as n from ({union})",
    }
    return write_project(tmp_path, source=source + rows, toml=warehouse, marts=marts)


def stage_generation(project: Project, generation: int) -> str:
    change_source(project.root, "".join(f"update {table} set generation = {generation};" for table in TABLES))
    return stage_batch(project)


def look(project: Project) -> tuple[set[int], set[int], int, list[str]]:
    """Return the generations of the tables, those of the mart, the rows, and the published batches; one snapshot."""
    with open_reader(project, SETTINGS) as connection:
        union = " union all ".join(f"from {table}" for table in TABLES)
        tables = {row[0] for row in connection.execute(f"select generation from ({union})").fetchall()}
        mart = {row[0] for row in connection.execute("from generations").fetchall()}
        rows = connection.execute(f"select count(*) from ({union})").fetchone()
        return tables, mart, rows[0], [publication.batch for publication in list_publications(connection)]


@pytest.mark.timeout(240)
def test_a_publisher_killed_at_any_instant_leaves_all_old_or_all_new(project: Project):
    publish_sample(project, SETTINGS, stage_generation(project, 0))
    audited = audit_sample(project, stage_generation(project, 1))
    started = time.monotonic()
    publish_batch(project, SETTINGS, audited)
    seconds = time.monotonic() - started
    generation, random_source, seen = 2, random.Random(20261123), []
    batch = stage_generation(project, generation)
    audited = audit_sample(project, batch)

    for attempt in range(KILLS):
        pid = fork(lambda audited=audited: publish_batch(project, SETTINGS, audited))
        # The sleep is the test's input: the instant of the kill.
        time.sleep(random_source.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

        tables, mart, rows, batches = look(project)
        was_published = batch in batches
        expected = generation if was_published else generation - 1
        assert (tables, mart, rows) == ({expected}, {expected}, 500 * len(TABLES)), f"after kill {attempt}"
        assert batches.count(batch) == was_published
        seen.append(was_published)
        # Keep the instants on both sides of the commit, however fast the machine is just now.
        seconds *= 0.9 if was_published else 1.1
        if was_published:
            generation += 1
            batch = stage_generation(project, generation)
            audited = audit_sample(project, batch)

    publish_batch(project, SETTINGS, audited)
    assert look(project)[:2] == ({generation}, {generation})
    assert {True, False} == set(seen), f"the instants hit one side of the commit only: {seen}"


def test_orphans_of_a_killed_publisher_go_within_one_cleanup(project: Project, monkeypatch: pytest.MonkeyPatch):
    publish_sample(project, SETTINGS, stage_generation(project, 0))
    batch = stage_generation(project, 1)
    known = set((project.warehouse / "data").rglob("*.parquet"))
    monkeypatch.setattr(
        "phasewise.publishing.publish.build_marts", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    )
    pid = fork(lambda: publish_sample(project, SETTINGS, batch))
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    monkeypatch.undo()
    orphans = set((project.warehouse / "data").rglob("*.parquet")) - known
    assert len(orphans) == len(TABLES)

    done = maintain_lake(project, SETTINGS)

    assert done.deleted_files == len(TABLES)
    assert set((project.warehouse / "data").rglob("*.parquet")) == known
    assert look(project)[0] == {0}
    publish_sample(project, SETTINGS, batch)
    assert look(project)[0] == {1}


@pytest.mark.timeout(120)
def test_readers_never_see_a_mix_nor_fail_while_others_publish_and_clean(project: Project):
    publish_sample(project, SETTINGS, stage_generation(project, 0))
    batches = [stage_generation(project, generation) for generation in range(1, 7)]

    def write() -> None:
        for batch in batches:
            publish_sample(project, SETTINGS, batch)
            maintain_lake(project, SETTINGS, orphan_grace=timedelta(0))

    pid = fork(write)
    passes, seen = 0, set()
    with open_session(SETTINGS) as connection:
        attach_lake(connection, project, read_only=True)
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            # A reader that holds a transaction, as a BI tool would.
            connection.execute("begin")
            found = {
                connection.execute(f"select distinct generation from lake.main.{table}").fetchone()[0]
                for table in TABLES
            }
            found |= {row[0] for row in connection.execute("from lake.marts.generations").fetchall()}
            connection.execute("commit")
            assert len(found) == 1, f"a mix: {found}"
            seen |= found
            passes += 1

    assert look(project)[0] == {6}
    assert passes > 10
    assert len(seen) > 1


def test_a_reader_within_retention_is_never_broken_by_cleanup(project: Project):
    publish_sample(project, SETTINGS, stage_generation(project, 0))

    with open_reader(project, SETTINGS) as connection:
        for generation in range(1, 4):
            publish_sample(project, SETTINGS, stage_generation(project, generation))
            maintain_lake(project, SETTINGS, orphan_grace=timedelta(0))

        for table in TABLES:
            assert connection.execute(f"select distinct generation from {table}").fetchall() == [(0,)]


@pytest.mark.timeout(120)
def test_a_first_publisher_killed_at_any_instant_leaves_a_warehouse_that_the_next_one_can_use(project: Project):
    batch = stage_generation(project, 0)
    audited = audit_sample(project, batch)
    started = time.monotonic()
    publish_batch(project, SETTINGS, audited)
    seconds = time.monotonic() - started
    random_source = random.Random(20261124)

    for attempt in range(12):
        shutil.rmtree(project.warehouse)
        drop_catalog(project.catalog)
        pid = fork(lambda: publish_batch(project, SETTINGS, audited))
        # The sleep is the test's input: the instant of the kill.
        time.sleep(random_source.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

        publish_batch(project, SETTINGS, audited)

        tables, mart, rows, batches = look(project)
        assert (tables, mart, rows, batches) == ({0}, {0}, 500 * len(TABLES), [batch]), f"after kill {attempt}"


def test_of_two_publishers_at_the_same_time_the_newer_batch_wins(project: Project):
    publish_sample(project, SETTINGS, stage_generation(project, 0))
    older, newer = stage_generation(project, 1), stage_generation(project, 2)

    pids = [fork(lambda batch=batch: publish_sample(project, SETTINGS, batch)) for batch in (newer, older)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    tables, mart, _, batches = look(project)
    assert (tables, mart) == ({2}, {2})
    # The older one came first, or was refused.
    assert codes[0] == 0
    assert batches.count(older) == (codes[1] == 0)


INCREMENT = """[table.t]
{mode}
quarantine_limit = 100
[[audit]]
name = "positive"
table = "t"
severity = "quarantine"
sql = "from t where generation < 0"
"""
MODES = {"full": "", "append": 'mode = "append"\ncursor = "at"', "merge": 'mode = "merge"\ncursor = "at"'}


def stage_increment(project: Project, generation: int) -> str:
    """Change all rows of the source, add a good and a bad one, and stage the batch of that name."""
    change_source(
        project.root,
        f"update t set generation = {generation}, at = {generation} where id <= 300; insert into t values "
        f"({1000 + generation}, {generation}, {generation}), ({2000 + generation}, -1, {generation})",
    )
    return stage_batch(project, batch=f"b{generation}")


def look_at_increment(project: Project) -> tuple[int, int, int, str | None, list[str]]:
    """Return how many rows are good, the highest generation, how many rows are set aside, the cursor, the batches."""
    with open_reader(project, SETTINGS) as connection:
        good, highest = connection.execute("select count(*) filter (id > 300), max(generation) from t").fetchone()
        aside = connection.execute("select count(*) from lake._quarantine.t").fetchone()[0]
        publications = list_publications(connection)
        mark = publications[-1].states[0].mark if publications[-1].states else None
        return good, highest, aside, mark, [publication.batch for publication in publications]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", MODES)
def test_rows_quarantine_and_cursor_of_a_publisher_that_is_killed_are_all_old_or_all_new(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
):
    source = """create table t (id integer primary key, generation integer, at integer); insert into t with recursive
        n(i) as (select 1 union all select i + 1 from n where i < 300) select i, 0, 0 from n;"""
    project = write_project(tmp_path, source=source, toml=INCREMENT.format(mode=MODES[mode]))
    started = time.monotonic()
    publish_sample(project, SETTINGS, stage_increment(project, 1))
    seconds = time.monotonic() - started
    random_source = random.Random(f"20261125 {mode}")

    def kill_within(batch: str, name: str | None) -> None:
        """Kill the publisher in the function *name*, or at any instant."""
        with monkeypatch.context() as patch:
            if name is not None:
                patch.setattr(
                    f"phasewise.publishing.publish.{name}", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
                )
            pid = fork(lambda: publish_sample(project, SETTINGS, batch))
            if name is None:
                # The sleep is the test's input: the instant of the kill.
                time.sleep(random_source.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    # In the transaction, when the table is changed; when its quarantine is, too; and when all is committed.
    for generation, name in enumerate(["publish_quarantine", None, "build_marts", "mark_published"], start=2):
        batch = stage_increment(project, generation)
        kill_within(batch, name)

        good, highest, aside, mark, batches = look_at_increment(project)
        shown = generation if batch in batches else generation - 1
        assert (good, aside) == (shown, shown), f"killed in {name}"
        assert highest == shown
        assert mark == (None if mode == "full" else str(shown))
        assert name is None or (batch in batches) == (name == "mark_published")

        publish_sample(project, SETTINGS, batch)
        assert look_at_increment(project)[:3] == (generation, generation, generation)
        assert look_at_increment(project)[4].count(batch) == 1
