"""A stack of its own for each test here: they break it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phasewise.stack.control import StackInfo, find_stack, running_stack, start_stack, start_workers, stop_stack

pytestmark = pytest.mark.timeout(240)


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> dict[int, str]:
    """Return pid → command line of the processes below *pid*, at any depth."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        found |= {int(child): command, **descendants(int(child))}
    return found


def pid_of(stack: StackInfo, what: str) -> int:
    return next(pid for pid, command in descendants(stack.pid).items() if what in command)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    stop_stack(tmp_path)


def start(home: Path) -> StackInfo:
    return start_stack(home, pool="warm", workers=1)


def test_two_starts_at_once_make_one_stack_and_stopping_it_leaves_nothing(home: Path) -> None:
    found: list[StackInfo] = []
    threads = [threading.Thread(target=lambda: found.append(start(home))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    processes = descendants(found[0].pid)
    with running_stack(home, pool="warm") as used:
        assert used == find_stack(home) == found[0] == found[1]
    assert find_stack(home) is not None  # it was not ours to stop
    assert stop_stack(home) is True

    assert not any(map(is_alive, [found[0].pid, *processes]))
    assert find_stack(home) is None


def test_a_server_or_worker_that_dies_is_started_again_and_workers_can_be_added(home: Path) -> None:
    stack = start(home)
    assert len(start_workers(home, 1).workers) == 2
    for what in ("phasewise.server.app", "--name worker-1", "phasewise.forkserver.server"):
        old = pid_of(stack, what)
        os.kill(old, signal.SIGKILL)
        until(lambda old=old: not is_alive(old))
        if what != "phasewise.forkserver.server":  # a worker replaces that one when it needs it
            until(lambda what=what: any(what in command for command in descendants(stack.pid).values()))

    until(lambda: find_stack(home) is not None)
    assert find_stack(home).api_url == stack.api_url  # type: ignore[union-attr]


def test_a_supervisor_killed_by_kill_9_takes_everything_along(home: Path) -> None:
    stack = start(home)
    until(lambda: any("phasewise.forkserver.server" in command for command in descendants(stack.pid).values()))
    processes = descendants(stack.pid)

    os.kill(stack.pid, signal.SIGKILL)

    until(lambda: not any(map(is_alive, processes)))
    assert find_stack(home) is None


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_is_killed_takes_its_stack_along(home: Path, signum: signal.Signals) -> None:
    command = f"""
import sys, time
from pathlib import Path
from phasewise.stack.control import running_stack
with running_stack(Path({str(home)!r}), pool="warm", workers=1) as stack:
    print(stack.pid, flush=True)
    time.sleep(300)
"""
    with subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        supervisor = int(process.stdout.readline())
        processes = [supervisor, *descendants(supervisor)]

        process.send_signal(signum)

    until(lambda: not any(map(is_alive, processes)))
    assert not (home / "stack.json").exists()


def test_a_second_home_gets_a_stack_of_its_own(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = start(home)
    with running_stack(tmp_path_factory.mktemp("other"), pool="warm", workers=1) as second:
        assert second.api_url != first.api_url
        assert second.pid != first.pid
    assert find_stack(home) == first
