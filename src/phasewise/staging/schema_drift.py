"""Schema drift: how the columns that a batch brings differ from those that the lake's table has, and what follows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from phasewise.errors import SchemaDrift
from phasewise.project.config import DriftRule

#: Integer types by how many decimal digits any of their values has; an unsigned one fits into a wider signed one.
_INTEGERS = {
    "TINYINT": (1, True),
    "SMALLINT": (2, True),
    "INTEGER": (4, True),
    "BIGINT": (8, True),
    "UTINYINT": (1, False),
    "USMALLINT": (2, False),
    "UINTEGER": (4, False),
    "UBIGINT": (8, False),
}
_DIGITS = {1: 3, 2: 5, 4: 10, 8: 20}
_DECIMAL = re.compile(r"DECIMAL\((\d+),(\d+)\)")


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What differs; names as the lake spells them, new ones as the source does."""

    #: The columns of the lake's table once the batch is in it: name → type, the new ones last.
    columns: Mapping[str, str]
    #: New columns, with their types. Under ``discard`` they are left out of *columns*.
    added: tuple[str, ...] = ()
    #: Columns that the source no longer has.
    lost: tuple[str, ...] = ()
    #: Columns whose type holds more than the lake's.
    widened: tuple[str, ...] = ()
    #: Columns whose type holds less than the lake's.
    narrowed: tuple[str, ...] = ()
    #: Columns of which neither type holds the values of the other.
    clashing: tuple[str, ...] = ()
    #: One sentence for each of them.
    notes: tuple[str, ...] = ()


def compare_columns(lake: Mapping[str, str], staged: Mapping[str, str], rule: DriftRule) -> Drift:
    """Compare the columns of the lake's table, name → type, with those that are *staged*; names differ not by case."""
    found = {name.casefold(): (name, type_) for name, type_ in staged.items()}
    columns = dict(lake)
    kinds: dict[str, list[str]] = {kind: [] for kind in ("added", "lost", "widened", "narrowed", "clashing")}
    notes = []
    for name, type_ in lake.items():
        if name.casefold() not in found:
            kinds["lost"].append(name)
            notes.append(f'The column "{name}" is gone from the source.')
            continue
        now = found[name.casefold()][1]
        kind = _compare_types(type_, now)
        if kind is not None:
            kinds[kind].append(name)
            notes.append(f'The column "{name}" was {type_} and is {now}: {kind}.')
        if kind == "widened" and rule != "discard":
            columns[name] = now
    known = {name.casefold() for name in lake}
    kinds["added"] = [name for name in staged if name.casefold() not in known]
    notes += [f'The column "{name}" ({staged[name]}) is new.' for name in kinds["added"]]
    if rule != "discard":
        columns |= {name: staged[name] for name in kinds["added"]}
    return Drift(columns=columns, notes=tuple(notes), **{kind: tuple(names) for kind, names in kinds.items()})


def refuse_drift(table: str, drift: Drift, rule: DriftRule, *, is_replaced: bool) -> None:
    """Do nothing where the contract of *table* takes *drift*.

    Raises:
        SchemaDrift: the table is frozen, or a column of a table that is not replaced has values of two kinds.
    """
    if rule == "freeze" and drift.notes:
        raise SchemaDrift(
            f'Table "{table}" is frozen, and its columns have changed: {" ".join(drift.notes)}',
            hint=f'Change the source back, or take the change: [table."{table}"] drift = "evolve".',
        )
    if drift.clashing and not (is_replaced and rule == "evolve"):
        names = ", ".join(f'"{name}"' for name in drift.clashing)
        raise SchemaDrift(
            f'Table "{table}" cannot hold old and new values of {names} together: {" ".join(drift.notes)}',
            hint=f'Raise [table."{table}"] version to load it again, or give the column a type in its columns.',
        )


def holds_all(wide: str, narrow: str) -> bool:
    """Tell whether every value of the type *narrow* has its equal in the type *wide*."""
    if wide == narrow or (wide == "VARCHAR" and narrow != "BLOB"):
        return True
    if narrow in _INTEGERS:
        return _holds_integers(wide, *_INTEGERS[narrow])
    old, new = _DECIMAL.fullmatch(narrow), _DECIMAL.fullmatch(wide)
    if old and new:
        scale, digits = int(old[2]), int(old[1]) - int(old[2])
        return int(new[2]) >= scale and int(new[1]) - int(new[2]) >= digits
    return (narrow, wide) in {("FLOAT", "DOUBLE"), ("DATE", "TIMESTAMP")}


def is_integer(type_: str) -> bool:
    return type_ in _INTEGERS


def find_lowest(integer: str) -> int:
    """Return the lowest value of an integer type."""
    size, is_signed = _INTEGERS[integer]
    return -(1 << (8 * size - 1)) if is_signed else 0


def _holds_integers(wide: str, size: int, is_signed: bool) -> bool:
    if wide in _INTEGERS:
        other, other_is_signed = _INTEGERS[wide]
        if is_signed == other_is_signed:
            return other >= size
        return other_is_signed and other > size
    if match := _DECIMAL.fullmatch(wide):
        return int(match[1]) - int(match[2]) >= _DIGITS[size]
    return wide == "DOUBLE" and size <= 4


def _compare_types(lake: str, staged: str) -> str | None:
    if lake == staged:
        return None
    if holds_all(lake, staged):
        return "narrowed"
    return "widened" if holds_all(staged, lake) else "clashing"
