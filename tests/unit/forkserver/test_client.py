from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
import venv
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from phasewise.forkserver.client import ForkedProcess, Forkserver
from phasewise.forkserver.protocol import ForkRefused, ForkserverDied

SOURCE = Path(__file__).resolve().parents[3] / "src"

TARGETS = """
import os, random, signal, sys, threading, time

def code(value):
    return value

def write(path):
    with open(path, "w") as file:
        print(os.environ.get("COLOUR"), os.environ.get("HOME"), os.getcwd(), random.random(), file=file)

def say():
    print("to stdout")
    print("to stderr", file=sys.stderr)

def forever():
    time.sleep(600)

def drop_what_sigterm_raises(path):
    class Finalized:
        def __del__(self):
            open(path, "w").close()
            time.sleep(600)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    Finalized()
    time.sleep(600)

def sleep_through_sigterm(path):
    # Another thread takes the signal, so that the main one stays in its sleep.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    open(path, "w").close()
    time.sleep(600)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def fail():
    raise RuntimeError("boom")

def leave():
    sys.exit("not today")

def read(descriptor, path):
    data = os.read(descriptor, 100)
    with open(path, "wb") as file:
        file.write(data)
"""


async def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not become true"
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "targets.py").write_text(TARGETS)
    return tmp_path


@pytest.fixture
async def server(folder: Path) -> AsyncIterator[Forkserver]:
    server = await Forkserver.start(preload=["targets"], env={**os.environ, "PYTHONPATH": str(folder)})
    yield server
    await server.aclose()


async def fork(server: Forkserver, folder: Path, target: str, **options: Any) -> ForkedProcess:
    arguments = options.pop("arguments", {})
    return await server.fork(target, arguments, env={"COLOUR": "blue"}, cwd=str(folder), **options)


async def test_a_child_exits_with_what_its_target_returns(server: Forkserver, folder: Path) -> None:
    for code in (0, 3):
        process = await fork(server, folder, "targets:code", arguments={"value": code})

        assert await process.wait() == code
        assert process.peak_rss_bytes > 0


async def test_a_child_that_raises_or_leaves_exits_like_a_new_python(server: Forkserver, folder: Path) -> None:
    assert await (await fork(server, folder, "targets:fail")).wait() == 1
    assert await (await fork(server, folder, "targets:leave")).wait() == 1


async def test_a_child_has_the_environment_and_folder_that_it_was_given(server: Forkserver, folder: Path) -> None:
    process = await fork(server, folder, "targets:write", arguments={"path": "out"})
    await process.wait()

    colour, home, cwd, _ = (folder / "out").read_text().split()

    assert (colour, home, cwd) == ("blue", "None", str(folder))


async def test_a_child_finds_modules_whose_folder_came_after_the_start(folder: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    server = await Forkserver.start(env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(later)])})
    try:
        # It has looked for a module, and so knows that there is no such folder.
        assert await (await fork(server, folder, "targets:code", arguments={"value": 3})).wait() == 3
        later.mkdir()
        (later / "came_later.py").write_text(TARGETS)

        assert await (await fork(server, folder, "came_later:code", arguments={"value": 4})).wait() == 4
    finally:
        await server.aclose()


@pytest.mark.parametrize("target", ["sleep_through_sigterm", "drop_what_sigterm_raises"])
async def test_a_child_that_has_missed_sigterm_is_told_to_notice_it(
    server: Forkserver, folder: Path, target: str
) -> None:
    process = await fork(server, folder, f"targets:{target}", arguments={"path": "ready"})
    await until((folder / "ready").exists)
    await asyncio.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)

    assert await asyncio.wait_for(process.wait_signalled(), 10) == 5


async def test_children_draw_different_random_numbers(server: Forkserver, folder: Path) -> None:
    for name in ("a", "b"):
        await (await fork(server, folder, "targets:write", arguments={"path": name})).wait()

    assert (folder / "a").read_text() != (folder / "b").read_text()


async def test_output_goes_to_the_descriptors_that_were_handed_over(server: Forkserver, folder: Path) -> None:
    with (folder / "o").open("wb") as out, (folder / "e").open("wb") as err:
        process = await fork(server, folder, "targets:say", stdout=out.fileno(), stderr=err.fileno())
    await process.wait()

    assert (folder / "o").read_text() == "to stdout\n"
    assert (folder / "e").read_text() == "to stderr\n"


async def test_a_child_can_read_from_a_descriptor_of_the_worker(server: Forkserver, folder: Path) -> None:
    reader, writer = os.pipe()
    process = await fork(server, folder, "targets:read", arguments={"path": "got"}, descriptor=reader)
    os.close(reader)
    os.write(writer, b"hello")
    os.close(writer)
    await process.wait()

    assert (folder / "got").read_bytes() == b"hello"


async def test_many_forks_at_once_each_get_their_own_answer(server: Forkserver, folder: Path) -> None:
    processes = await asyncio.gather(
        *(fork(server, folder, "targets:code", arguments={"value": number}) for number in range(20))
    )

    assert [await process.wait() for process in processes] == list(range(20))
    assert server.running == 0


async def test_a_killed_child_reports_its_signal(server: Forkserver, folder: Path) -> None:
    process = await fork(server, folder, "targets:die")

    assert await process.wait() == -signal.SIGKILL
    assert not process.is_lost


async def test_a_child_ends_on_sigterm_although_the_forkserver_ignores_it(server: Forkserver, folder: Path) -> None:
    process = await fork(server, folder, "targets:forever")

    os.killpg(process.pid, signal.SIGTERM)

    assert await process.wait() == -signal.SIGTERM
    assert server.is_alive


async def test_a_changed_file_of_the_project_is_never_served_stale(server: Forkserver, folder: Path) -> None:
    (folder / "targets.py").write_text(TARGETS + "\nNEW = 1\n")

    with pytest.raises(ForkRefused) as refusal:
        await fork(server, folder, "targets:code", arguments={"value": 0})

    assert refusal.value.stale
    assert "targets.py" in str(refusal.value)


async def test_an_installed_package_that_changed_is_never_served_stale(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(folder / "venv", with_pip=False)
    (folder / "phasewise-1.dist-info").mkdir()
    (folder / "phasewise-1.dist-info/METADATA").write_text("Name: phasewise\nVersion: 1\n")
    python = folder / "venv/bin/python"
    site = next((folder / "venv").glob("lib/python3*/site-packages"))
    monkeypatch.setattr(sys, "executable", str(python))
    server = await Forkserver.start(env={**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{folder}"})
    try:
        assert await (await fork(server, folder, "targets:code", arguments={"value": 0})).wait() == 0

        (site / "shop-2.0.dist-info").mkdir()

        with pytest.raises(ForkRefused, match="site-packages changed"):
            await fork(server, folder, "targets:code", arguments={"value": 0})
    finally:
        await server.aclose()


async def test_what_cannot_be_preloaded_is_named_and_the_rest_works(folder: Path) -> None:
    (folder / "broken.py").write_text("1 / 0")
    env = {**os.environ, "PYTHONPATH": str(folder)}
    server = await Forkserver.start(preload=["missing_module", "broken", "targets"], setup=["targets:fail"], env=env)
    try:
        process = await fork(server, folder, "targets:code", arguments={"value": 0})

        assert await process.wait() == 0
        assert [problem.split(":")[0] for problem in server.problems] == ["missing_module", "broken", "targets"]
    finally:
        await server.aclose()


async def test_nothing_is_forked_beside_a_thread(folder: Path) -> None:
    (folder / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
    )
    server = await Forkserver.start(preload=["threads"], env={**os.environ, "PYTHONPATH": str(folder)})
    try:
        with pytest.raises(ForkRefused, match="started a thread") as refusal:
            await fork(server, folder, "targets:code", arguments={"value": 0})
        assert not refusal.value.stale
    finally:
        await server.aclose()


async def test_children_of_a_killed_forkserver_are_killed_and_reported(server: Forkserver, folder: Path) -> None:
    process = await fork(server, folder, "targets:forever")

    os.kill(server.pid, signal.SIGKILL)

    assert await process.wait() == -signal.SIGKILL
    assert process.is_lost
    await until(lambda: not is_alive(process.pid))
    with pytest.raises(ForkserverDied):
        await fork(server, folder, "targets:code", arguments={"value": 0})


async def test_closing_the_forkserver_ends_its_children(folder: Path) -> None:
    server = await Forkserver.start(preload=["targets"], env={**os.environ, "PYTHONPATH": str(folder)})
    process = await fork(server, folder, "targets:forever")

    await server.aclose()

    await until(lambda: not is_alive(process.pid))
    assert process.returncode == -signal.SIGKILL


async def test_a_worker_killed_by_kill_9_leaves_no_forkserver_and_no_child(folder: Path) -> None:
    worker = textwrap.dedent(
        """
        import asyncio, os
        from phasewise.forkserver.client import Forkserver

        async def main():
            server = await Forkserver.start(preload=["targets"])
            process = await server.fork("targets:forever", {}, env={}, cwd=".")
            print(server.pid, process.pid, flush=True)
            await process.wait()

        asyncio.run(main())
        """
    )
    env = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", worker]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, cwd=folder) as process:  # noqa: ASYNC220
        assert process.stdout is not None
        pids = [int(pid) for pid in (await asyncio.to_thread(process.stdout.readline)).split()]

        process.kill()

    assert len(pids) == 2
    await until(lambda: not any(map(is_alive, pids)))


#: A process that has started another one, which prints its number, in a session of its own.
FAMILY = """
import subprocess, sys
code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
subprocess.run([sys.executable, "-c", code], start_new_session=True)
"""


async def test_what_is_guarded_is_killed_with_what_it_started_when_the_worker_is(folder: Path) -> None:
    worker = textwrap.dedent(
        f"""
        import asyncio, os, subprocess, sys
        from phasewise.forkserver.client import Forkserver

        def start():
            process = subprocess.Popen([sys.executable, "-c", {FAMILY!r}], stdout=subprocess.PIPE)
            return process, int(process.stdout.readline())

        async def main():
            server = await Forkserver.start()
            families = [start(), start(), start()]
            for process, _ in families[1:]:
                await server.guard(process.pid)
            await server.release(families[2][0].pid)
            print(*[pid for process, child in families for pid in (process.pid, child)], flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
        """
    )
    command = [sys.executable, "-c", worker]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder) as process:  # noqa: ASYNC220
        assert process.stdout is not None
        pids = [int(pid) for pid in (await asyncio.to_thread(process.stdout.readline)).split()]
        process.kill()
    others = [*pids[:2], *pids[4:]]
    try:
        assert len(pids) == 6
        await until(lambda: not any(map(is_alive, pids[2:4])))
        assert all(map(is_alive, others))
    finally:
        for pid in others:
            os.kill(pid, signal.SIGKILL)


async def test_a_forkserver_is_idle_only_when_it_guards_nothing(server: Forkserver) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:  # noqa: ASYNC220
        await server.guard(process.pid)
        idle = asyncio.create_task(server.wait_until_idle())
        await asyncio.sleep(0.1)
        assert not idle.done()

        process.kill()
    await server.release(process.pid)
    await asyncio.wait_for(idle, 5)


async def test_a_forkserver_that_cannot_start_says_so(folder: Path) -> None:
    with pytest.raises(ForkserverDied):
        await Forkserver.start(env={"PYTHONHOME": str(folder)}, timeout=10)
