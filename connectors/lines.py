"""Lines of a byte stream, plain or compressed, each with its place; truncation is an error, never an early end.

In: a URL. Out: lines as bytes, exactly as they stand in the (decompressed) file. Knows nothing of JSON.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, cast

import zstandard

from connectors import storage
from curate.errors import CorpusError

Compression = Literal["none", "gzip", "zstd"]
BOM = b"\xef\xbb\xbf"
MAX_LINE = 256 << 20  # bytes: beyond this it is no line of text, and memory is not to be had for it
_ZSTD_SKIPPABLE = tuple(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16))
_ZSTD_WINDOW = 1 << 30


def detect(head: bytes) -> Compression:
    """By the first bytes: names lie, above all where a store compresses behind one's back."""
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head[:4] == b"\x28\xb5\x2f\xfd" or head[:4] in _ZSTD_SKIPPABLE:
        return "zstd"
    return "none"


class _Zstd(io.RawIOBase):
    """Decompress zstd frames; unlike the library's own reader, an end within a frame is an EOFError."""

    def __init__(self, source: BinaryIO) -> None:
        self._source, self._pending, self._input = source, memoryview(b""), b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            # A little at a time: this much input can become a thousand times as much output.
            data = self._input or self._source.read(1 << 15)
            self._input = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
            self._pending = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        view = memoryview(buffer).cast("B")
        n = min(len(view), len(self._pending))
        view[:n] = self._pending[:n]
        self._pending = self._pending[n:]
        return n


class Hashing(io.RawIOBase):
    """Pass bytes through and feed them to a hash; for a stream that is read once from start to end."""

    def __init__(self, source: BinaryIO, hasher: Any) -> None:
        self._source, self._hasher = source, hasher

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._source.read(len(view))
        view[: len(data)] = data
        self._hasher.update(data)
        return len(data)


@contextmanager
def open_text(url: str, offset: int = 0, hasher: Any = None) -> Iterator[tuple[BinaryIO, Compression]]:
    """The decompressed bytes from byte `offset` (which only a plain file can have), and how they were compressed.

    Raises:
        CorpusError: the stream is cut off or broken; also while the block reads.
    """
    kind: Compression = "none"
    with storage.open_read(url) as raw:
        if offset:
            raw.seek(offset)
        else:
            kind = detect(raw.read(4))
            raw.seek(0)
        source = cast(BinaryIO, io.BufferedReader(Hashing(raw, hasher), 1 << 18)) if hasher else raw
        stream: BinaryIO = source
        if kind == "gzip":
            stream = cast(BinaryIO, io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=source, mode="rb")), 1 << 18))
        elif kind == "zstd":
            stream = cast(BinaryIO, io.BufferedReader(_Zstd(source), 1 << 18))
        try:
            yield stream, kind
        except EOFError as e:
            raise CorpusError(
                f"{url} is cut off in the middle: its {kind} stream has no end. Copy the file again."
            ) from e
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as e:
            raise CorpusError(f"{url} is broken: its {kind} stream cannot be read ({e}). Copy the file again.") from e


@contextmanager
def compressed(target: BinaryIO, kind: Compression) -> Iterator[BinaryIO]:
    """A file to write to whose bytes reach `target` compressed. The same bytes in, the same bytes out, at any time."""
    if kind == "gzip":
        with gzip.GzipFile(filename="", mode="wb", fileobj=target, compresslevel=6, mtime=0) as f:
            yield cast(BinaryIO, f)
    elif kind == "zstd":
        with zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(target, closefd=False) as z:
            yield cast(BinaryIO, z)
    else:
        yield target


def raw_lines(stream: BinaryIO, url: str, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line with its line end) of every line, blank ones too. `at` is the stream's first offset.

    Raises:
        CorpusError: a line is longer than 256 MiB.
    """
    offset = at
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise CorpusError(
                f"{url} has a line longer than {MAX_LINE >> 20} MiB at byte {offset}; is it a file of JSON lines?"
            )
        yield offset, line
        offset += len(line)


def lines(stream: BinaryIO, url: str, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Like raw_lines, without blank lines and without a byte order mark at the start of the file."""
    for offset, line in raw_lines(stream, url, at):
        start = len(BOM) if offset == 0 and line.startswith(BOM) else 0
        content = line[start:]
        if content and not content.isspace():
            yield offset + start, content
