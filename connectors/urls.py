"""URLs: which are allowed, the file system behind each, and how to join them.

In: a plain path or a URL. Out: an fsspec file system and the path within it. Reads and writes nothing.

Who runs the machines decides what a configuration may name, by two variables of the environment, which no option of a
job can change:

CURATE_SCHEMES      the schemes that are allowed, with commas: "s3,gs" allows no local path; "+sftp" adds one that
                    fsspec knows to those of SCHEMES. Unset: SCHEMES.
CURATE_LOCAL_ROOTS  folders, with colons, outside of which no local path is read or written, links followed to their
                    end. Curate's cache is allowed besides, and installed packages may be read. Unset: any path.
"""

from __future__ import annotations

import os
import re
import site
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from connectors.failures import is_storage_failure, storage_error
from connectors.redaction import check_no_secret, shown
from curate.errors import StorageError, near

SCHEMES = ("local", "file", "s3", "s3a", "gs", "gcs", "az", "abfs", "hf", "memory")
LOCAL = ("local", "file")
_OWN = Path(__file__).resolve().parents[1]  # the code itself, which holds the embedded corpus and traits
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_ALMOST_SCHEME = re.compile(rf"^({'|'.join(s for s in SCHEMES if s != 'local')}):/?(?!/)")
SCHEMES_VARIABLE, ROOTS_VARIABLE = "CURATE_SCHEMES", "CURATE_LOCAL_ROOTS"


@dataclass(frozen=True, order=True)
class FileInfo:
    """One file of a listing. `name` is relative to the listed root; `stamp` (etag, or time of change) tells whether
    the file has changed since."""

    url: str
    name: str
    size: int
    stamp: str


def allowed_schemes() -> tuple[str, ...]:
    """Those of SCHEMES, or what CURATE_SCHEMES says."""
    names = [n.strip().lower() for n in os.environ.get(SCHEMES_VARIABLE, "").split(",") if n.strip()]
    added = [n[1:] for n in names if n.startswith("+")]
    only = [n for n in names if not n.startswith("+")]
    return (*(only or SCHEMES), *added)


def scheme(url: str) -> str:
    """The URL's scheme in small letters, "local" for a plain path.

    Raises:
        StorageError: a scheme that is unknown or not allowed here, a chained URL, or a secret within the URL.
    """
    if "://" in url and "::" in url.split("://")[0]:
        raise StorageError(f"cannot use {shown(url)}: chained URLs (…::…) are not supported; give the inner URL.")
    check_no_secret(url)
    m = _SCHEME.match(url)
    if not m and (a := _ALMOST_SCHEME.match(url)):
        raise StorageError(f"cannot use {url}: a URL needs two slashes; did you mean {a[1]}://{url[a.end() :]}?")
    found = m[1].lower() if m else "local"
    allowed = allowed_schemes()
    if found in LOCAL and not set(LOCAL) & set(allowed):
        raise StorageError(f"cannot use {url}: local paths are not allowed here ({SCHEMES_VARIABLE} says so).")
    if found not in allowed and not (found in LOCAL and set(LOCAL) & set(allowed)):
        if found in SCHEMES:
            raise StorageError(f"cannot use {url}: {found}:// is not allowed here ({SCHEMES_VARIABLE} says so).")
        raise StorageError(f"cannot use {url}: unknown scheme {found!r}{near(found, allowed)}.")
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


def local_path(url: str, writing: bool = False) -> Path:
    """Absolute path of a local URL; "~" is the home folder.

    Raises:
        StorageError: it lies outside CURATE_LOCAL_ROOTS.
    """
    m = _SCHEME.match(url)
    path = Path(os.path.abspath(os.path.expanduser(url[m.end() :] if m else url)))
    if roots := os.environ.get(ROOTS_VARIABLE):
        _check_root(path, [Path(os.path.realpath(r)) for r in roots.split(os.pathsep) if r], writing)
    return path


def _check_root(path: Path, roots: list[Path], writing: bool) -> None:
    real = Path(os.path.realpath(path))
    readable = [] if writing else [_OWN, *map(Path, site.getsitepackages())]
    if any(real.is_relative_to(os.path.realpath(free)) for free in (*roots, cache_root(), *readable)):
        return
    link = f" (which is {real})" if real != path else ""
    raise StorageError(
        f"cannot {'write' if writing else 'use'} {path}{link}: it lies outside the folders that are allowed here, "
        f"{', '.join(map(str, roots))} ({ROOTS_VARIABLE})."
    )


def cache_root() -> Path:
    """${CURATE_CACHE:-~/.cache/curate}"""
    return Path(os.environ.get("CURATE_CACHE") or "~/.cache/curate").expanduser()


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
