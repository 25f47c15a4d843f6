"""Files are written whole or not at all, in one place."""

from __future__ import annotations

import ast
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import phasewise
from phasewise.system import files

BEFORE, AFTER = "before" * 10_000, "after" * 10_000
SOURCES = Path(phasewise.__file__).parent

#: The calls that a power cut or a kill may fall on, in their order.
CALLS = ("write", "fsync", "name", "fsync of the folder")


def kill_at(moment: str) -> None:
    """Have this process end, as by ``kill -9``, instead of the call *moment*."""
    synced: list[Callable[[int], None]] = []
    fsync, write_text = os.fsync, Path.write_text

    def write(self: Path, text: str, **options: str) -> int:
        write_text(self, text[: len(text) // 2], **options)  # type: ignore[arg-type]  # as it was called
        os._exit(9)

    def sync(descriptor: int) -> None:
        if moment == ("fsync of the folder" if synced else "fsync"):
            os._exit(9)
        synced.append(fsync)
        fsync(descriptor)

    os.fsync = sync
    if moment == "write":
        Path.write_text = write  # type: ignore[assignment,method-assign]
    elif moment == "name":
        Path.replace = os.link = lambda *_: os._exit(9)  # type: ignore[assignment,method-assign]


def write_and_die(name: str, path: Path, moment: str) -> None:
    kill_at(moment)
    getattr(files, name)(path, AFTER)


def run_in_child(*arguments: object) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=write_and_die, args=arguments)
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.parametrize("moment", CALLS)
def test_a_file_whose_writer_is_killed_is_what_it_was_or_what_it_was_to_be(tmp_path: Path, moment: str):
    path = tmp_path / "batch.json"
    path.write_text(BEFORE)

    assert run_in_child("write_atomically", path, moment) == 9

    assert path.read_text() == (AFTER if moment == CALLS[-1] else BEFORE)
    assert list(tmp_path.glob("*.json")) == [path]


@pytest.mark.parametrize("moment", CALLS)
def test_a_file_written_once_whose_writer_is_killed_is_not_there_or_whole(tmp_path: Path, moment: str):
    path = tmp_path / "batch.json"

    assert run_in_child("write_once", path, moment) == 9

    assert path.exists() == (moment == CALLS[-1])
    assert not path.exists() or path.read_text() == AFTER
    assert not list(tmp_path.glob("[!.]*.json.*"))


@pytest.mark.parametrize("write", [files.write_atomically, files.write_once])
def test_a_write_that_fails_leaves_the_file_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, str], None]
):
    path = tmp_path / "batch.json"
    path.write_text(BEFORE)

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write(path, AFTER)

    assert path.read_text() == BEFORE
    assert list(tmp_path.iterdir()) == [path]


def test_of_two_that_write_once_the_first_stays(tmp_path: Path):
    files.write_once(tmp_path / "batch.json", BEFORE)
    files.write_once(tmp_path / "batch.json", AFTER)

    assert (tmp_path / "batch.json").read_text() == BEFORE
    assert list(tmp_path.iterdir()) == [tmp_path / "batch.json"]


def test_a_name_as_long_as_the_file_system_takes_can_be_written(tmp_path: Path):
    files.write_atomically(tmp_path / ("n" * 255), AFTER)

    assert [path.read_text() for path in tmp_path.iterdir()] == [AFTER]


#: Files that get another name although nobody has just written them, and why.
RENAMES = {
    "stack/supervisor.py": 1,  # a log that has grown large is put aside
    "publishing/staging_cleanup.py": 1,  # a folder that is about to be removed
    "system/files.py": 1,
}


def test_nobody_else_gives_a_file_that_it_wrote_its_name():
    found = {
        str(path.relative_to(SOURCES)): count
        for path in SOURCES.rglob("*.py")
        if (count := sum(map(is_rename, ast.walk(ast.parse(path.read_text())))))
    }

    assert found == RENAMES


def is_rename(node: ast.AST) -> bool:
    """Tell whether *node* calls ``Path.replace``, ``Path.rename`` or their like; ``str.replace`` takes two texts."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.keywords:
        return False
    if any(isinstance(argument, ast.Constant | ast.JoinedStr) for argument in node.args):
        return False  # the reason for which a worker replaces its forkservers
    owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
    return (node.func.attr in {"replace", "rename"} and (len(node.args) == 1 or owner == "os")) or (
        node.func.attr == "move" and owner == "shutil"
    )
