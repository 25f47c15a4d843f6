"""Files on S3 as a source: the contract of sources, and what a listing cannot say."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest

from phasewise.errors import ProjectError, SourceUnavailable
from phasewise.lake.session import open_session, preload_extensions
from phasewise.project.config import Project, load_project
from phasewise.sources import open_source
from phasewise.staging.batch import new_batch_id
from phasewise.staging.extract import extract_table
from phasewise.staging.manifest import staged_files
from phasewise.staging.source_snapshot import open_snapshot
from phasewise.testing.projects import SAMPLE_SETTINGS
from phasewise.testing.source_contract import ROWS, SourceContract
from tests.integration.warehouses import put_object, s3_bucket

SETTINGS = SAMPLE_SETTINGS


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("httpfs",))


@pytest.fixture(scope="module", autouse=True)
def bucket() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


def make_project(tmp_path: Path, url: str) -> Project:
    (tmp_path / "phasewise.toml").write_text(f'[project]\nname = "t"\n[source]\nurl = "{url}"\n')
    return load_project(tmp_path)


def fill(folder: str) -> str:
    """Put files of each kind below *folder* of the bucket; return its URL."""
    put_object(f"{folder}/player.csv", b"id,name\n007,Ann\n8,\n")
    put_object(f"{folder}/odd [1]*.csv", b"a\n1\n")
    put_object(f"{folder}/zipped.csv.gz", gzip.compress(b"a\n1\n"))
    put_object(f"{folder}/parts/one.csv", b"a,b\n1,2\n")
    put_object(f"{folder}/parts/two.csv", b"b,a\n3,4\n")
    put_object(f"{folder}/parts/deeper/three.csv", b"c\n5\n")
    put_object(f"{folder}/events.jsonl", b'{"id": 12345678901234567890}\n')
    put_object(f"{folder}/_SUCCESS", b"")
    return f"s3://lake/{folder}"


def read(project: Project, table: str) -> list[tuple]:
    manifest = extract_table(project, SETTINGS, batch=new_batch_id(), table=table)
    with open_session(SETTINGS, extensions=()) as connection:
        files = [str(path) for path in staged_files(project, manifest)]
        return connection.execute("FROM read_parquet(?) ORDER BY 1", [files]).fetchall()


class TestCsvOnS3(SourceContract):
    def make_url(self, tmp_path: Path) -> str:
        for name, rows in (("contract", ROWS), ("contract_empty", [])):
            lines = ["id,label"]
            for number, label in rows:
                # A quoted empty field is an empty text, an unquoted one is NULL.
                quoted = "" if label is None else '"' + label.replace('"', '""') + '"'
                lines.append(f"{number},{quoted}")
            put_object(f"{tmp_path.name}/{name}.csv", ("\n".join(lines) + "\n").encode())
        return f"s3://lake/{tmp_path.name}"


def test_a_folder_on_s3_is_a_database_of_tables(tmp_path: Path):
    project = make_project(tmp_path, fill(tmp_path.name))

    assert open_source(project, SETTINGS).list_tables() == ["events", "odd [1]*", "parts", "player", "zipped"]
    assert read(project, "player") == [("007", "Ann"), ("8", None)]
    assert read(project, "zipped") == [("1",)]
    assert read(project, "parts") == [("1", "2"), ("4", "3")]
    assert read(project, "odd [1]*") == [("1",)]
    assert read(project, "events") == [("12345678901234567890",)]


def test_a_pattern_selects_objects(tmp_path: Path):
    url = fill(tmp_path.name)

    assert open_source(make_project(tmp_path, f"{url}/p*.csv"), SETTINGS).list_tables() == ["player"]
    assert open_source(make_project(tmp_path, f"{url}/player.csv"), SETTINGS).list_tables() == ["player"]
    with pytest.raises(SourceUnavailable, match="No file matches"):
        open_source(make_project(tmp_path, f"{url}/q*.csv"), SETTINGS).check()
    with pytest.raises(SourceUnavailable, match="cannot be listed.*AWS_"):
        open_source(make_project(tmp_path, "s3://no-such-bucket/x"), SETTINGS).check()
    with pytest.raises(ProjectError, match="names no bucket"):
        open_source(make_project(tmp_path, "s3:///x"), SETTINGS)


def test_an_object_that_changes_during_the_batch_fails_its_table(tmp_path: Path):
    project = make_project(tmp_path, fill(tmp_path.name))

    with open_snapshot(project, SETTINGS, "b1") as token:
        extract_table(project, SETTINGS, batch="b1", table="player", snapshot=token)
        put_object(f"{tmp_path.name}/zipped.csv.gz", gzip.compress(b"a\n11\n12\n"))
        with pytest.raises(SourceUnavailable, match="have changed since the batch began"):
            extract_table(project, SETTINGS, batch="b1", table="zipped", snapshot=token)
