"""Batches: their plan, what is missing of them, and a staging that can be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phasewise.errors import StagingError
from phasewise.lake.session import preload_extensions
from phasewise.project.config import Project
from phasewise.settings import Settings
from phasewise.staging.batch import (
    begin_batch,
    find_publishable_batch,
    list_batches,
    mark_published,
    new_batch_id,
    prepare_staging,
)
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import Manifest

SETTINGS = Settings(threads=1, memory_limit="256MB", min_free_bytes=0)


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner",))


def extract(project: Project, table: str, batch: str = "b1") -> Manifest:
    return extract_table(project, SETTINGS, batch=batch, table=table)


def test_staging_that_is_not_a_folder_is_an_error_that_names_it(project: Project):
    project.staging.parent.mkdir()
    project.staging.write_text("a file")

    with pytest.raises(StagingError, match="staging cannot be written"):
        prepare_staging(project, SETTINGS)
    with pytest.raises(StagingError, match="cannot be written"):
        extract(project, "player")


@contextmanager
def without_root() -> Iterator[None]:
    """Be someone whom permissions hold back: root may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_read_only_staging_is_an_error_that_names_it(project: Project):
    # Below a folder that others may enter, which the folders of pytest are not.
    with tempfile.TemporaryDirectory() as open_folder:
        Path(open_folder).chmod(0o755)
        elsewhere = project.model_copy(update={"staging": Path(open_folder) / "staging"})
        elsewhere.staging.mkdir(mode=0o555)

        with without_root(), pytest.raises(StagingError, match="cannot be written"):
            prepare_staging(elsewhere, SETTINGS)


def test_too_little_free_space_is_found_beforehand(project: Project):
    with pytest.raises(StagingError, match="bytes free, and a batch needs"):
        prepare_staging(project, SETTINGS.model_copy(update={"min_free_bytes": 10**18}))


def test_preparing_leaves_nothing_behind(project: Project):
    prepare_staging(project, SETTINGS)

    assert list(project.staging.iterdir()) == []


def test_a_batch_keeps_its_first_plan(project: Project):
    first = begin_batch(project, "b1", ["player", "team"])

    assert begin_batch(project, "b1", ["player"]) == first
    assert first.tables == ("player", "team")


def test_a_batch_is_complete_when_every_planned_table_is_staged(project: Project):
    begin_batch(project, "b1", ["player", "team"])
    extract(project, "player")
    assert [(b.tables, b.missing, b.is_complete) for b in list_batches(project)] == [(("player",), ("team",), False)]
    assert find_publishable_batch(project) is None

    extract(project, "team")

    assert find_publishable_batch(project) == "b1"


def test_a_single_extraction_is_a_batch_of_its_own(project: Project):
    batch = new_batch_id()

    extract(project, "player", batch)

    assert find_publishable_batch(project) == batch


def test_a_published_batch_hides_all_older_ones(project: Project):
    for batch in ("older", "newer"):
        extract(project, "player", batch)

    mark_published(project, "newer", 7)

    assert [(b.id, b.snapshot) for b in list_batches(project)] == [("older", None), ("newer", 7)]
    assert find_publishable_batch(project) is None


def test_a_folder_without_a_plan_is_no_batch(project: Project):
    (project.staging / "stray").mkdir(parents=True)
    (project.staging / "broken").mkdir()
    (project.staging / "broken" / "batch.json").write_text("{")

    assert list_batches(project) == []


@pytest.mark.parametrize("batch", ["", "..", "a/b", ".hidden", "a" * 101])
def test_a_batch_id_cannot_leave_staging(project: Project, batch: str):
    with pytest.raises(StagingError, match="cannot be the id of a batch"):
        begin_batch(project, batch, [])
