"""Passwords in the environment, where client libraries of databases look for them.

A source puts its password there, since the scanners show what they are told otherwise. Another login of the same
process that has none of its own must not get it.
"""

from __future__ import annotations

import os

#: Variable → the password that a source put there, and what was there before (None: nothing).
_lent: dict[str, tuple[str, str | None]] = {}


def lend_password(variable: str, password: str | None) -> None:
    """Give the client library that reads *variable* this password; None: the one that the process came with."""
    own = find_own_password(variable)
    _lent.pop(variable, None)
    if password is not None:
        os.environ[variable] = password
        _lent[variable] = (password, own)
    elif own is not None:
        os.environ[variable] = own
    else:
        os.environ.pop(variable, None)


def find_own_password(variable: str) -> str | None:
    """Return what *variable* says, but for what a source has put there."""
    found = os.environ.get(variable)
    password, own = _lent.get(variable, (None, None))
    return own if found is not None and found == password else found
