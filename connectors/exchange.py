"""Compare and swap of a small file: write it only if nobody else has written since it was read.

In: a URL, what is expected there, what shall be there. Out: whether it was done. On local disk a lock file makes it
one step; S3 does it itself (conditional writes); of other stores a writer waits a moment and reads back who has won.
"""

from __future__ import annotations

import errno
import time

import filelock
from filelock import FileLock

from connectors import storage
from connectors.failures import told
from curate.errors import StorageError

_SETTLE_S = 1.0  # how long two writers may overtake each other in a store without conditional writes
_LOCK_S = 30.0
_REFUSED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_UNKNOWN = ("NotImplemented", "501")


def read(url: str) -> bytes | None:
    """The file's content, None where there is none."""
    return storage.read_bytes(url) if storage.info(url) else None


def swap(url: str, expected: bytes | None, new: bytes | None) -> bool:
    """Replace `expected` by `new` and return True; return False where something else lies there.

    None: no file. Contents must differ from writer to writer (hold an owner's name), or nobody can tell who has won.

    Raises:
        StorageError: the place cannot be read or written.
    """
    if storage.is_local(url):
        return _local(url, expected, new)
    if storage.scheme(url) in ("s3", "s3a") and new is not None:
        done = _s3(url, expected, new)
        if done is not None:
            return done
    return _plain(url, expected, new)


def _local(url: str, expected: bytes | None, new: bytes | None) -> bool:
    path = storage.local_path(url, writing=True)
    with told(url, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_S):
            return _now(url, expected, new)
    except filelock.Timeout as e:
        raise StorageError(f"cannot write {url}: its lock file is held for {_LOCK_S:.0f} s; run again.") from e
    except OSError as e:
        with told(url, "write"):
            raise e


def _now(url: str, expected: bytes | None, new: bytes | None) -> bool:
    if read(url) != expected:
        return False
    if new is None:
        storage.remove(url)
    else:
        storage.write_atomic(url, new)
    return True


def _s3(url: str, expected: bytes | None, new: bytes) -> bool | None:
    """As `swap`; None where the store does not know conditional writes."""
    fs, path = storage.split(url)
    bucket, _, key = path.partition("/")
    condition = {"IfNoneMatch": "*"}
    if expected is not None:
        before = storage.info(url)  # before its content: what comes between fails the condition
        if before is None or read(url) != expected:
            return False
        condition = {"IfMatch": f'"{before.stamp}"'}
    try:
        with told(url, "write"):
            fs.call_s3("put_object", Bucket=bucket, Key=key, Body=new, **condition)
    except StorageError as e:
        cause = e.__cause__
        code = _code(cause)
        if code in _UNKNOWN:
            return None
        if code in _REFUSED or isinstance(cause, FileExistsError) or getattr(cause, "errno", None) == errno.EEXIST:
            return False
        raise
    fs.invalidate_cache(path)
    return True


def _code(error: BaseException | None) -> str:
    """The S3 error code within an exception of s3fs, which turns some into OSErrors."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            return str(answer.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def _plain(url: str, expected: bytes | None, new: bytes | None) -> bool:
    if not _now(url, expected, new):
        return False
    if new is not None and storage.scheme(url) != "memory":
        time.sleep(_SETTLE_S)
    return read(url) == new
