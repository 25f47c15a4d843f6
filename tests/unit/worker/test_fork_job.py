from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phasewise.worker.fork_job import (
    differing_variables,
    has_prefect_settings,
    pulled_directory,
    why_not_workspace,
    working_directory,
)

SET_FOLDER = "prefect.deployments.steps.set_working_directory"


def deployment(**fields: Any) -> Any:
    return SimpleNamespace(
        **{"entrypoint": "m.f", "path": None, "storage_document_id": None, "pull_steps": None, **fields}
    )


def test_variables_that_prefect_or_python_read_at_start_must_be_equal() -> None:
    warm = {"PREFECT_API_URL": "a", "PYTHONPATH": "p", "COLOUR": "blue", "PREFECT__WORKER_ID": "1"}

    assert differing_variables(warm, dict(warm)) == []
    assert (
        differing_variables(warm, {**warm, "COLOUR": "red", "PREFECT__WORKER_ID": "2", "PHASEWISE_PROJECT": "x"}) == []
    )
    assert differing_variables(warm, {**warm, "PREFECT_API_URL": "b", "PYTHONHOME": "h"}) == [
        "PREFECT_API_URL",
        "PYTHONHOME",
    ]
    assert differing_variables(warm, {**warm, "LC_ALL": "C", "LANG": "C"}) == ["LANG", "LC_ALL"]
    # Without a command of its own, a run has the interpreter of its worker whatever these say.
    assert differing_variables(warm, {**warm, "PATH": "/other/bin", "VIRTUAL_ENV": "/other"}) == []
    assert differing_variables(warm, {"COLOUR": "blue"}) == ["PREFECT_API_URL", "PYTHONPATH"]


def test_a_module_entrypoint_without_pull_steps_needs_no_workspace() -> None:
    assert why_not_workspace(deployment(entrypoint="phasewise.flows.main_etl")) is None


def test_an_existing_folder_is_a_workspace(tmp_path: Path) -> None:
    found = deployment(entrypoint="flows.py:main", pull_steps=[{SET_FOLDER: {"directory": str(tmp_path)}}])

    assert why_not_workspace(found) is None
    assert pulled_directory(found) == tmp_path.resolve()


@pytest.mark.parametrize(
    "fields",
    [
        {"entrypoint": "flows.py:main"},
        {"path": "/somewhere"},
        {"storage_document_id": "x"},
        {"pull_steps": [{SET_FOLDER: {"directory": "relative"}}]},
        {"pull_steps": [{SET_FOLDER: {"directory": "/does/not/exist"}}]},
        {"pull_steps": [{SET_FOLDER: {"directory": "{{ step.directory }}"}}]},
        {"pull_steps": [{SET_FOLDER: {"directory": "/"}}, {SET_FOLDER: {"directory": "/"}}]},
        {"pull_steps": [{"prefect.deployments.steps.git_clone": {"repository": "r"}}]},
        {"pull_steps": [{SET_FOLDER: None}]},
    ],
)
def test_code_that_must_be_fetched_is_left_to_prefect(fields: dict[str, Any]) -> None:
    assert why_not_workspace(deployment(**fields)) is not None


def test_the_working_directory_of_a_run_is_gone_after_it_unless_its_job_names_one(tmp_path: Path) -> None:
    with working_directory(None) as folder:
        assert list(Path(folder).iterdir()) == []
    assert not Path(folder).exists()

    with working_directory(tmp_path) as folder:
        assert Path(folder) == tmp_path.resolve()
    assert tmp_path.exists()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("prefect.toml", "", True),
        (".env", "PREFECT_API_URL=x", True),
        (".env", "PASSWORD=x", False),
        ("pyproject.toml", "[tool.prefect]\nhome = 'x'", True),
        ("pyproject.toml", "[tool.ruff]", False),
        ("pyproject.toml", "not toml [", False),
        ("other.txt", "PREFECT_", False),
    ],
)
def test_prefect_settings_in_a_folder_are_noticed(tmp_path: Path, name: str, text: str, expected: bool) -> None:
    (tmp_path / name).write_text(text)

    assert has_prefect_settings(tmp_path) is expected
