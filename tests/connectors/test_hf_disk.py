"""Hugging Face datasets on disk: read what save_to_disk writes; write what load_from_disk reads."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from connectors import registry, storage
from curate.errors import CorpusError
from tests.connectors.rows import check_units, conversations, read, some

N = 200


def save(folder: Path, splits: bool, shards: int = 3) -> datasets.Dataset | datasets.DatasetDict:
    data = datasets.Dataset.from_list(conversations(N))
    data = data.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    saved = datasets.DatasetDict({"train": data, "test": data.select(range(50, 90))}) if splits else data
    shards_by_split = {"train": shards, "test": 1}
    saved.save_to_disk(str(folder), num_shards=shards_by_split if splits else shards)
    return saved


def curate(source: str, target: str, share: float) -> list[dict]:
    """Curate all shards; returns the rows of the decision."""
    connector, files = registry.discover(source)
    kept = []
    for i, info in enumerate(files):
        entry, units = connector.scan(info, 40)
        keep = some(entry.rows, seed=i, share=share)
        rows = read(connector, units, entry.columns)
        kept += [r.value for r in rows if keep[r.index]]
        assert connector.curate(entry, storage.join(target, entry.key), keep) == keep.sum()
    connector.finalize(source, target)
    return kept


@pytest.mark.parametrize("splits", [True, False])
def test_read(tmp_path: Path, splits: bool) -> None:
    saved = save(tmp_path / "d", splits)
    connector, files = registry.discover(str(tmp_path / "d"))
    assert connector.name == "hf_disk"
    prefix = "train/" if splits else ""
    assert [f.name for f in files][:3] == [f"{prefix}data-0000{i}-of-00003.arrow" for i in range(3)]
    assert [f.name for f in files][3:] == (["test/data-00000-of-00001.arrow"] if splits else [])
    got = []
    for info in files:
        entry, units = connector.scan(info, 40)
        check_units(entry, units, 40)
        got += [r.value for r in read(connector, units, ["messages", "n"])]
    parts = saved.values() if splits else [saved]
    assert got == [{"messages": r["messages"], "n": r["n"]} for part in parts for r in part]


@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_datasets_library_loads_what_was_curated(tmp_path: Path, splits: bool, share: float) -> None:
    source, target = str(tmp_path / "in"), str(tmp_path / "out")
    saved = save(tmp_path / "in", splits)
    kept = curate(source, target, share)
    loaded = datasets.load_from_disk(target)
    parts = list(loaded.values()) if splits else [loaded]
    assert [r for part in parts for r in part] == kept
    if splits:
        assert list(loaded) == list(saved)
    first, original = parts[0], (saved["train"] if splits else saved)
    assert first.features == original.features
    assert first.features["label"].names == ["bad", "good"]
    assert first._fingerprint != original._fingerprint
    assert (share == 0) or [registry.discover(target)[0].name] == ["hf_disk"]


def test_on_s3(s3: str, tmp_path: Path) -> None:
    save(tmp_path / "d", splits=True)
    for file in (tmp_path / "d").rglob("*"):
        if file.is_file():
            storage.write_atomic(f"{s3}/in/{file.relative_to(tmp_path / 'd')}", file.read_bytes())
    kept = curate(f"{s3}/in", f"{s3}/out", 0.5)
    loaded = datasets.load_from_disk(storage.local_copy(f"{s3}/out"))
    assert [r for part in loaded.values() for r in part] == kept


def test_cache_files_in_the_folder_are_not_data(tmp_path: Path) -> None:
    save(tmp_path / "d", splits=False)
    data = datasets.load_from_disk(str(tmp_path / "d"))
    data.map(lambda row: {"n": row["n"] + 1})  # leaves cache-*.arrow beside the data
    assert list((tmp_path / "d").glob("cache-*.arrow"))
    _, files = registry.discover(str(tmp_path / "d"))
    assert [f.name for f in files] == [f"data-0000{i}-of-00003.arrow" for i in range(3)]


def test_counts_in_the_description_are_the_new_ones(tmp_path: Path) -> None:
    save(tmp_path / "in", splits=False)
    described = tmp_path / "in" / "dataset_info.json"
    info = json.loads(described.read_text())
    info["splits"] = {"train": {"name": "train", "num_bytes": 1, "num_examples": N, "dataset_name": "x"}}
    info["dataset_size"] = 12345
    described.write_text(json.dumps(info))
    state = tmp_path / "in" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_split": "train"}))
    kept = curate(str(tmp_path / "in"), str(tmp_path / "out"), 0.3)
    loaded = datasets.load_from_disk(str(tmp_path / "out"))
    assert loaded.info.splits["train"].num_examples == len(kept) == len(loaded)
    assert loaded.info.dataset_size is None


def test_unfinished(tmp_path: Path) -> None:
    save(tmp_path / "in", splits=False)
    connector, files = registry.discover(str(tmp_path / "in"))
    entry, _ = connector.scan(files[0], 100)
    connector.curate(entry, str(tmp_path / "out" / entry.key), np.ones(entry.rows, bool))
    with pytest.raises(CorpusError, match=r"data-00001-of-00003\.arrow is missing: not all shards are curated yet"):
        connector.finalize(str(tmp_path / "in"), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "state.json").exists()


def test_shards_left_out_on_purpose_are_empty(tmp_path: Path) -> None:
    save(tmp_path / "in", splits=True)
    connector, files = registry.discover(str(tmp_path / "in"))
    entry, _ = connector.scan(files[0], 100)
    connector.curate(entry, str(tmp_path / "out" / entry.key), np.ones(entry.rows, bool))
    connector.finalize(str(tmp_path / "in"), str(tmp_path / "out"), [entry.key])
    loaded = datasets.load_from_disk(str(tmp_path / "out"))
    assert (len(loaded["train"]), len(loaded["test"])) == (entry.rows, 0)


def test_a_shard_without_rows_may_be_passed_over(tmp_path: Path) -> None:
    save(tmp_path / "in", splits=True)
    curate(str(tmp_path / "in"), str(tmp_path / "in2"), share=1.0)
    test = registry.discover(str(tmp_path / "in"))[1][-1]
    connector, _ = registry.discover(str(tmp_path / "in2"))
    entry, _ = connector.scan(test, 100)
    connector.curate(entry, str(tmp_path / "in2" / entry.key), np.zeros(entry.rows, bool))
    connector, files = registry.discover(str(tmp_path / "in2"))
    for info in files:
        entry, _ = connector.scan(info, 100)
        if entry.rows:
            connector.curate(entry, str(tmp_path / "out" / entry.key), np.ones(entry.rows, bool))
    connector.finalize(str(tmp_path / "in2"), str(tmp_path / "out"))
    loaded = datasets.load_from_disk(str(tmp_path / "out"))
    assert (len(loaded["train"]), len(loaded["test"])) == (N, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/state.json", "{broken", r"state\.json is broken"),
        ("train/state.json", "{}", r"state\.json is broken: no list of data files"),
        ("train/state.json", '{"_indices_data_files": [{"filename": "i"}]}', "flatten_indices"),
        ("train/state.json", None, r"train/state\.json is missing"),
        (
            "train/data-00001-of-00003.arrow",
            None,
            r"data-00001-of-00003\.arrow is missing, though state\.json names it",
        ),
        ("dataset_dict.json", "[]", "not a JSON object"),
        ("dataset_dict.json", '{"splits": 3}', "no list of splits"),
    ],
)
def test_broken_folders(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    save(tmp_path / "d", splits=True)
    file = tmp_path / "d" / name
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(CorpusError, match=message):
        registry.discover(str(tmp_path / "d"))
