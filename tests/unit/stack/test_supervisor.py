"""The supervisor: its port, and the environment of what it starts."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from phasewise.stack import supervisor
from phasewise.stack.supervisor import client_environment, listen, stack_environment


def test_a_taken_preferred_port_is_replaced_by_a_free_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(supervisor, "PREFERRED_PORT", taken.getsockname()[1])
        with listen() as listening:
            assert listening.getsockname()[0] == "127.0.0.1"
            assert listening.getsockname()[1] != taken.getsockname()[1]


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
