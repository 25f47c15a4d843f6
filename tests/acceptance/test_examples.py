"""The projects of examples/, run by the commands of their READMEs."""

from __future__ import annotations

import shutil

import pytest

from phasewise.project import Project, load_project
from phasewise.samples import SAMPLE_SETTINGS
from phasewise.snapshots import query_warehouse
from tests.acceptance.conftest import CHECKOUT, Shell

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
