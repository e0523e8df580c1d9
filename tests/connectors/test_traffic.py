"""What is counted of reads, writes and failures, against what was really moved; and listings with times."""

from __future__ import annotations

import io
import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tenacity import wait_none

from connectors import storage, traffic
from connectors.dated import dated_files
from curate.errors import StorageError


@pytest.fixture
def moved():
    before = traffic.now()

    def since() -> tuple[int, int, int, int]:
        now = traffic.now()
        return tuple(getattr(now, n) - getattr(before, n) for n in ("read", "written", "retries", "errors"))

    return since


@pytest.fixture(params=["local", "s3"])
def at(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3')}/place"


def test_bytes_are_those_of_the_files(at, moved):
    data = os.urandom(300_000)
    storage.write_atomic(storage.join(at, "a"), data)
    with storage.atomic_writer(storage.join(at, "b")) as f:
        f.write(data)
    assert moved()[1] == 600_000
    assert storage.read_bytes(storage.join(at, "a")) == data
    with storage.open_read(storage.join(at, "b")) as f:
        assert f.read() == data
    assert moved() == (600_000, 600_000, 0, 0)


def test_what_a_format_library_reads_counts(at, moved):
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": list(range(1000)), "y": [os.urandom(900) for _ in range(1000)]}), sink)
    storage.write_atomic(storage.join(at, "t.parquet"), sink.getvalue())
    with storage.open_read(storage.join(at, "t.parquet")) as f:
        pq.read_table(f, columns=["x"])
    assert 0 < moved()[0] < len(sink.getvalue())  # the other column stays where it is


def test_a_failure_that_passes_and_one_that_does_not(s3, moved, monkeypatch):
    monkeypatch.setattr(storage, "_WAIT", wait_none())
    left = [ConnectionResetError("gone"), ConnectionResetError("gone")]

    def act() -> str:
        if left:
            raise left.pop()
        return "there"

    assert storage.again(f"{s3}/x", "read", act) == "there"
    assert moved() == (0, 0, 2, 0)
    left += [PermissionError("no")]
    with pytest.raises(StorageError, match="permission denied"):
        storage.again(f"{s3}/x", "read", act)
    assert moved() == (0, 0, 2, 1)


def test_listings_with_times(at):
    began = time.time()
    for name in ("a/1.parquet", "a/2.parquet", "b.json", "_status/x.json", "a/.hidden"):
        storage.write_atomic(storage.join(at, name), name)
    found = dated_files(at)
    assert [(f.name, f.size) for f in found] == [("a/1.parquet", 11), ("a/2.parquet", 11), ("b.json", 6)]
    assert all(f.modified is not None and began - 2 < f.modified < time.time() + 2 for f in found)
    assert [storage.read_text(f.url) for f in found] == [f.name for f in found]
    assert [f.name for f in dated_files(storage.join(at, "a"))] == ["1.parquet", "2.parquet"]
    assert dated_files(storage.join(at, "none")) == []


def test_a_local_files_time_is_its_own(tmp_path):
    (tmp_path / "x").write_text("")
    os.utime(tmp_path / "x", (1_700_000_000.25, 1_700_000_000.25))
    (found,) = dated_files(str(tmp_path))
    assert found.modified == pytest.approx(1_700_000_000.25, abs=1e-5)
