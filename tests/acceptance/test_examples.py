"""The projects of examples/, run by the commands of their READMEs."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Iterator

import pytest

from phasewise.lake.publications import query_warehouse
from phasewise.project.config import Project, load_project
from phasewise.testing.projects import SAMPLE_SETTINGS
from tests.acceptance.conftest import CHECKOUT, Shell
from tests.servers import find_postgres

pytestmark = pytest.mark.timeout(200)


def query(project: Project, sql: str) -> list[tuple[object, ...]]:
    return query_warehouse(project, SAMPLE_SETTINGS, sql)[1]


def test_the_folder_of_files_is_published_and_its_bad_rows_are_set_aside(shell: Shell) -> None:
    ignored = shutil.ignore_patterns("exports", "warehouse", ".phasewise")
    shutil.copytree(CHECKOUT / "examples" / "shop_files", shell.project, dirs_exist_ok=True, ignore=ignored)
    made = shell.run(str(shell.project / "make_data.py"))
    assert made.returncode == 0, made.stdout

    ran = shell.phasewise("run", "--local")

    assert ran.returncode == 0, ran.stdout
    project = load_project(shell.project)
    counts = "select (select count(*) from orders), (select count(*) from _quarantine.orders)"
    assert query(project, counts) == [(2980, 20)]
    assert query(project, "select month, orders from marts.revenue_by_month") == [
        ("2026-01", 1026),
        ("2026-02", 929),
        ("2026-03", 1025),
    ]
    assert query(project, "select count(*) from products where sku like '000%'") == [(40,)]
    assert len(query(project, "from marts.best_products")) == 10


@pytest.fixture
def shop_url() -> Iterator[str]:
    """A PostgreSQL database of its own."""
    address, name = find_postgres(), f"shop_{uuid.uuid4().hex[:10]}"
    if address.why_not:
        pytest.skip(address.why_not)
    server = f"postgresql://postgres:a%20secret@{address}"
    psql(f"{server}/postgres", "-c", f"create database {name}")
    yield f"{server}/{name}"
    psql(f"{server}/postgres", "-c", f"drop database {name} with (force)")


def psql(url: str, *arguments: str) -> None:
    subprocess.run(["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", *arguments, url], check=True, capture_output=True)


def test_the_database_is_loaded_by_what_is_new(shell: Shell, shop_url: str) -> None:
    ignored = shutil.ignore_patterns("warehouse", ".phasewise")
    shutil.copytree(CHECKOUT / "examples" / "shop_postgres", shell.project, dirs_exist_ok=True, ignore=ignored)
    shell.environment["SHOP_URL"] = shop_url
    psql(shop_url, "-f", str(shell.project / "data.sql"))
    first = shell.phasewise("run", "--local")
    assert first.returncode == 0, first.stdout
    psql(shop_url, "-f", str(shell.project / "next_day.sql"))

    second = shell.phasewise("run", "--local")

    assert second.returncode == 0, second.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOP_URL", shop_url)
        project = load_project(shell.project)
    counts = "select (select count(*) from orders), (select count(*) from events), (select count(*) from customers)"
    # Each of the 40 customers who moved has two rows in the history.
    assert query(project, counts) == [(5040, 21000, 540)]
    assert query(project, "select count(*) from orders where id between 101 and 200 and status = 'shipped'") == [(100,)]
    assert query(project, "from marts.moves") == [("Graz", "Bern", 40)]
    assert "customers: 500 rows" in second.stdout
    # The last event of the first day is read again: others could have come with its id.
    assert "events: 1001 rows" in second.stdout
