"""Each guarantee of orchestration, broken on purpose: real server, real workers, real signals."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from phasewise.lake.publications import query_warehouse
from phasewise.project.config import Project
from phasewise.stack.control import StackInfo, find_stack, running_stack
from phasewise.testing.projects import SAMPLE_SETTINGS, change_source, write_project
from tests.acceptance.conftest import SHOP, Shell, wait_for
from tests.servers import find_postgres, psql

pytestmark = pytest.mark.timeout(180)


class Server:
    """The stack's API, and the flows of guarantee_flows deployed on it."""

    def __init__(self, stack: StackInfo, signals: Path) -> None:
        self.stack = stack
        self.signals = signals

    def call(self, path: str, body: Any = None, method: str = "POST", timeout: float = 60) -> Any:
        url = f"{self.stack.api_url}{path}"
        options: dict[str, Any] = {"timeout": timeout, "follow_redirects": True}
        response = httpx.get(url, **options) if body is None else httpx.request(method, url, json=body, **options)
        response.raise_for_status()
        return response.json() if response.content else None

    def start(self, flow: str, **parameters: Any) -> str:
        deployment = self.call(f"/deployments/name/{flow}/{flow}-deployment")["id"]
        body = {"parameters": {"folder": str(self.signals), **parameters}, "state": {"type": "SCHEDULED"}}
        return str(self.call(f"/deployments/{deployment}/create_flow_run", body)["id"])

    def read(self, run_id: str) -> dict[str, Any]:
        return self.call(f"/flow_runs/{run_id}")  # type: ignore[no-any-return]

    def below(self, run_id: str) -> dict[str, dict[str, Any]]:
        """Return all runs below a run, at any depth, by name."""
        found: dict[str, dict[str, Any]] = {}
        level = [run_id]
        while level:
            body = {"flow_runs": {"parent_flow_run_id": {"any_": level}}}
            runs = self.call("/flow_runs/filter", body)
            found |= {run["name"]: run for run in runs}
            level = [run["id"] for run in runs]
        return found

    def read_fan_out(self, run_id: str) -> tuple[str, str]:
        """Return name and message of the state of the one task run below *run_id* that stands for a fan-out."""
        runs = [run_id, *(run["id"] for run in self.below(run_id).values())]
        body = {"task_runs": {"flow_run_id": {"any_": runs}, "tags": {"all_": ["phasewise.fan-out"]}}}
        [found] = self.call("/task_runs/filter", body)
        return found["state"]["name"], found["state"]["message"]

    def wait(self, run_id: str, state: str, seconds: float = 90) -> dict[str, Any]:
        wait_for(lambda: self.read(run_id)["state_type"] == state, seconds)
        return self.read(run_id)

    def mains(self, *states: str) -> list[dict[str, Any]]:
        """Return the main_etl runs whose state's name is one of *states*."""
        body = {"flows": {"name": {"any_": ["main-etl-job"]}}, "flow_runs": {"state": {"name": {"any_": list(states)}}}}
        return self.call("/flow_runs/filter", body)  # type: ignore[no-any-return]

    def set_state(self, run_id: str, kind: str, name: str | None = None) -> None:
        self.call(f"/flow_runs/{run_id}/set_state", {"state": {"type": kind, "name": name}})

    def retry(self, run_id: str) -> None:
        """What the UI's Retry button does."""
        self.set_state(run_id, "SCHEDULED", "AwaitingRetry")

    # Signals for the leaves.

    def hold(self, *names: str) -> None:
        for name in names:
            (self.signals / f"{name}.hold").touch()

    def release(self, *names: str) -> None:
        for name in names:
            (self.signals / f"{name}.hold").unlink()

    def fail(self, name: str) -> None:
        (self.signals / f"{name}.fail").touch()

    def mend(self, name: str) -> None:
        (self.signals / f"{name}.fail").unlink()

    def attempts(self, name: str) -> int:
        return len(list(self.signals.glob(f"{name}.*.pid")))

    def pid(self, name: str) -> int:
        """Wait until the leaf *name* runs and return the process id of its last attempt."""
        wait_for(lambda: self.attempts(name) > 0, 60)
        path = max(self.signals.glob(f"{name}.*.pid"), key=lambda path: path.stat().st_mtime)
        wait_for(lambda: bool(path.read_text()), 5)
        return int(path.read_text())


def deploy(stack: StackInfo, home: Path) -> None:
    """Deploy the flows of guarantee_flows: leaves on the queue of tables, the others on that of orchestrators."""
    from phasewise.orchestration.deployments import Deployment
    from phasewise.orchestration.deployments import deploy as deploy_all
    from phasewise.settings import Settings

    folder = Path(__file__).parent
    queues = {
        "leaf": "tables",
        "again": "orchestrators",
        "middle": "orchestrators",
        "top": "orchestrators",
        "apex": "orchestrators",
    }
    deployments = [
        Deployment(
            flow_name=name,
            name=f"{name}-deployment",
            entrypoint=f"guarantee_flows.py:{name}",
            work_queue=queue,
            root=folder,
        )
        for name, queue in queues.items()
    ]
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: stack.api_url}):
        asyncio.run(deploy_all(deployments, pool=stack.pool, settings=Settings()))


@pytest.fixture(scope="module")
def deployed(stack: StackInfo, home: Path) -> StackInfo:
    deploy(stack, home)
    return stack


@pytest.fixture
def server(deployed: StackInfo, tmp_path: Path) -> Server:
    return Server(deployed, tmp_path)


@pytest.fixture
def own_stack(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    """A stack for a test that breaks it."""
    home = tmp_path / "home"
    signals = tmp_path / "signals"
    signals.mkdir()
    with running_stack(home, pool="default-pool", workers=2) as stack:
        deploy(stack, home)
        yield Server(stack, signals), home


# ── 1. Barrier ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_g01_a_phase_starts_only_when_every_step_of_the_one_before_completed(server: Server) -> None:
    server.hold("a")
    run = server.start("top", names=["a", "b"])
    server.pid("a")
    wait_for(lambda: server.below(run)["leaf/b"]["state_type"] == "COMPLETED", 60)

    assert server.attempts("last") == 0

    server.release("a")
    server.wait(run, "COMPLETED")
    runs = server.below(run)
    assert runs["leaf"]["start_time"] > runs["leaf/a"]["end_time"]


def test_g01_on_failure_wait_lets_siblings_finish(server: Server) -> None:
    server.hold("a")
    server.fail("b")
    run = server.start("top", names=["a", "b"])
    wait_for(lambda: "leaf/b" in server.below(run) and server.below(run)["leaf/b"]["state_type"] == "FAILED", 60)
    server.pid("a")
    server.release("a")

    server.wait(run, "FAILED")

    assert server.below(run)["leaf/a"]["state_type"] == "COMPLETED"
    assert server.attempts("last") == 0


def test_g01_on_failure_cancel_ends_siblings_at_the_first_failure(server: Server) -> None:
    server.hold("a")
    server.hold("b")
    server.fail("b")
    run = server.start("top", names=["a", "b"], on_failure="cancel")
    server.pid("a")
    server.release("b")

    server.wait(run, "FAILED")

    assert server.below(run)["leaf/a"]["state_type"] == "CANCELLED"


def test_g01_failures_within_the_budget_do_not_stop_the_pipeline(server: Server) -> None:
    server.fail("b")
    run = server.start("top", names=["a", "b", "c", "d"], allow_failed="25%")

    server.wait(run, "COMPLETED")

    runs = server.below(run)
    assert runs["leaf/b"]["state_type"] == "FAILED"
    assert runs["leaf"]["state_type"] == "COMPLETED"


def test_g01_a_table_that_failed_within_the_budget_keeps_its_last_version(stack: StackInfo, stack_shell: Shell) -> None:
    project = write_project(stack_shell.project, source=SHOP, toml="[pipeline]\nallow_failed = 1\n")
    assert stack_shell.phasewise("run-distributed").returncode == 0
    change_source(stack_shell.project, "insert into orders values (13, 1, 'a lot'); delete from stock;")

    done = stack_shell.phasewise("run-distributed")

    assert done.returncode == 0, done.stdout
    counts = "select (select count(*) from orders), (select count(*) from stock)"
    assert query_warehouse(project, SAMPLE_SETTINGS, counts)[1] == [(3, 0)]
    reports = stack_shell.project / ".phasewise" / "reports"
    assert '"kept"' in max(reports.glob("*.json"), key=lambda path: path.stat().st_mtime).read_text()


# ── 2. Failure goes up ───────────────────────────────────────────────────────────────────────────────────────────


def test_g02_the_first_cause_is_readable_at_the_top_through_two_levels(server: Server) -> None:
    server.fail("b")
    server.fail("c")

    run = server.start("top", names=["a", "b", "c"], levels=2)

    message = server.wait(run, "FAILED")["state"]["message"]
    assert "b was told to fail" in message
    assert "c was told to fail" in message
    assert all(name in message for name in ("middle Failed", "leaf/b Failed", "leaf/c Failed"))
    assert f"/runs/flow-run/{server.below(run)['leaf/b']['id']}" in message  # the page in the UI


def test_g02_a_child_that_was_cancelled_fails_its_parent(server: Server) -> None:
    server.hold("a")
    run = server.start("top", names=["a"])
    server.pid("a")

    server.set_state(server.below(run)["leaf/a"]["id"], "CANCELLING", "Cancelling")

    assert "leaf/a Cancelled" in server.wait(run, "FAILED")["state"]["message"]


def test_g02_a_child_that_crashed_twice_fails_its_parent(server: Server) -> None:
    server.hold("a")
    run = server.start("top", names=["a"])
    os.kill(server.pid("a"), signal.SIGKILL)
    wait_for(lambda: server.attempts("a") == 2, 60)

    os.kill(server.pid("a"), signal.SIGKILL)

    assert "leaf/a Crashed" in server.wait(run, "FAILED")["state"]["message"]


# ── 3. Cancel goes down ──────────────────────────────────────────────────────────────────────────────────────────


def test_g03_cancelling_the_top_ends_everything_below_and_the_processes_within_two_seconds(server: Server) -> None:
    server.hold("a", "b")
    run = server.start("top", names=["a", "b"], levels=2)
    pids = [server.pid("a"), server.pid("b")]

    began = time.monotonic()
    server.set_state(run, "CANCELLING", "Cancelling")
    wait_for(lambda: not any(is_alive(pid) for pid in pids), 20)
    wait_for(lambda: {one["state_type"] for one in server.below(run).values()} == {"CANCELLED"}, 20)
    server.wait(run, "CANCELLED", 20)
    took = time.monotonic() - began

    print(f"cancelled in {took:.2f} s at a load of {os.getloadavg()[0]:.1f}")
    assert took < 2 * slowdown()


@contextmanager
def held_in_its_last_phase(project: Project) -> Iterator[IO[str]]:
    """Hold the batches of *project* in their last phase, until the block ends or the file that it gets is unlocked."""
    project.warehouse.mkdir(parents=True, exist_ok=True)
    with (project.warehouse / "writer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def start_main(shell: Shell, server: Server) -> tuple[subprocess.Popen[str], str]:
    """Start main_etl in a process of its own; return that, and the run's id once everything below sub_etl has ended."""
    process = shell.start("-m", "phasewise", "run")
    wait_for(lambda: bool(server.mains("Running")) or process.poll() is not None, 60)
    [running] = server.mains("Running")
    wait_for(lambda: "final-etl-job" in server.below(running["id"]), 90)
    return process, running["id"]


def test_g03_and_g04_a_main_that_was_killed_in_a_user_s_own_process_ends_everything_below_and_is_resumed(
    stack: StackInfo, stack_shell: Shell, tmp_path: Path
) -> None:
    project = write_project(stack_shell.project, source=SHOP)
    server = Server(stack, tmp_path)
    assert stack_shell.phasewise("deploy").returncode == 0
    with held_in_its_last_phase(project):
        process, run = start_main(stack_shell, server)
        with process:
            process.kill()
            process.communicate(timeout=10)
        server.wait(run, "CRASHED", 30)
        final = {"COMPLETED", "CANCELLED"}
        wait_for(lambda: {one["state_type"] for one in server.below(run).values()} <= final, 30)

    resumed = stack_shell.phasewise("resume")

    assert resumed.returncode == 0, resumed.stdout
    assert server.read(run)["state_type"] == "COMPLETED"
    counts = {name: one["run_count"] for name, one in server.below(run).items()}
    assert counts.pop("final-etl-job") == 2
    assert set(counts.values()) == {1}, counts


def test_g03_cancelling_a_main_in_a_user_s_own_process_ends_it_too(
    stack: StackInfo, stack_shell: Shell, tmp_path: Path
) -> None:
    project = write_project(stack_shell.project, source=SHOP)
    server = Server(stack, tmp_path)
    assert stack_shell.phasewise("deploy").returncode == 0
    with held_in_its_last_phase(project):
        process, run = start_main(stack_shell, server)
        with process:
            began = time.monotonic()
            server.set_state(run, "CANCELLING", "Cancelling")  # as the UI does
            server.wait(run, "CANCELLED", 30)
            wait_for(
                lambda: {one["state_type"] for one in server.below(run).values()} <= {"COMPLETED", "CANCELLED"}, 30
            )
            took = time.monotonic() - began
            output, _ = process.communicate(timeout=30)

    print(f"cancelled in {took:.2f} s at a load of {os.getloadavg()[0]:.1f}")
    assert process.returncode == 7, output
    assert f"Batch {run} was cancelled" in output
    assert server.read(run)["state_type"] == "CANCELLED"
    assert took < 2 * slowdown()


def test_g03_children_that_wait_to_be_run_again_are_cancelled_too(server: Server) -> None:
    server.fail("a")
    run = server.start("top", names=["a"])
    server.wait(run, "FAILED")
    path = f"/work_pools/{server.stack.pool}/queues/tables"
    server.call(path, {"is_paused": True}, "PATCH")
    try:
        server.retry(run)
        wait_for(lambda: server.below(run)["leaf/a"]["state_name"] == "AwaitingRetry", 60)

        server.set_state(run, "CANCELLING", "Cancelling")

        server.wait(run, "CANCELLED", 30)
        wait_for(lambda: server.below(run)["leaf/a"]["state_type"] == "CANCELLED", 30)
    finally:
        server.call(path, {"is_paused": False}, "PATCH")


def test_g03_a_batch_that_has_not_started_is_cancelled_without_naming_it(
    stack: StackInfo, stack_shell: Shell, tmp_path: Path
) -> None:
    write_project(stack_shell.project, source=SHOP)
    server = Server(stack, tmp_path)
    assert stack_shell.phasewise("deploy").returncode == 0
    path = f"/work_pools/{stack.pool}/queues/orchestrators"
    server.call(path, {"is_paused": True}, "PATCH")
    try:
        deployment = server.call("/deployments/name/main-etl-job/main-etl-deployment")["id"]
        run = server.call(f"/deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]

        cancelled = stack_shell.phasewise("cancel")
    finally:
        server.call(path, {"is_paused": False}, "PATCH")

    assert cancelled.returncode == 0, cancelled.stdout
    assert run in cancelled.stdout
    assert server.read(run)["state_type"] == "CANCELLED"


def test_g03_children_that_wait_for_a_slot_are_cancelled_too(server: Server) -> None:
    names = [f"n{number}" for number in range(20)]
    server.hold(*names)
    run = server.start("top", names=names)
    wait_for(lambda: len(server.below(run)) == 20, 60)
    assert "SCHEDULED" in {one["state_type"] for one in server.below(run).values()}

    server.set_state(run, "CANCELLING", "Cancelling")

    server.wait(run, "CANCELLED", 30)
    wait_for(lambda: {one["state_type"] for one in server.below(run).values()} == {"CANCELLED"}, 30)


def test_g03_a_top_that_crashed_ends_everything_below(server: Server) -> None:
    server.hold("a")
    run = server.start("top", names=["a"], levels=2)
    server.pid("a")

    os.kill(int(server.read(run)["infrastructure_pid"]), signal.SIGKILL)

    server.wait(run, "CRASHED", 30)
    wait_for(lambda: {one["state_type"] for one in server.below(run).values()} == {"CANCELLED"}, 30)
    wait_for(lambda: not is_alive(server.pid("a")), 10)


def test_g03_a_process_that_ignores_sigterm_is_killed_after_the_grace_time(server: Server) -> None:
    (server.signals / "a.stubborn").touch()
    server.hold("a")
    run = server.start("top", names=["a"])
    pid = server.pid("a")

    server.set_state(run, "CANCELLING", "Cancelling")

    wait_for(lambda: not is_alive(pid), 30)
    wait_for(lambda: server.below(run)["leaf/a"]["state_type"] == "CANCELLED", 30)
    server.wait(run, "CANCELLED", 30)


@find_postgres().needed()
def test_g03_a_query_in_flight_is_interrupted_at_the_source(
    stack: StackInfo, stack_shell: Shell, tmp_path: Path
) -> None:
    schema = f"slow_{uuid.uuid4().hex[:10]}"
    psql(f"CREATE SCHEMA {schema}")
    try:
        psql(f"CREATE VIEW {schema}.slow AS SELECT pg_sleep(300)::text AS nothing")
        (stack_shell.project / "phasewise.toml").write_text(
            f'[project]\nname = "slow"\n[source]\nurl = "postgresql://postgres@127.0.0.1/test?schema={schema}"\n'
            '[tables]\ninclude = ["slow"]\n'
        )
        running = f"SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%{schema}%' "
        running += "AND pid <> pg_backend_pid()"
        with stack_shell.start("-m", "phasewise", "run-distributed") as process:
            wait_for(lambda: int(psql(running)) > 0 or process.poll() is not None, 60)
            assert process.poll() is None, process.stdout and process.stdout.read()

            assert stack_shell.phasewise("cancel").returncode == 0

            process.communicate(timeout=60)
        wait_for(lambda: psql(running).strip() == "0", 20)
    finally:
        psql(f"DROP SCHEMA {schema} CASCADE")


def test_g03_and_g04_cancelled_and_resumed_from_the_command_line(stack: StackInfo, stack_shell: Shell) -> None:
    project = write_project(stack_shell.project, source=SHOP)
    project.warehouse.mkdir(parents=True)
    with (project.warehouse / "writer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # holds the batch in its last phase
        with stack_shell.start("-m", "phasewise", "run-distributed") as first:
            wait_for(lambda: len(list(project.staging.glob("*/*/manifest.json"))) == 3 or first.poll() is not None, 60)
            cancelled = stack_shell.phasewise("cancel")
            output, _ = first.communicate(timeout=60)
        fcntl.flock(lock, fcntl.LOCK_UN)
    assert cancelled.returncode == 0, cancelled.stdout
    assert first.returncode == 7, output

    resumed = stack_shell.phasewise("resume")

    assert resumed.returncode == 0, resumed.stdout
    wait_for(lambda: any(True for _ in project.staging.glob("*/published.json")))
    assert query_warehouse(project, SAMPLE_SETTINGS, "select count(*) from stock")[1] == [(2,)]


# ── 4. Resume ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_g04_a_retry_runs_only_what_did_not_complete(server: Server) -> None:
    server.fail("b")
    run = server.start("top", names=["a", "b", "c"], levels=2)
    server.wait(run, "FAILED")
    assert server.read_fan_out(run) == ("Failed", "1 of 3 flow runs did not complete.")
    server.mend("b")
    server.hold("b")

    server.retry(run)

    wait_for(lambda: server.attempts("b") == 2, 60)
    assert server.read_fan_out(run)[0] == "Running"
    server.release("b")
    server.wait(run, "COMPLETED")
    assert [server.attempts(name) for name in ("a", "b", "c", "last")] == [1, 2, 1, 1]
    assert server.read_fan_out(run) == ("Completed", "All 3 flow runs completed.")


def test_g04_a_retry_of_prefect_itself_runs_only_what_did_not_complete(server: Server) -> None:
    (server.signals / "b.fail-once").touch()

    run = server.start("again", names=["a", "b"])

    server.wait(run, "COMPLETED")
    assert [server.attempts(name) for name in ("a", "b")] == [1, 2]


def test_g04_resume_after_the_top_was_killed(server: Server) -> None:
    server.hold("b")
    run = server.start("top", names=["a", "b"], levels=2)
    server.pid("b")
    wait_for(lambda: server.below(run)["leaf/a"]["state_type"] == "COMPLETED", 60)
    os.kill(int(server.read(run)["infrastructure_pid"]), signal.SIGKILL)
    server.wait(run, "CRASHED", 30)
    wait_for(lambda: server.below(run)["leaf/b"]["state_type"] == "CANCELLED", 30)
    server.release("b")

    server.retry(run)

    server.wait(run, "COMPLETED")
    assert server.attempts("a") == 1
    assert server.attempts("b") == 2


def test_g04_a_killed_middle_or_leaf_is_run_again_without_a_retry_of_the_top(server: Server) -> None:
    server.hold("b")
    run = server.start("top", names=["a", "b"], levels=2)
    server.pid("b")
    os.kill(int(server.below(run)["middle"]["infrastructure_pid"]), signal.SIGKILL)
    wait_for(lambda: server.below(run)["middle"]["run_count"] == 2, 60)
    os.kill(server.pid("b"), signal.SIGKILL)
    wait_for(lambda: server.attempts("b") == 2, 60)
    server.release("b")

    server.wait(run, "COMPLETED")

    assert server.attempts("a") == 1


@pytest.mark.timeout(300)
def test_g04_resume_after_everything_was_killed_at_once(tmp_path: Path) -> None:
    """As after a reboot: server, workers and flow runs are gone; the database is what is left."""
    home, signals = tmp_path / "home", tmp_path / "signals"
    signals.mkdir()
    with running_stack(home, pool="default-pool", workers=1) as stack:
        deploy(stack, home)
        server = Server(stack, signals)
        server.hold("b")
        run = server.start("top", names=["a", "b"], levels=2)
        server.pid("b")
        wait_for(lambda: server.below(run)["leaf/a"]["state_type"] == "COMPLETED", 60)
        os.kill(stack.pid, signal.SIGKILL)
        wait_for(lambda: not is_alive(server.pid("b")), 30)
    server.release("b")

    with running_stack(home, pool="default-pool", workers=1) as stack:
        server = Server(stack, signals)
        wait_for(lambda: server.read(run)["state_type"] == "CRASHED", 60)
        server.retry(run)
        server.wait(run, "COMPLETED")

    assert server.attempts("a") == 1
    assert server.attempts("b") == 2


@pytest.mark.timeout(300)
def test_g04_resume_after_the_workers_were_killed_with_everything_below_them(own_stack: tuple[Server, Path]) -> None:
    server, _ = own_stack
    server.hold("b")
    run = server.start("top", names=["a", "b"], levels=2)
    before = server.pid("b")
    wait_for(lambda: server.below(run)["leaf/a"]["state_type"] == "COMPLETED", 60)
    runs = [server.read(run), *server.below(run).values()]
    workers = {worker_pid(int(one["infrastructure_pid"])) for one in runs if one["state_type"] == "RUNNING"}

    for worker in workers:
        os.kill(worker, signal.SIGKILL)

    wait_for(lambda: not is_alive(before), 30)
    server.release("b")
    server.wait(run, "CRASHED", 60)
    server.retry(run)
    server.wait(run, "COMPLETED")
    assert [server.attempts(name) for name in ("a", "last")] == [1, 1]
    assert server.attempts("b") >= 2


@pytest.mark.timeout(400)
def test_g04_a_batch_resumed_after_everything_was_killed_at_once_equals_one_that_never_failed(
    shell: Shell, tmp_path: Path
) -> None:
    project = write_project(shell.project, source=SHOP)
    with held_in_its_last_phase(project):
        assert shell.phasewise("up").returncode == 0
        with shell.start("-m", "phasewise", "run-distributed") as command:
            wait_for(
                lambda: len(list(project.staging.glob("*/*/manifest.json"))) == 3 or command.poll() is not None, 90
            )
            stack = find_stack(shell.home)
            assert stack is not None
            os.kill(stack.pid, signal.SIGKILL)
            command.kill()
            command.communicate(timeout=10)
    staged = {path: path.stat().st_mtime_ns for path in project.staging.glob("*/*/manifest.json")}
    assert shell.phasewise("up").returncode == 0
    try:
        wait_for(lambda: shell.phasewise("resume").returncode == 0, 90)  # once the new workers have seen what is lost
        wait_for(lambda: any(True for _ in project.staging.glob("*/published.json")), 120)
    finally:
        shell.phasewise("down")

    (tmp_path / "other").mkdir()
    other = Shell(home=shell.home, project=tmp_path / "other", environment={})
    whole = write_project(other.project, source=SHOP)
    assert other.phasewise("run", "--local").returncode == 0
    for table in ("customer", "orders", "stock"):
        resumed, undisturbed = (
            query_warehouse(one, SAMPLE_SETTINGS, f"select * from {table} order by all") for one in (project, whole)
        )
        assert resumed == undisturbed
        assert len(resumed[1]) > 1
    assert {path: path.stat().st_mtime_ns for path in staged} == staged  # nothing was extracted again


# ── 5. Never twice ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("on_overlap", ["refuse", "wait"])
def test_g05_a_second_batch_of_the_project_waits_or_is_refused_and_names_the_first(
    stack: StackInfo, stack_shell: Shell, tmp_path: Path, on_overlap: str
) -> None:
    project = write_project(stack_shell.project, source=SHOP, toml=f'[pipeline]\non_overlap = "{on_overlap}"\n')
    server = Server(stack, tmp_path)
    with held_in_its_last_phase(project) as lock, stack_shell.start("-m", "phasewise", "run-distributed") as first:
        wait_for(lambda: bool(server.mains("Running")) or first.poll() is not None, 60)
        [running] = server.mains("Running")
        wait_for(lambda: "sub-etl-job" in server.below(running["id"]), 60)

        with stack_shell.start("-m", "phasewise", "run-distributed") as second:
            if on_overlap == "refuse":
                said, _ = second.communicate(timeout=60)
            else:
                # It has given its slot back, which the first one may need.
                wait_for(lambda: bool(server.mains("AwaitingBatch")) or second.poll() is not None, 60)
                [waiting] = server.mains("AwaitingBatch")
                assert running["id"] in waiting["state"]["message"]
                assert running["id"] in stack_shell.phasewise("why", waiting["id"]).stdout
            fcntl.flock(lock, fcntl.LOCK_UN)
            output, _ = first.communicate(timeout=120)
            if on_overlap == "wait":
                said, _ = second.communicate(timeout=120)

    assert first.returncode == 0, output
    assert second.returncode == (7 if on_overlap == "refuse" else 0), said
    assert (f"Batch {running['id']} of this project has been running since" in said) == (on_overlap == "refuse")


def test_g05_a_local_batch_and_one_of_the_server_do_not_run_at_the_same_time(
    stack: StackInfo, stack_shell: Shell, tmp_path: Path
) -> None:
    project = write_project(stack_shell.project, source=SHOP)
    server = Server(stack, tmp_path)
    with held_in_its_last_phase(project) as lock, stack_shell.start("-m", "phasewise", "run-distributed") as first:
        wait_for(lambda: bool(server.mains("Running")) or first.poll() is not None, 60)
        [running] = server.mains("Running")
        wait_for(lambda: "sub-etl-job" in server.below(running["id"]), 60)

        local = stack_shell.phasewise("run", "--local")

        fcntl.flock(lock, fcntl.LOCK_UN)
        output, _ = first.communicate(timeout=120)
    assert local.returncode == 8
    assert f"Batch {running['id']} of this project is running" in local.stdout
    assert first.returncode == 0, output

    with held_in_its_last_phase(project), stack_shell.start("-m", "phasewise", "run", "--local") as local_first:
        # Not until more tables are staged than before: the first batch's are removed once this one's are all there.
        holder = project.staging / ".running-batch"
        wait_for(lambda: bool(holder.read_text()) or local_first.poll() is not None, 60)
        batch = holder.read_text()

        refused = stack_shell.phasewise("run-distributed")

        local_first.send_signal(signal.SIGINT)
        local_first.communicate(timeout=60)
    assert refused.returncode == 7
    assert f"Batch {batch} of this project is running on this machine" in refused.stdout
    assert batch not in {"", running["id"]}


def test_g05_two_triggers_of_one_step_are_one_run(deployed: StackInfo, server: Server) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from phasewise import trigger_subflow, wait_for_flow_runs

    async def trigger_both() -> list[str]:
        parameters = {"name": "once", "folder": str(server.signals)}
        keys = [trigger_subflow("leaf/leaf-deployment", parameters, key=f"{server.signals}") for _ in range(2)]
        ids = await asyncio.gather(*keys)
        await wait_for_flow_runs(ids)
        return ids

    with temporary_settings({PREFECT_API_URL: deployed.api_url}):
        first, second = asyncio.run(trigger_both())

    assert first == second
    assert server.attempts("once") == 1


# ── 6. Never a deadlock ──────────────────────────────────────────────────────────────────────────────────────────


def test_g06_three_levels_complete_with_a_table_limit_of_one(server: Server) -> None:
    queue = server.call(f"/work_pools/{server.stack.pool}/queues/tables")
    path = f"/work_pools/{server.stack.pool}/queues/tables"
    server.call(path, {"concurrency_limit": 1}, "PATCH")
    try:
        run = server.start("apex", names=["a", "b", "c"])
        server.wait(run, "COMPLETED", 120)
    finally:
        server.call(path, {"concurrency_limit": queue["concurrency_limit"]}, "PATCH")

    assert [server.attempts(name) for name in ("a", "b", "c", "last")] == [1, 1, 1, 1]


def test_g06_a_configuration_that_can_deadlock_is_refused_at_deploy_time(
    stack: StackInfo, stack_shell: Shell, tmp_path: Path
) -> None:
    write_project(stack_shell.project, source=SHOP)
    server = Server(stack, tmp_path)
    assert stack_shell.phasewise("deploy").returncode == 0
    path = f"/work_pools/{stack.pool}/queues/orchestrators"
    limit = server.call(path)["concurrency_limit"]
    server.call(path, {"concurrency_limit": 1}, "PATCH")
    try:
        refused = stack_shell.phasewise("deploy")
    finally:
        server.call(path, {"concurrency_limit": limit}, "PATCH")

    assert refused.returncode == 8
    assert "orchestrators" in refused.stdout
    assert "main_etl" in refused.stdout


@pytest.mark.timeout(300)
def test_g06_the_batches_of_all_projects_of_a_server_are_counted(
    stack: StackInfo, stack_shell: Shell, tmp_path: Path
) -> None:
    write_project(stack_shell.project, source=SHOP)
    server = Server(stack, tmp_path)
    assert stack_shell.phasewise("deploy").returncode == 0
    mains = server.call("/deployments/filter", {"flows": {"name": {"any_": ["main-etl-job"]}}})
    projects = {one["job_variables"]["env"]["PHASEWISE_PROJECT"] for one in mains}
    path = f"/work_pools/{stack.pool}/queues/orchestrators"
    limit = server.call(path)["concurrency_limit"]
    (tmp_path / "other").mkdir()
    other = Shell(home=stack_shell.home, project=tmp_path / "other", environment={})
    write_project(other.project, source=SHOP)
    server.call(path, {"concurrency_limit": len(projects) + 1}, "PATCH")  # one for each main_etl, one for its steps
    try:
        alone = stack_shell.phasewise("deploy")
        one_more = other.phasewise("deploy", "--main", "counted")
    finally:
        server.call(path, {"concurrency_limit": limit}, "PATCH")

    assert alone.returncode == 0, alone.stdout
    assert one_more.returncode == 8
    assert "The pipeline can wait for itself" in one_more.stdout
    assert f"{len(projects) + 1} runs of main_etl" in one_more.stdout


# ── 7. Waiting is exact ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.timeout(300)
def test_g07_a_server_killed_in_the_middle_of_a_phase_loses_nothing(own_stack: tuple[Server, Path]) -> None:
    server, home = own_stack
    server.hold("a", "b")
    run = server.start("top", names=["a", "b"], levels=2)
    server.pid("a"), server.pid("b")

    os.kill(server_pid(server), signal.SIGKILL)
    server.release("a")  # ends while nobody is there to hear of it
    wait_for(lambda: find_stack(home) is not None, 60)
    server.release("b")

    assert server.wait(run, "COMPLETED", 120)["run_count"] == 1
    assert [server.attempts(name) for name in ("a", "b", "last")] == [1, 1, 1]


@pytest.mark.timeout(300)
def test_g07_a_server_that_is_away_for_three_quarters_of_a_minute_fails_nothing(own_stack: tuple[Server, Path]) -> None:
    server, home = own_stack
    server.hold("a", "b")
    run = server.start("top", names=["a", "b"], levels=2)
    server.pid("a"), server.pid("b")

    os.kill(server.stack.pid, signal.SIGSTOP)  # the supervisor, which would start it again at once
    os.kill(server_pid(server), signal.SIGKILL)
    server.release("a")  # ends while nobody is there to hear of it
    threading.Event().wait(45)  # the outage itself, not a wait for something
    os.kill(server.stack.pid, signal.SIGCONT)
    wait_for(lambda: find_stack(home) is not None, 60)
    server.release("b")

    assert server.wait(run, "COMPLETED", 120)["run_count"] == 1
    assert [server.attempts(name) for name in ("a", "b", "last")] == [1, 1, 1]


# ── 8. Lost children are found ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.timeout(300)
def test_g08_a_run_whose_worker_died_is_found_and_run_again(own_stack: tuple[Server, Path]) -> None:
    server, _ = own_stack
    server.hold("a")
    run = server.start("top", names=["a"])
    first = server.pid("a")
    worker = server.read(server.below(run)["leaf/a"]["id"])["labels"]["prefect.worker.name"]

    os.kill(worker_pid(first), signal.SIGKILL)
    wait_for(lambda: not is_alive(first), 30)
    wait_for(lambda: server.read(run)["state_type"] == "CRASHED" or server.attempts("a") == 2, 60)
    server.release("a")
    if server.read(run)["state_type"] == "CRASHED":  # the worker had the top in hand as well
        server.retry(run)

    server.wait(run, "COMPLETED")
    assert worker.startswith("worker-")
    assert server.attempts("a") == 2


@pytest.mark.timeout(300)
def test_g08_a_run_whose_worker_died_on_another_machine_is_found_by_its_heartbeats(
    own_stack: tuple[Server, Path], shell: Shell
) -> None:
    server, _ = own_stack
    template = server.call(f"/work_pools/{server.stack.pool}")["base_job_template"]
    server.call("/work_pools/", {"name": "far", "type": "warm-process", "base_job_template": template})
    leaf = server.call("/deployments/name/leaf/leaf-deployment")
    server.call(f"/deployments/{leaf['id']}", {"work_pool_name": "far", "work_queue_name": "default"}, "PATCH")
    server.hold("a")
    run = server.start("top", names=["a"])
    with start_worker(shell, server, "lost") as lost:
        first = server.pid("a")
        with start_worker(shell, server, "other") as other:
            body = {"workers": {"status": {"any_": ["ONLINE"]}}}
            wait_for(lambda: len(server.call("/work_pools/far/workers/filter", body)) == 2, 60)
            lost.kill()
            lost.wait()
            killed = time.monotonic()
            wait_for(lambda: not is_alive(first), 10)
            wait_for(lambda: server.attempts("a") == 2, 90)
            found = time.monotonic() - killed
            server.release("a")
            server.wait(run, "COMPLETED")
            other.terminate()
            other.communicate(timeout=60)
        lost.communicate(timeout=10)

    print(f"found and run again after {found:.1f} s")
    assert found < 30 + slowdown()


def start_worker(shell: Shell, server: Server, name: str) -> subprocess.Popen[str]:
    command = ["-m", "prefect", "worker", "start", "--type", "warm-process", "--pool", "far", "--name", name]
    return shell.start(*command, PREFECT_API_URL=server.stack.api_url)


@pytest.mark.timeout(300)
def test_g08_nobody_is_declared_dead_when_the_machine_stalls_for_10_s(own_stack: tuple[Server, Path]) -> None:
    server, _ = own_stack
    server.hold("a")
    run = server.start("top", names=["a"])
    server.pid("a")
    everything = [server.stack.pid, *descendants(server.stack.pid)]

    for pid in everything:
        os.kill(pid, signal.SIGSTOP)
    threading.Event().wait(10)  # the stall itself, not a wait for something
    for pid in everything:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: server.read(run)["state_type"] == "RUNNING", 60)
    # Long enough for every worker to have looked at the heartbeats of the others.
    threading.Event().wait(10)
    server.release("a")

    server.wait(run, "COMPLETED")
    assert server.attempts("a") == 1


# ── 9. Timeouts ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_g09_a_step_that_exceeds_its_timeout_is_cancelled_and_counts_as_timed_out(server: Server) -> None:
    server.hold("a")

    run = server.start("top", names=["a"], timeout=3)

    message = server.wait(run, "FAILED")["state"]["message"]
    assert "leaf/a TimedOut" in message
    assert "exceeded its timeout of 3 s" in message
    assert server.below(run)["leaf/a"]["state_type"] == "CANCELLED"


# ── 10. Order ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_g10_children_start_in_the_order_of_their_requests(server: Server) -> None:
    names = [f"n{number}" for number in range(12)]

    run = server.start("top", names=names)

    server.wait(run, "COMPLETED", 120)
    runs = {name: one for name, one in server.below(run).items() if name.startswith("leaf/")}
    planned = sorted(runs, key=lambda name: runs[name]["expected_start_time"])
    assert planned == [f"leaf/{name}" for name in names]


# ── 11. Scale ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.timeout(1800)  # the server creates the runs and sets their states one by one
def test_g11_a_parent_of_many_children_stays_small_and_its_calls_linear(
    deployed: StackInfo, stack_shell: Shell, tmp_path: Path
) -> None:
    """The children are never started: their states are set from outside, so that only the parent is looked at.

    ``TEST_CHILDREN=2000`` takes minutes more; what is asserted is the same.
    """
    count = int(os.environ.get("TEST_CHILDREN", "300"))
    server = Server(deployed, tmp_path)
    leaf = server.call("/deployments/name/leaf/leaf-deployment")
    pool = f"/work_pools/{deployed.pool}/queues"
    server.call(pool, {"name": "paused", "is_paused": True})
    server.call(
        "/deployments/",
        {
            "name": "never-started",
            "flow_id": leaf["flow_id"],
            "entrypoint": leaf["entrypoint"],
            "work_pool_name": deployed.pool,
            "work_queue_name": "paused",
        },
    )
    with stack_shell.start(
        "tests/acceptance/scale_parent.py", str(count), str(tmp_path), PREFECT_API_URL=deployed.api_url
    ) as parent:
        assert parent.stdout is not None
        said = next(line for line in parent.stdout if line.startswith("{"))  # the others are its log
        triggering = json.loads(said)["triggering"]
        deployment = server.call("/deployments/name/leaf/never-started")["id"]
        try:
            set_all_states(server, deployment, "SCHEDULED", "RUNNING")
            set_all_states(server, deployment, "RUNNING", "COMPLETED")
            output, _ = parent.communicate(timeout=120)
        finally:
            parent.kill()

    measured = json.loads(output.strip().splitlines()[-1])
    print(f"{triggering} calls to trigger, {measured['waiting']} to wait, {measured['peak_mib']:.0f} MiB")
    assert measured["completed"] == count
    assert triggering <= 2 * count
    assert measured["waiting"] <= count / 2  # each has changed its state twice
    assert measured["peak_mib"] < 300


def set_all_states(server: Server, deployment: str, before: str, after: str) -> None:
    runs = {"state": {"type": {"any_": [before]}}, "deployment_id": {"any_": [deployment]}}
    body = {"flow_runs": runs, "state": {"type": after}, "force": True}
    while server.call("/flow_runs/bulk_set_state", body, timeout=600)["results"]:  # 100 runs a call
        pass


# ── 12. Small results come back ──────────────────────────────────────────────────────────────────────────────────


def test_g12_outcomes_carry_the_summary_in_the_order_asked_for(deployed: StackInfo, server: Server) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from phasewise import trigger_subflow, wait_for_flow_runs

    async def run() -> list[dict[str, Any]]:
        ids = [
            await trigger_subflow("leaf/leaf-deployment", {"name": name, "folder": str(server.signals)})
            for name in ("long-name", "x")
        ]
        outcomes = await wait_for_flow_runs(list(reversed(ids)))
        return [dict(outcome.summary) for outcome in outcomes]

    with temporary_settings({PREFECT_API_URL: deployed.api_url}):
        summaries = asyncio.run(run())

    assert [(one["name"], one["rows"]) for one in summaries] == [("x", 1), ("long-name", 9)]


def test_g12_the_outcome_of_a_table_has_its_rows_bytes_seconds_and_manifest(
    stack: StackInfo, stack_shell: Shell
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from phasewise import trigger_subflow, wait_for_flow_runs

    project = write_project(stack_shell.project, source=SHOP)
    assert stack_shell.phasewise("deploy").returncode == 0

    async def run() -> Mapping[str, Any]:
        parameters = {"table": "orders", "batch_id": "g12"}
        run_id = await trigger_subflow("process-table-etl/process-table-etl-deployment", parameters)
        [outcome] = await wait_for_flow_runs([run_id])
        return outcome.summary

    with temporary_settings({PREFECT_API_URL: stack.api_url}):
        summary = asyncio.run(run())

    manifest = project.staging / "g12" / "orders" / "manifest.json"
    assert summary["rows"] == 3
    assert summary["size_bytes"] == json.loads(manifest.read_text())["size_bytes"] > 0
    assert summary["seconds"] > 0
    assert (project.staging / str(summary["manifest"])) == manifest


def slowdown() -> float:
    """Return how many times slower this machine is now than with nothing else to do: its load for each processor."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def parent_pid(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descendants(pid: int) -> list[int]:
    children = [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if is_child(int(folder.name), pid)]
    return children + [below for child in children for below in descendants(child)]


def is_child(pid: int, parent: int) -> bool:
    try:
        return parent_pid(pid) == parent
    except FileNotFoundError:
        return False


def worker_pid(run_pid: int) -> int:
    """Return the worker above a flow run's process: run → forkserver → worker."""
    return parent_pid(parent_pid(run_pid))


def server_pid(server: Server) -> int:
    """Return the process that listens on the server's port, a child of the stack's supervisor."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"phasewise.server.app" in line and parent_pid(int(folder.name)) == server.stack.pid:
            return int(folder.name)
    raise AssertionError("the stack has no server process")
