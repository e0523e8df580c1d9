"""Parquet: units over any row groups, shards that differ from their source in nothing but the rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from connectors import base, storage
from connectors.parquet import Parquet
from curate.errors import CorpusError, StorageError
from tests.connectors.rows import check_units, conversations, read, scan, some
from tests.s3_server import Endpoint

PARQUET = Parquet()
N = 500


def rich_table(n: int = N) -> pa.Table:
    """Nested messages and one column of every awkward type, with metadata."""
    table = pa.Table.from_pylist(conversations(n))
    extra: dict[str, pa.Array] = {
        "dictionary": pa.array(["x", "y", None, "z"] * (n // 4)).dictionary_encode(),
        "large": pa.array([["a", None]] * n, pa.large_list(pa.large_string())),
        "map": pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int32())),
        "time": pa.array(range(n), pa.timestamp("ns", "UTC")),
        "unsigned": pa.array(range(n), pa.uint32()),
        "decimal": pa.array([None] * n, pa.decimal128(10, 2)),
        "a.dotted name": pa.array(range(n), pa.int8() if n < 128 else pa.int32()),
        "binary": pa.array([b"\xff\x00"] * n),
    }
    for name, column in extra.items():
        table = table.append_column(name, column)
    return table.replace_schema_metadata({"huggingface": '{"info": {}}', "own": "x"})


def write(url: str, table: pa.Table, **settings: Any) -> None:
    with storage.atomic_writer(url) as f:
        pq.write_table(table, f, **settings)


@pytest.mark.parametrize("group", [1, 7, 120, 10_000])
@pytest.mark.parametrize(("unit_rows", "unit_bytes"), [(10_000, None), (100, None), (13, None), (10_000, 20_000)])
def test_round_trip(tmp_path: Path, group: int, unit_rows: int, unit_bytes: int | None) -> None:
    url = str(tmp_path / "a.parquet")
    write(url, pa.Table.from_pylist(conversations(N)), row_group_size=group)
    entry, units = scan(PARQUET, url, unit_rows, unit_bytes)
    assert (entry.rows, entry.columns) == (N, ("id", "messages", "label", "n"))
    check_units(entry, units, unit_rows if len(units) > 1 and units[0].rows <= unit_rows else N)
    assert all(u.step <= unit_rows for u in units)
    # Small row groups are gathered: no more than twice the units that there must be.
    assert unit_bytes or len(units) <= 2 * -(-N // unit_rows)
    assert not unit_bytes or 3 < len(units) < 40
    got = read(PARQUET, units, ["messages", "n", "absent"])
    assert [r.value for r in got] == [{"messages": r["messages"], "n": r["n"]} for r in conversations(N)]


def test_a_huge_row_group_is_not_decoded_once_a_part(tmp_path: Path) -> None:
    url = str(tmp_path / "a.parquet")
    write(url, pa.table({"n": range(100_000)}))
    entry, units = scan(PARQUET, url, 100)
    check_units(entry, units, 6300)
    assert len(units) == 16
    assert {u.step for u in units} == {100}
    assert sum(len(u.ranges()) for u in units) == 1000
    assert [r.value["n"] for r in read(PARQUET, units[-1:], ["n"])] == list(range(units[-1].start, 100_000))


def test_places(place: str) -> None:
    url = storage.join(place, "a.parquet")
    write(url, pa.Table.from_pylist(conversations(N)), row_group_size=60)
    entry, units = scan(PARQUET, url, 100)
    assert [r.value["n"] for r in read(PARQUET, units, ["n"])] == list(range(N))
    keep = some(N)
    assert PARQUET.curate(entry, storage.join(place, "out.parquet"), keep) == keep.sum()
    with storage.open_read(storage.join(place, "out.parquet")) as f:
        assert pq.read_table(f)["n"].to_pylist() == np.flatnonzero(keep).tolist()


def test_wanted_ranges_only(tmp_path: Path) -> None:
    url = str(tmp_path / "a.parquet")
    write(url, pa.Table.from_pylist(conversations(N)), row_group_size=90)
    _, units = scan(PARQUET, url, 200)
    for unit in units:
        wanted = [(unit.start + 1, unit.start + 4), (unit.start + 7, unit.start + 8), (unit.stop - 2, unit.stop)]
        got = [(a, b, [r.value["n"] for r in rows]) for a, b, rows in PARQUET.read(unit, ["n"], wanted)]
        assert got == [(a, b, list(range(a, b))) for a, b in wanted]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"compression": "zstd"},
    {"compression": "none", "use_dictionary": False},
    {"compression": {"id": "gzip", "messages.list.element.role": "lz4", "n": "brotli"}},
    {"use_compliant_nested_type": False},
    {"store_schema": False},
    {"use_deprecated_int96_timestamps": True},
    {"row_group_size": 1},
    {"row_group_size": 77, "data_page_version": "2.0"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_curated_shard_differs_in_its_rows_only(tmp_path: Path, settings: dict[str, Any], share: float) -> None:
    url, out = str(tmp_path / "a.parquet"), str(tmp_path / "out.parquet")
    write(url, rich_table(), **settings)
    entry, _ = scan(PARQUET, url)
    keep = some(N, share=share)
    assert PARQUET.curate(entry, out, keep) == keep.sum()
    source, target = pq.ParquetFile(url), pq.ParquetFile(out)
    assert target.schema_arrow.equals(source.schema_arrow, check_metadata=True)
    assert target.schema.equals(source.schema)
    assert target.read().to_pylist() == source.read().filter(pa.array(keep)).to_pylist()
    assert (target.metadata.metadata or {}).keys() == (source.metadata.metadata or {}).keys()
    if keep.any():
        for i in range(source.metadata.num_columns):
            a, b = source.metadata.row_group(0).column(i), target.metadata.row_group(0).column(i)
            assert (a.path_in_schema, a.compression, a.physical_type) == (
                b.path_in_schema,
                b.compression,
                b.physical_type,
            )
            assert a.has_dictionary_page == b.has_dictionary_page


@pytest.mark.parametrize("cut", [0, 4, 100, -1, -8, -200])
def test_truncated(tmp_path: Path, cut: int) -> None:
    url = str(tmp_path / "a.parquet")
    write(url, rich_table())
    raw = Path(url).read_bytes()
    Path(url).write_bytes(raw[:cut])
    with pytest.raises(
        CorpusError, match=r"a\.parquet is cut off or broken, or no Parquet file: .* Copy the file again"
    ):
        scan(PARQUET, url)


def test_broken_in_the_middle(tmp_path: Path) -> None:
    url, out = str(tmp_path / "a.parquet"), tmp_path / "out.parquet"
    write(url, pa.Table.from_pylist(conversations(N)), compression="zstd", row_group_size=100)
    entry, units = scan(PARQUET, url)
    raw = bytearray(Path(url).read_bytes())
    at = pq.ParquetFile(url).metadata.row_group(2).column(1).data_page_offset
    raw[at : at + 300] = random.Random(0).randbytes(300)
    Path(url).write_bytes(raw)
    with pytest.raises(CorpusError, match=r"a\.parquet is cut off or broken"):
        read(PARQUET, units, ["messages"])
    with pytest.raises(CorpusError, match=r"a\.parquet is cut off or broken"):
        PARQUET.curate(entry, str(out), some(N))
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_file_that_changed_since(tmp_path: Path) -> None:
    url, out = str(tmp_path / "a.parquet"), tmp_path / "out.parquet"
    write(url, pa.Table.from_pylist(conversations(20)))
    entry, units = scan(PARQUET, url)
    for n, found in ((15, "15 rows"), (25, "more rows")):
        write(url, pa.Table.from_pylist(conversations(n)))
        with pytest.raises(CorpusError, match=rf"has {found}, but had 20 rows"):
            PARQUET.curate(entry, str(out), np.ones(20, bool))
        assert not out.exists()
    write(url, pa.Table.from_pylist(conversations(15)))
    with pytest.raises(CorpusError, match="only 15 rows"):
        read(PARQUET, units, ["n"])


def test_text_that_is_not_utf8_spoils_its_own_row(tmp_path: Path) -> None:
    url = str(tmp_path / "a.parquet")
    raw = pa.array([b"good", b"\xff\xfe", b"fine"])
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    write(url, pa.table({"n": [0, 1, 2], "text": text}))
    _, units = scan(PARQUET, url)
    rows = read(PARQUET, units, ["n", "text"])
    assert [rows[0].value, rows[2].value] == [{"n": 0, "text": "good"}, {"n": 2, "text": "fine"}]
    assert rows[1].value is None
    assert "column 'text' cannot be read" in (rows[1].error or "")


def test_empty(tmp_path: Path) -> None:
    url = str(tmp_path / "a.parquet")
    write(url, rich_table(0))
    entry, units = scan(PARQUET, url)
    assert (entry.rows, units) == (0, [])
    assert PARQUET.curate(entry, str(tmp_path / "out.parquet"), np.zeros(0, bool)) == 0
    assert pq.read_schema(tmp_path / "out.parquet").equals(pq.read_schema(url), check_metadata=True)


def test_no_columns_are_wanted(tmp_path: Path) -> None:
    url = str(tmp_path / "a.parquet")
    write(url, pa.Table.from_pylist(conversations(20)))
    _, units = scan(PARQUET, url)
    assert [r.value for r in read(PARQUET, units, ["absent"])] == [{}] * 20


@pytest.mark.parametrize("whole", [True, False])
def test_digest_is_of_the_content(place: str, tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "WHOLE_DIGEST", 1 << 30 if whole else 0)
    for url in (storage.join(place, "a.parquet"), str(tmp_path / "same.parquet")):
        write(url, pa.Table.from_pylist(conversations(N)))
    write(str(tmp_path / "other.parquet"), pa.Table.from_pylist([*conversations(N - 1), conversations(1)[0]]))
    here = scan(PARQUET, storage.join(place, "a.parquet"))[0].digest
    assert here == scan(PARQUET, str(tmp_path / "same.parquet"))[0].digest
    assert here != scan(PARQUET, str(tmp_path / "other.parquet"))[0].digest


def test_a_failing_store_is_not_a_broken_file(s3: str, s3_endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{s3}/a.parquet"
    write(url, pa.Table.from_pylist(conversations(N)))
    _, units = scan(PARQUET, url)
    fs, _ = storage.split(url)
    file_class = type(fs.open(url, "rb"))

    def refuse(*_: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(file_class, "_fetch_range", refuse)
    with pytest.raises(StorageError, match=rf"cannot read {url}: permission denied"):
        read(PARQUET, units, ["n"])


def test_a_full_disk_is_told_of_the_target(tiny_disk: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "a.parquet")
    write(url, pa.table({"x": np.random.default_rng(0).random(500_000)}))
    entry, _ = scan(PARQUET, url)
    with pytest.raises(StorageError, match=r"disk/out\.parquet: no space left"):
        PARQUET.curate(entry, str(tiny_disk / "out.parquet"), np.ones(500_000, bool))
    assert list(tiny_disk.iterdir()) == []
