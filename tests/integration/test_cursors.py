"""Cursors of servers: compared by them as the lake would, whatever their collation and time zone."""

from __future__ import annotations
