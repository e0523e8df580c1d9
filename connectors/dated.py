"""Listings with times: the files of a place and when each was written, for whoever tells progress from them.

In: a URL. Out: name, size and seconds since 1970. The time is the store's own: local disks' modification time, an
object store's LastModified; None where a store tells none. Knows no formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from connectors import storage
from connectors.urls import is_local


@dataclass(frozen=True, order=True)
class Dated:
    """One file; `name` is relative to the listed folder."""

    name: str
    url: str
    size: int
    modified: float | None


def dated_files(url: str) -> list[Dated]:
    """All files under the folder `url`, sorted by name, without hidden ones; empty where nothing is.

    Raises:
        StorageError: it cannot be listed.
    """
    if is_local(url):
        # A local stamp is the modification time in nanoseconds.
        return [Dated(f.name, f.url, f.size, int(f.stamp) / 1e9) for f in storage.list_files(url)]
    found = storage.remote_files(url)
    return [Dated(name, where, int(details["size"] or 0), _time(details)) for where, name, details in found]


def _time(details: dict[str, Any]) -> float | None:
    for key in ("LastModified", "last_modified", "mtime", "updated", "created"):
        value = details.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
    return None
