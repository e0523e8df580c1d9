"""A local cache of model folders that take long to make: made once, whole or not at all, by one process at a time.

In: a key and a function that fills a folder. Out: the folder. The cache lies in $CURATE_CACHE, else
~/.cache/curate. Does not know what the folders hold.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from connectors.storage import cache_root
from curate.errors import StorageError


def cached_folder(key: str, build: Callable[[Path], None]) -> Path:
    """The folder `models/<key>` of the cache; `build` fills it if it is not there.

    A second process waits for the first. What an interrupted one left is removed.

    Raises:
        StorageError: the cache cannot be written; whatever `build` raises.
    """
    root = cache_root() / "models"
    target = root / key
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{key}.lock"):
            if target.is_dir():
                return target
            for stale in root.glob(f".{key}.*.tmp"):
                shutil.rmtree(stale)
            temp = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=".tmp", dir=root))
            try:
                build(temp)
                _readable(temp)
                temp.rename(target)
            finally:
                shutil.rmtree(temp, ignore_errors=True)  # gone after the rename
    except (OSError, SafetensorError) as error:  # a full disk is the second, where safetensors meets it
        raise StorageError(
            f"the model cache {root} cannot be written: {getattr(error, 'strerror', None) or error}. "
            f"Set CURATE_CACHE to a folder with room for the model."
        ) from error
    return target


def _readable(folder: Path) -> None:
    # Weights are written with mode 0600 and temporary folders with 0700; others on this machine may share the cache.
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
