"""The real thing: a stack with real workers, the real command, one project per test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from examples.baseball.lahman import build_demo_source
from phasewise.stack.control import StackInfo, running_stack

CHECKOUT = Path(__file__).resolve().parents[2]
POOL = "default-pool"

#: A source of three tables, for what does not need 27.
SHOP = """
create table customer (id integer primary key, name text not null);
insert into customer values (1, 'Ada'), (2, 'Grace'), (3, 'Edsger');
create table orders (id integer primary key, customer integer, amount integer);
insert into orders values (10, 1, 100), (11, 2, 250), (12, 1, 75);
create table stock (item text primary key, pieces integer);
insert into stock values ('bolt', 1000), ('nut', 900);
"""


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="session")
def stack(home: Path) -> Iterator[StackInfo]:
    """One stack for all tests that do not break it; each of them has a project, and so a warehouse, of its own."""
    with running_stack(home, pool=POOL, workers=2) as info:
        yield info


class Command(subprocess.Popen[str]):
    """A command that a test which fails does not wait for: what it waits for may be what the test holds."""

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: Any) -> None:
        if exc_type is not None:
            self.kill()
        super().__exit__(exc_type, *exc_info)


@dataclass(frozen=True, kw_only=True)
class Shell:
    """Runs commands the way a user of one project would."""

    home: Path
    project: Path
    environment: Mapping[str, str]

    def start(self, *command: str, **changes: str) -> Command:
        environment = {**os.environ, "PHASEWISE_HOME": str(self.home), "PHASEWISE_PROJECT": str(self.project)}
        return Command(
            [sys.executable, *command],
            cwd=CHECKOUT,
            env={**environment, **self.environment, **changes},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
        with self.start(*command, **changes) as process:
            try:
                output, _ = process.communicate(timeout=240)
            finally:
                process.kill()
        return subprocess.CompletedProcess(command, process.returncode, output, "")

    def phasewise(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "phasewise", *arguments, **changes)

    def python(self, code: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", code, **changes)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A shell in a project that has no server yet: its own home, its own project folder."""
    project = tmp_path / "project"
    project.mkdir()
    return Shell(home=tmp_path / "home", project=project, environment={})


@pytest.fixture
def stack_shell(tmp_path: Path, home: Path, stack: StackInfo) -> Shell:
    """A shell whose server is the stack of the session."""
    project = tmp_path / "project"
    project.mkdir()
    return Shell(home=home, project=project, environment={})


@pytest.fixture(scope="session")
def lahman(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_source(tmp_path_factory.mktemp("lahman") / "lahman.sqlite").path


@pytest.fixture
def baseball(lahman: Path) -> Callable[[Path], None]:
    """Turn a project's folder into a copy of examples/baseball."""

    def copy_to(folder: Path) -> None:
        example = CHECKOUT / "examples" / "baseball"
        shutil.copy(example / "phasewise.toml", folder)
        shutil.copytree(example / "marts", folder / "marts")
        (folder / "data").mkdir()
        shutil.copy(lahman, folder / "data" / "lahman.sqlite")

    return copy_to


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until *condition* holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.2)
