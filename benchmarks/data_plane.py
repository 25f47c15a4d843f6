"""One table from a database into Parquet, by phasewise and by what people would use instead, side by side.

    python benchmarks/data_plane.py --systems phasewise,duckdb,psql --sources postgresql,sqlite --scale 1 --json FILE

See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.harness import environments, tpch
from benchmarks.harness.options import choices, run
from benchmarks.harness.processes import Broken
from benchmarks.programs.reading import Job
from benchmarks.systems import Unavailable
from benchmarks.systems.readers import Reader, load_readers


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of one system."""

    system: str
    version: str
    source: str
    table: str
    rows: int
    #: From before connecting until the rows are written.
    seconds: float
    #: CPU seconds of that, of the program and of PostgreSQL.
    cpu_s: float
    #: Largest memory of the program.
    peak_rss_mib: float


def main(argv: Sequence[str] | None = None) -> int:
    readers = load_readers()
    options = parse(argv, list(readers))
    chosen = {name: readers[name] for name in options.systems}
    return run(lambda folder: measure(chosen, options, folder), options, describe=describe, summarise=summarise)


def parse(argv: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure reading TPC-H tables into Parquet, side by side.")
    parser.add_argument(
        "--systems", type=choices(names), default=list(names), help=f"which of {', '.join(names)}; default: all"
    )
    parser.add_argument("--sources", type=choices(tpch.SOURCES), default=["postgresql", "sqlite"])
    parser.add_argument("--tables", type=choices(tpch.TABLES), default=list(tpch.TABLES), help="default: all eight")
    parser.add_argument("--scale", type=float, default=1.0, help="TPC-H's; 1 is 6 million rows of lineitem")
    parser.add_argument("--threads", type=int, default=2, help="of DuckDB, for phasewise and for DuckDB itself")
    parser.add_argument("--memory-limit", default="200MB", help="of DuckDB, likewise; PHASEWISE_EXTRACT_MEMORY_LIMIT")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write the records to")
    parser.add_argument("--keep", type=Path, help="folder for data and logs, kept; default: a temporary one")
    parser.add_argument(
        "--environments", type=Path, default=environments.default_folder(), help="where the peers are installed"
    )
    return parser.parse_args(argv)


def measure(readers: Mapping[str, Reader], options: argparse.Namespace, folder: Path) -> Iterator[Record]:
    """Yield a record for each run. The systems take turns on each table."""
    with tpch.serving(options.sources, options.scale, folder, options.environments) as addresses:
        for _ in range(options.repeat):
            for source, address in addresses.items():
                for table in options.tables:
                    for name, reader in readers.items():
                        if source not in reader.sources:
                            continue
                        try:
                            yield _measure_run(name, reader, source, address, table, options, folder)
                        except (Unavailable, Broken) as reason:
                            print(f"{name} skipped on {table}: {reason}", file=sys.stderr, flush=True)


def _measure_run(
    name: str, reader: Reader, source: str, address: str, table: str, options: argparse.Namespace, folder: Path
) -> Record:
    version = reader.version()
    with tempfile.TemporaryDirectory(prefix="read-", dir=folder) as target:
        job = Job(
            source=source,
            address=address,
            table=table,
            folder=target,
            threads=options.threads,
            memory_limit=options.memory_limit,
        )
        reading, cpu = reader.read(job, peers=options.environments, log=folder / f"{name}.log")
    return Record(
        system=name,
        version=version,
        source=source,
        table=table,
        rows=reading.rows,
        seconds=round(reading.seconds, 3),
        cpu_s=round(cpu, 2),
        peak_rss_mib=round(reading.peak_rss_mib, 1),
    )


def describe(record: Record) -> str:
    return (
        f"{record.system:15} {record.source:10} {record.table:10} {record.rows:>10,} rows "
        f"{record.seconds:8.2f} s, CPU {record.cpu_s:8.2f} s, {record.peak_rss_mib:7.0f} MiB"
    )


def summarise(records: Sequence[Record]) -> str:
    """Return the medians as a Markdown table, and how each compares with phasewise on the same table."""
    groups: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.source, record.table, record.system, record.version), []).append(record)
    medians = {key: statistics.median(record.seconds for record in group) for key, group in groups.items()}
    own = {key[:2]: seconds for key, seconds in medians.items() if key[2] == "phasewise"}
    lines = [
        "| source | table | system | version | runs | rows/s | CPU s | peak MiB | phasewise is faster by |",
        "|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for key, group in sorted(groups.items(), key=lambda item: (item[0][0], -item[1][0].rows, medians[item[0]])):
        source, table, system, version = key
        cpu = statistics.median(record.cpu_s for record in group)
        peak = max(record.peak_rss_mib for record in group)
        ratio = f"{medians[key] / own[key[:2]]:.2f}" if key[:2] in own else ""
        lines.append(
            f"| {source} | {table} | {system} | {version} | {len(group)} | {group[0].rows / medians[key]:,.0f} "
            f"| {cpu:.2f} | {peak:.0f} | {ratio} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
