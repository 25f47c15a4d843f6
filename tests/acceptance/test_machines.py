"""One batch on two machines that share PostgreSQL, S3 and the Prefect server, and no folder of the project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from phasewise.lake.publications import query_warehouse
from phasewise.project.config import load_project
from phasewise.stack.control import StackInfo, running_stack
from phasewise.testing.projects import SAMPLE_SETTINGS
from tests.acceptance.conftest import POOL, SHOP, wait_for
from tests.integration.warehouses import postgres_catalog, s3_bucket
from tests.servers import find_postgres, psql


def can_mount() -> bool:
    probe = ["unshare", "--mount", "--propagation", "private", "true"]
    try:
        return subprocess.run(probe, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


pytestmark = [
    pytest.mark.skipif(not can_mount(), reason="giving each worker a folder of its own needs root (unshare --mount)"),
    find_postgres().needed(),
]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Path, Path, Path]]:
    """The path of the project, and the folder that is there on each of the two machines."""
    path, one, two = (tmp_path / name for name in ("project", "one", "two"))
    with postgres_catalog() as catalog, s3_bucket() as data:
        schema = f"{catalog.rpartition('=')[2]}_source"
        psql(f"create schema {schema}; set search_path = {schema}; {SHOP}")
        try:
            path.mkdir()
            (one / "marts").mkdir(parents=True)
            (one / "marts" / "revenue.sql").write_text("select sum(amount) as total from orders")
            url = f"postgresql://postgres:a%20secret@{find_postgres()}/test?schema={schema}"
            (one / "phasewise.toml").write_text(
                f'[project]\nname = "shop"\n[source]\nurl = "{url}"\n'
                f'[warehouse]\ncatalog = "{catalog}"\ndata = "{data}"\n'
            )
            shutil.copytree(one, two)
            yield path, one, two
        finally:
            psql(f"drop schema {schema} cascade")


def on_machine(folder: Path, path: Path, *command: str) -> list[str]:
    """Return what runs a Python command where *path* is *folder*, and is so for nobody else."""
    script = 'mount --bind "$0" "$1" && shift && exec "$@"'
    mounted = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(folder), str(path)]
    return [*mounted, sys.executable, *command]


def list_online(stack: StackInfo) -> set[str]:
    body = {"workers": {"status": {"any_": ["ONLINE"]}}}
    found = httpx.post(f"{stack.api_url}/work_pools/{POOL}/workers/filter", json=body, timeout=30)
    if found.status_code == httpx.codes.NOT_FOUND:
        return set()  # The first worker makes the pool.
    return {one["name"] for one in found.raise_for_status().json()}


@contextmanager
def worker(stack: StackInfo, folder: Path, path: Path, queue: str) -> Iterator[None]:
    """Run a worker of one queue on a machine."""
    name = f"on-{folder.name}"
    options = ["--pool", POOL, "--type", "warm-process", "--work-queue", queue, "--name", name]
    environment = {**os.environ, "PREFECT_API_URL": stack.api_url, "PHASEWISE_PROJECT": str(path)}
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            on_machine(folder, path, "-m", "prefect", "worker", "start", *options),
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            # A batch is refused while no worker is online.
            wait_for(lambda: name in list_online(stack) or process.poll() is not None, 60)
            yield
        finally:
            process.terminate()
            process.wait(timeout=40)


@pytest.mark.timeout(300)
def test_two_machines_that_share_no_folder_run_one_batch(machines: tuple[Path, Path, Path], tmp_path: Path):
    path, one, two = machines

    with (
        running_stack(tmp_path / "home", pool=POOL, workers=0) as stack,
        worker(stack, one, path, "orchestrators"),
        worker(stack, two, path, "tables"),
    ):
        command = on_machine(one, path, "-m", "phasewise", "run-distributed")
        done = subprocess.run(
            command,
            env={**os.environ, "PHASEWISE_HOME": str(tmp_path / "home"), "PHASEWISE_PROJECT": str(path)},
            capture_output=True,
            text=True,
            timeout=200,
        )

    logs = "".join(machine.with_suffix(".log").read_text()[-4000:] for machine in (one, two))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{logs}"
    project = load_project(one)
    assert query_warehouse(project, SAMPLE_SETTINGS, "from revenue")[1] == [(425,)]
    # Whoever extracts a table holds its folder's lock, which is not exchanged: all did so on the second machine.
    locked = {machine.name: sorted(file.parent.name for file in machine.rglob(".lock")) for machine in (one, two)}
    assert locked == {"one": [], "two": ["customer", "orders", "stock"]}
    assert not list(path.iterdir())
    assert list((one / ".phasewise" / "reports").glob("*.html"))
    assert not (two / ".phasewise" / "reports").exists()
    assert not list(tmp_path.glob("*/.phasewise/**/*.parquet"))
