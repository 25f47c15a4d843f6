"""The reference topology on phasewise and on what people would use instead, side by side.

    python benchmarks/topology.py --systems phasewise,airflow --tables 20,100 --seconds 1 --repeat 3 --json FILE

See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.harness import environments, meter
from benchmarks.harness.load import Load
from benchmarks.harness.options import choices, run
from benchmarks.harness.processes import Broken
from benchmarks.systems import Context, Submit, System, Unavailable, load_systems

#: After completion: the system's own tail (events written, processes ended) belongs to the run.
_SETTLE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of one system."""

    system: str
    version: str
    tables: int
    seconds: float
    #: 1 for the first.
    repeat: int
    #: From submission to completion of main, as the system recorded them.
    makespan_s: float
    #: CPU seconds of all processes of the system, server and database included.
    cpu_s: float
    #: Steps that worked, as ``Load.steps``.
    flow_runs: int


def main(argv: Sequence[str] | None = None) -> int:
    systems = load_systems()
    options = parse(argv, list(systems))
    chosen = {name: systems[name] for name in options.systems}
    return run(lambda folder: measure(chosen, options, folder), options, describe=describe, summarise=summarise)


def parse(argv: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the reference topology on several systems, side by side.")
    parser.add_argument(
        "--systems", type=choices(names), default=list(names), help=f"which of {', '.join(names)}; default: all"
    )
    parser.add_argument("--tables", type=_numbers(int), default=[20], help="such as 20,100")
    parser.add_argument("--seconds", type=_numbers(float), default=[1.0], help="that a table sleeps, such as 1,0")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=20, help="tables at once, for every system")
    parser.add_argument("--json", type=Path, help="file to write the records to")
    parser.add_argument("--keep", type=Path, help="folder for data and logs, kept; default: a temporary one")
    parser.add_argument(
        "--environments", type=Path, default=environments.default_folder(), help="where the peers are installed"
    )
    return parser.parse_args(argv)


def _numbers(kind: type):  # type: ignore[no-untyped-def, type-arg] # argparse wants any callable
    def read(text: str) -> list[float]:
        return [kind(part) for part in text.split(",")]

    return read


def measure(systems: dict[str, System], options: argparse.Namespace, folder: Path) -> Iterator[Record]:
    """Yield a record for each run. The systems take turns within a repeat, each up only while it is measured."""
    loads = [
        Load(tables=tables, seconds=seconds, parallel=options.parallel)
        for seconds in options.seconds
        for tables in options.tables
    ]
    for repeat in range(1, options.repeat + 1):
        for name, system in systems.items():
            home = folder / name
            home.mkdir(exist_ok=True)
            try:
                yield from _measure_system(name, system, repeat, loads, home, options.environments)
            except (Unavailable, Broken) as reason:
                print(f"{name} skipped: {reason}", file=sys.stderr, flush=True)


def _measure_system(
    name: str, system: System, repeat: int, loads: Sequence[Load], home: Path, peers: Path
) -> Iterator[Record]:
    wanted = [load for load in loads if system.most_tables is None or load.tables <= system.most_tables]
    for load in loads:
        if load not in wanted:
            print(f"{name} skipped with {load.tables} tables: more than {system.most_tables}", file=sys.stderr)
    if not wanted:
        return
    # Not recorded: whatever a system does on its first run only.
    warm_up = Load(tables=2, seconds=0.0, parallel=wanted[0].parallel)
    context = Context(home=home, environments=peers, loads=[warm_up, *wanted])
    with _nothing_left(), system.running(context) as submit:
        submit(warm_up)
        for load in wanted:
            yield _measure_run(name, system.version(), repeat, load, submit)


def _measure_run(name: str, version: str, repeat: int, load: Load, submit: Submit) -> Record:
    time.sleep(_SETTLE_SECONDS)  # the run before is over for its system too
    before = meter.tree_cpu_seconds()
    run = submit(load)
    time.sleep(_SETTLE_SECONDS)
    cpu = meter.tree_cpu_seconds() - before
    return Record(
        system=name,
        version=version,
        tables=load.tables,
        seconds=load.seconds,
        repeat=repeat,
        makespan_s=round(run.makespan, 3),
        cpu_s=round(cpu, 2),
        flow_runs=load.steps,
    )


@contextlib.contextmanager
def _nothing_left() -> Iterator[None]:
    yield
    if left := meter.descendants(os.getpid()):
        raise Broken(f"processes were left behind: {left}")


def describe(record: Record) -> str:
    per_step = record.cpu_s / record.flow_runs
    return (
        f"{record.system:21} N={record.tables:<4} S={record.seconds:<4g} repeat {record.repeat}: "
        f"{record.makespan_s:7.2f} s, CPU {record.cpu_s:7.2f} s, {per_step:.3f} s a step"
    )


def summarise(records: Sequence[Record]) -> str:
    """Return the medians as a Markdown table."""
    groups: dict[tuple[str, str, int, float], list[Record]] = {}
    for record in records:
        groups.setdefault((record.system, record.version, record.tables, record.seconds), []).append(record)
    lines = [
        "| system | version | tables | seconds | runs | makespan s | CPU s | CPU s per step |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (system, version, tables, seconds), group in groups.items():
        makespan = statistics.median(record.makespan_s for record in group)
        cpu = statistics.median(record.cpu_s for record in group)
        lines.append(
            f"| {system} | {version} | {tables} | {seconds:g} | {len(group)} "
            f"| {makespan:.2f} | {cpu:.1f} | {cpu / group[0].flow_runs:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
