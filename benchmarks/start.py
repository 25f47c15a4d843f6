"""How long a flow run waits before it starts, and what memory one more of them takes.

    python benchmarks/start.py --systems phasewise,stock --starts 100 --json FILE

See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.harness import environments, meter, prefect_api
from benchmarks.harness.load import Load
from benchmarks.harness.processes import Broken, wait_until
from benchmarks.systems import Context
from benchmarks.systems.phasewise import Phasewise, PhasewisePostgresql
from benchmarks.systems.stock import Stock

SYSTEMS = {"phasewise": Phasewise(), "phasewise-postgresql": PhasewisePostgresql(), "stock": Stock()}
#: Between two starts: the stack has nothing else to do.
_PAUSE_SECONDS = 0.5
#: How long the runs sleep whose memory is measured.
_ASLEEP_SECONDS = 20.0
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was measured on one system."""

    system: str
    version: str
    #: Seconds from Scheduled to Running, in the order of measuring.
    starts_s: list[float]
    #: Proportional set size of one more running flow run.
    run_pss_mib: float


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    records = []
    for name in options.systems.split(","):
        with tempfile.TemporaryDirectory(prefix="phasewise-start-") as folder:
            Path(folder).chmod(0o755)  # PostgreSQL runs as another user when we are root
            try:
                records.append(_measure(name, Path(folder), options))
            except Broken as reason:
                print(f"{name} skipped: {reason}", file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    print(summarise(records))
    return 0 if records else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how flow runs start on an idle stack.")
    parser.add_argument("--systems", default="phasewise", help=f"of {', '.join(SYSTEMS)}; separated by commas")
    parser.add_argument("--starts", type=int, default=100, help="flow runs, one after the other")
    parser.add_argument("--runs", type=int, default=10, help="flow runs at once whose memory is measured")
    parser.add_argument("--json", type=Path, help="file to write the records to")
    parser.add_argument("--environments", type=Path, default=environments.default_folder())
    return parser.parse_args(argv)


def _measure(name: str, home: Path, options: argparse.Namespace) -> Record:
    system = SYSTEMS[name]
    load = Load(tables=1, seconds=0.0, parallel=options.runs + 1)
    with system.serving(Context(home=home, environments=options.environments, loads=[load])) as api:
        _start(api)  # not counted: whatever a system does on its first run only
        starts = []
        for _ in range(options.starts):
            time.sleep(_PAUSE_SECONDS)
            starts.append(_start(api))
        pss = _measure_memory(api, options.runs)
    return Record(system=name, version=system.version(), starts_s=starts, run_pss_mib=round(pss, 1))


def _start(api: str) -> float:
    run_id = prefect_api.create_run(api, "bench-pre/bench", {"seconds": 0.0})
    return wait_until(lambda: prefect_api.read_start(api, run_id), "a flow run", seconds=120, pause=0.5)


def _measure_memory(api: str, runs: int) -> float:
    """Return the MiB that *runs* more flow runs take, beside one that runs already, divided by their number."""
    taken = []
    for count in (1, runs):
        ids = [
            prefect_api.create_run(api, "bench-table/bench", {"table": str(n), "seconds": _ASLEEP_SECONDS})
            for n in range(count)
        ]
        wait_until(lambda ids=ids: all(prefect_api.is_running(api, run) for run in ids), "runs asleep", seconds=120)
        time.sleep(1)  # they are all in their sleep now
        taken.append(meter.tree_pss_bytes())
    return (taken[1] - taken[0]) / runs / _MIB


def summarise(records: Sequence[Record]) -> str:
    """Return the records as a Markdown table."""
    lines = [
        "| system | version | starts | Scheduled to Running: median ms | p99 ms | MiB of one more run |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for record in records:
        starts = sorted(record.starts_s)
        median = statistics.median(starts) * 1000
        p99 = starts[min(len(starts) - 1, int(len(starts) * 0.99))] * 1000
        lines.append(
            f"| {record.system} | {record.version} | {len(starts)} | {median:.0f} | {p99:.0f} | {record.run_pss_mib} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
