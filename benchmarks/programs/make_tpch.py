"""Make the TPC-H tables with DuckDB's extension: ``python make_tpch.py FILE SCALE``, a new DuckDB database."""

import importlib.util
import sys
from pathlib import Path

import duckdb


def main(file: str, scale: float) -> None:
    package = importlib.util.find_spec("duckdb_extension_tpch")
    assert package is not None
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "extensions" / f"v{duckdb.__version__}"
    with duckdb.connect(file) as connection:
        connection.execute(f"LOAD '{folder / 'tpch.duckdb_extension'}'")
        parts = max(1, round(scale))
        for step in range(parts):  # a step holds its rows in memory
            connection.execute(f"CALL dbgen(sf = {scale}, children = {parts}, step = {step})")


main(sys.argv[1], float(sys.argv[2]))
