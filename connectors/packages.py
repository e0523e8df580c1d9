"""pkg:// locations: files inside installed Python packages, found without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from curate.errors import StorageError

SCHEME = "pkg://"


def package_path(url: str) -> Path:
    """The file or folder that `pkg://<package>[/<path>]` names.

    Raises:
        StorageError: no such package, or no such file in it.
    """
    package, _, inner = url.removeprefix(SCHEME).partition("/")
    # find_spec of a top-level package looks for it and runs none of its code.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise StorageError(f"{url}: no package {package!r} is installed; install it with pip, or give another location")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / inner).resolve()
    if not path.is_relative_to(root):
        raise StorageError(f"{url} leads out of the package {package!r}")
    if not path.exists():
        raise StorageError(f"{url}: the package {package!r} has no {inner!r}")
    return path


def expand(url: str) -> str:
    """`url` with a pkg:// location replaced by its path; every other one as it is."""
    return str(package_path(url)) if url.startswith(SCHEME) else url
