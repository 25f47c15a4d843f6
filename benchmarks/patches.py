"""What each patch gains: CPU seconds of the server, and of workers and runs, without the patch and with it.

    python benchmarks/patches.py --patches parse-events-once,known-run --tables 20 --repeat 3

Two embedded stacks are up, one with all patches and one without the patch, and run the reference topology in turns; see
benchmarks/README.md. ``off`` as a patch leaves out all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.harness import meter, prefect_api, processes
from benchmarks.harness.load import Load
from benchmarks.systems.programs import PROGRAMS
from phasewise.patches.entries import PATCHES
from phasewise.stack.control import running_stack
from phasewise.stack.supervisor import client_environment

POOL = "bench"
#: After completion: what is written late belongs to the run; task runs are written once a second.
_SETTLE_SECONDS = 1.5


@dataclass(frozen=True, kw_only=True)
class Used:
    """CPU seconds of one run of the topology."""

    server: float
    #: Workers, forkservers, flow runs.
    runs: float


@dataclass(frozen=True, kw_only=True)
class Stack:
    api: str
    pid: int

    def measure(self, load: Load) -> Used:
        before = self._read()
        prefect_api.run_topology(self.api, load)
        time.sleep(_SETTLE_SECONDS)
        after = self._read()
        return Used(server=after.server - before.server, runs=after.runs - before.runs)

    def _read(self) -> Used:
        below = meter.read_tree(self.pid)
        server = sum(one.cpu_seconds for one in below if _is_server(one.pid))
        return Used(server=server, runs=sum(one.cpu_seconds for one in below) - server)


def _is_server(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"phasewise.server.app" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    load = Load(tables=options.tables, seconds=0.0, parallel=20)
    with tempfile.TemporaryDirectory(prefix="phasewise-patches-") as folder, ExitStack() as stack:
        patched = stack.enter_context(_running(Path(folder) / "all", "on", load))
        for name in options.patches:
            with _running(Path(folder) / name, name if name == "off" else f"-{name}", load) as without:
                pairs = [(without.measure(load), patched.measure(load)) for _ in range(options.repeat)]
            print(f"| {name} | {_compare(pairs, 'server')} | {_compare(pairs, 'runs')} |", flush=True)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [patch.name for patch in PATCHES if patch.is_optional and patch.process != "local"]
    parser = argparse.ArgumentParser(description="Measure what each patch gains.")
    parser.add_argument("--patches", type=lambda text: text.split(","), default=["off", *names])
    parser.add_argument("--tables", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args(argv)


@contextlib.contextmanager
def _running(home: Path, patches: str, load: Load) -> Iterator[Stack]:
    with running_stack(home, pool=POOL, workers=1, project_env={"PHASEWISE_PATCHES": patches}) as info:
        env = processes.clean_environment(
            **client_environment(home, info.api_url), PHASEWISE_TABLE_CONCURRENCY=str(load.parallel)
        )
        deploy = [sys.executable, PROGRAMS / "phasewise_flows.py", POOL]
        processes.run(deploy, log=home / "deploy.log", env=env, cwd=home)
        stack = Stack(api=info.api_url, pid=info.pid)
        stack.measure(load)  # not counted: whatever is done on the first run only
        yield stack


def _compare(pairs: Sequence[tuple[Used, Used]], part: str) -> str:
    """Return the medians without and with, and the median of the savings of each pair."""
    without, patched = ([getattr(one, part) for one in side] for side in zip(*pairs, strict=True))
    saved = statistics.median(1 - now / then for then, now in zip(without, patched, strict=True))
    return f"{statistics.median(without):.2f} → {statistics.median(patched):.2f} s | {saved:.1%}"


if __name__ == "__main__":
    sys.exit(main())
