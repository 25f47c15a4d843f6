"""Decide which tables of a batch are staged in parts, and keep the decision for a resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from phasewise.errors import PhasewiseError, SourceError
from phasewise.project.config import Project
from phasewise.settings import Settings
from phasewise.sources import SnapshotToken, Source, describe_project_table, open_source
from phasewise.staging.batch import read_plan, remember_lake
from phasewise.staging.load_plan import LakeView, plan_load
from phasewise.staging.manifest import batch_folder, folder_name, list_manifests
from phasewise.staging.partitions import SplitTable, name_item, read_splits, split_tables, write_splits
from phasewise.staging.replication import explaining_writes, remove_shared


def plan_partitions(
    project: Project, settings: Settings, batch: str, snapshot: SnapshotToken | None
) -> dict[str, SplitTable]:
    """Decide which tables of *batch* are staged in parts, and write it down; return table → its parts.

    A table that could not be split is among them too, without parts and with the reason.

    Of a table with a cursor the new rows alone are read, and they are staged whole.
    What was decided at the same moment of the source, or is staged completely, stays. A table that was staged in
    part at another moment is divided again, and its parts from then are removed.

    Raises:
        SourceUnavailable: the source does not answer.
        StagingError: staging cannot be written.
    """
    folder = batch_folder(project, batch)
    plan = read_plan(project, batch)
    before = read_splits(folder)
    moment = snapshot["id"] if snapshot else None
    staged = {manifest.table for manifest in list_manifests(project, batch)}
    kept = {table: split for table, split in before.items() if table in staged or split.moment == moment}
    open_tables = [table for table in (plan.tables if plan else ()) if table not in {*kept, *staged}]
    whole = {
        table: replace(before[table], partitions=(), moment=moment, note=None)
        for table in open_tables
        if table in before
    }
    view = remember_lake(project, settings, batch)
    # One for all tables: some read their whole catalogue to describe one.
    source = open_source(project, settings)
    large = [table for table in open_tables if _reads_all(project, source, table, view)]
    splits = {**before, **whole, **split_tables(project, settings, large, snapshot, before=before)}
    if splits != before:
        write_splits(project, folder, splits)
    with explaining_writes(folder):
        for item in (name_item(table, name) for table in whole for name in before[table].list_names()):
            remove_shared(project, folder / folder_name(item))
    return {table: split for table, split in splits.items() if split.partitions or split.note}


def list_items(tables: Sequence[str], splits: Mapping[str, SplitTable]) -> dict[str, dict[str, str]]:
    """Return what one flow run each stages → its parameters: a table, or a part of one that *splits* has divided."""
    divided = [split for split in splits.values() if split.partitions]
    whole = [table for table in tables if table not in {split.table for split in divided}]
    return {table: {"table": table} for table in whole} | {
        name_item(split.table, part.name): {"table": split.table, "partition": part.name}
        for split in divided
        for part in split.partitions
    }


def estimate_rows(
    project: Project, settings: Settings, items: Mapping[str, Mapping[str, str]], splits: Mapping[str, SplitTable]
) -> dict[str, int]:
    """Return the rows of each of *items*; those are missing that the source does not know without counting."""
    source = open_source(project, settings)
    rows: dict[str, int] = {}
    for item, parameters in items.items():
        if "partition" in parameters:
            split = splits[parameters["table"]]
            rows[item] = split.rows // len(split.partitions)
            continue
        with suppress(SourceError):  # its own flow run reports what is wrong with it
            if (estimate := source.describe_table(item).row_estimate) is not None:
                rows[item] = estimate
    return rows


def _reads_all(project: Project, source: Source, table: str, view: LakeView) -> bool:
    contract = project.find_table(table)
    if contract.cursor is None:
        return True
    try:
        described = describe_project_table(project, source, table)
        return plan_load(contract, described, view.find(table)).reads_all
    except PhasewiseError:
        return False  # its own flow run says what is wrong with it
