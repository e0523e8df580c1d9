"""Temporary folders that do not outlive a killed process for long: the next training on the machine removes them.

In: a purpose. Out: a folder of this machine, gone when the block ends. Checkpoints of a large model pass through such a
folder, and workers are killed as a matter of course (a sweep that is interrupted, memory that ran out).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "curate-training-"
_YOUNG_S = 60.0  # between making a folder and locking it; such a one is left alone


@contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """An empty folder, after the removal of those whose processes are dead: a process holds a lock on its folder, which
    ends with it."""
    root = Path(tempfile.gettempdir())
    remove_dead(root)
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{purpose}-") as folder:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # without locks there is no removal either
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(fd)


def remove_dead(root: Path) -> int:
    """Remove the folders of dead processes below `root`; returns how many. Those of other users stay."""
    return sum(_removed(folder) for folder in root.glob(f"{_PREFIX}*"))


def _removed(folder: Path) -> bool:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # just gone, or another user's
        return False
    try:
        if time.time() - os.fstat(fd).st_mtime < _YOUNG_S:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its process lives, or the file system has no locks
        return False
    else:
        shutil.rmtree(folder, ignore_errors=True)  # another one may be at it
        return True
    finally:
        os.close(fd)
