"""Which source serves a URL: by its scheme, ours or one that a package adds."""

from __future__ import annotations

import importlib
from importlib import metadata

from phasewise.errors import ProjectError
from phasewise.project.config import Project
from phasewise.project.urls import redact_url
from phasewise.settings import Settings
from phasewise.sources.protocol import Source, SourceFactory

BUILT_IN = {
    "duckdb": "phasewise.sources.duckdb_file:DuckdbSource",
    "file": "phasewise.sources.files:FilesSource",
    "mariadb": "phasewise.sources.mysql:MysqlSource",
    "mysql": "phasewise.sources.mysql:MysqlSource",
    "postgres": "phasewise.sources.postgres:PostgresSource",
    "postgresql": "phasewise.sources.postgres:PostgresSource",
    "s3": "phasewise.sources.files:FilesSource",
    "sqlite": "phasewise.sources.sqlite:SqliteSource",
}


def open_source(project: Project, settings: Settings) -> Source:
    """Return the project's source. It is not connected to yet.

    Raises:
        ProjectError: no source serves the URL's scheme, or the URL is malformed.
    """
    url = project.source.url
    scheme = url.partition(":")[0].lower()
    if scheme in BUILT_IN:
        module, _, name = BUILT_IN[scheme].partition(":")
        factory: SourceFactory = getattr(importlib.import_module(module), name)
        return factory(url, project.root, settings)
    added = metadata.entry_points(group="phasewise.sources")
    for entry_point in added.select(name=scheme):
        factory = entry_point.load()
        return factory(url, project.root, settings)
    known = ", ".join(sorted({*BUILT_IN, *added.names}))
    raise ProjectError(f'No source serves the URL "{redact_url(url)}".', hint=f"Known schemes: {known}.")
