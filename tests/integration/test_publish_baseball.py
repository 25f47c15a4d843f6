"""The example, without Prefect: 27 tables staged, audited and published are the source, row for row."""

from __future__ import annotations

import shutil

import pytest

from examples.baseball.lahman import build_demo_source
from phasewise.lake.marts import read_mart
from phasewise.lake.publications import diff_batches, open_reader
from phasewise.lake.session import preload_extensions
from phasewise.project.config import Project, load_project
from phasewise.publishing.audits import raise_for
from phasewise.publishing.maintenance import maintain_lake
from phasewise.publishing.staging_cleanup import remove_finished_staging
from phasewise.settings import Settings, find_checkout
from phasewise.staging.manifest import list_manifests
from phasewise.testing.projects import audit_sample, publish_sample, stage_batch

# Two nights of 27 tables: seconds on an idle machine, a minute on a busy one.
pytestmark = pytest.mark.timeout(240)

SETTINGS = Settings(threads=2, memory_limit="512MB", min_free_bytes=0)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    preload_extensions(("sqlite_scanner", "ducklake"))
    checkout = find_checkout()
    assert checkout is not None
    root = tmp_path_factory.mktemp("baseball")
    shutil.copy(checkout / "examples" / "baseball" / "phasewise.toml", root)
    shutil.copytree(checkout / "examples" / "baseball" / "marts", root / "marts")
    build_demo_source(root / "data" / "lahman.sqlite")
    return load_project(root)


@pytest.fixture(scope="module")
def batch(project: Project) -> str:
    batch = stage_batch(project, SETTINGS)
    publish_sample(project, SETTINGS, batch)
    return batch


def test_the_audits_find_what_is_known_about_the_data(project: Project, batch: str):
    results = audit_sample(project, batch, SETTINGS).results

    raise_for(results)
    assert {(result.name, result.bad_rows) for result in results if not result.passed} == {
        ("team_home_runs_add_up", 3),
        ("schools_are_known", 4),
    }
    keys = {result.table for result in results if result.name.startswith("unique(")}
    assert keys == {manifest.table for manifest in list_manifests(project, batch)} - {"awards_players"}


def test_every_table_equals_its_source(project: Project, batch: str):
    with open_reader(project, SETTINGS) as connection:
        source = project.root / "data" / "lahman.sqlite"
        connection.execute(f"attach '{source}' as source (type sqlite, read_only)")
        tables = [row[0] for row in connection.execute("select name from (show tables from source)").fetchall()]
        for table in tables:
            for one, other in (("lake.main", "source"), ("source", "lake.main")):
                sql = f'select count(*) from (from {one}."{table}" except all from {other}."{table}")'
                assert connection.execute(sql).fetchone() == (0,), table

    assert len(tables) == 27


def test_the_marts_say_what_the_record_books_say(project: Project, batch: str):
    with open_reader(project, SETTINGS) as connection:
        marts = {mart.name: read_mart(connection, mart, limit=1) for mart in project.marts}

    assert marts["career_home_runs"].rows[0][:2] == ("Barry Bonds", 762)
    assert marts["player_careers"].rows[0][1] == "Pete Rose"
    assert marts["pitching_era_leaders"].rows[0][:2] == ("Ed Walsh", 1.816)
    assert marts["world_series_titles"].rows[0][:2] == ("New York Yankees", 27)
    assert all(mart.total_rows > 5 for mart in marts.values())


def test_the_next_night_changes_nothing_that_did_not_change(project: Project, batch: str):
    tonight = stage_batch(project, SETTINGS)
    publish_sample(project, SETTINGS, tonight)

    assert remove_finished_staging(project, SETTINGS, keep=set()).removed == (batch, tonight)
    assert maintain_lake(project, SETTINGS).deleted_files == 0
    differences = diff_batches(project, SETTINGS, batch, tonight)
    assert len(differences) == 27
    assert all(difference.is_same for difference in differences)
