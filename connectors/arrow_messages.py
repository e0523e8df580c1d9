"""The messages of an Arrow IPC stream or file: where each begins and how many rows it holds, bodies unread.

In: a seekable file. Out: Message entries. Reads the few flatbuffer fields of the IPC specification (Message.fbs) that
pyarrow does not tell: the row count and the compression of a record batch without loading it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

import pyarrow as pa

MAGIC = b"ARROW1"
Kind = Literal["schema", "dictionary", "batch", "other"]
_KINDS: dict[int, Kind] = {1: "schema", 2: "dictionary", 3: "batch"}
_CODECS = {0: "lz4", 1: "zstd"}
_CONTINUATION = 0xFFFFFFFF
_MAX_METADATA = 1 << 30


@dataclass(frozen=True)
class Message:
    """One message at byte `offset` (of its length prefix) up to `end`; `rows` and `codec` for record batches."""

    kind: Kind
    offset: int
    end: int
    rows: int = 0
    codec: str | None = None


class _Table:
    """A flatbuffer table: fields by their index in the schema."""

    def __init__(self, buffer: bytes, at: int) -> None:
        self._buffer, self._at = buffer, at
        (back,) = struct.unpack_from("<i", buffer, at)
        self._vtable = at - back
        (self._size,) = struct.unpack_from("<H", buffer, self._vtable)

    def _place(self, field: int) -> int | None:
        entry = 4 + 2 * field
        if entry >= self._size:
            return None
        (offset,) = struct.unpack_from("<H", self._buffer, self._vtable + entry)
        return self._at + offset if offset else None

    def number(self, field: int, form: str, default: int = 0) -> int:
        place = self._place(field)
        return default if place is None else int(struct.unpack_from(form, self._buffer, place)[0])

    def first(self, field: int, form: str) -> int | None:
        """First element of a vector of structs or numbers, None if there is none."""
        place = self._place(field)
        if place is None:
            return None
        (offset,) = struct.unpack_from("<I", self._buffer, place)
        (length,) = struct.unpack_from("<I", self._buffer, place + offset)
        return int(struct.unpack_from(form, self._buffer, place + offset + 4)[0]) if length else None

    def table(self, field: int) -> _Table | None:
        place = self._place(field)
        if place is None:
            return None
        (offset,) = struct.unpack_from("<I", self._buffer, place)
        return _Table(self._buffer, place + offset)


def _parse(metadata: bytes, offset: int, body_at: int) -> Message:
    try:
        (root,) = struct.unpack_from("<I", metadata, 0)
        message = _Table(metadata, root)
        kind = _KINDS.get(message.number(1, "<B"), "other")
        body = message.number(3, "<q")
        if body < 0:
            raise EOFError(f"the message at byte {offset} has a negative length")
        rows, codec = 0, None
        batch = message.table(2) if kind == "batch" else None
        if batch:
            rows = batch.number(0, "<q")
            # The first column's own count: a broken number must not pass for a billion rows.
            if rows < 0 or batch.first(1, "<q") not in (None, rows):
                raise EOFError(f"the record batch at byte {offset} is broken: {rows} rows")
            compression = batch.table(3)
            codec = _CODECS.get(compression.number(0, "<b")) if compression else None
    except struct.error as e:
        raise EOFError(f"the message at byte {offset} is broken") from e
    return Message(kind, offset, body_at + body, rows, codec)


def is_file_format(f: BinaryIO | pa.NativeFile) -> bool:
    """True for the file format (random access, with a footer), False for a stream. Leaves the position at 0."""
    f.seek(0)
    head = f.read(len(MAGIC))
    f.seek(0)
    return head == MAGIC


def walk(f: BinaryIO, size: int, at: int = 0) -> Iterator[Message]:
    """All messages from byte `at` (the place of one, or 0) up to the end-of-stream mark.

    Raises:
        EOFError: the file of `size` bytes ends before that mark: whoever wrote it was cut off.
    """
    if at == 0 and is_file_format(f):
        at = 8
    while True:
        f.seek(at)
        prefix = f.read(8)
        if len(prefix) < 4:
            raise EOFError(f"no end-of-stream mark; the file ends at byte {at}")
        (length,) = struct.unpack_from("<I", prefix)
        head = 4  # Arrow before 0.15 had no continuation mark
        if length == _CONTINUATION:
            if len(prefix) < 8:
                raise EOFError(f"the file ends within the message at byte {at}")
            (length,) = struct.unpack_from("<I", prefix, 4)
            head = 8
        if length == 0:
            return
        if length > _MAX_METADATA or at + head + length > size:
            raise EOFError(f"the file ends within the message at byte {at}, or holds something else there")
        f.seek(at + head)
        message = _parse(f.read(length), at, at + head + length)
        if message.end > size:
            raise EOFError(f"the file ends within the message at byte {at}: {size} bytes of {message.end}")
        yield message
        at = message.end
