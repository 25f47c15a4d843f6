"""Work pools of our type: the commands of Prefect know it, limits hold, several workers share a pool."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import LogFilter
from prefect.client.schemas.objects import FlowRun

from phasewise.stack.control import StackInfo
from phasewise.worker.worker import WarmProcessWorker
from tests.integration.conftest import FLOWS, Runs, create_python

pytestmark = pytest.mark.timeout(150)


def environment(stack: StackInfo, **changes: str) -> dict[str, str]:
    return {**os.environ, "PREFECT_API_URL": stack.api_url, **changes}


@contextlib.contextmanager
def started(stack: StackInfo, *command: str, **changes: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, *command], env=environment(stack, **changes)) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()


def worker_command(pool: str, name: str) -> list[str]:
    return ["-c", "from phasewise.worker.__main__ import main; main()", "--pool", pool, "--name", name]


async def test_prefects_own_commands_create_a_pool_of_our_type_and_start_a_worker(runs: Runs, stack: StackInfo) -> None:
    prefect = [sys.executable, "-m", "prefect", "work-pool", "create", "by-command", "--type", "warm-process"]
    created = await asyncio.to_thread(
        subprocess.run, prefect, env=environment(stack), capture_output=True, text=True, check=False
    )
    assert created.returncode == 0, created.stdout + created.stderr
    pool = await runs.client.read_work_pool("by-command")

    with started(stack, "-m", "prefect", "worker", "start", "--pool", "by-command", "--type", "warm-process"):
        run = await Runs(client=runs.client, pool="by-command").finish("completed", seconds=60)

    assert pool.type == "warm-process"
    assert pool.base_job_template == WarmProcessWorker.get_default_base_job_template()
    assert run.state.name == "Completed"
    assert run.labels["prefect.worker.type"] == "warm-process"


async def test_the_ui_is_told_of_our_type_when_it_asks_which_there_are(runs: Runs) -> None:
    answer = await runs.client._client.get("collections/views/aggregate-worker-metadata")

    types = {name: found for package in answer.json().values() for name, found in package.items()}
    ours, template = types["warm-process"], WarmProcessWorker.get_default_base_job_template()
    assert {"process", "docker", "kubernetes"} <= set(types)
    assert ours["display_name"] == "Warm process"
    assert ours["default_base_job_configuration"]["job_configuration"] == template["job_configuration"]
    offered = ours["default_base_job_configuration"]["variables"]["properties"]
    assert set(offered) == set(template["variables"]["properties"])


def most_at_once(spans: list[tuple[datetime, datetime]]) -> int:
    """Return how many of *spans* overlap at most; one that ends when another begins does not overlap it."""
    steps = sorted([(end, -1) for _, end in spans] + [(start, 1) for start, _ in spans])
    running = most = 0
    for _, step in steps:
        running += step
        most = max(most, running)
    return most


async def spans_of(runs: Runs, found: list[FlowRun]) -> list[tuple[datetime, datetime]]:
    """Return from when to when each run held a slot: from Pending until it was final."""
    spans = []
    for run in found:
        states = {state.name: state.timestamp for state in await runs.client.read_flow_run_states(run.id)}
        spans.append((states["Pending"], states["Completed"]))
    return spans


@pytest.mark.parametrize("limit", ["pool", "queue"])
async def test_a_limit_holds_exactly_while_two_workers_race(runs: Runs, stack: StackInfo, limit: str) -> None:
    name = f"limited-{limit}"
    pool = await runs.client.create_work_pool(WorkPoolCreate(name=name, type="warm-process"))
    if limit == "pool":
        await runs.client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=3))
    else:
        await runs.client.update_work_queue(pool.default_queue_id, concurrency_limit=3)
    limited = Runs(client=runs.client, pool=name)
    deployment = await limited.deploy("a_moment")
    with started(stack, *worker_command(name, "one")), started(stack, *worker_command(name, "two")):
        created = await asyncio.gather(*(runs.client.create_flow_run_from_deployment(deployment) for _ in range(12)))
        ended = [await limited.until(run, seconds=90) for run in created]

    assert {run.state.name for run in ended} == {"Completed"}
    assert {run.run_count for run in ended} == {1}
    for run in ended:
        assert (await limited.states(run)).count("Pending") == 1
    assert most_at_once(await spans_of(limited, ended)) == 3


async def test_a_limit_of_the_worker_holds(runs: Runs, stack: StackInfo) -> None:
    name = "limited-worker"
    await runs.client.create_work_pool(WorkPoolCreate(name=name, type="warm-process"))
    limited = Runs(client=runs.client, pool=name)
    deployment = await limited.deploy("a_moment")
    with started(stack, "-m", "prefect", "worker", "start", "--pool", name, "--limit", "2"):
        created = [await runs.client.create_flow_run_from_deployment(deployment) for _ in range(6)]
        ended = [await limited.until(run, seconds=90) for run in created]

    assert most_at_once(await spans_of(limited, ended)) == 2


async def test_a_run_is_claimed_on_the_event_of_its_scheduling(runs: Runs, stack: StackInfo) -> None:
    heard = Runs(client=runs.client, pool="heard")
    await runs.client.create_work_pool(WorkPoolCreate(name="heard", type="warm-process"))
    with started(stack, *worker_command("heard", "heard"), PREFECT_WORKER_QUERY_SECONDS="3600"):
        for _ in range(2):  # the first may be claimed by the poll at the worker's start
            run = await heard.finish("completed", seconds=60)

    assert run.state.name == "Completed"


async def runs_by_worker(runs: Runs, name: str, workers: set[str], **parameters: Any) -> dict[str, list[FlowRun]]:
    """Start runs of *name*, one by one, until each of *workers* has begun one; returns them by worker."""
    found: dict[str, list[FlowRun]] = {}
    while not workers <= set(found):
        run = await runs.until(await runs.start(name, **parameters), "Running", "Completed")
        async with asyncio.timeout(30):
            while run.infrastructure_pid is None:  # it is reported just after the state
                run = await runs.client.read_flow_run(run.id)
        found.setdefault(str(run.labels["prefect.worker.name"]), []).append(run)
    return found


def parent_of(pid: str | None) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_a_forkserver_that_is_killed_takes_along_the_runs_of_its_own_worker_alone(
    runs: Runs, stack: StackInfo, tmp_path: Path
) -> None:
    shared = Runs(client=runs.client, pool="shared")
    workers = {"one", "two"}
    release, found = tmp_path / "release", tmp_path / "found"
    with started(stack, *worker_command("shared", "one")), started(stack, *worker_command("shared", "two")):
        await until_online(shared, workers)
        held = await runs_by_worker(shared, "held", workers, file=str(release))
        pids = {run.id: run.infrastructure_pid for run in held["one"] + held["two"]}
        killed = parent_of(pids[held["one"][0].id])
        other = parent_of(pids[held["two"][0].id])

        os.kill(killed, signal.SIGKILL)

        crashed = [await shared.until(run) for run in held["one"]]
        undisturbed = [await runs.client.read_flow_run(run.id) for run in held["two"]]
        parents = [parent_of(pids[run.id]) for run in held["two"]]
        release.touch()
        ended = [await shared.until(run) for run in held["two"]]
        later = await runs_by_worker(shared, "surroundings", {"one"}, file=str(found))
        await shared.until(later["one"][-1])

    assert killed != other
    assert {run.state.name for run in crashed if run.state} == {"Crashed"}
    for run in crashed:
        assert run.state is not None
        assert "The forkserver that it was forked from has ended" in (run.state.message or "")
    assert {run.state_name for run in undisturbed} == {"Running"}
    assert set(parents) == {other}
    assert [(run.state_name, run.run_count, run.infrastructure_pid) for run in ended] == [
        ("Completed", 1, pids[run.id]) for run in held["two"]
    ]
    assert ast.literal_eval(found.read_text())["parent"] not in (killed, other)


async def until_online(runs: Runs, workers: set[str]) -> None:
    async with asyncio.timeout(60):
        while runs.pool not in [pool.name for pool in await runs.client.read_work_pools()]:
            await asyncio.sleep(0.1)
        while not workers <= {one.name for one in await runs.client.read_workers_for_work_pool(runs.pool)}:
            await asyncio.sleep(0.1)


DEAF = """
from phasewise.worker import __main__, worker

def refuse(*_, **__):
    raise ConnectionError("no events here")

worker.get_events_subscriber = refuse
__main__.main()
"""


async def test_a_worker_without_events_claims_by_polling(runs: Runs, stack: StackInfo) -> None:
    deaf = Runs(client=runs.client, pool="deaf")
    await runs.client.create_work_pool(WorkPoolCreate(name="deaf", type="warm-process"))
    command = ["-c", DEAF, "--pool", "deaf", "--name", "deaf"]
    with started(stack, *command, PREFECT_WORKER_QUERY_SECONDS="1"):
        for _ in range(2):
            run = await deaf.finish("completed", seconds=60)

    assert run.state.name == "Completed"


async def messages(runs: Runs, run: FlowRun) -> str:
    logs = await runs.client.read_logs(LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}}))
    return "\n".join(log.message for log in logs)


async def until_logged(runs: Runs, run: FlowRun, text: str) -> None:
    async with asyncio.timeout(30):  # logs are sent every two seconds
        while text not in await messages(runs, run):
            await asyncio.sleep(0.2)


async def test_code_from_git_is_fetched_by_a_new_python_and_the_log_says_so(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "cloned.py").write_text("from prefect import flow\n\n@flow\ndef cloned():\n    pass\n")
    for command in (
        ["git", "init", "-q", "-b", "main"],
        ["git", "add", "cloned.py"],
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)  # noqa: ASYNC221
    step: dict[str, Any] = {"prefect.deployments.steps.git_clone": {"repository": str(tmp_path), "branch": "main"}}
    deployment = await runs.deploy("cloned", entrypoint="cloned.py:cloned", pull_steps=[step])

    run = await runs.until(await runs.client.create_flow_run_from_deployment(deployment), seconds=60)

    assert run.state.name == "Completed", run.state.message
    await until_logged(runs, run, "Starting a new Python for this run: its pull steps do more")


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_python(tmp_path_factory.mktemp("other") / "venv")


OWN_COMMAND = "Starting a new Python for this run: it has a command of its own."


@pytest.mark.parametrize("way", ["run", "deployment", "path"])
async def test_a_command_with_another_interpreter_is_started_as_such_and_the_log_says_so(
    runs: Runs, tmp_path: Path, other_python: Path, way: str
) -> None:
    file = tmp_path / "found"
    job: dict[str, Any] = {"command": f"{other_python} -m prefect.engine"}
    if way == "path":
        path = f"{other_python.parent}{os.pathsep}{os.environ['PATH']}"
        job = {"command": "python -m prefect.engine", "env": {"PATH": path}}
    deployment = await runs.deploy("surroundings", job_variables=job if way == "deployment" else {})

    run = await runs.client.create_flow_run_from_deployment(
        deployment, parameters={"file": str(file)}, job_variables=job if way != "deployment" else None
    )
    run = await runs.until(run, seconds=60)

    assert run.state is not None
    assert run.state.name == "Completed", run.state.message
    assert ast.literal_eval(file.read_text())["python"] == str(other_python.parents[1])
    await until_logged(runs, run, OWN_COMMAND)


async def test_a_work_pool_whose_template_has_a_command_runs_all_of_its_runs_under_that(
    runs: Runs, stack: StackInfo, tmp_path: Path, other_python: Path
) -> None:
    file = tmp_path / "found"
    template = WarmProcessWorker.get_default_base_job_template()
    template["variables"]["properties"]["command"]["default"] = f"{other_python} -m prefect.engine"
    await runs.client.create_work_pool(
        WorkPoolCreate(name="commanded", type="warm-process", base_job_template=template)
    )
    commanded = Runs(client=runs.client, pool="commanded")

    with started(stack, *worker_command("commanded", "commanded")):
        run = await commanded.finish("surroundings", seconds=60, file=str(file))

    assert run.state is not None
    assert run.state.name == "Completed", run.state.message
    assert ast.literal_eval(file.read_text())["python"] == str(other_python.parents[1])
    await until_logged(runs, run, OWN_COMMAND)


async def test_an_environment_that_uv_makes_for_a_run_is_one_of_a_new_python(
    runs: Runs, tmp_path: Path, other_python: Path
) -> None:
    file, uv = tmp_path / "found", tmp_path / "bin" / "uv"
    (tmp_path / FLOWS.name).write_bytes(FLOWS.read_bytes())
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "own"\ndependencies = ["prefect"]\n')
    uv.parent.mkdir()
    # In place of `uv run`, which would download the dependencies: the script that comes after its own options.
    uv.write_text(f'#!/bin/sh\nwhile [ "${{1%.py}}" = "$1" ]; do shift; done\nexec {other_python} "$@"\n')
    uv.chmod(0o755)
    env = {"PREFECT_RUNNER_AUTO_INSTALL_DEPENDENCIES": "true", "PATH": f"{uv.parent}{os.pathsep}{os.environ['PATH']}"}
    deployment = await runs.deploy("surroundings", folder=tmp_path, job_variables={"env": env})

    run = await runs.client.create_flow_run_from_deployment(deployment, parameters={"file": str(file)})
    run = await runs.until(run, seconds=60)

    assert run.state is not None
    assert run.state.name == "Completed", run.state.message
    assert ast.literal_eval(file.read_text())["python"] == str(other_python.parents[1])
    await until_logged(runs, run, "its environment differs in PREFECT_RUNNER_AUTO_INSTALL_DEPENDENCIES,")


async def test_another_interpreter_on_the_path_without_a_command_is_not_chosen(
    runs: Runs, tmp_path: Path, other_python: Path
) -> None:
    # As on Prefect's process worker, see the case in test_worker_contract.py.
    file = tmp_path / "found"
    env = {
        "PATH": f"{other_python.parent}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(other_python.parents[1]),
    }

    run = await runs.finish("surroundings", seconds=60, job_variables={"env": env}, file=str(file))

    assert run.state is not None
    assert run.state.name == "Completed", run.state.message
    assert ast.literal_eval(file.read_text())["python"] == sys.prefix
    await until_logged(runs, run, "submitted to infrastructure")  # which the worker says after that
    assert "Starting a new Python for this run" not in await messages(runs, run)
