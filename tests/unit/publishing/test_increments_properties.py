"""Whatever happens to a source between batches, the lake holds what a plain model of the mode says."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phasewise.lake.publications import open_reader
from phasewise.lake.session import preload_extensions
from phasewise.publishing.maintenance import maintain_lake
from phasewise.publishing.rollback import rollback_batch
from phasewise.staging.batch import read_plan
from phasewise.testing.projects import SAMPLE_SETTINGS as SETTINGS
from phasewise.testing.projects import change_source, publish_sample, stage_batch, write_project

Key = int
#: Text and cursor.
Row = tuple[str | None, int | None]


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    preload_extensions(("sqlite_scanner", "ducklake"))


@dataclass
class Model:
    """What the lake must hold: the rows now, and of a history those before, with the batches that saw them."""

    mode: str
    deletes: bool
    rows: dict[Key, Row] = field(default_factory=dict)
    since: dict[Key, int] = field(default_factory=dict)
    closed: list[tuple[Key, Row, int, int]] = field(default_factory=list)
    mark: int | None = None

    def load(self, source: dict[Key, Row], batch: int) -> None:
        if self.mode == "append" and self.mark is None:
            self.rows = {}  # nothing to go on from: the table is loaded whole
        for key, row in source.items():
            is_read = self.mark is None or row[1] is None or row[1] >= self.mark
            if is_read and (self.mode != "append" or key not in self.rows) and self.rows.get(key) != row:
                self._close(key, batch)
                self.rows[key], self.since[key] = row, batch
        if self.deletes:
            for key in self.rows.keys() - source.keys():
                self._close(key, batch)
                del self.rows[key]
        # Without a cursor all rows are read, so nothing is ever behind the mark.
        cursors = [row[1] for row in source.values() if row[1] is not None and (not self.mark or row[1] >= self.mark)]
        self.mark = max([*cursors, *([self.mark] if self.mark is not None else [])], default=None)

    def _close(self, key: Key, batch: int) -> None:
        if self.mode == "history" and key in self.rows:
            self.closed.append((key, self.rows[key], self.since[key], batch))

    def expected(self) -> list[tuple[object, ...]]:
        is_history = self.mode == "history"
        current = [(key, *row, self.since[key] if is_history else None, None) for key, row in self.rows.items()]
        closed = [(key, *row, first, last) for key, row, first, last in self.closed]
        return sorted([*current, *closed], key=repr)


keys = st.integers(1, 4)
texts = st.sampled_from(["a", "b", "", None])
#: How far the cursor of a row is beyond the newest; 0 is a tie, None is no cursor, below 0 is a row that comes late.
steps = st.sampled_from([0, 1, 2, -3, None])
put = st.tuples(st.just("put"), keys, texts, steps)
remove = st.tuples(st.just("remove"), keys, st.none(), st.none())
batches = st.lists(st.lists(st.one_of(put, put, remove), max_size=4), min_size=2, max_size=4)


@pytest.mark.timeout(400)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(changes=batches, deletes=st.booleans(), maintains=st.booleans(), goes_back=st.booleans())
@pytest.mark.parametrize("mode", ["append", "merge", "history"])
def test_the_lake_holds_what_the_model_says(mode, changes, deletes, maintains, goes_back):
    deletes = deletes and mode != "append"
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), mode, changes, deletes=deletes, maintains=maintains, goes_back=goes_back)


def check(
    root: Path, mode: str, changes: list[list[tuple[str, Key, str | None, int | None]]], *,
    deletes: bool, maintains: bool, goes_back: bool
) -> None:  # fmt: skip
    toml = f'[table.t]\nmode = "{mode}"\ncursor = "c"\ndeletes = {str(deletes).lower()}\n'
    project = write_project(root, source="create table t (id integer primary key, v text, c integer)", toml=toml)
    model, source, newest = Model(mode=mode, deletes=deletes), {}, 10
    for batch, operations in enumerate(changes):
        for kind, key, text, step in operations:
            source.pop(key, None)
            if kind == "put":
                source[key] = (text, None if step is None else newest + step)
                newest = max(newest, newest + (step or 0))
        write_source(root, source)
        if batch and goes_back:
            # A batch that is published, taken back and loaded again under another name changes nothing.
            before = read(project, mode, batch - 1)
            publish(project, f"undone{batch}")
            rollback_batch(project, SETTINGS, f"b{batch - 1}")
            assert read(project, mode, batch - 1) == before
        publish(project, f"b{batch}")
        model.load(source, batch)
        assert read(project, mode, batch) == model.expected()
        publish_sample(project, SETTINGS, f"b{batch}")
        if maintains:
            maintain_lake(project, SETTINGS)
        assert read(project, mode, batch) == model.expected()


def write_source(root: Path, source: dict[Key, Row]) -> None:
    def literal(value: object) -> str:
        return "null" if value is None else repr(value)

    values = [f"insert into t values ({key}, {literal(row[0])}, {literal(row[1])});" for key, row in source.items()]
    change_source(root, "\n".join(["delete from t;", *values]))


def publish(project, batch: str) -> None:
    stage_batch(project, batch=batch)
    publish_sample(project, SETTINGS, batch)


def read(project, mode: str, last: int) -> list[tuple[object, ...]]:
    """Return the rows of the lake, the times of a history as the number of the batch."""
    columns = "id, v, c, valid_from, valid_to" if mode == "history" else "id, v, c, null, null"
    with open_reader(project, SETTINGS) as connection:
        rows = connection.execute(f"select {columns} from t").fetchall()
        if mode == "history":
            wrong = connection.execute("select count(*) from t where is_current <> (valid_to is null)").fetchone()
            assert wrong == (0,)
    began = {read_plan(project, f"b{number}").created_at: number for number in range(last + 1)}
    return sorted([(*row[:3], began.get(row[3]), began.get(row[4])) for row in rows], key=repr)
