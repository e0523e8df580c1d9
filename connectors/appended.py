"""Files that were appended to: what of a grown file is new.

In: a file as it was and as it is now. Out: the units of the appended rows, where the beginning is the old file byte for
byte. Plain JSON lines alone grow at their end; a file of another format that grows is written anew, and a compressed
stream cannot be entered in the middle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from connectors import lines, storage
from connectors.base import Connector
from connectors.jsonl import Jsonl
from curate.corpus.units import FileEntry, Unit


def begins_with(now: FileEntry, before: FileEntry) -> bool:
    """Is the old file, byte for byte, the beginning of the new one, and ends it with a whole line?"""
    if now.size < before.size:
        return False
    hasher = hashlib.blake2b(digest_size=16)
    left, last = before.size, b""
    with storage.open_read(now.url) as f:
        if lines.detect(f.read(4)) != "none":
            return now.size == before.size and now.digest == before.digest
        f.seek(0)
        while left and (block := f.read(min(left, 1 << 20))):
            hasher.update(block)
            left -= len(block)
            last = block[-1:]
    return left == 0 and last in (b"\n", b"") and hasher.hexdigest() == before.digest


def new_units(
    connector: Connector, now: FileEntry, units: Sequence[Unit], before: FileEntry
) -> tuple[list[Unit], bool]:
    """(units of the rows that `before` did not have, True), or (all units, False) where the file did not just grow.

    `before` is an earlier state of the same file, by its digest (of all its bytes), size and rows.
    """
    if not isinstance(connector, Jsonl) or now.size <= before.size or not begins_with(now, before):
        return list(units), False
    out = []
    for u in units:
        if u.start >= before.rows:
            out.append(u)
        elif u.stop > before.rows:  # its beginning is old: enter it at the first appended byte
            out.append(Unit(u.key, u.url, before.rows, u.stop, u.stop - before.rows, before.size))
    return out, True
