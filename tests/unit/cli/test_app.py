"""What the command says of a batch that did not complete; the commands themselves are tested as commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phasewise.cli.app import _describe_warehouse, _use_server
from phasewise.settings import Settings
from phasewise.staging.batch import mark_published
from phasewise.testing.projects import stage_batch, write_project


@pytest.mark.parametrize(
    ("is_published", "said"), [(True, "Its tables were published before that"), (False, "Nothing was published")]
)
def test_a_failure_after_the_publishing_is_told_from_one_before_it(
    tmp_path: Path, is_published: bool, said: str
) -> None:
    project = write_project(tmp_path, source="create table t (a integer)")
    batch = stage_batch(project)
    if is_published:
        mark_published(project, batch, snapshot=1)

    assert _describe_warehouse(project, batch).startswith(said)


def test_nothing_of_a_stack_of_our_own_calls_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "")  # put back as it was when the test ends
    monkeypatch.delenv("DO_NOT_TRACK")

    _use_server(Settings(home=tmp_path), "http://127.0.0.1:4711/api")

    assert os.environ["DO_NOT_TRACK"] == "1"
