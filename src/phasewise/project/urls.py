"""Read the URLs of sources and of the warehouse, and show them without secrets.

The one place that takes a URL apart: a malformed one is a ``ProjectError`` that names no password.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from phasewise.errors import ProjectError

#: One server of the authority: a name, an IPv4 address or an IPv6 address in brackets; perhaps a port.
_SERVER = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:\[\]]*)(?::(?P<port>\d{0,5}))?")
#: A login without a ``//`` before it.
_USERINFO = re.compile(r"([^:/@?]*):[^@?]*@")
_SECRET = re.compile(r"(?i)((?:password|passwd|secret|token|key)[^=&]*=)[^&]*")


@dataclass(frozen=True, kw_only=True)
class DatabaseUrl:
    """``scheme://user:password@host:port/database?option=value``; every part decoded."""

    user: str | None
    #: Also where the URL has it as an option.
    password: str | None = field(repr=False)
    #: Host (IPv6 without brackets) and port of each server; one, but for PostgreSQL, which takes several.
    servers: tuple[tuple[str, str], ...]
    database: str
    #: Without the password.
    options: dict[str, str] = field(repr=False)

    def write(self, scheme: str, options: Mapping[str, str]) -> str:
        """Return the URL with these *options* and without the password."""
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        servers = ",".join(_write_server(host, port) for host, port in self.servers)
        query = f"?{urlencode(options, quote_via=quote)}" if options else ""
        return f"{scheme}://{user}{servers}/{quote(self.database, safe='')}{query}"


def read_database_url(url: str, example: str) -> DatabaseUrl:
    """Take apart the *url* of a database on a server; *example* shows how one is written.

    Raises:
        ProjectError: it is malformed, or names no database.
    """
    parts = split_url(url, example)
    userinfo, _, address = parts.netloc.rpartition("@")
    servers = [_SERVER.fullmatch(server) for server in address.split(",")]
    has_rest_of_password = parts.fragment or (":" in parts.netloc and "@" in parts.path)
    is_odd = "://" not in url or has_rest_of_password
    if is_odd or not all(match and int(match["port"] or 0) < 2**16 for match in servers):
        raise _explain_malformed(url, example)
    user, _, password = userinfo.partition(":")
    try:
        options = dict(parse_qsl(parts.query, errors="strict"))
        given = options.pop("password", None) or _decode(password) or None
        database = _decode(parts.path.strip("/"))
        hosts = tuple((_decode(match["host"].strip("[]")), match["port"] or "") for match in servers if match)
        name = _decode(user) or None
    except UnicodeDecodeError:
        raise _explain_malformed(url, example) from None  # the error has the bytes of the password
    if not database:
        raise ProjectError(f'"{redact_url(url)}" names no database.', hint=f"Write {example}.")
    return DatabaseUrl(user=name, password=given, servers=hosts, database=database, options=options)


def find_local_path(url: str, root: Path) -> Path:
    """Return the path that ``scheme:///relative`` or ``scheme:////absolute`` means: SQLAlchemy's rule, below *root*.

    Raises:
        ProjectError: the URL names none.
    """
    scheme = url.partition(":")[0]
    example = f"{scheme}:///relative/to/project or {scheme}:////absolute"
    parts = split_url(url.replace("#", "%23"), example)
    if "//" not in url or parts.netloc or not parts.path.startswith("/") or len(parts.path) < 2:
        raise ProjectError(f'"{redact_url(url)}" names no file or folder.', hint=f"Write {example}.")
    return (root / parts.path[1:].replace("%23", "#")).absolute()


def read_options(url: str) -> dict[str, str]:
    """Return what *url* says after its ``?``."""
    return dict(parse_qsl(split_url(url.replace("#", "%23")).query))


def split_url(url: str, example: str = "scheme://user@host:port/name") -> SplitResult:
    """Return the parts of *url* as they are written.

    Raises:
        ProjectError: it is malformed.
    """
    try:
        parts = urlsplit(url)
        if "\0" in unquote(url):
            raise ValueError("no library takes it")
        return parts
    except ValueError:
        raise _explain_malformed(url, example) from None  # the error may have the password


def redact_url(url: str) -> str:
    """Return *url*, which may be malformed, without its password and without options that may be secrets."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return _hide_secrets(_USERINFO.sub(r"\1:***@", url))
    address = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # A "/", "?" or "#" that was not escaped in a password ends the address too early: hide up to the last "@".
    end = rest.rfind("@") if ":" in address else address.rfind("@")
    userinfo, tail = (rest[:end], rest[end:]) if end >= 0 else ("", rest)
    user, colon, _ = userinfo.partition(":")
    return f"{scheme}://{user}{':***' if colon else ''}{_hide_secrets(tail)}"


def _hide_secrets(text: str) -> str:
    path, mark, query = text.partition("?")
    return path + mark + _SECRET.sub(r"\1***", query)


def _write_server(host: str, port: str) -> str:
    return (f"[{host}]" if ":" in host else quote(host, safe="")) + (f":{port}" if port else "")


def _decode(text: str) -> str:
    return unquote(text, errors="strict")


def _explain_malformed(url: str, example: str) -> ProjectError:
    return ProjectError(
        f'"{redact_url(url)}" is not a URL that can be read.',
        hint=f"Write {example}. In a user or password, write %40 for @, %2F for /, %3A for :, %23 for #, %25 for %.",
    )
