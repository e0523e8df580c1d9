"""What went wrong at a location, in words: any storage library's exception becomes one StorageError.

In: an exception and the URL it concerns. Out: StorageError naming the URL, the reason and a remedy.
Knows nothing of file formats.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from connectors import traffic
from connectors.redaction import without_secrets
from curate.errors import StorageError

# Libraries underneath fsspec whose exceptions are not OSErrors.
_LIBRARIES = frozenset(
    ["adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "httpx", "requests", "s3fs"]
)
_TRANSIENT_ERRNO = frozenset(
    {errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE}
    | {errno.EAGAIN, errno.EREMOTEIO}
)
# By name, so that no library need be installed for it; a subclass counts too.
_TRANSIENT_NAMES = frozenset(
    ["ConnectError", "ConnectTimeout", "ConnectionClosedError", "ConnectTimeoutError", "EndpointConnectionError"]
).union(
    ["ClientPayloadError", "FSTimeoutError", "HTTPClientError", "IncompleteRead", "ReadError", "ReadTimeout"],
    ["ReadTimeoutError", "RemoteProtocolError", "ResponseParserError", "ServerDisconnectedError"],
)
_CREDENTIAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "DefaultCredentialsError")
_BY_ERRNO = {
    errno.ENOSPC: ("no space left", "free some space there, or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "free some space there, or choose another place"),
    errno.EFBIG: ("the file is larger than the limit there", "raise the file-size limit (ulimit -f), or cut smaller"),
    errno.EROFS: ("the file system is read-only", "choose a place that can be written"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another place"),
    errno.EISDIR: ("it is a folder, not a file", "name a file"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
    errno.ELOOP: ("its links lead in a circle", "mend the links"),
}


def is_storage_failure(error: BaseException) -> bool:
    """True for OSErrors and for the exceptions of the object-store libraries; False for a bug or a user's error."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _LIBRARIES


def is_transient(error: BaseException) -> bool:
    """True where asking an object store again may help: time-outs, dropped connections, throttling, its 5xx."""
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    return any(kind.__name__ in _TRANSIENT_NAMES for kind in type(error).__mro__[:-1])


def explain(error: BaseException) -> tuple[str, str]:
    """(reason, remedy) in plain words."""
    # The cause is looked at too: a library may wrap the OSError that says what happened.
    chain = [error]
    while len(chain) < 5 and chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for e in chain:
        if isinstance(e, FileNotFoundError):
            return "it does not exist", "check the spelling"
        if isinstance(e, PermissionError) or getattr(e, "errno", None) in (errno.EPERM, errno.EACCES):
            return f"permission denied ({_line(e)})", "check the rights of the user or the credentials"
        known = _BY_ERRNO.get(getattr(e, "errno", None) or 0)
        if known:
            return known
        if type(e).__name__ in _CREDENTIAL_NAMES:
            return f"no credentials ({_line(e)})", "set them in the environment, for example AWS_ACCESS_KEY_ID"
        if is_transient(e):
            return f"the store does not answer ({_line(e)})", "check the endpoint and the network, then run again"
    return _line(error), "check that the place can be reached and used"


def _line(error: BaseException) -> str:
    text = without_secrets(getattr(error, "strerror", None) or " ".join(str(error).split()))[:300].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def storage_error(error: BaseException, url: str, doing: str) -> StorageError:
    """`doing` is a verb: "read", "write", "list"."""
    reason, remedy = explain(error)
    if doing == "write" and isinstance(error, FileNotFoundError):
        reason, remedy = "its folder or bucket does not exist and cannot be made", "make it, or choose another place"
    return StorageError(f"cannot {doing} {url}: {reason}; {remedy}.")


@contextmanager
def told(url: str, doing: str) -> Iterator[None]:
    """Within this block every storage failure becomes a StorageError about `url`; other exceptions pass."""
    try:
        yield
    except Exception as e:
        if not is_storage_failure(e):
            raise
        traffic.add(errors=1)
        raise storage_error(e, url, doing) from e
