"""URLs: which are allowed, the file system behind each, and how to join them.

In: a plain path or a URL. Out: an fsspec file system and the path within it. Reads and writes nothing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from connectors.failures import is_storage_failure, storage_error
from curate.errors import StorageError, near

SCHEMES = ("local", "file", "s3", "s3a", "gs", "gcs", "az", "abfs", "hf", "memory")
LOCAL = ("local", "file")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_ALMOST_SCHEME = re.compile(rf"^({'|'.join(s for s in SCHEMES if s != 'local')}):/?(?!/)")
_USER = re.compile(r"^([A-Za-z0-9+.-]+://)[^/@]*:[^/@]*@")


@dataclass(frozen=True, order=True)
class FileInfo:
    """One file of a listing. `name` is relative to the listed root; `stamp` (etag, or time of change) tells whether
    the file has changed since."""

    url: str
    name: str
    size: int
    stamp: str


def scheme(url: str) -> str:
    """The URL's scheme in small letters, "local" for a plain path.

    Raises:
        StorageError: an unknown scheme, a chained URL, or credentials within the URL.
    """
    if "://" in url and "::" in url.split("://")[0]:
        raise StorageError(f"cannot use {url}: chained URLs (…::…) are not supported; give the inner URL.")
    if m := _USER.match(url):
        shown = m[1] + "…@" + url[m.end() :]
        raise StorageError(
            f"cannot use {shown}: credentials in a URL end up in logs and recipes; "
            f"set them in the environment instead, for example AWS_ACCESS_KEY_ID."
        )
    m = _SCHEME.match(url)
    if not m:
        if a := _ALMOST_SCHEME.match(url):
            raise StorageError(f"cannot use {url}: a URL needs two slashes; did you mean {a[1]}://{url[a.end() :]}?")
        return "local"
    found = m[1].lower()
    if found not in SCHEMES:
        raise StorageError(f"cannot use {url}: unknown scheme {found!r}{near(found, SCHEMES)}.")
    return found


def split(url: str) -> tuple[Any, str]:
    """(fsspec file system, path within it)."""
    kind = scheme(url)
    try:
        # Listings are never cached: other processes write to the same places.
        options = {} if kind in (*LOCAL, "memory", "hf") else {"use_listings_cache": False}
        fs = fsspec.filesystem("file" if kind in LOCAL else kind, **options)
    except ImportError as e:
        package = _PACKAGES.get(kind, "huggingface_hub")
        raise StorageError(f"cannot use {url}: {kind}:// needs the package {package}; pip install {package}.") from e
    except Exception as e:
        if not is_storage_failure(e):
            raise
        raise storage_error(e, url, "use") from e
    if kind in LOCAL:
        return fs, str(local_path(url))
    return fs, fs._strip_protocol(f"{kind}://{url.split('://', 1)[1]}")


def is_local(url: str) -> bool:
    """True for a plain path, file:// and local://."""
    return scheme(url) in LOCAL


def local_path(url: str) -> Path:
    """Absolute path of a local URL; "~" is the home folder."""
    m = _SCHEME.match(url)
    return Path(os.path.abspath(os.path.expanduser(url[m.end() :] if m else url)))


def join(url: str, *parts: str) -> str:
    """`url` with `parts` appended; parts may hold slashes but not climb out with "..".

    Raises:
        StorageError: a part that contains "..".
    """
    out = url
    for part in parts:
        clean = part.strip("/")
        if ".." in clean.split("/"):
            raise StorageError(f"cannot join {url} and {part!r}: it climbs out of the folder.")
        if clean:
            out = out + clean if out.endswith("://") else out.rstrip("/") + "/" + clean
    return out
