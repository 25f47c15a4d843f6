"""Source databases: what any of them must do, which of them serves a URL, and what the project's contract asks of it.

A source is found by the scheme of its URL. Phasewise has its own (see ``registry.BUILT_IN``); a package adds another
with an entry point of the group ``phasewise.sources``, whose name is the scheme and whose object is called as
``factory(url, root, settings)`` and returns a ``Source``.

Never reaches Prefect. ``staging`` and what is above may import it. It runs in the processes that read tables.

The rule that every source keeps: **nothing changes silently**. A value arrives in the lake as it was, or its
column is carried as text and says so (``Column.note``), or the extraction fails and names the column, a sample
row and the option that decides. That option is the contract in phasewise.toml: ``columns = { hits = "VARCHAR" }``.
"""

from phasewise.sources.contract import apply_contract, check_project, describe_project_table, list_project_tables
from phasewise.sources.protocol import (
    Column,
    SnapshotToken,
    Source,
    SourceFactory,
    SourceTable,
    StagedRows,
    find_snapshot,
)
from phasewise.sources.registry import open_source

__all__ = [
    "Column",
    "SnapshotToken",
    "Source",
    "SourceFactory",
    "SourceTable",
    "StagedRows",
    "apply_contract",
    "check_project",
    "describe_project_table",
    "find_snapshot",
    "list_project_tables",
    "open_source",
]
