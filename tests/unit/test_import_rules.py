"""The import rules that import-linter cannot state.

It sees other packages by their first name only, and not that importing a module runs its package first.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: The packages that may touch Prefect below its client API.
ALLOWED = [ROOT / "src/phasewise" / package for package in ("worker", "server", "local")]


def imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def private_prefect_names(source: str) -> list[str]:
    """Return the imported names below ``prefect`` of which a part begins with one underscore."""
    parts = (name.split(".") for name in imported_names(ast.parse(source)))
    return [
        ".".join(name)
        for name in parts
        if name[0] == "prefect" and any(p.startswith("_") and not p.startswith("__") for p in name)
    ]


@pytest.mark.parametrize(
    "line",
    [
        "import prefect._internal.concurrency",
        "from prefect.runner._starter_direct import DirectSubprocessStarter",
        "from prefect.flow_engine import _drive_run_flow_result",
        "def f():\n    from prefect.workers import _cleanup",
    ],
)
def test_private_names_are_recognised(line):
    assert private_prefect_names(line)


@pytest.mark.parametrize("line", ["from prefect.client import get_client", "from _prefect import x", "import prefect"])
def test_public_names_are_not(line):
    assert not private_prefect_names(line)


def test_only_worker_server_and_local_touch_private_names_of_prefect():
    files = [f for folder in ("src", "flows", "examples") for f in (ROOT / folder).rglob("*.py")]
    files = [f for f in files if not any(f.is_relative_to(package) for package in ALLOWED)]

    found = {str(f.relative_to(ROOT)): private_prefect_names(f.read_text()) for f in files}

    assert len(found) > 5
    assert {f: names for f, names in found.items() if names} == {}


@pytest.mark.parametrize("package", ["forkserver", "local"])
def test_the_first_line_of_a_file_says_in_which_process_it_runs(package):
    files = [f for f in (ROOT / "src/phasewise" / package).glob("*.py") if f.name != "__init__.py"]
    first = {f.name: (ast.get_docstring(ast.parse(f.read_text())) or "").partition("\n")[0] for f in files}

    assert len(first) >= 4
    assert {name: line for name, line in first.items() if " Runs " not in line} == {}


@pytest.mark.parametrize(
    ("plane", "stranger"),
    [
        ("lake sources staging publishing report", "prefect"),
        ("project outcomes orchestration stack", "duckdb"),
        ("forkserver", "prefect"),
        ("forkserver/server", "pydantic"),
        ("forkserver/server", "anyio"),
        ("forkserver/server", "duckdb"),
        ("stack", "prefect"),
    ],
)
def test_importing_a_plane_does_not_load_the_library_of_the_other(plane, stranger):
    modules = [
        ".".join(file.relative_to(ROOT / "src").with_suffix("").parts)
        for name in plane.split()
        for file in [*(ROOT / "src/phasewise" / name).rglob("*.py"), *(ROOT / "src/phasewise").glob(f"{name}.py")]
    ]
    assert len(modules) >= len(plane.split())
    imports = "".join(f"import {module}\n" for module in modules)

    run = subprocess.run(
        [sys.executable, "-c", f"{imports}import sys; sys.exit({stranger!r} in sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr or f"{stranger} was loaded by one of: {plane}"


def test_each_module_of_worker_and_server_says_in_which_process_it_runs():
    files = [
        file
        for package in ("worker", "server")
        for file in (ROOT / "src/phasewise" / package).glob("*.py")
        if file.name != "__init__.py"
    ]
    assert len(files) > 10

    first_lines = {
        file.name: (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0] for file in files
    }

    process = r"Runs in the (worker's process|server's process|forkserver|process (that was )?forked for)"
    assert {name: line for name, line in first_lines.items() if not re.search(process, line)} == {}


@pytest.mark.parametrize("process", ["worker", "server"])
def test_the_code_of_a_flow_run_and_of_its_worker_do_not_import_each_other(process: str) -> None:
    """``warm_up``, in the process that is forked, is what may import the code of the run."""
    folder = ROOT / "src/phasewise" / process
    of_the_run = {"child", "event_outlet", "warm_up"}
    found = {
        file.stem: [
            name
            for name in imported_names(ast.parse(file.read_text()))
            if name.split(".")[2:3] and name.split(".")[2] in of_the_run and name.startswith("phasewise.worker.")
        ]
        for file in folder.glob("*.py")
        if file.stem not in of_the_run
    }

    assert {name: names for name, names in found.items() if names} == {}
