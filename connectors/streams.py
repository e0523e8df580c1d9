"""Files of any store as Python's own kind of file: failures are StorageErrors about a URL, and bytes are counted.

In: a file that fsspec or the operating system opened. Out: raw and buffered files. Knows no stores.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from connectors import traffic
from connectors.failures import told


class Reading(io.RawIOBase):
    """A file of an object store whose failures are StorageErrors, also when a format library does the reading."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        with told(self._url, "read"):
            data = self._file.read(view.nbytes)
        view[: len(data)] = data
        traffic.add(read=len(data))
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class Writing(io.RawIOBase):
    """A file being written whose failures are StorageErrors about its final URL."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url, self._at = file, url, 0
        self.abandoned = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.abandoned:
            return view.nbytes  # what the buffer above still holds is not wanted any more
        done = 0
        with told(self._url, "write"):
            while done < view.nbytes:  # a nearly full disk takes a part
                done += self._file.write(view[done:])
        self._at += done
        traffic.add(written=done)
        return done

    def tell(self) -> int:
        return self._at


@contextmanager
def buffered(file: Any, url: str) -> Iterator[BinaryIO]:
    """A buffered file to write `url` by; of a block that fails, what is still in the buffer is not written."""
    raw = Writing(file, url)
    out = io.BufferedWriter(raw, 1 << 20)
    try:
        yield cast(BinaryIO, out)
        if not out.closed:
            out.flush()
    except BaseException:
        raw.abandoned = True
        raise
    finally:
        out.close()
