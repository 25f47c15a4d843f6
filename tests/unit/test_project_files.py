"""The files round the code agree with each other."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements.lock", "requirements-dev.lock")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(name: str) -> list[Requirement]:
    """Return the pinned requirements of a lock file; a package stands twice where its version depends on Python."""
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line.removesuffix("\\").strip()) for line in lines if re.match(r"[a-z0-9]", line)]


def direct(*extras: str) -> list[Requirement]:
    optional = project()["optional-dependencies"]
    return [Requirement(r) for r in project()["dependencies"] + [r for e in extras for r in optional[e]]]


@pytest.mark.parametrize("name", LOCKS)
def test_lock_names_no_host_and_no_path(name):
    text = (ROOT / name).read_text()

    assert not re.search(r"://|file:|^-|--(extra-)?index|--find-links|--trusted", text, re.MULTILINE)
    assert not re.search(r"(^|\s)/\w", text)


@pytest.mark.parametrize("name", LOCKS)
def test_lock_pins_every_package_with_hashes(name):
    entries = re.split(r"\n(?=[a-z0-9])", (ROOT / name).read_text())[1:]

    assert len(entries) == len(locked(name)) > 50
    for entry in entries:
        assert re.match(r"[a-z0-9.-]+==\S+ ", entry), entry
        assert "--hash=sha256:" in entry, entry


@pytest.mark.parametrize(("name", "extras"), [(LOCKS[0], ["example"]), (LOCKS[1], ["example", "dev"])])
def test_lock_satisfies_what_pyproject_asks_for(name, extras):
    pins = {canonicalize_name(r.name): r for r in locked(name)}

    for wanted in direct(*extras):
        pin = pins[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(str(pin.specifier).removeprefix("=="), prereleases=True), wanted


def test_dev_lock_holds_all_of_the_runtime_lock():
    runtime, dev = ({str(r) for r in locked(name)} for name in LOCKS)

    assert runtime <= dev


def test_engine_and_extension_wheels_have_one_version():
    versions = {str(r.specifier) for r in direct() if r.name.startswith("duckdb")}

    assert len(versions) == 1


def test_installed_package_has_the_version_of_pyproject():
    assert version("phasewise") == project()["version"]


def test_changelog_names_the_version_or_has_it_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text()

    assert "## [Unreleased]" in text or f"## [{project()['version']}]" in text


def test_prefect_finds_the_worker_through_its_entry_point():
    found = {e.name: e.value for e in entry_points(group="prefect.collections")}

    assert found["phasewise"] == "phasewise.worker.worker"


def test_licence_is_the_apache_licence():
    assert project()["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()


def test_every_make_target_is_phony_or_a_file_and_says_what_it_does():
    text = (ROOT / "Makefile").read_text()
    declared = set(re.search(r"^\.PHONY: (run-.*)$", text, re.MULTILINE)[1].split())
    explained = set(re.findall(r"^([a-z-]+):.* ## \S", text, re.MULTILINE))

    assert declared == explained


def test_pre_commit_runs_the_commands_of_make_lint():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    commands = [line.strip().replace("$(PY)", ".venv/bin/python") for line in recipe.splitlines()]
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text())

    assert [hook.removesuffix(" --force-exclude") for hook in hooks] == commands
