"""Each entry of the registry, against the installed Prefect: part of ``make test-prefect-range``."""

from __future__ import annotations

import ast
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prefect
import pytest

from phasewise.errors import OrchestrationError
from phasewise.local import engine
from phasewise.patches import entries, registry
from phasewise.patches.entries import PATCHES, list_patches
from phasewise.patches.registry import Patch, apply, describe_shape, find_target, may_apply, undo, why_not

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "src" / "phasewise"
CACHED = (registry.why_not, registry.left_out, registry._warn_of_skipped, registry._warn_of_untested_version)


def forget() -> None:
    for function in CACHED:
        function.cache_clear()


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    undo()  # what a local run of another test has applied
    forget()
    yield
    undo()
    forget()


def targets_of(patch: Patch) -> dict[str, Any]:
    """Return path → what is there, for what the patch rebinds."""
    found = {path: find_target(path) for path in patch.targets}
    return {path: getattr(owner, name) for path, (owner, name) in found.items()}


every_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)


@every_patch
def test_it_fits_the_installed_versions(patch: Patch) -> None:
    assert why_not(patch) is None


@pytest.mark.parametrize("patch", [patch for patch in PATCHES if patch.targets], ids=lambda patch: patch.name)
def test_the_stock_code_is_back_when_it_is_undone(patch: Patch) -> None:
    before = targets_of(patch)

    assert apply(patch, lambda stock: SimpleNamespace(stock=stock))

    assert all(isinstance(now, SimpleNamespace) for now in targets_of(patch).values())
    undo()
    assert targets_of(patch) == before
    for path, shape in patch.targets.items():
        owner, name = find_target(path)
        assert describe_shape(getattr(owner, name)).startswith(shape.removesuffix("…"))


@every_patch
def test_without_its_target_the_stock_code_runs_and_one_line_says_so(
    patch: Patch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    renamed = next(iter({**patch.targets, **patch.needs}))
    before = targets_of(patch)

    def find(path: str) -> tuple[Any, str]:
        owner, name = find_target(path)
        return owner, f"renamed_{name}" if path == renamed else name

    monkeypatch.setattr(registry, "find_target", find)
    with caplog.at_level(logging.WARNING):
        assert [apply(patch, lambda _: None), may_apply(patch), apply(patch, lambda _: None)] == [False] * 3

    assert caplog.messages == [f"Patch {patch.name} is not applied: {renamed} is not there. The stock code runs."]
    assert targets_of(patch) == before


@every_patch
def test_a_target_with_another_signature_is_left_alone(
    patch: Patch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "describe_shape", lambda target: "(another)")

    assert not may_apply(patch)

    [line] = caplog.messages
    assert re.search(rf"^Patch {patch.name} is not applied: \S+ is \(another\), not ", line)


@every_patch
def test_the_switch_leaves_out_all_that_rebind_and_a_name_leaves_out_one(
    patch: Patch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for value, is_left_out in (("off", patch.is_optional), (f"-x,-{patch.name}", patch.is_optional), ("-x", False)):
        monkeypatch.setenv("PHASEWISE_PATCHES", value)
        forget()
        assert (why_not(patch) is not None) == is_left_out
        assert may_apply(patch) != is_left_out
    assert patch.is_optional or not patch.targets or patch.process == "local"
    assert caplog.messages == []  # it is what was asked for


@every_patch
def test_it_says_all_that_the_next_maintainer_asks(patch: Patch) -> None:
    assert patch.targets or patch.needs
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", patch.name)
    assert all([patch.why, patch.gain.strip("?"), patch.since, patch.until])


def test_names_are_given_once() -> None:
    names = [patch.name for patch in PATCHES]

    assert len(set(names)) == len(names) > 10
    assert [patch for patch, _ in list_patches()] == list(PATCHES)


def test_a_change_of_the_code_is_noticed_and_one_of_its_layout_is_not(tmp_path: Path) -> None:
    def shape(body: str) -> str:
        file = tmp_path / f"module_{len(list(tmp_path.iterdir()))}.py"
        file.write_text(body)
        module: dict[str, Any] = {}
        exec(compile(body, str(file), "exec"), module)  # noqa: S102 - a function whose source can be read
        return describe_shape(module["stock"])

    one = shape("def stock(a: int, b=2):\n    return a + b\n")
    assert one == shape(
        "def stock(a: int, b = 2):\n    return (\n        a + b\n    )\n".replace("(\n        a + b\n    )", "a  +  b")
    )
    assert one.startswith("(a, b=2) ")
    assert one != shape("def stock(a: int, b=2):\n    return a - b\n")


def test_a_newer_prefect_gets_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(prefect, "__version__", "3.12.0.dev4")

    assert may_apply(entries.VALID_VARIABLES)
    assert may_apply(entries.KNOWN_RUN)

    [line] = caplog.messages
    assert "3.12.0.dev4 is newer than 3.9.1" in line


def test_a_local_run_says_why_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "describe_shape", lambda target: "(another)")

    with pytest.raises(OrchestrationError, match=r"needs the patch local-tasks: prefect\S+ is \(another\)"):
        engine.install()


def test_every_entry_is_used_and_nothing_is_rebound_elsewhere() -> None:
    files = [file for file in SOURCE.rglob("*.py") if file.parent.name != "patches"]
    text = "\n".join(file.read_text() for file in files)
    names = [name for name, value in vars(entries).items() if isinstance(value, Patch)]
    assert [name for name in names if f"entries.{name}" not in text] == []

    found = [f"{file.name}: {one}" for file in files for one in rebound(ast.parse(file.read_text()))]
    assert found == []


def rebound(tree: ast.Module) -> Iterator[str]:
    """Yield what is assigned to an attribute of something that was imported from another library."""
    foreign = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and not (getattr(node, "module", None) or "").startswith("phasewise")
        for alias in node.names
    } - {"sys", "os"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            yield ast.unparse(node)
        for target in getattr(node, "targets", []):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value).partition(".")[0] in foreign:
                yield ast.unparse(target)


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("from prefect import flow_engine\nflow_engine.run_flow = None", True),
        ("import prefect.flows\nprefect.flows.Flow.fn = None", True),
        ("from prefect.flows import Flow\nsetattr(Flow, 'fn', None)", True),
        ("from phasewise import flows\nflows.x = None", False),
        ("class A:\n    def f(self):\n        self.x = 1", False),
    ],
)
def test_rebinding_is_recognised(line: str, is_found: bool) -> None:
    assert bool(list(rebound(ast.parse(line)))) == is_found


def test_doctor_lists_them(tmp_path: Path) -> None:
    env = {**os.environ, "PREFECT_HOME": str(tmp_path), "PHASEWISE_PATCHES": "-valid-variables,-one-writer,-typo"}

    done = subprocess.run([sys.executable, "-m", "phasewise", "doctor"], capture_output=True, text=True, env=env)

    assert done.returncode == 0, done.stderr
    for patch in PATCHES:
        assert patch.name in done.stdout
    assert f"{len(PATCHES) - 1} of {len(PATCHES)}" in done.stdout
    assert "PHASEWISE_PATCHES leaves it out" in done.stdout
    assert "names no patch that can be left out: -one-writer, -typo." in done.stdout
    assert prefect.__version__ in done.stdout
