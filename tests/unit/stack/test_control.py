"""A running stack is found, and nothing else is taken for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phasewise.stack.control import find_stack, start_workers, stop_stack
from phasewise.stack.supervisor import StackError
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
