"""Names and texts as SQL."""

from __future__ import annotations


def quote_identifier(name: str) -> str:
    """Return *name* as an SQL identifier, whatever characters it has."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """Return *text* as an SQL string."""
    return "'" + text.replace("'", "''") + "'"
