"""Units of work: row ranges of source files, and the manifest that lists them.

A unit is what one worker scores and commits at a time. Units are cut here, not by a reader's block size. The
manifest is made once and stored with the output, so that a resumed run cuts the same units. Knows no storage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from curate.errors import CorpusError


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of one source file.

    `key` is the file's path within the corpus (unique, used in names of parts); `hint` is the connector's own
    shortcut to `start` (a byte offset, a row group, a record batch). `step` is the length of the parts: smaller
    than the unit for a compressed stream, which is one unit and is cut as it streams.
    """

    key: str
    url: str
    start: int
    stop: int
    step: int
    hint: int = 0

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def ranges(self) -> list[tuple[int, int]]:
        """The part ranges of this unit, in order."""
        return [(a, min(a + self.step, self.stop)) for a in range(self.start, self.stop, self.step)]


@dataclass(frozen=True)
class FileEntry:
    """One source file: `digest` names its content; `stamp` (etag or mtime) and `size` tell cheaply if it changed."""

    key: str
    url: str
    size: int
    stamp: str
    digest: str
    rows: int
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """All files and units of a corpus, in order. `format` is the connector's name."""

    format: str
    files: tuple[FileEntry, ...]
    units: tuple[Unit, ...]
    skipped: tuple[str, ...] = field(default=())

    @property
    def rows(self) -> int:
        return sum(u.rows for u in self.units)

    @property
    def digest(self) -> str:
        """Content digest: independent of where the corpus lies, of timestamps and of how units are cut."""
        first = min((u.start for u in self.units), default=0)
        payload = [self.format, first, self.rows, [[f.key, f.digest, f.rows] for f in self.files]]
        return hashlib.blake2b(json.dumps(payload).encode(), digest_size=16).hexdigest()

    def head(self, max_rows: int | None) -> Manifest:
        """The manifest of the first `max_rows` rows."""
        if max_rows is None or max_rows >= self.rows:
            return self
        if max_rows < 1:
            raise CorpusError(f"source.max_rows is {max_rows}; it must be at least 1")
        units, left = [], max_rows
        for u in self.units:
            if left <= 0:
                break
            units.append(Unit(u.key, u.url, u.start, min(u.stop, u.start + left), u.step, u.hint))
            left -= units[-1].rows
        keys = {u.key for u in units}
        return Manifest(self.format, tuple(f for f in self.files if f.key in keys), tuple(units), self.skipped)

    def per_file(self) -> Iterator[tuple[FileEntry, list[Unit]]]:
        """Each file with its units, in order."""
        by_key: dict[str, list[Unit]] = {}
        for u in self.units:
            by_key.setdefault(u.key, []).append(u)
        for f in self.files:
            yield f, by_key.get(f.key, [])

    def to_table(self) -> pa.Table:
        """Units as a table, with files, format and skipped shards in the schema's metadata."""
        table = pa.Table.from_pylist([asdict(u) for u in self.units], schema=_UNIT_SCHEMA)
        meta = {"format": self.format, "files": [asdict(f) for f in self.files], "skipped": list(self.skipped)}
        return table.replace_schema_metadata({b"curate": json.dumps(meta).encode()})

    @staticmethod
    def from_table(table: pa.Table) -> Manifest:
        meta = json.loads((table.schema.metadata or {})[b"curate"])
        files = tuple(FileEntry(**{**f, "columns": tuple(f["columns"])}) for f in meta["files"])
        return Manifest(meta["format"], files, tuple(Unit(**u) for u in table.to_pylist()), tuple(meta["skipped"]))


_UNIT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("step", pa.int64()),
        ("hint", pa.int64()),
    ]
)
