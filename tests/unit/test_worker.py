from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from phasewise import worker

SET_FOLDER = "prefect.deployments.steps.set_working_directory"


def deployment(**fields: Any) -> Any:
    return SimpleNamespace(
        **{"entrypoint": "m.f", "path": None, "storage_document_id": None, "pull_steps": None, **fields}
    )


def test_variables_that_prefect_or_python_read_at_start_must_be_equal() -> None:
    warm = {"PREFECT_API_URL": "a", "PYTHONPATH": "p", "COLOUR": "blue", "PREFECT__WORKER_ID": "1"}

    assert worker._differing(warm, dict(warm)) == []
    assert worker._differing(warm, {**warm, "COLOUR": "red", "PREFECT__WORKER_ID": "2", "PHASEWISE_PROJECT": "x"}) == []
    assert worker._differing(warm, {**warm, "PREFECT_API_URL": "b", "PYTHONHOME": "h"}) == [
        "PREFECT_API_URL",
        "PYTHONHOME",
    ]
    assert worker._differing(warm, {"COLOUR": "blue"}) == ["PREFECT_API_URL", "PYTHONPATH"]


def test_a_module_entrypoint_without_pull_steps_needs_no_workspace() -> None:
    assert worker._why_not_workspace(deployment(entrypoint="phasewise.flows.main_etl")) is None


def test_an_existing_folder_is_a_workspace(tmp_path: Path) -> None:
    found = deployment(entrypoint="flows.py:main", pull_steps=[{SET_FOLDER: {"directory": str(tmp_path)}}])

    assert worker._why_not_workspace(found) is None
    assert worker._pulled_directory(found) == tmp_path.resolve()


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
    assert worker._why_not_workspace(deployment(**fields)) is not None


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

    assert worker._has_prefect_settings(tmp_path) is expected


def test_the_worker_is_one_of_prefects_types() -> None:
    from prefect.workers.base import BaseWorker

    assert BaseWorker.get_worker_class_from_type("warm-process") is worker.WarmProcessWorker
    assert "working_dir" in worker.WarmProcessWorker.get_default_base_job_template()["variables"]["properties"]


def test_a_context_for_tls_is_made_once_for_the_same_arguments() -> None:
    import ssl

    shared = worker._SharedContexts("ssl")

    assert shared.create_default_context() is shared.create_default_context()
    assert shared.SSLContext is ssl.SSLContext
    assert shared.CERT_NONE == ssl.CERT_NONE


def test_the_working_directory_of_a_run_is_gone_after_it(tmp_path: Path) -> None:
    with worker._working_directory(worker.WarmProcessJobConfiguration(env={})) as folder:
        assert list(Path(folder).iterdir()) == []
    assert not Path(folder).exists()

    with worker._working_directory(worker.WarmProcessJobConfiguration(env={}, working_dir=tmp_path)) as folder:
        assert Path(folder) == tmp_path.resolve()
    assert tmp_path.exists()


async def test_a_freed_slot_is_asked_for_again_while_runs_hold_the_slots_of_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = worker.WarmProcessWorker(work_pool_name="pool")
    asked: list[None] = []
    monkeypatch.setattr(one._claims, "set", lambda: asked.append(None))

    one._submitting_flow_run_ids.add(uuid4())
    await one._submit_scheduled_flow_runs([])  # the limit is reached, so nothing more is handed out
    one._slot_freed()

    assert len(asked) == 1


async def test_an_idle_worker_does_not_ask_after_every_run_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    one = worker.WarmProcessWorker(work_pool_name="pool")
    asked: list[None] = []
    monkeypatch.setattr(one._claims, "set", lambda: asked.append(None))

    await one._submit_scheduled_flow_runs([])
    one._slot_freed()

    assert asked == []
