"""How the values of a SQLite table come across: by the scanner in types, or as tagged text.

SQLite gives a type to each value, a column only prefers one. The scanner has one type for a column. It refuses a text
in a column of numbers and a number in one of texts, but it takes a 5 for a date, and a text for a blob. So a column is
*scanned* where the scanner keeps or refuses every value (``scan_column``), but for those that SQLite itself is asked
about beforehand (``find_changed``). A table with any other column is read as text with one letter before it that tells
the type of the value, and each value is decoded and checked in DuckDB.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from phasewise.errors import UnfaithfulValue
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.sources.decoding import MOMENTS, decode_text, explain_unfaithful, fail_where_null
from phasewise.sources.protocol import Column, SourceTable

# Declared types that DuckDB's scanner maps as SQLite's own rules do, and whose values it checks one by one.
_SCANNED = re.compile(
    r"(?:(?:TINY|SMALL|MEDIUM|BIG)?INT(?:EGER)?|INT[248])(?:\(\d+\))?"
    r"|(?:N?(?:VAR)?CHAR|VARYING CHARACTER)(?:\(\d+\))?|TEXT|CLOB"
    r"|REAL|FLOAT|DOUBLE(?: PRECISION)?"
)
_DECIMAL = re.compile(r"(?:DECIMAL|DEC|NUMERIC|NUMBER)\s*\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?\)")
_TYPED = re.compile(rf"{_DECIMAL.pattern}|NUMERIC|DECIMAL|DEC|NUMBER|BOOL(?:EAN)?|DATE(?:TIME)?|TIMESTAMP|BLOB")
_LAKE_DECIMAL = re.compile(r"DECIMAL\((\d+),(\d+)\)")
#: Digits of which a double holds every number.
_DOUBLE_DIGITS = 15
#: A double holds every integer up to here.
_DOUBLE_INTEGERS = 2**53


def find_type(declared: str) -> tuple[str, str | None]:
    """Return the lake's type for a declared type, and a note; SQLite's affinity rules, in their order.

    https://sqlite.org/datatype3.html, section 3.1; its last family, NUMERIC, is told apart further.
    """
    upper = " ".join(declared.upper().split())
    if "INT" in upper:
        return "BIGINT", None
    if any(word in upper for word in ("CHAR", "CLOB", "TEXT")):
        return "VARCHAR", None
    if "BLOB" in upper:
        return "BLOB", None
    if any(word in upper for word in ("REAL", "FLOA", "DOUB")):
        return "DOUBLE", None
    return _find_numeric_type(upper), find_note(declared)


def _find_numeric_type(upper: str) -> str:
    exact = {"DATE": "DATE", "TIME": "TIME", "DATETIME": "TIMESTAMP", "TIMESTAMP": "TIMESTAMP"}
    if upper in exact:
        return exact[upper]
    if upper in {"BOOLEAN", "BOOL"}:
        return "BOOLEAN"
    if match := _DECIMAL.fullmatch(upper):
        precision, scale = int(match[1]), int(match[2] or 0)
        if 1 <= precision <= 38 and scale <= precision:
            return f"DECIMAL({precision},{scale})"
    return "DOUBLE" if upper in {"NUMERIC", "DECIMAL", "DEC", "NUMBER"} else "VARCHAR"


def find_note(declared: str) -> str | None:
    upper = " ".join(declared.upper().split())
    families = ("INT", "CHAR", "CLOB", "TEXT", "BLOB", "REAL", "FLOA", "DOUB")
    if any(word in upper for word in families) or _find_numeric_type(upper) != "VARCHAR":
        return None
    if not upper:
        return "carried as text: the column has no declared type"
    return f"carried as text: neither SQLite nor the warehouse has a type {declared}"


def scan_column(column: Column) -> str | None:
    """Return an expression for the value of *column*, as the scanner gives it, that fails where it would change.

    None where the scanner changes values without a word that nobody can ask SQLite about at a lower price.
    """
    name = quote_identifier(column.name)
    if column.note is not None:  # generated columns, and types that are not the column's own
        return None
    if _is_declared(column, _SCANNED):
        return check_utf8(name) if column.type == "VARCHAR" else name
    if not _is_declared(column, _TYPED):
        return None
    if column.type in {"BLOB", "DOUBLE"}:
        return name
    if column.type == "BOOLEAN":
        return fail_where_null(f"CASE {name} WHEN 0 THEN false WHEN 1 THEN true END", name, "BOOLEAN")
    if column.type.startswith("DECIMAL"):
        decimal = f"CAST({name} AS {column.type})"
        return _fail_where(f"CAST({decimal} AS DOUBLE) <> {name}", decimal, name, column.type)
    # A date or a timestamp. There is no year 0; the scanner takes it for 1 BC.
    return _fail_where(f"{name} < DATE '0001-01-01'", name, name, column.type)


def find_changed(column: Column) -> str | None:
    """Return a condition, for SQLite, on values of a scanned column that the scanner might change without a word.

    It may hold for others too. None: there are no such values.
    """
    name = quote_identifier(column.name)
    if _is_declared(column, _SCANNED) or column.type == "BOOLEAN":
        return None
    if column.type == "BLOB":
        return f"typeof({name}) NOT IN ('blob', 'null')"
    if column.type == "DATE":  # the scanner takes '2024-1-5', '2024-01-05 10:00' and 5 too
        return f"date({name}) IS NOT {name} COLLATE BINARY"
    if column.type == "TIMESTAMP":
        return _find_changed_timestamp(name)
    # An integer arrives as a double, and is multiplied as one for its decimals.
    match = _LAKE_DECIMAL.fullmatch(column.type)
    if match and int(match[1]) <= _DOUBLE_DIGITS:
        return None  # a larger integer overflows the decimal
    limit = _DOUBLE_INTEGERS // 10 ** int(match[2] if match else 0)
    return f"typeof({name}) = 'integer' AND {name} NOT BETWEEN {-limit} AND {limit}"


def _find_changed_timestamp(name: str) -> str:
    # Bytes, not characters: those of a text end at a NUL. datetime() prints whole seconds, and 24:00:00 as it is.
    seconds = f"substr({name}, 1, 19)"
    digits = "[0-9][0-9][0-9]"
    is_other = f"(datetime({seconds}) IS NOT replace({seconds}, 'T', ' ') COLLATE BINARY OR {seconds} LIKE '%24:__:__')"
    return (
        f"CASE length(CAST({name} AS BLOB)) WHEN 19 THEN {is_other} "
        f"WHEN 23 THEN {is_other} OR substr({name}, 20) NOT GLOB '.{digits}' "
        f"WHEN 26 THEN {is_other} OR substr({name}, 20) NOT GLOB '.{digits}{digits}' ELSE {name} IS NOT NULL END"
    )


def _is_declared(column: Column, pattern: re.Pattern[str]) -> bool:
    return bool(pattern.fullmatch(" ".join(column.source_type.upper().split())))


def _fail_where(condition: str, value: str, name: str, type_name: str) -> str:
    # Half of the price of fail_where_null. The column is in the message: DuckDB has no error before it has a row.
    failure = f"error('unfaithful value ' || left(CAST({name} AS VARCHAR), 1))"
    return f"CASE WHEN {condition} THEN CAST({failure} AS {type_name}) ELSE {value} END"


def _cast_double(double: str, type_name: str) -> str:
    """Return an expression for *double* as a decimal, NULL where that would not be the same double again."""
    decimal = f"TRY_CAST({double} AS {type_name})"
    return f"CASE WHEN CAST({decimal} AS DOUBLE) = {double} THEN {decimal} END"


def check_utf8(expression: str) -> str:
    # The scanner hands on texts unchecked, and a Parquet file with bytes that are not UTF-8 is one nobody can
    # read. Decoding what was encoded fails on them; it costs 8 % of a scan of texts.
    return f"decode(encode({expression}))"


def read_tagged(
    table: SourceTable, *, text_as_hex: bool = False, is_short: bool = False, extra: list[str] | None = None
) -> str:
    """Return a relation with the columns c0, c1, …: each value as text after one letter that tells its type.

    ``i`` an integer, ``r`` a real, ``t`` a text, ``x`` a text in hexadecimal, ``b`` a blob in hexadecimal.
    Hexadecimal texts may hold bytes that are not UTF-8. With *is_short* values of the types that a column is there for
    (``_find_short``) have no letter.
    """
    names = [column.name for column in table.columns] + (extra or [])
    as_hex = {column.name for column in table.columns if text_as_hex or _is_text_as_blob(column)}
    short = {column.name: _find_short(column) for column in table.columns if is_short}
    tagged = ", ".join(
        f"{_tag(quote_identifier(name), text_as_hex=name in as_hex, short=short.get(name, ()))} AS c{index}"
        for index, name in enumerate(names)
    )
    inner = f"SELECT {tagged} FROM {quote_identifier(table.name)}{table.where()}"
    return f"sqlite_query('source', {quote_literal(inner)})"


def _tag(name: str, *, text_as_hex: bool, short: tuple[str, ...] = ()) -> str:
    # 20 digits: SQLite's 17 are not the nearest ones for large exponents (542 of 400,000 random doubles came
    # back changed, none with 20).
    printed = {"integer": name, "real": f"printf('%!.20g', {name})", "text": name, "blob": f"hex({name})"}
    letters = {"integer": "i", "real": "r", "text": "t", "blob": "b"}
    if text_as_hex:
        printed["text"], letters["text"] = f"hex({name})", "x"
    prefixes = {kind: "" if kind in short else f"'{letter}' || " for kind, letter in letters.items()}
    cases = " ".join(f"WHEN '{kind}' THEN {prefixes[kind]}{text}" for kind, text in printed.items())
    return f"CASE typeof({name}) {cases} END"


def _find_short(column: Column) -> tuple[str, ...]:
    """Return the types of SQLite whose values need no letter in *column*: with one they decode to NULL there."""
    if column.type == "BIGINT":
        return ("integer",)
    if column.type == "DOUBLE":
        return ("real",)
    if (match := _LAKE_DECIMAL.fullmatch(column.type)) and int(match[1]) <= _DOUBLE_DIGITS:
        return ("integer", "real")
    return ("text",) if column.type in MOMENTS or column.type == "UUID" else ()


def decode_or_fail(column: Column, value: str) -> str:
    return fail_where_null(_decode_short(column, value), value, column.type)


def _decode_short(column: Column, value: str) -> str:
    """Return what ``_decode`` does, for a value that may have no letter (``is_short``): in half of its time."""
    short = _find_short(column)
    if not short:
        return _decode(column, value)
    if short == ("text",):
        return decode_text(column.type, value)
    if short == ("integer",):
        return f"TRY_CAST({value} AS BIGINT)"
    if short == ("real",):
        return f"CASE WHEN left({value}, 1) = 'i' THEN {_decode(column, value)} ELSE TRY_CAST({value} AS DOUBLE) END"
    # Fifteen digits are less than 2**53: a double holds each such integer, and any larger one overflows the decimal.
    return _cast_double(f"TRY_CAST({value} AS DOUBLE)", column.type)


def is_unfaithful(column: Column, tagged: str) -> str:
    return f"({tagged} IS NOT NULL AND ({_decode(column, tagged)}) IS NULL)"


def _is_text_as_blob(column: Column) -> bool:
    """Tell whether the contract takes the bytes of texts: the way for texts that are not UTF-8."""
    return column.type == "BLOB" and find_type(column.source_type)[0] != "BLOB"


def _decode(column: Column, tagged: str) -> str:
    """Return an expression for the value of *tagged* in its column's type, NULL where it would be another value."""
    type_name, is_text_as_blob = column.type, _is_text_as_blob(column)
    value = f"substr({tagged}, 2)"
    kind = f"left({tagged}, 1)"
    text = f"CASE {kind} WHEN 't' THEN {value} WHEN 'x' THEN TRY(decode(unhex({value}))) END"
    double = f"TRY_CAST({value} AS DOUBLE)"
    if type_name == "VARCHAR":
        return f"CASE {kind} WHEN 'i' THEN {value} WHEN 'r' THEN CAST({double} AS VARCHAR) ELSE {text} END"
    if type_name == "BLOB":
        kinds = "('b', 'x')" if is_text_as_blob else "('b')"
        return f"CASE WHEN {kind} IN {kinds} THEN unhex({value}) END"
    if type_name == "BIGINT":
        return f"CASE WHEN {kind} = 'i' THEN CAST({value} AS BIGINT) END"
    if type_name == "BOOLEAN":
        return f"CASE {tagged} WHEN 'i0' THEN false WHEN 'i1' THEN true END"
    if type_name == "DOUBLE":
        # A double holds every integer up to 2**53 and then ever fewer.
        exact = f"TRY_CAST({double} AS HUGEINT) = CAST({value} AS HUGEINT)"
        return f"CASE {kind} WHEN 'r' THEN {double} WHEN 'i' THEN CASE WHEN {exact} THEN {double} END END"
    if type_name.startswith("DECIMAL"):
        real = _cast_double(double, type_name)
        return f"CASE {kind} WHEN 'i' THEN TRY_CAST({value} AS {type_name}) WHEN 'r' THEN {real} END"
    return decode_text(type_name, f"({text})")


def explain_tagged(
    table: SourceTable, column: Column, key: Sequence[str], tagged: Sequence[str], *, count: int
) -> UnfaithfulValue:
    kind = {"i": "integer", "r": "real", "x": "text", "t": "text", "b": "blob"}[tagged[0][0]]
    value, *shown = map(_show_tagged, tagged)
    other = "BLOB" if column.type == "VARCHAR" else "VARCHAR"
    return explain_unfaithful(table.name, column, key, (f"the {kind} {value}", *shown), count=count, other=other)


def _show_tagged(tagged: str | None) -> str:
    if tagged is None:
        return "NULL"
    kind, value = tagged[0], tagged[1:]
    if kind == "x":
        value = bytes.fromhex(value).decode("utf-8", "backslashreplace")
    short = value if len(value) <= 60 else f"{value[:60]}…"
    return {"i": short, "r": repr(float(value)) if kind == "r" else "", "b": f"x'{short}'"}.get(kind, f"'{short}'")
