"""What holds for every test: a home of its own, no settings of the machine, and no process left behind."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Every process that a test starts, at any depth, inherits this variable, so that it can be found again.
MARK = "PYTEST_PHASEWISE_RUN"

_home = Path(tempfile.mkdtemp(prefix="phasewise-tests-"))


def _isolate(environ: os._Environ[str]) -> None:
    """Take this process and its children away from the user's home, settings and servers.

    Prefect reads its settings when it is imported, so this runs before any test module is.
    """
    for name in [n for n in environ if n.startswith(("PREFECT_", "PHASEWISE_")) and n != "PHASEWISE_PATCHES"]:
        del environ[name]
    environ["HOME"] = str(_home)
    environ["PREFECT_HOME"] = str(_home / "prefect")
    environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    environ[MARK] = str(os.getpid())


_isolate(os.environ)
# A shell that starts us in the background has us ignore Ctrl-C, and what we start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    shutil.rmtree(_home, ignore_errors=True)


def marked_processes() -> dict[int, str]:
    """Return pid → command line of the living processes that this test run started, at any depth."""
    mark = f"{MARK}={os.getpid()}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        try:
            if pid != os.getpid() and mark in (folder / "environ").read_bytes().split(b"\0"):
                found[pid] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile, or is not ours to look into
            continue
    return found


@pytest.fixture(autouse=True)
def _passwords_end_with_their_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what sources leave in the environment of their process, which is a flow run's own otherwise."""
    for name in ("PGPASSWORD", "MYSQL_PWD"):
        password = os.environ.get(name)
        monkeypatch.setenv(name, password or "")
        if password is None:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session", autouse=True)
def _no_process_left_behind() -> Iterator[None]:
    """Fail the run when a process that a test started outlives all tests; then end it."""
    yield

    deadline = time.monotonic() + 10
    # Nothing must be found twice in a row: while a process is in exec, its environment reads as empty.
    looks_without = 0
    while looks_without < 2 and time.monotonic() < deadline:
        left = marked_processes()
        looks_without = 0 if left else looks_without + 1
        time.sleep(0.1)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    assert not left, f"Processes outlived the tests that started them: {left}"
