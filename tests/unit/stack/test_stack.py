from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from phasewise.stack import supervisor
from phasewise.stack.control import StackError, client_environment, find_stack, start_workers, stop_stack
from phasewise.stack.supervisor import listen, stack_environment
from phasewise.system.processes import start_time


def write_state(home: Path, pid: int, started: str | None) -> None:
    state = {"api_url": "http://127.0.0.1:1/api", "ui_url": "http://127.0.0.1:1", "pool": "p", "workers": ["worker-1"]}
    (home / "stack.json").write_text(json.dumps({**state, "pid": pid, "started": started}))


def test_a_folder_without_a_state_file_has_no_stack(tmp_path: Path) -> None:
    assert find_stack(tmp_path) is None
    assert stop_stack(tmp_path) is False


def test_a_half_written_state_file_is_no_stack(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text('{"pid": 1')

    assert find_stack(tmp_path) is None


def test_a_dead_supervisor_is_no_stack(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    started = start_time(process.pid)
    process.wait()
    write_state(tmp_path, process.pid, started)

    assert find_stack(tmp_path) is None
    assert stop_stack(tmp_path) is False


def test_another_process_that_got_the_number_is_not_taken_for_the_supervisor(tmp_path: Path) -> None:
    write_state(tmp_path, os.getpid(), "12345")

    assert find_stack(tmp_path) is None
    assert stop_stack(tmp_path) is False  # and above all: this process was not signalled


def test_a_supervisor_whose_server_does_not_answer_is_no_stack(tmp_path: Path) -> None:
    write_state(tmp_path, os.getpid(), start_time(os.getpid()))

    assert find_stack(tmp_path) is None


def test_workers_cannot_be_added_where_no_stack_runs(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="make up"):
        start_workers(tmp_path, 3)


def test_the_start_time_of_a_process_stays_and_differs_from_another(tmp_path: Path) -> None:
    own = start_time(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        its = start_time(other.pid)

    assert own == start_time(os.getpid())
    assert None not in (own, its)
    assert own != its
    assert start_time(other.pid) is None


def test_a_taken_preferred_port_is_replaced_by_a_free_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(supervisor, "PREFERRED_PORT", taken.getsockname()[1])
        with listen(None) as listening:
            assert listening.getsockname()[0] == "127.0.0.1"
            assert listening.getsockname()[1] != taken.getsockname()[1]


def test_a_taken_port_that_was_asked_for_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StackError, match="is taken"):
        listen(taken.getsockname()[1])


def test_the_users_own_prefect_does_not_reach_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "PREFECT_API_KEY",
        "PREFECT_PROFILE",
        "PREFECT_API_DATABASE_CONNECTION_URL",
        "PREFECT_SERVER_API_PORT",
    ):
        monkeypatch.setenv(name, "foreign")
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL", "3")

    environment = stack_environment(tmp_path, 4711, {"PHASEWISE_PROJECT": "/p"})

    assert "foreign" not in environment.values()
    assert environment["PREFECT_API_URL"] == environment["PREFECT_UI_API_URL"] == "http://127.0.0.1:4711/api"
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["PREFECT_LOGGING_LEVEL"] == "DEBUG"
    assert environment["PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL"] == "3"
    assert environment["PHASEWISE_PROJECT"] == "/p"


def test_clients_keep_out_of_the_users_home(tmp_path: Path) -> None:
    environment = client_environment(tmp_path, "http://127.0.0.1:4711/api")

    assert Path(environment["PREFECT_HOME"]).is_relative_to(tmp_path)
    assert Path(environment["PREFECT_PROFILES_PATH"]).is_relative_to(tmp_path)


def test_the_supervisor_starts_without_prefect_or_pydantic() -> None:
    code = (
        "import sys, phasewise.stack.supervisor;"
        " print([m for m in ('prefect', 'pydantic', 'httpx') if m in sys.modules])"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"
