"""The benchmark's own parts; nothing here is timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from benchmarks import data_plane, start, topology
from benchmarks.harness import meter, processes, tpch
from benchmarks.harness.load import Load, Measured
from benchmarks.systems import load_systems
from benchmarks.systems.readers import load_readers

_BURN = "import time; end = time.process_time() + 0.4\nwhile time.process_time() < end: pass"


def test_arguments_are_lists_separated_by_commas() -> None:
    options = topology.parse(["--systems", "floor,luigi", "--tables", "20,100", "--seconds", "1,0"], ["floor", "luigi"])

    assert options.systems == ["floor", "luigi"]
    assert options.tables == [20, 100]
    assert options.seconds == [1.0, 0.0]
    assert options.repeat == 3


def test_an_unknown_system_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        topology.parse(["--systems", "florr"], ["floor"])

    assert "unknown: florr" in capsys.readouterr().err


def test_all_systems_of_the_documentation_exist() -> None:
    readme = (Path(topology.__file__).parent / "README.md").read_text()

    assert all(f"| `{name}` |" in readme for name in [*load_systems(), *load_readers()])


def test_the_critical_path_of_one_second_is_five_thirds() -> None:
    load = Load(tables=20, seconds=1.0, parallel=20)

    assert load.seconds + 2 * load.short == pytest.approx(5 / 3)
    assert load.steps == 24


def test_a_record_has_the_documented_fields_in_json(tmp_path: Path) -> None:
    file = tmp_path / "out.json"

    code = topology.main(
        ["--systems", "floor", "--tables", "2", "--seconds", "0", "--repeat", "1", "--json", str(file)]
    )

    [record] = json.loads(file.read_text())
    assert code == 0
    assert list(record) == [
        "system", "version", "tables", "seconds", "repeat", "makespan_s", "cpu_s", "flow_runs",
    ]  # fmt: skip
    assert record["flow_runs"] == 6


def test_the_summary_shows_medians() -> None:
    shared = {"system": "floor", "version": "1", "tables": 2, "seconds": 1.0, "cpu_s": 0.6, "flow_runs": 6}
    records = [
        topology.Record(**shared, repeat=number, makespan_s=makespan) for number, makespan in enumerate([9.0, 2.0, 3.0])
    ]

    assert "| floor | 1 | 2 | 1 | 3 | 3.00 | 0.6 | 0.100 |" in topology.summarise(records)


def test_the_makespan_runs_from_submission_to_completion() -> None:
    assert Measured(submitted=10.0, completed=12.5).makespan == 2.5


def test_cpu_time_of_a_grandchild_whose_parent_ended_is_counted(tmp_path: Path) -> None:
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {_BURN!r}])"
    stays = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {orphan!r}]); time.sleep(600)"
    before = meter.tree_cpu_seconds()

    with processes.service([sys.executable, "-c", stays], log=tmp_path / "log", env=dict(os.environ), cwd=tmp_path):
        used = processes.wait_until(
            lambda: (used := meter.tree_cpu_seconds() - before) > 0.4 and used, "the CPU time", seconds=30
        )

    assert used < 1.5


def test_nothing_is_left_when_the_benchmark_is_killed(tmp_path: Path) -> None:
    inner = f"""
import os, sys, time
from pathlib import Path
from benchmarks.harness import processes
child = "import os, subprocess, sys, time; subprocess.Popen(['sleep', '600'], start_new_session=True); "
child += "print(os.getpid(), flush=True); time.sleep(600)"
with processes.service([sys.executable, "-c", child], log=Path({str(tmp_path / "log")!r}), env=dict(os.environ),
                       cwd=Path.cwd()) as guard:
    print(guard.pid, flush=True)
    time.sleep(600)
"""
    root = Path(topology.__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", inner], cwd=root, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        guard = int(benchmark.stdout.readline())
        processes.wait_until(lambda: len(meter.descendants(guard)) == 2, "both processes", seconds=30)
        below = meter.descendants(guard)

        benchmark.kill()

    processes.wait_until(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in [guard, *below]), "their end", seconds=30
    )


def test_reading_a_table_gives_a_record_with_the_documented_fields(tmp_path: Path) -> None:
    made = tmp_path / "tpch.duckdb"
    with duckdb.connect(str(made)) as connection:
        for table in tpch.TABLES:
            connection.execute(f"CREATE TABLE {table} AS SELECT i AS id, 'row ' || i AS note FROM range(7) AS t (i)")
    file = tmp_path / "out.json"

    systems, sources = "phasewise,duckdb,duckdb-typed", "sqlite,duckdb"
    chosen = ["--systems", systems, "--sources", sources, "--tables", "region", "--repeat", "1"]
    code = data_plane.main([*chosen, "--keep", str(tmp_path), "--json", str(file)])

    records = json.loads(file.read_text())
    assert code == 0
    assert [(record["source"], record["system"], record["rows"]) for record in records] == [
        (source, system, 7) for source in ("sqlite", "duckdb") for system in ("phasewise", "duckdb", "duckdb-typed")
    ]
    assert list(records[0]) == ["system", "version", "source", "table", "rows", "seconds", "cpu_s", "peak_rss_mib"]
    assert all(record["seconds"] > 0 and record["cpu_s"] > 0 and record["peak_rss_mib"] > 20 for record in records)


def test_a_system_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with duckdb.connect(str(tmp_path / "tpch.duckdb")) as connection:
        connection.execute("CREATE TABLE other (i INTEGER)")

    code = data_plane.main(
        ["--systems", "duckdb", "--sources", "duckdb", "--tables", "region", "--repeat", "1", "--keep", str(tmp_path)]
    )

    assert code == 1
    assert "duckdb skipped on region: it failed: see" in capsys.readouterr().err


def test_the_summary_compares_with_phasewise_on_the_same_table() -> None:
    shared = {"version": "1", "source": "sqlite", "table": "orders", "rows": 100, "cpu_s": 1.0}
    measured = [("phasewise", 2.0, 100.0), ("adbc", 5.0, 50.0), ("adbc", 7.0, 70.0), ("adbc", 6.0, 60.0)]
    records = [
        data_plane.Record(system=system, seconds=seconds, peak_rss_mib=peak, **shared)
        for system, seconds, peak in measured
    ]

    assert "| sqlite | orders | adbc | 1 | 3 | 17 | 1.00 | 70 | 3.00 |" in data_plane.summarise(records)


def test_the_summary_of_starts_shows_median_and_the_slowest_of_a_hundred() -> None:
    starts = [0.1] * 98 + [0.2, 0.4]
    record = start.Record(system="phasewise", version="1", starts_s=starts, run_pss_mib=20.5)

    assert start.summarise([record]).splitlines()[-1] == "| phasewise | 1 | 100 | 100 | 400 | 20.5 |"


def test_memory_that_processes_share_is_counted_once_in_a_tree() -> None:
    size = 64 << 20
    before = meter.tree_pss_bytes()  # a stack of other tests may run below this process
    code = f"import os, sys\nblock = bytearray({size})\npid = os.fork()\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()

        taken = meter.tree_pss_bytes()

        assert size < taken - before < 2 * size
