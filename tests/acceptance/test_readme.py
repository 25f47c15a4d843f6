"""What the README shows is run as it stands there: its commands and snippets, but for the two long make commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from phasewise.project.config import load_project
from phasewise.project.pipeline import Phase, load_phases, validate_phases
from phasewise.stack.control import StackInfo
from phasewise.testing.projects import SAMPLE_SETTINGS, publish_sample, stage_batch, write_project
from tests.acceptance.conftest import CHECKOUT, SHOP, Shell, wait_for

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def find_block(language: str, containing: str) -> str:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    [block] = [block for kind, block in blocks if kind == language and containing in block]
    return str(block)


def find_commands(containing: str) -> list[list[str]]:
    """Return the commands of a block as argument lists for this Python."""
    commands = []
    for line in find_block("sh", containing).splitlines():
        program, *arguments = shlex.split(line)
        python = {"python": [], "phasewise": ["-m", "phasewise"], "prefect": ["-m", "prefect"]}[program]
        commands.append([*python, *arguments])
    return commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, lahman: Path) -> Path:
    """A folder like a checkout after `make run-distributed`: the example's warehouse is published."""
    folder = tmp_path_factory.mktemp("checkout")
    example = folder / "examples" / "baseball"
    shutil.copytree(CHECKOUT / "examples" / "baseball" / "marts", example / "marts")
    shutil.copy(CHECKOUT / "examples" / "baseball" / "phasewise.toml", example)
    (example / "data").mkdir()
    shutil.copy(lahman, example / "data" / "lahman.sqlite")
    project = load_project(example)
    publish_sample(project, SAMPLE_SETTINGS, stage_batch(project))
    return folder


Run = Callable[..., str]


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    environment = {
        **os.environ,
        "PHASEWISE_HOME": str(tmp_path),
        "PHASEWISE_PROJECT": str(folder / "examples" / "baseball"),
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]),
        "COLUMNS": "120",
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_a_query_prints_what_is_shown(run: Run) -> None:
    [command] = find_commands("phasewise query")

    printed = run(*command)

    shown = [line.rstrip() for line in find_block("", "Barry Bonds").splitlines()]
    assert [line.rstrip() for line in printed.splitlines() if line.strip()][: len(shown)] == shown


def test_plain_duckdb_reads_the_warehouse(run: Run) -> None:
    printed = run("-c", find_block("python", "load_extension"))

    assert "Barry Bonds" in printed
    assert "762" in printed


def test_flows_run_as_functions_without_a_server(run: Run) -> None:
    check, extract, publish = [run(*command) for command in find_commands("pre_etl()")]

    assert "'sources_validated': True, 'tables': 27" in check
    assert "'table': 'batting', 'rows': 115450" in extract
    assert "'status': 'final_etl_complete'" in publish


@pytest.mark.timeout(200)
def test_the_script_prefect_and_a_flow_of_ones_own_run_deployments(stack: StackInfo, stack_shell: Shell) -> None:
    write_project(stack_shell.project, source=SHOP)

    for command in find_commands("prefect_flow-worker-flow-v2.py deploy"):
        done = stack_shell.run(*command, PREFECT_API_URL=stack.api_url)
        assert done.returncode == 0, done.stdout
    body = {"flows": {"name": {"any_": ["main-etl-job"]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}

    def is_completed() -> bool:
        [newest] = httpx.post(f"{stack.api_url}/flow_runs/filter", json=body, timeout=30).json()
        return bool(newest["state_type"] == "COMPLETED")

    wait_for(is_completed)
    both = stack_shell.python(
        f"{find_block('python', 'await trigger_subflow')}\nimport asyncio\nasyncio.run(both())",
        PREFECT_API_URL=stack.api_url,
    )
    assert both.returncode == 0, both.stdout
    assert both.stdout.count("completed successfully") == 2


def test_the_step_and_the_phase_that_are_shown_are_those_of_the_example() -> None:
    names: dict[str, object] = {}
    exec(find_block("python", "with_step"), names)  # noqa: S102 - our own README

    shown = names["PHASES"]

    assert isinstance(shown, tuple)
    validate_phases(shown)
    example = load_phases(CHECKOUT / "examples" / "custom_pipeline", "pipeline.py:PHASES")
    assert describe(shown) == describe(example)


def describe(phases: tuple[Phase, ...]) -> list[list[tuple[str, str, str | None]]]:
    return [[(step.name, step.deployment, step.entrypoint) for step in phase.steps] for phase in phases]
