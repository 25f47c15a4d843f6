"""The project: ``phasewise.toml`` (see docs/reference/project-file.md), parsed and validated into frozen records."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from phasewise.errors import ProjectError, ProjectNotFound, UnknownTable
from phasewise.project.urls import redact_url
from phasewise.settings import Settings, find_checkout

PROJECT_FILE = "phasewise.toml"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Reference(_Record):
    """A foreign key that must hold: every non-null value of *columns* is in *to* of *table*."""

    columns: tuple[str, ...] = Field(min_length=1)
    table: str
    to: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sides_match(self) -> Reference:
        if len(self.columns) != len(self.to):
            raise ValueError(f"{len(self.columns)} columns cannot refer to {len(self.to)}")
        return self


#: How a table is loaded: whole, by new rows, by new and changed rows, or with its history, which was called
#: ``snapshot``, also in warehouses of that time.
Mode = Annotated[
    Literal["full", "append", "merge", "history"],
    BeforeValidator(lambda mode: "history" if mode == "snapshot" else mode),
]


#: What happens when columns of the source change.
DriftRule = Literal["evolve", "freeze", "discard"]


class Table(_Record):
    """What the project says about one table; every field has a default, so a table need not be mentioned."""

    #: Columns whose values together are unique and not null.
    key: tuple[str, ...] = ()
    #: The contract: column → DuckDB type. Empty: whatever the source has.
    columns: dict[str, str] = Field(default_factory=dict)
    #: Glob patterns of the only columns that are loaded. Empty: all.
    only: tuple[str, ...] = ()
    #: Glob patterns of columns that are not loaded.
    exclude: tuple[str, ...] = ()
    #: A condition in the SQL of the source; rows for which it does not hold are not loaded.
    where: str | None = Field(default=None, min_length=1)
    mode: Mode = "full"
    #: The column whose values grow with every new or changed row.
    cursor: str | None = None
    #: How far before the last cursor rows are read again: a number, or a time such as "2 days".
    lookback: int | Decimal | str | None = None
    #: Whether rows that the source no longer has are removed (merge) or closed (history).
    deletes: bool = False
    drift: DriftRule = "evolve"
    #: Raise it to load the whole table once more.
    version: int = 1
    references: tuple[Reference, ...] = ()
    #: Rows above which the table is split into partitions; 0: never, None: as the setting says.
    partition_rows: int | None = Field(default=None, ge=0)
    #: Built-in audits whose bad rows are set aside instead of stopping the batch.
    quarantine: tuple[Literal["key", "references"], ...] = ()
    #: Rows that a batch may set aside: a number, or a share of those that it read, such as "1%". More of them stop it.
    quarantine_limit: int | str = "1%"

    @model_validator(mode="after")
    def _mode_makes_sense(self) -> Table:
        if self.mode == "append" and self.cursor is None:
            raise ValueError("mode append needs a cursor")
        if self.mode == "full" and self.cursor is not None:
            raise ValueError("a cursor needs a mode: append, merge or history")
        if self.lookback is not None and self.cursor is None:
            raise ValueError("lookback needs a cursor")
        if self.deletes and self.mode in ("full", "append"):
            raise ValueError("deletes works only with the modes merge and history")
        return self

    @field_validator("quarantine_limit")
    @classmethod
    def _limit_is_a_share(cls, limit: int | str) -> int | str:
        count_share(limit, 100)
        return limit


#: What a bad row does: it stops the batch, is reported, or is set aside.
Severity = Literal["blocking", "warning", "quarantine"]


class Audit(_Record):
    """A query over the staged tables (by their names) that returns the bad rows."""

    name: str
    sql: str
    table: str | None = None
    severity: Severity = "blocking"

    @model_validator(mode="after")
    def _rows_are_of_a_table(self) -> Audit:
        if self.severity == "quarantine" and self.table is None:
            raise ValueError("an audit that sets rows aside needs the table that they are of")
        return self


class Mart(_Record):
    """A SQL model: one SELECT over the published tables and other marts, in ``marts/<name>.sql``.

    The chart of the report is declared in the file's leading comments:
    ``-- title: Career home runs``, ``-- chart: bar``, ``-- x: player``, ``-- y: home_runs``.
    """

    name: str
    sql: str
    title: str = ""
    chart: Literal["bar", "line", "scatter"] = "bar"
    x: str | None = None
    y: str | None = None


class SourceConfig(_Record):
    #: May contain a password: printed and logged only through ``redact_url``.
    url: str = Field(repr=False)


class WarehouseConfig(_Record):
    #: Folder of the warehouse; relative paths are relative to the project's folder.
    path: str = "warehouse"
    #: PostgreSQL URL of the catalog, for several machines. None: ``catalog.sqlite`` in the folder.
    catalog: str | None = Field(default=None, repr=False)
    #: Folder or ``s3://bucket/prefix`` of the Parquet files. None: ``data`` in the folder of the warehouse.
    data: str | None = None

    @field_validator("catalog")
    @classmethod
    def _catalog_is_postgres(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"postgres(ql)?://", url):
            raise ValueError("a catalog is a postgresql:// URL, or catalog.sqlite in the folder [warehouse] path")
        return url

    @field_validator("data")
    @classmethod
    def _data_is_a_folder_or_s3(cls, data: str | None) -> str | None:
        if data is not None and "://" in data and not re.match(r"s3://[^/?#@:*\[]+(/[^?#*\[]*)?$", data):
            raise ValueError("data is a folder, or s3://bucket/prefix; endpoint and credentials are in AWS_* variables")
        return data


class TableSelection(_Record):
    #: Glob patterns over the names of the source's tables.
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()


class PipelineConfig(_Record):
    #: ``file.py:NAME`` (or ``module:NAME``) of a list of phases that replaces the built-in two.
    phases: str | None = None
    #: Seconds that a whole batch may take; steps that are still running then are cancelled. None: no limit.
    timeout: float | None = Field(default=None, gt=0)
    #: What a second batch of the project does while one is running: ``refuse`` to start, or ``wait`` for its end.
    on_overlap: Literal["refuse", "wait"] = "refuse"
    #: Tables that may fail without failing the batch: a number, or a share such as "10%". They keep their last version.
    allow_failed: int | str = 0


class _ProjectSection(_Record):
    name: str = Field(min_length=1)
    #: Folder for staging and reports; relative to the project's folder.
    state: str = ".phasewise"


class _ProjectFile(_Record):
    project: _ProjectSection
    source: SourceConfig
    warehouse: WarehouseConfig = WarehouseConfig()
    tables: TableSelection = TableSelection()
    table: dict[str, Table] = Field(default_factory=dict)
    audit: tuple[Audit, ...] = ()
    pipeline: PipelineConfig = PipelineConfig()

    @field_validator("audit")
    @classmethod
    def _names_are_unique(cls, audits: tuple[Audit, ...]) -> tuple[Audit, ...]:
        names = [audit.name for audit in audits]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two audits have the name {twice[0]!r}")
        return audits


class Project(_Record):
    """A validated project. Paths are absolute."""

    name: str
    root: Path
    source: SourceConfig
    #: Folder of the warehouse; what of it lies elsewhere is said by *catalog* and *data*.
    warehouse: Path
    #: PostgreSQL URL of the catalog, with its password. None: ``catalog.sqlite`` in the folder.
    catalog: str | None = Field(default=None, repr=False)
    #: Folder or ``s3://bucket/prefix`` of the Parquet files. None: ``data`` in the folder of the warehouse.
    data: str | None = None
    staging: Path
    reports: Path
    tables: TableSelection
    table: dict[str, Table]
    audits: tuple[Audit, ...]
    marts: tuple[Mart, ...]
    pipeline: PipelineConfig

    def find_table(self, name: str) -> Table:
        """Return what the project says about *name*; an empty Table when it says nothing."""
        return self.table.get(name) or Table()

    @property
    def warehouse_name(self) -> str:
        """What messages call the warehouse; without a password."""
        return redact_url(self.catalog) if self.catalog else str(self.warehouse)

    @property
    def data_path(self) -> str:
        """Where the Parquet files are, with a "/" at its end."""
        return f"{self.data or self.warehouse / 'data'}/"

    @property
    def is_stored(self) -> bool:
        """Whether the Parquet files are on S3."""
        return self.data_path.startswith("s3://")

    @property
    def is_replicated(self) -> bool:
        """Whether staging is replicated to machines that share no folder: manifests by the catalog, rows on S3."""
        return self.catalog is not None and self.is_stored


def load_project(root: Path) -> Project:
    """Parse and validate ``phasewise.toml`` and ``marts/*.sql`` of the folder *root*.

    Raises:
        ProjectNotFound: *root* has no phasewise.toml.
        ProjectError: it is malformed; the message names the file, the line where it is known, and the key.
    """
    path = root.resolve() / PROJECT_FILE
    if not path.is_file():
        raise ProjectNotFound(
            f"There is no {PROJECT_FILE} in {root}.",
            hint="Create one (see docs/quickstart.md), or point PHASEWISE_PROJECT at a folder that has one.",
        )
    raw = _read_toml(path)
    try:
        parsed = _ProjectFile.model_validate(raw)
    except ValidationError as exc:
        text, errors = path.read_text(encoding="utf-8"), exc.errors(include_url=False, include_input=False)
        raise ProjectError("\n".join(_explain_error(path, text, error) for error in errors)) from None
    return _build_project(path.parent, parsed)


def find_project(settings: Settings, *, start: Path | None = None) -> Path:
    """Return the project's folder: the setting, else the nearest above *start*, else examples/baseball.

    Raises:
        ProjectNotFound: none of the three exists.
    """
    if settings.project is not None:
        return settings.project.expanduser().resolve()
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / PROJECT_FILE).is_file():
            return folder
    checkout = find_checkout()
    example = checkout / "examples" / "baseball" if checkout else None
    if example is not None and (example / PROJECT_FILE).is_file():
        return example
    raise ProjectNotFound(
        f"No {PROJECT_FILE} in {here} or above it.", hint="Change into a project's folder, or set PHASEWISE_PROJECT."
    )


def resolve_table(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Return the table of *known* that *name* means: the exact name, else the only one equal but for case.

    Raises:
        UnknownTable: there is none; the hint names the nearest.
    """
    if name in known:
        return name
    same = [table for table in known if table.casefold() == name.casefold()]
    if len(same) == 1:
        return same[0]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'Did you mean "{near[0]}"?' if near else f"It has: {', '.join(sorted(known)[:40]) or 'no tables'}."
    raise UnknownTable(name, hint=hint)


def count_share(limit: int | str, total: int) -> int:
    """Return how many of *total* the limit allows: ``2``, or ``"10%"`` (rounded down).

    Raises:
        ValueError: it is neither a number from 0 on nor a percentage from 0 to 100.
    """
    text = str(limit)
    try:
        allowed = total * float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        allowed = -1
    if not allowed >= 0 or (text.endswith("%") and allowed > total):
        raise ValueError(f'"{limit}" is neither a number nor a share such as "10%"')
    return int(allowed)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as exc:
        raise ProjectError(f"{path} is not UTF-8 text (byte {exc.start}).") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ProjectError(f"{path} is not valid TOML: {exc}.") from exc


def _explain_error(path: Path, text: str, error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    line = _find_line(text, location)
    where = f"{path}:{line}" if line else f"{path}"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _known_keys(error["loc"]), n=1)
        suggestion = f' Did you mean "{near[0]}"?' if near else ""
        return f'{where}: unknown key "{key}".{suggestion}'
    if error["type"] == "missing":
        return f'{where}: the key "{key}" is missing.'
    return f'{where}: key "{key}": {error["msg"]}.'


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys allowed next to the last part of *location*."""
    model: type[_Record] = _ProjectFile
    for part in location[:-1]:
        kind = field.annotation if (field := model.model_fields.get(str(part))) else None
        # A record, or a dict or tuple of records; a number or the name of a table is a place among those.
        records = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, _Record)]
        model = records[0] if records else model
    return list(model.model_fields)


def _find_line(text: str, location: list[str]) -> int | None:
    """Return the line where the key of *location* is, or its section; TOML parsers keep no positions."""
    names = [part for part in location if not part.isdigit()]
    for name in reversed(names):
        quoted = re.escape(name)
        pattern = re.compile(rf'^\s*(?:\[+.*)?["\']?{quoted}["\']?\s*(?:=|\]|\.)')
        inner = re.compile(rf'["\'{{,\s]{quoted}["\']?\s*=')
        for number, line in enumerate(text.splitlines(), start=1):
            if pattern.search(line) or inner.search(line):
                return number
    return None


def _build_project(root: Path, parsed: _ProjectFile) -> Project:
    state = root / parsed.project.state
    warehouse, catalog = parsed.warehouse, parsed.warehouse.catalog
    data = _locate_data(root, warehouse.data)
    staging = (state / "staging").resolve()
    if catalog and data and not data.startswith("s3://"):
        # A folder that all machines reach: what they stage is there too, next to the files of the warehouse.
        data, staging = f"{data}/lake", Path(data, "staging")
    return Project(
        name=parsed.project.name,
        root=root,
        source=SourceConfig(url=_expand_environment(parsed.source.url, what="source")),
        warehouse=(root / warehouse.path).resolve(),
        catalog=_expand_environment(catalog, what="catalog") if catalog else None,
        data=data,
        staging=staging,
        reports=(state / "reports").resolve(),
        tables=parsed.tables,
        table=parsed.table,
        audits=parsed.audit,
        marts=tuple(_load_mart(path) for path in sorted((root / "marts").glob("*.sql"))),
        pipeline=parsed.pipeline,
    )


def _locate_data(root: Path, data: str | None) -> str | None:
    if data is None or data.startswith("s3://"):
        return data and data.rstrip("/")
    return str((root / data).resolve())


def _expand_environment(url: str, *, what: str) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ProjectError(
                f"The {what} URL needs the environment variable {name}, which is not set.",
                hint=f"Export {name} where the command and the workers run.",
            )
        return os.environ[name]

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", replace, url)


_MART_HEADER = re.compile(r"^--\s*(title|chart|x|y)\s*:\s*(.+?)\s*$")


def _load_mart(path: Path) -> Mart:
    sql = path.read_text(encoding="utf-8")
    matches = [match for line in sql.splitlines() if (match := _MART_HEADER.match(line))]
    header = {match[1]: match[2] for match in matches}
    try:
        return Mart.model_validate({"name": path.stem, "sql": sql, "title": path.stem.replace("_", " "), **header})
    except ValidationError as exc:
        problem = exc.errors(include_url=False)[0]
        raise ProjectError(f'{path}: the header "{problem["loc"][-1]}": {problem["msg"]}.') from None
