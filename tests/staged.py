"""What is staged, for tests to look at."""

from __future__ import annotations

from phasewise.project.config import Project, load_project
from phasewise.staging.manifest import Manifest, batch_folder, folder_name, read_complete
from phasewise.staging.partitions import name_item
from phasewise.staging.replication import fetch_staging


def read_manifest(project: Project, batch: str, table: str, partition: str | None = None) -> Manifest:
    """Return the manifest of a staged table, or of a part of it."""
    folder = batch_folder(project, batch) / folder_name(name_item(table, partition))
    fetch_staging(project, batch, folder=folder.name)
    manifest = read_complete(folder)
    assert manifest is not None, f"{table} is not staged in {batch}"
    return manifest


def change_project(project: Project, old: str, new: str) -> Project:
    """Replace *old* in the file of *project*; return the project as it is then."""
    path = project.root / "phasewise.toml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return load_project(project.root)
