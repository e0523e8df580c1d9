"""Which connector, which files, which names; and plain words where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from connectors import registry, storage
from curate.errors import ConfigError, CorpusError


def make(place: str, *names: str) -> None:
    for name in names:
        storage.write_atomic(storage.join(place, name), "{}\n")


def names(source: str | list[str], format: str = "auto") -> tuple[str, list[str]]:
    connector, files = registry.discover(source, format)
    assert len({f.name for f in files}) == len(files)
    return connector.name, [f.name for f in files]


def test_folder(place: str) -> None:
    make(place, "b/2.jsonl.gz", "a.ndjson", "README.md", "_meta/x.jsonl", ".hidden.jsonl", "info.json", "C.JSONL.ZST")
    assert names(place) == ("jsonl", ["C.JSONL.ZST", "a.ndjson", "b/2.jsonl.gz"])
    assert names(place + "/") == names(place)


def test_file(place: str) -> None:
    make(place, "a.jsonl", "b.json", "_c.jsonl", "d.txt", "e.parquet")
    for name in ("a.jsonl", "b.json", "_c.jsonl"):
        assert names(storage.join(place, name)) == ("jsonl", [name])
    assert names(storage.join(place, "d.txt"), "jsonl") == ("jsonl", ["d.txt"])
    assert names(storage.join(place, "e.parquet")) == ("parquet", ["e.parquet"])
    with pytest.raises(CorpusError, match=r"d\.txt: none of the files is of a known format.*found 1 × \.txt"):
        registry.discover(storage.join(place, "d.txt"))


def test_pattern(place: str) -> None:
    make(place, "x/1/a.jsonl", "x/2/a.jsonl", "x/2/b.txt", "y/a.jsonl", "x/_h/a.jsonl")
    assert names(storage.join(place, "x/*/a.jsonl")) == ("jsonl", ["1/a.jsonl", "2/a.jsonl"])
    assert names(storage.join(place, "**/*.jsonl"))[1] == ["x/1/a.jsonl", "x/2/a.jsonl", "y/a.jsonl"]
    assert names(storage.join(place, "x/[12]/*"))[1] == ["1/a.jsonl", "2/a.jsonl"]
    with pytest.raises(CorpusError, match="no file matches this pattern"):
        registry.discover(storage.join(place, "z/*.jsonl"))


def test_a_name_with_brackets_is_a_name_first(place: str) -> None:
    make(place, "a[1].jsonl")
    assert names(storage.join(place, "a[1].jsonl")) == ("jsonl", ["a[1].jsonl"])


def test_list(place: str) -> None:
    make(place, "x/a.jsonl", "y/a.jsonl", "y/deep/b.jsonl")
    both = [storage.join(place, "x/a.jsonl"), storage.join(place, "y")]
    assert names(both) == ("jsonl", ["x/a.jsonl", "y/a.jsonl", "y/deep/b.jsonl"])
    assert names([*both, storage.join(place, "y/*.jsonl")]) == names(both)  # found twice, counted once
    assert names([both[0]]) == ("jsonl", ["a.jsonl"])


def test_list_across_stores(s3: str, tmp_path: Path) -> None:
    make(s3, "x/a.jsonl")
    make(str(tmp_path), "a.jsonl")
    _, found = names([s3, str(tmp_path)])
    assert sorted(n.rsplit("/", 1)[-1] for n in found) == ["a.jsonl", "a.jsonl"]


def test_several_formats(place: str) -> None:
    make(place, "a.jsonl", "b.jsonl", "c.parquet")
    with pytest.raises(CorpusError, match=r"several formats \(2 jsonl, 1 parquet\); choose .*source\.format=jsonl"):
        registry.discover(place)
    assert names(place, "parquet") == ("parquet", ["c.parquet"])
    with pytest.raises(CorpusError, match=r"has no arrow_ipc files\. Expected names that end in \.arrow"):
        registry.discover(place, "arrow_ipc")
    with pytest.raises(CorpusError, match="no folder written by save_to_disk"):
        registry.discover(place, "hf_disk")


def test_nothing_there(place: str) -> None:
    make(place, "notes.csv", "more.csv")
    with pytest.raises(CorpusError, match=r"Expected names that end in .*\.jsonl.*\.parquet.*; found 2 × \.csv"):
        registry.discover(place)
    with pytest.raises(CorpusError, match=r"missing: no such file or folder"):
        registry.discover(storage.join(place, "missing"))
    for empty in ("", [], [""]):
        with pytest.raises(CorpusError, match="the source is empty"):
            registry.discover(empty)


def test_misspelt_path(tmp_path: Path) -> None:
    make(str(tmp_path), "conversations.jsonl")
    with pytest.raises(CorpusError, match=r"did you mean 'conversations\.jsonl'"):
        registry.discover(str(tmp_path / "conversation.jsonl"))
    with pytest.raises(CorpusError, match=r"the folder .*nowhere does not exist either"):
        registry.discover(str(tmp_path / "nowhere" / "x.jsonl"))


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="there are no files"):
        registry.discover(str(tmp_path))


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source\.format='parket' is unknown; did you mean 'parquet'"):
        registry.discover(str(tmp_path), "parket")
    assert set(registry.connectors()) == {"jsonl", "parquet", "arrow_ipc", "hf_disk"}
