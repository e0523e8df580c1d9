"""Parquet. A unit is some whole small row groups or a part of a large one; `hint` is the row group of its start.

A row group can only be read from its start, so that its last row costs as much as all of it. A very large one is
therefore cut into few units, each of which is read in several parts.

Curated shards keep schema, metadata, compression and dictionary encoding, column by column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool

from connectors import columnar, storage
from connectors.base import Connector, Range, Row, check_keep, check_ranges, content_digest
from connectors.storage import FileInfo
from curate.corpus.units import FileEntry, Unit

_MOST_UNITS = 16  # of one row group: they decode it 8 times over together, which is little beside any model
_GROUP_BYTES = 128 << 20  # of kept rows, in memory, before a row group is written


class Parquet(Connector):
    name = "parquet"
    extensions = (".parquet", ".pq")

    def scan(self, info: FileInfo, unit_rows: int, unit_bytes: int | None = None) -> tuple[FileEntry, list[Unit]]:
        with columnar.readable(info.url, "Parquet"), storage.open_read(info.url) as f:
            file = pq.ParquetFile(f)
            units = _units(file.metadata, info, unit_rows, unit_bytes)
            columns, rows = tuple(file.schema_arrow.names), file.metadata.num_rows
            f.seek(-8, 2)
            size = int.from_bytes(f.read(4), "little") + 8
            f.seek(-size, 2)
            digest = content_digest(info, f.read())
        return FileEntry(info.name, info.url, info.size, info.stamp, digest, rows, columns), units

    def read(
        self, unit: Unit, columns: Sequence[str], ranges: Sequence[Range] | None = None
    ) -> Iterator[tuple[int, int, list[Row]]]:
        wanted = check_ranges(unit, ranges)
        if not wanted:
            return
        with columnar.readable(unit.url, "Parquet"), storage.open_read(unit.url) as f:
            file = _open(f, unit.url)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            first = sum(sizes[: unit.hint])
            at, groups = first, []
            for i in range(unit.hint, len(sizes)):  # only the groups that hold a wanted row
                if at >= wanted[-1][1]:
                    break
                if at + sizes[i] > wanted[0][0]:
                    groups.append(i)
                elif not groups:
                    first = at + sizes[i]
                at += sizes[i]
            have = [c for c in columns if c in file.schema_arrow.names]
            batches = file.iter_batches(_batch_rows(file.metadata), groups, have, use_threads=False) if groups else []
            yield from columnar.to_ranges(batches, first, unit, wanted, have)

    def curate(self, entry: FileEntry, target_url: str, keep: Bool[np.ndarray, " rows"]) -> int:
        check_keep(entry, keep)
        with columnar.readable(entry.url, "Parquet"), storage.open_read(entry.url) as f:
            file = _open(f, entry.url)
            meta = file.metadata
            sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            batches = file.iter_batches(_batch_rows(meta), use_threads=False) if sum(sizes) else iter(())
            with storage.atomic_writer(target_url) as out, _writer(file, out) as writer:
                pending: list[pa.RecordBatch] = []
                rows = size = 0
                for batch in columnar.kept(batches, entry, keep):
                    pending.append(batch)
                    rows, size = rows + batch.num_rows, size + batch.nbytes
                    if rows >= max(sizes) or size >= _GROUP_BYTES:
                        writer.write_table(pa.Table.from_batches(pending), row_group_size=rows)
                        pending, rows, size = [], 0, 0
                if pending:
                    writer.write_table(pa.Table.from_batches(pending), row_group_size=rows)
        return int(keep.sum())


def _open(f: BinaryIO, url: str) -> pq.ParquetFile:
    # Over a network a column chunk is fetched at once; on a disk pages are read as they are needed, which keeps
    # memory flat whatever the size of the row groups.
    local = storage.is_local(url)
    return pq.ParquetFile(f, pre_buffer=not local, buffer_size=1 << 20 if local else 0)


def _batch_rows(meta: pq.FileMetaData) -> int:
    """Rows that make about BATCH_BYTES, by the largest row group's average."""
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    row = max((g.total_byte_size / g.num_rows for g in groups if g.num_rows), default=1.0)
    return int(min(8192, max(16, columnar.BATCH_BYTES // max(row, 1.0))))


def _units(meta: pq.FileMetaData, info: FileInfo, unit_rows: int, unit_bytes: int | None) -> list[Unit]:
    units: list[Unit] = []

    def add(start: int, stop: int, group: int, step: int) -> None:
        units.append(Unit(info.name, info.url, start, stop, min(step, stop - start), group))

    at = 0
    n = first = 0  # rows gathered from small groups, which end at row `at`, and the first of these groups
    for i in range(meta.num_row_groups):
        group = meta.row_group(i)
        limit = unit_rows
        if unit_bytes is not None:
            limit = min(limit, max(1, unit_bytes * group.num_rows // max(1, group.total_byte_size)))
        if n and n + group.num_rows > limit:
            add(at - n, at, first, n)
            n = 0
        if group.num_rows <= limit:
            first = first if n else i
            n += group.num_rows
        else:
            parts = -(-group.num_rows // limit)
            length = limit * -(-parts // _MOST_UNITS)
            for start in range(at, at + group.num_rows, length):
                add(start, min(start + length, at + group.num_rows), i, limit)
        at += group.num_rows
    if n:
        add(at - n, at, first, n)
    return units


def _writer(file: pq.ParquetFile, out: BinaryIO) -> pq.ParquetWriter:
    meta = file.metadata
    schema = file.schema_arrow
    compression: Any = "snappy"
    dictionary: Any = True
    int96 = False
    if meta.num_row_groups:
        group = meta.row_group(0)
        chunks = [group.column(i) for i in range(meta.num_columns)]
        names = {"UNCOMPRESSED": "NONE", "LZ4_RAW": "LZ4"}
        compression = {c.path_in_schema: names.get(c.compression, c.compression) for c in chunks}
        dictionary = [c.path_in_schema for c in chunks if c.has_dictionary_page]
        int96 = any(c.physical_type == "INT96" for c in chunks)
    paths = [file.schema.column(i).path for i in range(meta.num_columns)]
    return pq.ParquetWriter(
        out,
        schema,
        version="2.6",  # the only one that holds every type; older readers of the source read it too
        compression=compression,
        use_dictionary=dictionary,
        use_deprecated_int96_timestamps=int96,
        store_schema=b"ARROW:schema" in (meta.metadata or {}),
        use_compliant_nested_type=not any(".list.item" in p for p in paths),
    )
