"""Places: local disk and object stores behind one small set of functions, addressed by URL.

In: URLs (a plain path, file://, s3://, gs://, az://, hf://, memory://). Out: bytes, listings, files written whole
or not at all. Every failure is a StorageError that names the URL, the reason and a remedy. Endpoints and
credentials come from fsspec's and the stores' own configuration (FSSPEC_S3_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …), so
that a worker process needs nothing but its environment. Knows nothing of file formats.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from connectors import localfile, traffic
from connectors.failures import is_transient, storage_error, told
from connectors.streams import Reading, buffered
from connectors.urls import LOCAL, SCHEMES, FileInfo, cache_root, is_local, join, local_path, scheme, split
from curate.errors import StorageError

__all__ = ["LOCAL", "SCHEMES", "FileInfo", "is_local", "join", "local_path", "scheme", "split"]
__all__ += ["atomic_writer", "cache_root", "check_writable", "exists", "glob", "hidden", "info", "is_dir", "list_files"]
__all__ += ["local_copy", "open_read", "read_bytes", "read_text", "remove_stale_temps", "write_atomic"]

T = TypeVar("T")
READ_BLOCK = 8 << 20  # bytes fetched ahead from an object store
_ATTEMPTS = 3  # the store's own client retries underneath; this is for what it does not
_WAIT = wait_exponential_jitter(initial=0.2, max=3.0, jitter=0.2)
_STALE_UPLOAD_S = 24 * 3600.0


def again(url: str, doing: str, act: Callable[[], T]) -> T:
    """Do an idempotent thing; on an object store again after a transient failure. Failures become StorageError."""
    attempts = 1 if scheme(url) in (*LOCAL, "memory") else _ATTEMPTS
    policy = Retrying(
        stop=stop_after_attempt(attempts),
        wait=_WAIT,
        retry=retry_if_exception(is_transient),
        before_sleep=lambda state: traffic.add(retries=1),
        reraise=True,
    )
    with told(url, doing):
        return policy(act)


def _stamp(details: dict[str, Any]) -> str:
    # The first that the store gives: a hash of the content rather than a time.
    for key in ("ETag", "etag", "blob_id", "md5Hash", "content_md5", "LastModified", "last_modified", "created"):
        value = details.get(key)
        if value:
            return str(value.timestamp() if isinstance(value, datetime) else value).strip('"')
    return ""


def info(url: str) -> FileInfo | None:
    """The file at `url` (name = last part of the path), or None where there is no file."""
    if is_local(url):
        with told(url, "read"):
            return localfile.info(local_path(url), url)
    fs, path = split(url)

    def ask() -> FileInfo | None:
        try:
            details = fs.info(path)
        except FileNotFoundError:
            return None
        if details["type"] != "file":
            return None
        return FileInfo(url, path.rsplit("/", 1)[-1], int(details["size"] or 0), _stamp(details))

    return again(url, "read", ask)


def is_dir(url: str) -> bool:
    """True for a folder; in an object store, for a prefix under which something lies."""
    fs, path = split(url)

    def ask() -> bool:
        try:
            return fs.info(path)["type"] == "directory"
        except FileNotFoundError:
            return False

    return again(url, "read", ask)


def exists(url: str) -> bool:
    """True if a file or a folder is there; a failure to find out is an error, not False."""
    return info(url) is not None or is_dir(url)


def hidden(name: str) -> bool:
    """True if a part of the relative path begins with "_" or ".": bookkeeping, not data."""
    return any(part[:1] in "._" for part in name.split("/"))


def _listing(url: str, all_files: bool) -> list[FileInfo]:
    if is_local(url):
        with told(url, "list"):
            found = list(localfile.walk(local_path(url), url, skip=None if all_files else hidden))
        return sorted(found, key=lambda f: f.name)
    return [
        FileInfo(where, name, int(details["size"] or 0), _stamp(details))
        for where, name, details in remote_files(url, all_files)
    ]


def remote_files(url: str, all_files: bool = False) -> list[tuple[str, str, dict[str, Any]]]:
    """(URL, name below `url`, fsspec's details) of the files of a place that is not local, sorted by name.

    Raises:
        StorageError: it cannot be listed.
    """
    fs, path = split(url)
    root = path.rstrip("/")

    def ask() -> dict[str, Any]:
        fs.invalidate_cache()
        try:
            return fs.find(path, detail=True)
        except FileNotFoundError:
            return {}

    out = []
    for name, details in again(url, "list", ask).items():
        relative = name.rstrip("/").removeprefix(root).strip("/") or root.rsplit("/", 1)[-1]
        # An object whose name ends in "/" is how some tools mark a folder.
        if details["type"] != "file" or name.endswith("/") or (not all_files and name != root and hidden(relative)):
            continue
        out.append((url if name.rstrip("/") == root else join(url, relative), relative, details))
    return sorted(out, key=lambda f: f[1])


def list_files(url: str) -> list[FileInfo]:
    """All files under `url`, recursively, sorted by name, without hidden ones; of a file: itself.

    A place that does not exist lists as empty: an object store cannot tell the two apart.
    """
    return _listing(url, all_files=False)


def glob(pattern: str) -> list[FileInfo]:
    """The files that match a pattern with * ? [] or **, sorted by URL; names are the last parts of their paths."""
    fs, path = split(pattern)

    def ask() -> dict[str, Any]:
        fs.invalidate_cache()
        return fs.glob(path, detail=True)

    out = []
    for name, details in again(pattern, "list", ask).items():
        if is_local(pattern):  # links are followed, as in a listing
            with told(name, "read"):
                found = localfile.info(Path(name), name)
            out += [found] if found else []
        elif details["type"] == "file":
            url = f"{scheme(pattern)}://{name.lstrip('/')}"
            out.append(FileInfo(url, name.rsplit("/", 1)[-1], int(details["size"] or 0), _stamp(details)))
    return sorted(out)


def open_read(url: str) -> BinaryIO:
    """A buffered, seekable binary file; close it. Failures while reading are StorageErrors."""
    kind = scheme(url)
    fs, path = split(url)
    if kind in LOCAL:
        with told(url, "read"):
            raw: Any = io.FileIO(path)
    elif kind == "memory":
        # fsspec's memory files are shared between readers: each needs a position of its own.
        with told(url, "read"):
            raw = io.BytesIO(fs.cat_file(path))
    else:
        raw = again(url, "read", lambda: fs.open(path, "rb", block_size=READ_BLOCK))
    return cast(BinaryIO, io.BufferedReader(Reading(raw, url), 1 << 18))


def read_bytes(url: str) -> bytes:
    fs, path = split(url)
    data = bytes(again(url, "read", lambda: fs.cat_file(path)))
    traffic.add(read=len(data))
    return data


def read_text(url: str) -> str:
    """UTF-8 text.

    Raises:
        StorageError: it is not UTF-8, or cannot be read.
    """
    try:
        return read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise StorageError(f"cannot read {url} as text: it is not UTF-8 (byte {e.start}).") from e


def write_atomic(url: str, data: bytes | str) -> None:
    """Write a whole file, replacing one that is there; a reader sees the old one or the new one, never a part."""
    raw = data.encode() if isinstance(data, str) else data
    if is_local(url):
        with atomic_writer(url) as f:
            f.write(raw)
        return
    fs, path = split(url)
    again(url, "write", lambda: fs.pipe_file(path, raw))
    traffic.add(written=len(raw))


@contextmanager
def atomic_writer(url: str) -> Iterator[BinaryIO]:
    """A binary file to write in a stream. It appears at `url` whole when the block ends, and never otherwise.

    Local: a hidden temporary file in the same folder, fsync, rename. Object store: one PUT if small, else a
    multipart upload that is completed at the end and aborted on an exception.
    """
    if is_local(url):
        with (
            localfile.replacing(local_path(url, writing=True), lambda: told(url, "write")) as raw,
            buffered(raw, url) as f,
        ):
            yield f
        return
    fs, path = split(url)
    if scheme(url) == "memory":  # its files show while they are being written
        whole = io.BytesIO()
        with buffered(whole, url) as f:
            yield f
        write_atomic(url, whole.getvalue())
        return
    with told(url, "write"):
        upload = fs.open(path, "wb")
    try:
        with buffered(upload, url) as f:
            yield f
        with told(url, "write"):
            upload.close()
    except BaseException as e:
        # Closing would complete the upload with what has come so far; even garbage collection closes.
        upload.closed = True
        try:
            upload.discard()
        except Exception as second:  # noqa: BLE001  # any: the first failure is the one to tell
            e.add_note(f"and the upload of {url} could not be abandoned: {second}")
        raise


def remove_stale_temps(url: str) -> int:
    """Remove what killed writers left under the folder `url`; returns how many. Live writers are not disturbed:
    locally they hold a lock on their file; in S3, uploads that are not completed count as dead after a day."""
    if is_local(url):
        with told(url, "clean"):
            return localfile.remove_stale(local_path(url, writing=True))
    if scheme(url) not in ("s3", "s3a"):
        return 0  # the other stores drop incomplete uploads by themselves
    fs, path = split(url)
    bucket, _, prefix = path.partition("/")

    def ask() -> int:
        now, removed = datetime.now(UTC), 0
        answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
        for upload in answer.get("Uploads", []):
            if (now - upload["Initiated"]).total_seconds() > _STALE_UPLOAD_S:
                fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])
                removed += 1
        return removed

    return again(url, "clean", ask)


def check_writable(url: str) -> None:
    """Make the folder `url` and write and remove a small file there.

    Raises:
        StorageError: names the URL and the reason (permission, read-only, no space, no bucket, …).
    """
    probe = join(url, f".probe-{secrets.token_hex(8)}")
    try:
        write_atomic(probe, b"can this place be written?\n" * 200)
        fs, path = split(probe)
        again(probe, "remove", lambda: fs.rm_file(path))
    except StorageError as e:
        raise StorageError(str(e).replace(probe, url)) from e


def remove(url: str) -> None:
    """Remove one file; one that is not there is no error."""
    if exists(url):
        fs, path = split(url)
        if is_local(url):
            path = str(local_path(url, writing=True))
        again(url, "remove", lambda: fs.rm_file(path))


def local_copy(url: str) -> Path:
    """The file or folder at `url` as a local path: itself if it is local, else a copy in the cache, whole or not at
    all, made once for each version of the source.

    Raises:
        StorageError: nothing is there, or it cannot be copied.
    """
    if is_local(url):
        if not exists(url):
            raise StorageError(f"cannot read {url}: it does not exist; check the spelling.")
        return local_path(url)
    files = _listing(url, all_files=True)
    if not files:
        raise StorageError(f"cannot read {url}: it does not exist; check the spelling.")
    version = repr([url.rstrip("/")] + [(f.name, f.size, f.stamp) for f in files])
    folder = cache_root() / "files" / hashlib.blake2b(version.encode(), digest_size=16).hexdigest()
    one_file = len(files) == 1 and files[0].url == url
    name = url.rstrip("/").rsplit("/", 1)[-1]
    if not (folder / name).exists():
        _download(files, folder, name, one_file)
    return folder / name


def _download(files: list[FileInfo], folder: Path, name: str, one_file: bool) -> None:
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        for f in files:
            target = partial / name if one_file else partial / name / f.name
            with open_read(f.url) as source, atomic_writer(str(target)) as out:
                shutil.copyfileobj(source, out, 1 << 20)
            if target.stat().st_size != f.size:
                raise StorageError(f"cannot copy {f.url}: got {target.stat().st_size} bytes of {f.size}; run again.")
        try:
            os.rename(partial, folder)
        except OSError as e:
            if not (folder / name).exists():  # else another process was quicker, with the same content
                raise storage_error(e, str(folder), "write") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
