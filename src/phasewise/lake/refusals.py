"""Say why a database server cannot be reached, from what its client library says."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: What libpq says of TLS, and what to do then.
POSTGRES_ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "certificate verify failed": "Let sslrootcert name the certificate of the authority that signed the server's.",
        "root certificate file": "Let sslrootcert name a file that is there wherever commands and workers run.",
        "does not match host name": "Name the server as its certificate does, or set sslmode=verify-ca.",
        "no encryption": "Set sslmode=verify-full, or require, which does not check the certificate.",
        "server does not support SSL": "Turn on TLS in the server, or set sslmode=prefer.",
    }
)


def explain_refusal(exc: Exception, setting: str, advice: Mapping[str, str]) -> tuple[str, str]:
    """Return the reason for which a server could not be attached, and a hint that names the *setting* of its URL."""
    reason = find_reason(exc)
    found = next((text for words, text in advice.items() if words in reason), None)
    if found is not None:
        return reason, f"{found} See {setting} in phasewise.toml."
    return reason, f"Check {setting} in phasewise.toml, the password and that the server runs."


def find_reason(exc: Exception) -> str:
    """Return what the client library said: DuckDB puts the whole DSN before it."""
    lines = str(exc).rpartition('": ')[2].strip().splitlines()
    return lines[0].rstrip(".") if lines else type(exc).__name__
