"""What the API shows of runs on a warm worker; the same cases as Prefect's own process worker."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.filters import LogFilter, TaskRunFilter, TaskRunFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Cancelling, Pending, Suspended

from phasewise.forkserver.client import Forkserver
from phasewise.stack.control import StackInfo
from phasewise.worker.worker import PRELOAD, SETUP
from tests.integration.conftest import FLOWS, Runs

INSTALLED_WITH_PREFECT = {
    "prefect",
    "anyio",
    "pydantic",
    "httpx",
    "httpcore",
    "websockets",
    "rich",
    "jinja2",
    "phasewise",
    "duckdb",
}
# The first test waits for the stack to come up as well.
pytestmark = pytest.mark.timeout(150)


def find_memory_cgroup() -> Path:
    """Return this process's cgroup in the hierarchy of version 1, where there is one."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    paths = [line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"]
    return Path(f"/sys/fs/cgroup/memory{paths[0]}") if paths else Path("/nowhere")


OWN_MEMORY_CGROUP = find_memory_cgroup()
BEFORE_RUNNING = ["Scheduled", "Pending", "Submitting"]


def open_files(pid: int) -> dict[int, str]:
    """Return descriptor → what it is, such as ``socket`` or a path, of a process."""
    links = {int(link.name): str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    return {fd: "socket" if target.startswith("socket:") else target for fd, target in links.items()}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def until(condition: Any, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not (condition() if not asyncio.iscoroutinefunction(condition) else await condition()):
        assert time.monotonic() < deadline, "it did not become true"
        await asyncio.sleep(0.05)


async def pid_of(runs: Runs, run: FlowRun) -> int:
    """Return the process of *run*; the worker reports it just after the start."""

    async def known() -> bool:
        return (await runs.client.read_flow_run(run.id)).infrastructure_pid is not None

    await until(known)
    return int((await runs.client.read_flow_run(run.id)).infrastructure_pid or 0)


async def cancel(runs: Runs, name: str, **parameters: Any) -> tuple[Any, float]:
    """Cancel a run of *name* while it runs; returns it and the seconds that the cancellation took."""
    run = await runs.until(await runs.start(name, **parameters), "Running")
    begun = time.monotonic()
    await runs.client.set_flow_run_state(run.id, Cancelling())
    return await runs.until(run), time.monotonic() - begun


async def test_a_run_that_completes_goes_through_the_states_of_any_worker(runs: Runs) -> None:
    run = await runs.finish("completed", value=5)

    assert await runs.states(run) == [*BEFORE_RUNNING, "Running", "Completed"]
    assert run.infrastructure_pid is not None
    assert run.labels["prefect.worker.type"] == "warm-process"
    assert {"prefect.worker.name", "prefect.work-pool.name", "prefect.work-pool.id"} <= set(run.labels)


async def test_logs_of_run_and_worker_arrive(runs: Runs) -> None:
    run = await runs.finish("completed", value=7)
    found: list[str] = []

    async def all_there() -> bool:
        logs = await runs.client.read_logs(LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}}))
        found[:] = [log.message for log in logs]
        return "Finished in state Completed()" in found and any("submitted to infra" in line for line in found)

    await until(all_there)
    assert "the value is 7" in found


async def test_a_parameter_may_have_a_default_beyond_64_bits(runs: Runs) -> None:
    schema = {"type": "object", "properties": {"value": {"type": "integer", "default": 10**20}}}
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(FLOWS.parent)}}
    deployment = await runs.client.create_deployment(
        flow_id=await runs.client.create_flow_from_name("completed"),
        name="large",
        work_pool_name=runs.pool,
        entrypoint=f"{FLOWS.name}:completed",
        parameter_openapi_schema=schema,
        enforce_parameter_schema=True,
        pull_steps=[step],
    )

    for value in (5, 10**20):
        run = await runs.client.create_flow_run_from_deployment(deployment, parameters={"value": value})
        assert (await runs.until(run)).state_name == "Completed"


async def test_task_runs_are_recorded(runs: Runs) -> None:
    run = await runs.finish("with_tasks")

    async def three_completed() -> bool:
        of_run = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[run.id]))
        found = await runs.client.read_task_runs(task_run_filter=of_run)
        return [task_run.state_name for task_run in found] == ["Completed"] * 3

    await until(three_completed)


async def test_a_run_that_raises_fails_with_its_message(runs: Runs) -> None:
    run = await runs.finish("failed")

    assert await runs.states(run) == [*BEFORE_RUNNING, "Running", "Failed"]
    assert "ValueError: boom" in (run.state.message or "")


async def test_a_run_that_is_killed_crashes_with_the_reason(runs: Runs) -> None:
    run = await runs.finish("killed")

    assert await runs.states(run) == [*BEFORE_RUNNING, "Running", "Crashed"]
    assert "SIGKILL" in (run.state.message or "")


@pytest.mark.parametrize("name", ["asleep", "asleep_async"])
async def test_a_running_run_is_cancelled_within_two_seconds(runs: Runs, name: str) -> None:
    run, seconds = await cancel(runs, name)

    assert await runs.states(run) == [*BEFORE_RUNNING, "Running", "Cancelling", "Cancelled"]
    assert seconds < 2
    await until(lambda: not is_alive(int(run.infrastructure_pid)))


async def test_what_a_cancelled_run_has_started_is_gone_too(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    run = await runs.until(await runs.start("with_a_child_process", pid_file=str(file)), "Running")
    await until(file.exists)

    await runs.client.set_flow_run_state(run.id, Cancelling())
    run = await runs.until(run)

    assert run.state.name == "Cancelled"
    assert not is_alive(int(file.read_text()))


async def test_hooks_run_when_a_run_is_cancelled_or_crashes(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "hooks"

    cancelled, _ = await cancel(runs, "with_hooks", file=str(file), die=False)
    await runs.finish("with_hooks", file=str(file), die=True)

    await until(lambda: file.exists() and file.read_text() == "Cancelling\nCrashed\n")
    line = "Running hook 'note' in response to entering state 'Cancelling'"

    async def is_logged_once() -> bool:
        return (await messages(runs, cancelled)).count(line) == 1

    await until(is_logged_once)


async def test_a_run_that_is_suspended_leaves_its_process(runs: Runs) -> None:
    run = await runs.until(await runs.start("with_tasks_for_a_while"), "Running")
    process = await pid_of(runs, run)

    await runs.client.set_flow_run_state(run.id, Suspended(timeout_seconds=600))

    await until(lambda: not is_alive(process))
    assert (await runs.client.read_flow_run(run.id)).state.name == "Suspended"


async def test_each_run_has_the_environment_and_folder_of_its_job(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "found"

    run = await runs.finish("surroundings", file=str(file), job_variables={"env": {"COLOUR": "blue"}})

    found = ast.literal_eval(file.read_text())
    assert run.state.name == "Completed"
    assert found["colour"] == "blue"
    assert found["cwd"] == found["path"] == str(Path(__file__).parent)


async def test_a_job_that_a_fork_cannot_serve_gets_a_new_python(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "found"
    other = {"env": {"PREFECT_LOGGING_LEVEL": "ERROR"}}

    run = await runs.finish("surroundings", file=str(file), job_variables=other)

    logs = await runs.client.read_logs(LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}}))
    assert run.state.name == "Completed"
    assert any("PREFECT_LOGGING_LEVEL" in log.message for log in logs)


@pytest.mark.parametrize("changed", ["flow_of_now.py", "part_of_now.py"], ids=["entry point", "module below it"])
async def test_a_run_sees_the_code_of_now_not_of_the_worker_s_start(runs: Runs, tmp_path: Path, changed: str) -> None:
    (tmp_path / "flow_of_now.py").write_text(
        "from prefect import flow\nfrom part_of_now import PART\n\n"
        "@flow\ndef now():\n    raise RuntimeError(PART + ' and one')\n"
    )
    (tmp_path / "part_of_now.py").write_text("PART = 'one'\n")
    deployment = await runs.deploy("now", folder=tmp_path, entrypoint="flow_of_now.py:now")
    results = []
    for version in ("one", "another"):
        file = tmp_path / changed
        file.write_text(file.read_text().replace("one'", f"{version}'"))
        run = await runs.until(await runs.client.create_flow_run_from_deployment(deployment))
        results.append((run.state.message or "").count("another"))

    assert results == [0, 1]


async def forkserver_of(runs: Runs, tmp_path: Path, deployment: UUID | None = None) -> int:
    """Return the process that a run of the flow ``surroundings`` is forked from."""
    file = tmp_path / f"found-{uuid4()}"
    deployment = deployment or await runs.deploy("surroundings")
    run = await runs.client.create_flow_run_from_deployment(deployment, parameters={"file": str(file)})
    assert (await runs.until(run)).state.name == "Completed"
    return int(ast.literal_eval(file.read_text())["parent"])


async def test_a_new_version_of_a_deployment_is_forked_from_a_new_process(runs: Runs, tmp_path: Path) -> None:
    first = await forkserver_of(runs, tmp_path, await runs.deploy("surroundings", version="1"))
    again = await forkserver_of(runs, tmp_path, await runs.deploy("surroundings", version="1"))
    second = await forkserver_of(runs, tmp_path, await runs.deploy("surroundings", version="2"))

    assert first == again != second


async def test_a_dead_forkserver_is_replaced(runs: Runs, tmp_path: Path) -> None:
    forkserver = await forkserver_of(runs, tmp_path)

    os.kill(forkserver, signal.SIGKILL)
    await until(lambda: not is_alive(forkserver))

    assert await forkserver_of(runs, tmp_path) != forkserver


async def test_a_run_imports_nothing_of_prefect_phasewise_or_duckdb_after_the_fork(runs: Runs, tmp_path: Path) -> None:
    deployment = await runs.deploy("with_tasks")
    run = await runs.client.create_flow_run_from_deployment(deployment, state=Pending())
    api_url = get_current_settings().api.url
    assert api_url is not None
    entrypoint = f"{FLOWS.name}:with_tasks"
    env = {**os.environ, "PREFECT_API_URL": api_url, "PYTHONPATH": str(FLOWS.parent)}
    server = await Forkserver.start(preload=[*PRELOAD, FLOWS.stem], setup=SETUP, env=env)
    ours, theirs = socket.socketpair()
    try:
        assert server.problems == ()
        process = await server.fork(
            f"{FLOWS.stem}:record_imports",
            {"file": str(tmp_path / "m"), "entrypoint": entrypoint, "known": {}},
            env={**env, "PREFECT__FLOW_RUN_ID": str(run.id), "PREFECT__FLOW_ENTRYPOINT": entrypoint},
            cwd=str(FLOWS.parent),
            descriptor=theirs.fileno(),
        )
        assert await process.wait() == 0
    finally:
        ours.close()
        theirs.close()
        await server.aclose()

    imported = (tmp_path / "m").read_text().split()
    assert [name for name in imported if name.partition(".")[0] in INSTALLED_WITH_PREFECT] == []


async def test_no_connection_thread_or_file_is_open_at_the_fork() -> None:
    server = await Forkserver.start(preload=PRELOAD, setup=SETUP, env=dict(os.environ))
    try:
        # Beside standard input, output and error: the socket to the worker and what waits for it and for children.
        opened = sorted(kind for fd, kind in open_files(server.pid).items() if fd > 2)
        status = Path(f"/proc/{server.pid}/status").read_text()  # noqa: ASYNC240
    finally:
        await server.aclose()

    assert [kind for kind in opened if kind != "anon_inode:[eventpoll]"] == ["socket"] * 3
    assert "Threads:\t1\n" in status


@pytest.mark.parametrize("colour", ["", "ERROR"], ids=["forked", "new Python"])
async def test_a_run_that_needs_more_memory_than_its_limit_fails(runs: Runs, stack: StackInfo, colour: str) -> None:
    limited = Runs(client=runs.client, pool="limited")
    job = {"env": {"PREFECT_LOGGING_LEVEL": colour}} if colour else None
    with worker_of_a_pool("limited", stack, PHASEWISE_RUN_MEMORY_LIMIT="1GB"):
        await until_pool_exists(limited)
        enough = await limited.finish("takes_memory", size_bytes=200_000_000, job_variables=job)
        failed = await limited.finish("takes_memory", size_bytes=1_000_000_000, job_variables=job)

    assert enough.state.name == "Completed"
    assert failed.state.name == "Failed"
    assert "MemoryError" in failed.state.message
    if not colour:
        assert "A flow run may use 953.7MiB of memory (PHASEWISE_RUN_MEMORY_LIMIT)." in failed.state.message


@pytest.mark.skipif(not OWN_MEMORY_CGROUP.is_dir(), reason="no cgroup of memory to make one below")
async def test_a_run_that_the_kernel_ends_for_want_of_memory_says_so(runs: Runs, stack: StackInfo) -> None:
    starved = Runs(client=runs.client, pool="starved")
    with small_cgroup(600_000_000) as cgroup, worker_of_a_pool("starved", stack) as worker:
        (cgroup / "cgroup.procs").write_text(str(worker.pid))
        await until_pool_exists(starved)
        run = await starved.finish("takes_memory", size_bytes=2_000_000_000)

    assert run.state.name == "Crashed"
    assert "The kernel killed it because memory ran out; it used up to " in run.state.message


async def messages(runs: Runs, run: FlowRun) -> list[str]:
    logs = await runs.client.read_logs(LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}}))
    return [log.message for log in logs]


@contextlib.contextmanager
def small_cgroup(size_bytes: int) -> Iterator[Path]:
    cgroup = OWN_MEMORY_CGROUP / f"phasewise-test-{os.getpid()}"
    try:
        cgroup.mkdir()
        (cgroup / "memory.limit_in_bytes").write_text(str(size_bytes))
    except OSError as exc:
        pytest.skip(f"no cgroup can be made here: {exc}")
    try:
        yield cgroup
    finally:
        deadline = time.monotonic() + 10
        while (cgroup / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        cgroup.rmdir()


@contextlib.contextmanager
def worker_of_a_pool(pool: str, stack: StackInfo, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "phasewise.worker", "--pool", pool, "--name", pool]
    with subprocess.Popen(command, env={**os.environ, "PREFECT_API_URL": stack.api_url, **environment}) as worker:
        try:
            yield worker
        finally:
            worker.kill()


async def until_pool_exists(runs: Runs) -> None:
    async def exists() -> bool:
        return runs.pool in [pool.name for pool in await runs.client.read_work_pools()]

    await until(exists, 30)


#: Job variables of a run that is forked, and of one that is not.
WAYS = pytest.mark.parametrize("job", [{}, {"env": {"PREFECT_LOGGING_LEVEL": "ERROR"}}], ids=["forked", "new Python"])


@WAYS
async def test_a_stopped_worker_reschedules_what_does_not_finish_in_time(
    runs: Runs, stack: StackInfo, job: dict[str, Any]
) -> None:
    drained = Runs(client=runs.client, pool="drained")
    with worker_of_a_pool("drained", stack, PHASEWISE_DRAIN_SECONDS="0.5") as worker:
        await until_pool_exists(drained)
        run = await drained.until(await drained.start("asleep", job_variables=job), "Running")

        worker.terminate()

        await until(lambda: worker.poll() is not None)
    assert worker.returncode == 0
    assert (await drained.states(run))[-2:] == ["Running", "AwaitingRetry"]
    # It would be claimed by the worker of the next test.
    await drained.client.set_flow_run_state(run.id, Cancelled(), force=True)


@WAYS
async def test_a_stopped_worker_lets_runs_finish(runs: Runs, stack: StackInfo, job: dict[str, Any]) -> None:
    drained = Runs(client=runs.client, pool="patient")
    with worker_of_a_pool("patient", stack, PHASEWISE_DRAIN_SECONDS="30") as worker:
        await until_pool_exists(drained)
        run = await drained.until(await drained.start("short", job_variables=job), "Running")

        worker.terminate()

        await until(lambda: worker.poll() is not None, 30)
    assert (await drained.client.read_flow_run(run.id)).state_name == "Completed"


@WAYS
async def test_a_worker_killed_by_kill_9_leaves_no_process_of_a_run(
    runs: Runs, stack: StackInfo, job: dict[str, Any]
) -> None:
    killed = Runs(client=runs.client, pool="killed")
    with worker_of_a_pool("killed", stack) as worker:
        await until_pool_exists(killed)
        run = await killed.until(await killed.start("asleep", job_variables=job), "Running")
        process = await pid_of(killed, run)
        assert is_alive(process)

        worker.kill()

    await until(lambda: not is_alive(process))


async def test_a_forkserver_is_replaced_on_sighup_and_after_a_number_of_runs(
    runs: Runs, stack: StackInfo, tmp_path: Path
) -> None:
    renewed = Runs(client=runs.client, pool="renewed")
    with worker_of_a_pool("renewed", stack, PHASEWISE_FORKSERVER_RUNS="3") as worker:
        await until_pool_exists(renewed)
        first = await forkserver_of(renewed, tmp_path)
        worker.send_signal(signal.SIGHUP)
        await until(lambda: not is_alive(first))
        found = [await forkserver_of(renewed, tmp_path) for _ in range(3)]
        await until(lambda: not is_alive(found[0]))
        last = await forkserver_of(renewed, tmp_path)

    assert found == [found[0]] * 3
    assert len({first, found[0], last}) == 3


async def test_runs_start_soon_on_an_idle_stack(runs: Runs) -> None:
    await runs.finish("completed")
    seconds = []
    for _ in range(5):
        run = await runs.finish("completed")
        states = {state.name: state.timestamp for state in await runs.client.read_flow_run_states(run.id)}
        seconds.append((states["Running"] - states["Scheduled"]).total_seconds())

    # A poll would take up to ten seconds; the bound leaves room for a machine that does other things.
    assert sorted(seconds)[2] < 3
