"""Local disk: listings, files that appear whole or not at all, and the removal of what killed writers left.

In: paths. Out: FileInfo, open files. Raises plain OSErrors; storage.py puts them in words. Knows no formats.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from connectors.urls import FileInfo

_TEMP = re.compile(r"^\..+\.[0-9a-f]{16}\.tmp$")
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_DEAD_AFTER_S = 24 * 3600.0  # where the file system has no locks


def _file_info(url: str, name: str, status: os.stat_result) -> FileInfo:
    return FileInfo(url, name, status.st_size, str(status.st_mtime_ns))


def info(path: Path, url: str) -> FileInfo | None:
    """The file at `path`, or None for a folder or nothing."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if S_ISDIR(status.st_mode) else _file_info(url, path.name, status)


def walk(root: Path, url: str, skip: Callable[[str], bool] | None) -> Iterator[FileInfo]:
    """All regular files under `root`, links followed. Unlike os.walk, a folder that cannot be read is an error.

    Raises:
        OSError: a folder that may not be read, a broken link, links in a circle.
    """
    itself = info(root, url)
    if itself:
        yield itself
        return
    base = url.rstrip("/")
    todo: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while todo:
        prefix, above = todo.pop()
        try:
            entries = sorted(os.scandir(root / prefix), key=lambda e: e.name)
        except FileNotFoundError:
            if prefix:
                continue  # removed while we looked
            return
        for entry in entries:
            name = prefix + entry.name
            if _TEMP.match(entry.name) or (skip and skip(name)):
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                if entry.is_symlink():
                    raise FileNotFoundError(errno.ENOENT, "broken link", entry.path) from None
                continue
            if S_ISDIR(status.st_mode):
                real = os.path.realpath(entry.path)
                if real in above:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), entry.path)
                todo.append((name + "/", (*above, real)))
            elif S_ISREG(status.st_mode):
                yield _file_info(f"{base}/{name}", name, status)


def _temporary(target: Path) -> tuple[io.FileIO, Path]:
    while True:
        path = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
        # Not the tempfile module: its files are mode 0600, and the result shall follow the umask.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        file = io.FileIO(fd, "w")
        try:
            # The lock dies with the process: remove_stale() can tell a killed writer's file from a live one's.
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:  # else remove_stale() came between open and lock
                return file, path
        except OSError as e:
            if e.errno in _NO_LOCKS:
                return file, path
            file.close()
            path.unlink(missing_ok=True)
            raise
        file.close()


@contextmanager
def replacing(target: Path, telling: Callable[[], AbstractContextManager[None]]) -> Iterator[io.FileIO]:
    """A new file that takes the name `target` when the block ends well, and vanishes otherwise.

    `telling` wraps this function's own steps, not the caller's block, so that each failure is told of the right file.
    """
    with telling():
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        file, temporary = _temporary(target)
    try:
        yield file
        with telling():
            os.fsync(file.fileno())
            os.replace(temporary, target)
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name itself must survive a power cut
            finally:
                os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        file.close()


def remove_stale(root: Path) -> int:
    """Remove temporary files of dead writers under `root`; returns how many."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    removed = 0
    for folder, _, names in os.walk(root, onerror=refuse):
        for name in filter(_TEMP.match, names):
            path = Path(folder, name)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # its writer has just finished
            try:
                if _dead(fd):
                    path.unlink(missing_ok=True)
                    removed += 1
            finally:
                os.close(fd)
    return removed


def _dead(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise
        return time.time() - os.fstat(fd).st_mtime > _DEAD_AFTER_S
    return True
