"""Expressions for values that a source hands on as text: decoded, checked, and a failure where they would change.

Each is NULL for a value that its type cannot hold as it was. The same expression so serves the extraction, which
fails there, and the search for the row to name in the message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from phasewise.errors import UnfaithfulValue
from phasewise.lake.quoting import quote_identifier, quote_literal
from phasewise.sources.protocol import Column

#: Types of moments that ``decode_text`` decodes.
MOMENTS = frozenset({"DATE", "TIME", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE"})


def decode_text(type_name: str, text: str) -> str:
    """Return an expression for the moment or UUID that *text*, an expression, prints; NULL where it prints none."""
    cast = f"TRY_CAST({text} AS {type_name})"
    if type_name in {"DATE", "UUID"}:
        return f"CASE WHEN CAST({cast} AS VARCHAR) = lower({text}) THEN {cast} END"
    time = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?"
    zone = r"(Z|[+-]\d\d(:?\d\d)?)" if type_name == "TIMESTAMP WITH TIME ZONE" else ""
    pattern = time if type_name == "TIME" else rf"\d{{4}}-\d\d-\d\d[ T]{time}{zone}"
    # There is no year 0; DuckDB would take it for 1 BC.
    return f"CASE WHEN regexp_full_match({text}, {quote_literal(pattern)}) AND {text} NOT LIKE '0000-%' THEN {cast} END"


def fail_where_null(decoded: str, value: str, type_name: str) -> str:
    """Return *decoded*, but failing on rows where it is NULL and *value* is not."""
    # The value is part of the message only so that DuckDB cannot evaluate error() before it has a row.
    failure = f"CAST(error('unfaithful value ' || left(CAST({value} AS VARCHAR), 1)) AS {type_name})"
    return f"CASE WHEN {value} IS NULL THEN NULL ELSE coalesce({decoded}, {failure}) END"


def explain_unfaithful(
    table: str, column: Column, key: Sequence[str], sample: Sequence[object], *, count: int, other: str = "VARCHAR"
) -> UnfaithfulValue:
    """Return the error for *count* values of *column*; *other* is a way out.

    The first of them is the first of *sample*; the rest of it are the values of *key* in its row.
    """
    where = ", ".join(f"{name} = {shown}" for name, shown in zip(key, sample[1:], strict=True))
    rows = "1 row holds a value" if count == 1 else f"{count} rows hold values"
    first = f"the first ({where})" if where else "the first"
    name = column.name if re.fullmatch(r"[A-Za-z0-9_-]+", column.name) else quote_identifier(column.name)
    return UnfaithfulValue(
        f'Table "{table}", column "{column.name}" ({column.source_type or "no declared type"}): {rows} that '
        f"{column.type} cannot hold unchanged; {first} is {sample[0]}.",
        hint=f'Fix the source, or carry the column as {other}: [table."{table}"] columns = {{ {name} = "{other}" }}.',
    )
