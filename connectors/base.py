"""Connector: what a file format must be able to do. One subclass a format; the rest of the library knows only this.

In: files of one format. Out: units of work, rows as dicts, and shards of the same format with fewer rows.
Knows nothing of examples, models or clusters.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool

from connectors import storage
from connectors.storage import FileInfo
from curate.corpus.units import FileEntry, Unit
from curate.errors import CorpusError

Range = tuple[int, int]
WHOLE_DIGEST = 64 << 20  # bytes: larger columnar files are digested by size, footer and samples
_SAMPLES, _SAMPLE = 16, 1 << 16


@dataclass(frozen=True)
class Row:
    """Row `index` of its file: the wanted columns that it has, or why it cannot be read (broken JSON, say)."""

    index: int
    value: dict[str, Any] | None
    error: str | None = None


class Connector(ABC):
    """A file format. Instances hold no state and can be sent to other processes."""

    name: ClassVar[str]
    extensions: ClassVar[tuple[str, ...]]  # with the dot, as in ".jsonl.gz"

    @abstractmethod
    def scan(self, info: FileInfo, unit_rows: int, unit_bytes: int | None = None) -> tuple[FileEntry, list[Unit]]:
        """Look through one file and cut it into units of at most `unit_rows` rows and about `unit_bytes` bytes.

        Raises:
            CorpusError: the file is cut off or broken; the message names it and where.
            StorageError: it cannot be read.
        """

    @abstractmethod
    def read(
        self, unit: Unit, columns: Sequence[str], ranges: Sequence[Range] | None = None
    ) -> Iterator[tuple[int, int, list[Row]]]:
        """Yield (start, stop, rows) for each wanted range of the unit, in order; all of unit.ranges() by default.

        Columns that the file lacks are left out of the rows' values. At most one range is in memory.

        Raises:
            CorpusError: the file is broken, or has fewer rows than when it was scanned.
            StorageError: it cannot be read.
        """

    @abstractmethod
    def curate(self, entry: FileEntry, target_url: str, keep: Bool[np.ndarray, " rows"]) -> int:
        """Write the kept rows of one file, in order, to `target_url`, whole or not at all; returns how many.

        Same columns, schema, metadata and compression as the source; JSON lines byte for byte.

        Raises:
            CorpusError: the source no longer has entry.rows rows, or is broken.
            StorageError: source or target fails.
        """

    def finalize(self, source_url: str, target_url: str, keys: Collection[str] | None = None) -> None:
        """Once all shards are curated: write what the format keeps beside them. Most formats keep nothing.

        `keys` are the shards that were curated, all by default; the others count as having no kept rows.

        Raises:
            CorpusError: a shard among `keys` is missing at the target.
        """
        return None


def check_keep(entry: FileEntry, keep: Bool[np.ndarray, " rows"]) -> None:
    """Raise CorpusError unless `keep` is one bool a row."""
    if keep.shape != (entry.rows,) or keep.dtype != np.bool_:
        raise CorpusError(
            f"{entry.url}: the decision has shape {keep.shape} and type {keep.dtype}, "
            f"but the file has {entry.rows} rows; it must be one bool a row."
        )


def check_ranges(unit: Unit, ranges: Sequence[Range] | None) -> list[Range]:
    """The wanted ranges, or all; they must be ascending and within the unit."""
    if ranges is None:
        return unit.ranges()
    at = unit.start
    for start, stop in ranges:
        if not at <= start < stop <= unit.stop:
            raise ValueError(f"range {start}-{stop} is not within {unit.start}-{unit.stop}, or not ascending")
        at = stop
    return list(ranges)


def changed(url: str, expected: int, found: str) -> CorpusError:
    """The error for a file that differs from what its manifest says."""
    return CorpusError(
        f"{url} has {found}, but had {expected} rows when the manifest was made: it has changed since. "
        f"Restore it, or start again in another place (sink.url=…)."
    )


def content_digest(info: FileInfo, footer: bytes = b"") -> str:
    """blake2b of the bytes; for a file over 64 MiB of its size, its footer (which holds the columns' sizes and
    statistics) and 16 samples of 64 KiB. Does not depend on where the file lies or when it was written."""
    h = hashlib.blake2b(digest_size=16)
    with storage.open_read(info.url) as f:
        if info.size <= WHOLE_DIGEST:
            while block := f.read(1 << 20):
                h.update(block)
            return h.hexdigest()
        h.update(f"sampled {info.size} {len(footer)} ".encode() + footer)
        for i in range(_SAMPLES):
            f.seek(max(0, info.size - _SAMPLE) * i // (_SAMPLES - 1))
            h.update(f.read(_SAMPLE))
    return h.hexdigest()
