"""The command and the flows as a user meets them, without a server, with a missing one, and interrupted."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from pathlib import Path

import pytest

from phasewise.stack.control import StackInfo
from phasewise.testing.projects import write_project
from tests.acceptance.conftest import SHOP, Shell, wait_for
from tests.conftest import marked_processes

FLOWS = "from flows.prefect_flow_worker_flow_v2 import *\n"
SCRIPT = "flows/prefect_flow-worker-flow-v2.py"


@pytest.fixture
def shop(shell: Shell) -> Shell:
    write_project(shell.project, source=SHOP)
    return shell


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_every_flow_runs_alone_without_a_server(shop: Shell) -> None:
    steps = 'print(pre_etl())\nprint(process_table_etl("Orders"))\nprint(cleanup_flow1())\nprint(cleanup_flow2())\n'

    done = shop.python(FLOWS + steps + "print(final_etl())")

    assert done.returncode == 0, done.stdout
    assert "'status': 'pre_etl_complete', 'sources_validated': True" in done.stdout
    assert "'table': 'orders', 'rows': 3" in done.stdout
    assert "'status': 'final_etl_complete', 'reports_generated': True" in done.stdout
    assert "175" in shop.phasewise("query", "select sum(amount) - 250 as total from orders").stdout


def test_final_etl_on_an_empty_warehouse_says_what_to_run(shop: Shell) -> None:
    done = shop.python(FLOWS + "final_etl()")

    assert done.returncode == 1
    assert "Nothing is staged" in done.stdout
    assert "make run-distributed" in done.stdout


def test_final_etl_without_anything_staged_renews_marts_and_report(shop: Shell) -> None:
    (shop.project / "marts" / "totals.sql").write_text("select sum(amount) as total from orders")
    assert shop.python(FLOWS + 'process_table_etl("orders"); final_etl()').returncode == 0
    (shop.project / "marts" / "totals.sql").write_text("select 2 * sum(amount) as total from orders")

    renewed = shop.python(FLOWS + "final_etl()")

    assert renewed.returncode == 0, renewed.stdout
    assert "850" in shop.phasewise("query", "from marts.totals").stdout


def test_an_unknown_table_is_refused_by_name(shop: Shell) -> None:
    done = shop.python(FLOWS + 'process_table_etl("order")')

    assert done.returncode == 1
    assert 'no table "order". Did you mean "orders"?' in done.stdout


def test_pre_etl_reports_every_failure_at_once(shop: Shell) -> None:
    toml = shop.project / "phasewise.toml"
    toml.write_text(
        toml.read_text()
        + '[table.orders.columns]\namount = "DATE"\n[table.stock.columns]\nplace = "VARCHAR"\n[table.suppliers]\n'
    )

    done = shop.python(FLOWS + "pre_etl()")

    assert done.returncode == 1
    assert all(name in done.stdout for name in ("amount", "place", "suppliers"))


@pytest.mark.parametrize("arguments", [[], ["destroy"], ["deploy", "twice"]])
def test_the_script_explains_its_usage(shop: Shell, arguments: list[str]) -> None:
    done = shop.run(SCRIPT, *arguments)

    assert done.returncode == 2
    assert "usage" in done.stdout
    assert "deploy|run" in done.stdout


def test_run_without_a_server_says_how_to_start_one(shop: Shell) -> None:
    done = shop.run(SCRIPT, "run", PREFECT_API_URL=f"http://127.0.0.1:{free_port()}/api")

    assert done.returncode == 8
    assert "No Prefect server answers" in done.stdout
    assert "make up" in done.stdout


def test_run_without_a_worker_says_how_to_start_one(stack: StackInfo, stack_shell: Shell) -> None:
    write_project(stack_shell.project, source=SHOP)
    assert stack_shell.run(SCRIPT, "deploy", PREFECT_WORK_POOL="nobody-here").returncode == 0

    done = stack_shell.run(SCRIPT, "run", PREFECT_WORK_POOL="nobody-here")

    assert done.returncode == 8
    assert 'No worker of the work pool "nobody-here" is online' in done.stdout
    assert "make start-workers" in done.stdout
    assert stack_shell.run(SCRIPT, "deploy").returncode == 0


def test_run_without_deployments_says_how_to_make_them(stack: StackInfo, stack_shell: Shell) -> None:
    toml = '[pipeline]\nphases = "pipeline.py:PHASES"\n'
    write_project(stack_shell.project, source=SHOP, toml=toml)
    (stack_shell.project / "pipeline.py").write_text(
        "from phasewise import PHASES, Step\n"
        "step = Step(name='tidy', deployment='tidy/never-deployed', entrypoint='pipeline.py:tidy')\n"
        "PHASES = (PHASES[0].with_step(step), PHASES[1])\n"
    )

    done = stack_shell.run(SCRIPT, "run")

    assert done.returncode == 8
    assert "tidy/never-deployed" in done.stdout
    assert "make deploy-flows" in done.stdout


@pytest.mark.parametrize(
    ("toml", "code", "message"),
    [
        ("[project\n", 3, "is not valid TOML"),
        ('[project]\nname = "x"\n[sources]\nurl = "sqlite:///x"\n', 3, 'Did you mean "source"?'),
        (None, 3, "There is no phasewise.toml"),
    ],
)
def test_a_broken_project_is_explained(shell: Shell, toml: str | None, code: int, message: str) -> None:
    if toml is not None:
        (shell.project / "phasewise.toml").write_text(toml)

    done = shell.phasewise("query", "select 1")

    assert done.returncode == code
    assert message in done.stdout


def test_a_setting_that_is_no_number_is_named(shop: Shell) -> None:
    done = shop.phasewise("query", "select 1", PHASEWISE_THREADS="many")

    assert done.returncode == 3
    assert "PHASEWISE_THREADS = 'many'" in done.stdout


@pytest.mark.parametrize("command", [["cancel"], ["resume"], ["why", "0"], ["deploy"]])
def test_a_command_without_a_server_says_how_to_start_one(shop: Shell, command: list[str]) -> None:
    done = shop.phasewise(*command, PREFECT_API_URL=f"http://127.0.0.1:{free_port()}/api")

    assert done.returncode == 8
    assert "make up" in done.stdout


def test_help_shows_every_command_and_the_exit_codes(shell: Shell) -> None:
    done = shell.phasewise("--help")

    assert done.returncode == 0
    assert all(word in done.stdout for word in ("run-distributed", "deploy", "query", "Exit codes", "130"))
    assert shell.phasewise("--version").stdout.strip() == "0.1.0"


def test_a_password_is_never_printed_or_deployed(stack: StackInfo, stack_shell: Shell) -> None:
    port = free_port()
    write_project(stack_shell.project, source=SHOP)
    toml = stack_shell.project / "phasewise.toml"
    url = f"postgresql://etl:s3cr3t-word@127.0.0.1:{port}/shop"
    toml.write_text(toml.read_text().replace("sqlite:///source.sqlite", url))

    failed = stack_shell.phasewise("run-distributed")
    alone = stack_shell.python(FLOWS + "pre_etl()", PREFECT_API_URL="")

    assert failed.returncode == 7
    assert alone.returncode == 1
    assert "s3cr3t-word" not in failed.stdout + alone.stdout
    database = stack_shell.home / "prefect" / "prefect.db"
    written = b"".join(path.read_bytes() for path in database.parent.glob("prefect.db*"))
    assert b"s3cr3t-word" not in written
    logs = b"".join(path.read_bytes() for path in (stack_shell.home / "logs").iterdir())
    assert b"s3cr3t-word" not in logs


@pytest.mark.timeout(200)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_and_nothing_half_published(shop: Shell, how: signal.Signals) -> None:
    before = set(marked_processes())
    warehouse = shop.project / "warehouse"
    warehouse.mkdir()
    with (warehouse / "writer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # holds the batch before it publishes
        with shop.start("-m", "phasewise", "run-distributed") as process:
            # As soon as tables are being staged: server, workers and flow runs are all there.
            wait_for(lambda: any((shop.project / ".phasewise" / "staging").glob("*/*")) or process.poll() is not None)
            assert process.poll() is None, process.stdout and process.stdout.read()

            os.kill(process.pid, how)
            process.communicate(timeout=60)

        wait_for(lambda: set(marked_processes()) <= before, seconds=30)
    assert process.returncode in (130, -how)
    assert not (warehouse / "catalog.sqlite").exists() or "orders" not in shop.phasewise("query", "show tables").stdout


@pytest.mark.timeout(200)
def test_a_stack_stays_until_it_is_stopped(shop: Shell, tmp_path: Path) -> None:
    before = set(marked_processes())

    up = shop.phasewise("up", "--workers", "1")
    assert up.returncode == 0, up.stdout
    more = shop.phasewise("start-workers", "1")
    again = shop.phasewise("up")
    ran = shop.phasewise("run-distributed")
    still = shop.phasewise("deploy")
    down = shop.phasewise("down")

    assert "2 workers are online" in more.stdout
    assert again.returncode == 0
    assert ran.returncode == 0, ran.stdout
    assert still.returncode == 0, still.stdout
    assert down.returncode == 0
    wait_for(lambda: set(marked_processes()) <= before, seconds=30)
    assert "No stack is running" in shop.phasewise("down").stdout
