"""Write docs/reference/types.md from the code that maps types; with --check only say whether it is current."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from phasewise.sources import Column, duckdb_file, mysql, postgres, sqlite

PATH = Path(__file__).resolve().parents[1] / "docs" / "reference" / "types.md"

HEAD = """# Types: from the source to the warehouse

Written by `tools/write_types_reference.py` from the code of the sources. Do not edit.

**Nothing changes silently.** A value arrives as it was; or its column is carried as text and the manifest and
the report say so; or the extraction fails and names table, column, count, a sample row and the option that
decides. That option is the contract of the table in `phasewise.toml`:

```toml
[table.batting.columns]
H = "VARCHAR"          # carry as text, whatever the source holds
```

A table without columns, a column without a name, and columns or tables that differ by case only are refused
by name: the warehouse cannot hold them.
"""

NOTES = {
    "SQLite": """\
SQLite types each value, a column only prefers one. **Every value is checked**: a text in an `INTEGER` column,
a blob in a `TEXT` column, a text that is not UTF-8, an integer above 2^53 in a `NUMERIC` column, `2024-02-31`
in a `DATE` column fail the table. Of the contract's types, `VARCHAR` carries anything but blobs, `BLOB` the
bytes of texts; numbers may become `BIGINT`, `DOUBLE`, `BOOLEAN` or `DECIMAL(p,s)`; texts `DATE`, `TIME`,
`TIMESTAMP`, `TIMESTAMPTZ` or `UUID`. Generated columns are carried; views only when they are named.""",
    "PostgreSQL": """\
`NaN` in a `numeric(p,s)` and timestamps after the year 294246 fail the table. `infinity` and years before
Christ are carried. A domain is its base type. The trailing blanks of `char(n)`, which PostgreSQL does not
count, are not carried. The contract may give a `numeric` a `DECIMAL(p,s)`, checked; any column may be
`VARCHAR`. A partitioned table is one table; views, materialised views and foreign tables are extracted only
when they are named.""",
    "MySQL and MariaDB": """\
`0000-00-00`, `2024-00-01` and `2024-02-31` fail the table. `timestamp` is a moment and is read in UTC;
`datetime` has no zone. `time` reaches 838 hours and is text. `tinyint(1)` is a number; the contract may make
it `BOOLEAN`, checked. Any column but a binary one may be `VARCHAR`.""",
    "DuckDB and Parquet files": """\
What Parquet or the warehouse would change is carried as text. Any column but a `BLOB` may be `VARCHAR`.""",
}

FILES = """
## CSV and JSON files

Every column is `VARCHAR`: guessing types changes values (`007`). In CSV an unquoted empty field is NULL, a
quoted one an empty text; quotes are `"`, doubled within a value, and no row is a comment. In JSON each key of
the objects is a column; objects and lists are JSON text. The contract may make a column `BIGINT`, `DOUBLE`,
`DECIMAL(p,s)`, `BOOLEAN`, `DATE`, `TIME`, `TIMESTAMP`, `TIMESTAMPTZ` or `UUID`; every value is checked.
"""


# One column for each kind of type.
SQLITE = "INTEGER|BIGINT|REAL|DOUBLE PRECISION|TEXT|VARCHAR(40)|BLOB|BOOLEAN|DATE|DATETIME|TIMESTAMP|TIME"
SQLITE += "|DECIMAL(10,2)|NUMERIC|DECIMAL(40,2)|JSON||ANY"
MYSQL = [*mysql.PLAIN, "bigint unsigned", "tinyint(1)", "decimal(18,4)", "decimal(65,30)", "bit(1)", "bit(8)", "time"]
MYSQL += ["enum('a','b')", "set('a','b')", "inet6", "point"]
DUCKDB = "BOOLEAN|TINYINT|BIGINT|UBIGINT|FLOAT|DOUBLE|DECIMAL(18,4)|VARCHAR|BLOB|UUID|DATE|TIME|TIMESTAMP"
DUCKDB += "|TIMESTAMP WITH TIME ZONE|JSON|HUGEINT|INTERVAL|TIME WITH TIME ZONE|TIMESTAMP_NS|BIT|INTEGER[]"
DUCKDB += "|STRUCT(a INTEGER)|MAP(VARCHAR, INTEGER)|ENUM('a', 'b')"


def list_postgres_types() -> list[Column]:
    numerics = ["numeric(18,4)", "numeric", "numeric(50,10)", "numeric(5,-2)"]
    others = ["interval", "timetz", "integer[]", "money", "bit(3)", "inet", "int4range", "point", "tsvector", "oid"]
    kinds = [(name, name, name) for name in [*postgres.PLAIN, *sorted(postgres.TEXTS), *others]]
    kinds += [("numeric", name, name) for name in numerics]
    found = [(declared, *postgres.find_type(type_name, base, declared)) for type_name, base, declared in kinds]
    found.append(("an enum", *postgres.find_type("mood", "mood", "mood", is_enum=True)))
    return [Column(name=name, source_type=name, type=kind, nullable=True, note=note) for name, kind, note in found]


def render() -> str:
    """Return the whole page."""
    tables = {
        "SQLite": [sqlite.describe_column(name or "(none)", name, 0, 0, 0) for name in SQLITE.split("|")],
        "PostgreSQL": list_postgres_types(),
        "MySQL and MariaDB": [mysql.describe_column(name, name, re.split(r"[( ]", name)[0], 1) for name in MYSQL],
        "DuckDB and Parquet files": [duckdb_file.describe_column(name, name, True) for name in DUCKDB.split("|")],
    }
    parts = [f"\n## {name}\n\n{NOTES[name]}\n\n{render_table(columns)}" for name, columns in tables.items()]
    return HEAD + "".join(parts) + FILES


def render_table(columns: list[Column]) -> str:
    lines = ["| in the source | in the warehouse | remark |", "|---|---|---|"]
    for column in columns:
        source = f"`{column.source_type}`" if column.source_type and " an" not in f" {column.source_type}" else ""
        lines.append(f"| {source or column.name} | `{column.type}` | {column.note or ''} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    text = render()
    if "--check" in sys.argv[1:]:
        return 0 if PATH.is_file() and PATH.read_text(encoding="utf-8") == text else 1
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(text, encoding="utf-8")
    print(f"Wrote {PATH}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
