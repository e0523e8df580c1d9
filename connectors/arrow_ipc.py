"""Arrow IPC, both forms: streams (what Hugging Face datasets writes) and files (Feather 2).

`hint` of a unit tells where its first record batch lies and how many rows of it come before the unit, so that a unit
is read without looking at the rest of the file.

Curated shards have the source's form, schema, metadata and compression.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from connectors import arrow_messages, columnar, storage
from connectors.base import Connector, Range, Row, check_keep, check_ranges, content_digest
from connectors.storage import FileInfo
from curate.corpus.units import FileEntry, Unit

_SKIP_BITS = 20
_MAX_SKIP = (1 << _SKIP_BITS) - 1


class ArrowIpc(Connector):
    name = "arrow_ipc"
    extensions = (".arrow", ".arrows", ".ipc", ".feather")

    def scan(self, info: FileInfo, unit_rows: int, unit_bytes: int | None = None) -> tuple[FileEntry, list[Unit]]:
        with columnar.readable(info.url, "Arrow"), storage.open_read(info.url) as f:
            batches = [m for m in arrow_messages.walk(f, info.size) if m.kind == "batch" and m.rows]
            with _reader(f) as reader:  # for a file, also checks the footer
                columns = tuple(reader.schema.names)
        units = _units(batches, info, unit_rows, unit_bytes)
        rows = sum(m.rows for m in batches)
        return FileEntry(info.name, info.url, info.size, info.stamp, content_digest(info), rows, columns), units

    def read(
        self, unit: Unit, columns: Sequence[str], ranges: Sequence[Range] | None = None
    ) -> Iterator[tuple[int, int, list[Row]]]:
        wanted = check_ranges(unit, ranges)
        if not wanted:
            return
        with columnar.readable(unit.url, "Arrow"), storage.open_read(unit.url) as f:
            source = _mapped(f, unit.url)
            with _reader(source) as reader:
                schema = reader.schema
                if any(_has_dictionary(field.type) for field in schema):
                    # Dictionaries come before the batches that use them and may grow: read from the start.
                    yield from columnar.to_ranges(_all(reader), 0, unit, wanted, columns)
                    return
            offset, before = unit.hint >> _SKIP_BITS, unit.hint & _MAX_SKIP
            at = unit.start - before
            messages = (m for m in arrow_messages.walk(f, f.seek(0, 2), offset) if m.kind == "batch")
            first = next(messages, None)
            while first and at + first.rows <= wanted[0][0]:
                at += first.rows
                first = next(messages, None)
            todo = itertools.chain([first], messages) if first else ()
            batches = (_batch(source, m.offset, schema) for m in todo)
            yield from columnar.to_ranges(batches, at, unit, wanted, columns)

    def curate(self, entry: FileEntry, target_url: str, keep: Bool[np.ndarray, " rows"]) -> int:
        check_keep(entry, keep)
        with columnar.readable(entry.url, "Arrow"), storage.open_read(entry.url) as f:
            size = f.seek(0, 2)
            codec = next((m.codec for m in arrow_messages.walk(f, size) if m.kind == "batch" and m.rows), None)
            options = pa.ipc.IpcWriteOptions(compression=codec)
            is_file = arrow_messages.is_file_format(f)
            make = pa.ipc.new_file if is_file else pa.ipc.new_stream
            with (
                _reader(_mapped(f, entry.url)) as reader,
                storage.atomic_writer(target_url) as out,
                make(out, reader.schema, options=options) as writer,
            ):
                for batch in columnar.kept(_all(reader), entry, keep):
                    writer.write_batch(batch)
        return int(keep.sum())


def _reader(f: BinaryIO | pa.MemoryMappedFile) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
    is_file = arrow_messages.is_file_format(f)
    return pa.ipc.open_file(f) if is_file else pa.ipc.open_stream(f)


def _all(reader: pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
    else:
        yield from reader


def _mapped(f: BinaryIO, url: str) -> BinaryIO | pa.MemoryMappedFile:
    # A local file may be one huge record batch: mapped, only what is used of it comes into memory.
    return pa.memory_map(str(storage.local_path(url))) if storage.is_local(url) else f


def _batch(source: BinaryIO | pa.MemoryMappedFile, offset: int, schema: pa.Schema) -> pa.RecordBatch:
    source.seek(offset)
    return pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)


def _has_dictionary(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _has_dictionary(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return True
    return any(_has_dictionary(kind.field(i).type) for i in range(kind.num_fields))


def _units(batches: list[arrow_messages.Message], info: FileInfo, unit_rows: int, unit_bytes: int | None) -> list[Unit]:
    """Some whole small batches together, or a part of a large one."""
    units: list[Unit] = []

    def add(start: int, stop: int, message: arrow_messages.Message, before: int) -> None:
        hint = (message.offset << _SKIP_BITS) | before
        units.append(Unit(info.name, info.url, start, stop, stop - start, hint))

    at = 0
    gathered: list[arrow_messages.Message] = []
    n = 0  # rows gathered; they end at row `at`
    for message in batches:
        limit = unit_rows
        if unit_bytes is not None:
            limit = min(limit, max(1, unit_bytes * message.rows // max(1, message.end - message.offset)))
        if gathered and n + message.rows > limit:
            add(at - n, at, gathered[0], 0)
            gathered, n = [], 0
        if message.rows <= limit:
            gathered.append(message)
            n += message.rows
        else:
            done = 0
            while done < message.rows:
                step = limit if done + limit <= _MAX_SKIP else message.rows - done
                step = min(step, message.rows - done)
                add(at + done, at + done + step, message, done)
                done += step
        at += message.rows
    if gathered:
        add(at - n, at, gathered[0], 0)
    return units
