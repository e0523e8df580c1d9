"""A Hugging Face dataset on disk: the folder that save_to_disk writes, of a Dataset or a DatasetDict.

The rows are Arrow streams; state.json says which files belong to the dataset and in what order (the folder may hold
cache files too), dataset_info.json describes it. Keys keep split and file: "train/data-00000-of-00001.arrow".
Knows nothing of the datasets library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from connectors import storage
from connectors.arrow_ipc import ArrowIpc
from connectors.base import Connector, Range, Row
from connectors.storage import FileInfo
from curate.corpus.units import FileEntry, Unit
from curate.errors import CorpusError

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_ARROW = ArrowIpc()


class HfDisk(Connector):
    name = "hf_disk"
    extensions = (STATE, SPLITS)  # told by these files, not by an extension

    def scan(self, info: FileInfo, unit_rows: int, unit_bytes: int | None = None) -> tuple[FileEntry, list[Unit]]:
        return _ARROW.scan(info, unit_rows, unit_bytes)

    def read(
        self, unit: Unit, columns: Sequence[str], ranges: Sequence[Range] | None = None
    ) -> Iterator[tuple[int, int, list[Row]]]:
        return _ARROW.read(unit, columns, ranges)

    def curate(self, entry: FileEntry, target_url: str, keep: Bool[np.ndarray, " rows"]) -> int:
        return _ARROW.curate(entry, target_url, keep)

    def finalize(self, source_url: str, target_url: str, keys: Collection[str] | None = None) -> None:
        """Write state.json, dataset_info.json and dataset_dict.json of the curated dataset, the telling ones last."""
        listed = storage.list_files(source_url)
        for folder in _folders(source_url, listed):
            source, target = storage.join(source_url, folder), storage.join(target_url, folder)
            state = _load(storage.join(source, STATE))
            rows, size, digest = 0, 0, hashlib.blake2b(str(state.get("_fingerprint")).encode(), digest_size=8)
            for name in _data_files(state, source):
                key = f"{folder}/{name}" if folder else name
                if keys is not None and key not in keys:
                    _write_empty(storage.join(source, name), storage.join(target, name))
                info = storage.info(storage.join(target, name)) or _empty_too(source, target, name)
                entry, _ = _ARROW.scan(info, unit_rows=1 << 30)
                rows, size = rows + entry.rows, size + info.size
                digest.update(entry.digest.encode())
            described = storage.join(source, INFO)
            if storage.exists(described):
                changed = _describe(_load(described), state.get("_split"), rows, size)
                storage.write_atomic(storage.join(target, INFO), json.dumps(changed, indent=2))
            # The fingerprint names the content for the datasets library's cache: other rows, another name.
            state["_fingerprint"] = digest.hexdigest()
            storage.write_atomic(storage.join(target, STATE), json.dumps(state, indent=2, sort_keys=True))
        if any(f.name == SPLITS for f in listed):
            storage.write_atomic(storage.join(target_url, SPLITS), storage.read_bytes(storage.join(source_url, SPLITS)))


def is_saved_dataset(files: Sequence[FileInfo]) -> bool:
    """True if the listing is that of a folder which save_to_disk wrote, or of several such folders."""
    return any(f.name.rsplit("/", 1)[-1] in (STATE, SPLITS) for f in files)


def data_files(url: str, listed: Sequence[FileInfo]) -> list[FileInfo]:
    """The Arrow files of the dataset at `url`, split after split, in the dataset's own order.

    Raises:
        CorpusError: a file that state.json names is missing, or state.json is broken.
    """
    have = {f.name: f for f in listed}
    out = []
    for folder in _folders(url, listed):
        for name in _data_files(_load(storage.join(url, folder, STATE)), storage.join(url, folder)):
            key = f"{folder}/{name}" if folder else name
            if key not in have:
                raise CorpusError(
                    f"{storage.join(url, key)} is missing, though {STATE} names it. Copy the dataset again."
                )
            out.append(have[key])
    return out


def _write_empty(source: str, target: str) -> None:
    info = storage.info(source)
    if info is None:
        raise CorpusError(f"{source} is missing, though {STATE} names it. Copy the dataset again.")
    entry, _ = _ARROW.scan(info, unit_rows=1 << 30)
    _ARROW.curate(entry, target, np.zeros(entry.rows, dtype=bool))


def _empty_too(source: str, target: str, name: str) -> FileInfo:
    """A shard without rows may have been passed over; the dataset needs its file all the same."""
    info = storage.info(storage.join(source, name))
    if info and _ARROW.scan(info, unit_rows=1 << 30)[0].rows == 0:
        _write_empty(info.url, storage.join(target, name))
    written = storage.info(storage.join(target, name))
    if written is None:
        raise CorpusError(f"{storage.join(target, name)} is missing: not all shards are curated yet.")
    return written


def _folders(url: str, listed: Sequence[FileInfo]) -> list[str]:
    """Folders with a state.json, relative to `url`; of a DatasetDict: its splits, in order."""
    names = {f.name for f in listed}
    if SPLITS in names:
        splits = _load(storage.join(url, SPLITS)).get("splits")
        if not isinstance(splits, list) or not all(isinstance(s, str) for s in splits):
            raise CorpusError(f"{storage.join(url, SPLITS)} is broken: no list of splits. Copy the dataset again.")
        for split in splits:
            if f"{split}/{STATE}" not in names:
                raise CorpusError(f"{storage.join(url, split, STATE)} is missing. Copy the dataset again.")
        return splits
    return sorted(n.removesuffix(STATE).rstrip("/") for n in names if n == STATE or n.endswith("/" + STATE))


def _load(url: str) -> dict[str, Any]:
    try:
        value = json.loads(storage.read_text(url))
    except json.JSONDecodeError as e:
        raise CorpusError(f"{url} is broken: {e}. Copy the dataset again.") from e
    if not isinstance(value, dict):
        raise CorpusError(f"{url} is broken: not a JSON object. Copy the dataset again.")
    return value


def _data_files(state: dict[str, Any], where: str) -> list[str]:
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise CorpusError(
            f"{where} was saved with an indices mapping by an old version of datasets. Save it again with a new one: "
            f"load_from_disk(…).flatten_indices().save_to_disk(…)."
        )
    try:
        return [str(f["filename"]) for f in state["_data_files"]]
    except (KeyError, TypeError) as e:
        raise CorpusError(f"{storage.join(where, STATE)} is broken: no list of data files. Copy it again.") from e


def _describe(info: dict[str, Any], split: str | None, rows: int, size: int) -> dict[str, Any]:
    """dataset_info.json with the new counts; what is not known any more is left out."""
    out = {k: v for k, v in info.items() if k not in ("dataset_size", "size_in_bytes")}
    splits = info.get("splits")
    if isinstance(splits, dict) and split in splits:
        mine = {k: v for k, v in splits[split].items() if k != "shard_lengths"}
        out["splits"] = {**splits, split: {**mine, "num_examples": rows, "num_bytes": size}}
    return out
