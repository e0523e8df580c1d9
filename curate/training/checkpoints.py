"""Checkpoints of a training at a URL: <url>/step-00000100/…, whole once complete.json is there.

In and out: local folders as the Trainer writes and reads them. Knows no model. A half copy that a kill left is never
taken for a checkpoint; only the newest one is kept.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from connectors import storage

COMPLETE = "complete.json"
_STEP = re.compile(r"^step-(\d{8})/")


def step_url(url: str, step: int) -> str:
    return storage.join(url, f"step-{step:08d}")


def upload(folder: Path, url: str, leave: Sequence[str] = ()) -> dict[str, int]:
    """Copy all files of `folder` to `url`, but for those named in `leave`; returns their sizes by relative name."""
    sizes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in leave):
        name = path.relative_to(folder).as_posix()
        with path.open("rb") as source, storage.atomic_writer(storage.join(url, name)) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        sizes[name] = path.stat().st_size
    return sizes


def download(url: str, folder: Path) -> None:
    """Copy all files below `url` to `folder`."""
    for file in storage.list_files(url):
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.open_read(file.url) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def complete(url: str, step: int, sizes: dict[str, int]) -> None:
    """Say that the checkpoint of `step` is whole, and remove the older ones."""
    text = json.dumps({"step": step, "files": sizes}, indent=2)
    storage.write_atomic(storage.join(step_url(url, step), COMPLETE), text)
    remove(url, below=step)


def remove(url: str, below: int | None = None) -> None:
    """Remove checkpoints (of steps below `below`), what says that they are whole first."""
    if not storage.exists(url):
        return
    for file in sorted(storage.list_files(url), key=lambda f: (not f.name.endswith(COMPLETE), f.name)):
        found = _STEP.match(file.name)
        if found and (below is None or int(found[1]) < below):
            storage.remove(file.url)
            if storage.is_local(file.url):
                with suppress(OSError):  # a folder that still holds files
                    storage.local_path(file.url).parent.rmdir()


def newest(url: str) -> int | None:
    """The step of the newest whole checkpoint, or None. Whole: its files are there in the sizes that were written."""
    if not storage.exists(url):
        return None
    there: dict[int, dict[str, int]] = {}
    for file in storage.list_files(url):
        found = _STEP.match(file.name)
        if found:
            there.setdefault(int(found[1]), {})[file.name[found.end() :]] = file.size
    for step in sorted(there, reverse=True):
        if COMPLETE in there[step]:
            said = json.loads(storage.read_text(storage.join(step_url(url, step), COMPLETE)))
            if said["files"].items() <= there[step].items():
                return step
    return None
