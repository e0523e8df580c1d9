"""Copies of remote folders in the local cache: whole or not at all, one for each version."""

from __future__ import annotations

from pathlib import Path

import pytest

from connectors import storage
from curate.errors import StorageError


def test_local_copy_of_a_folder(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURATE_CACHE", str(tmp_path / "cache"))
    for name in ("config.json", "deep/weights.bin", "_private", ".hidden"):
        storage.write_atomic(f"{s3}/model/{name}", name * 1000)
    copy = storage.local_copy(f"{s3}/model")
    found = {str(p.relative_to(copy)): p.read_text() for p in copy.rglob("*") if p.is_file()}
    assert found == {n: n * 1000 for n in ("config.json", "deep/weights.bin", "_private", ".hidden")}
    assert storage.local_copy(f"{s3}/model/") == copy
    storage.write_atomic(f"{s3}/model/config.json", "changed")
    newer = storage.local_copy(f"{s3}/model")
    assert newer != copy
    assert (newer / "config.json").read_text() == "changed"
    one = storage.local_copy(f"{s3}/model/config.json")
    assert one.name == "config.json"
    assert one.read_text() == "changed"


def test_local_copy_that_fails_leaves_nothing(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURATE_CACHE", str(tmp_path / "cache"))
    for i in range(3):
        storage.write_atomic(f"{s3}/model/{i}", "x" * 1000)
    real, calls = storage.open_read, []

    def fail_on_second(url: str) -> object:
        calls.append(url)
        if len(calls) == 2:
            raise StorageError("gone")
        return real(url)

    monkeypatch.setattr(storage, "open_read", fail_on_second)
    with pytest.raises(StorageError, match="gone"):
        storage.local_copy(f"{s3}/model")
    assert list((tmp_path / "cache" / "files").iterdir()) == []
