"""Arrow IPC: streams and files, compressed or not, with dictionaries; every truncation is noticed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from connectors import arrow_ipc, arrow_messages, storage
from connectors.arrow_ipc import ArrowIpc
from curate.errors import CorpusError
from tests.connectors.rows import check_units, conversations, read, scan, some
from tests.connectors.test_parquet import rich_table

ARROW = ArrowIpc()
N = 500
MAKE: dict[str, Any] = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}
OPEN: dict[str, Any] = {"file": pa.ipc.open_file, "stream": pa.ipc.open_stream}


def write(url: str, table: pa.Table, form: str, batch: int = 100, codec: str | None = None) -> None:
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with storage.atomic_writer(url) as f, MAKE[form](f, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch)


@pytest.mark.parametrize("form", MAKE)
@pytest.mark.parametrize("batch", [1, 7, 120, 10_000])
@pytest.mark.parametrize(("unit_rows", "unit_bytes"), [(10_000, None), (100, None), (13, None), (10_000, 20_000)])
def test_round_trip(tmp_path: Path, form: str, batch: int, unit_rows: int, unit_bytes: int | None) -> None:
    url = str(tmp_path / "a.arrow")
    write(url, pa.Table.from_pylist(conversations(N)), form, batch)
    entry, units = scan(ARROW, url, unit_rows, unit_bytes)
    assert (entry.rows, entry.columns) == (N, ("id", "messages", "label", "n"))
    check_units(entry, units, unit_rows)
    assert unit_bytes or len(units) <= 2 * -(-N // unit_rows)
    got = read(ARROW, units, ["messages", "n", "absent"])
    assert [r.value for r in got] == [{"messages": r["messages"], "n": r["n"]} for r in conversations(N)]


@pytest.mark.parametrize("form", MAKE)
@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dictionaries", [True, False])
def test_curated_shard_differs_in_its_rows_only(
    tmp_path: Path, form: str, codec: str | None, share: float, dictionaries: bool
) -> None:
    url, out = str(tmp_path / "a.arrow"), str(tmp_path / "out.arrow")
    table = rich_table() if dictionaries else rich_table().drop_columns(["dictionary"])
    write(url, table, form, 90, codec)
    entry, units = scan(ARROW, url, 70)
    assert [r.value for r in read(ARROW, units, ["n", "map"])] == table.select(["n", "map"]).to_pylist()
    keep = some(N, share=share)
    assert ARROW.curate(entry, out, keep) == keep.sum()
    source, target = OPEN[form](url), OPEN[form](out)
    assert target.schema.equals(source.schema, check_metadata=True)
    assert target.read_all().equals(table.filter(pa.array(keep)))
    if share == 1.0:  # the compression shows in the size
        assert Path(out).stat().st_size == pytest.approx(Path(url).stat().st_size, rel=0.02)


def test_places(place: str) -> None:
    url = storage.join(place, "a.arrow")
    write(url, pa.Table.from_pylist(conversations(N)), "stream")
    entry, units = scan(ARROW, url, 70)
    assert [r.value["n"] for r in read(ARROW, units, ["n"])] == list(range(N))
    keep = some(N)
    ARROW.curate(entry, storage.join(place, "out.arrow"), keep)
    with storage.open_read(storage.join(place, "out.arrow")) as f:
        assert pa.ipc.open_stream(f).read_all()["n"].to_pylist() == np.flatnonzero(keep).tolist()


@pytest.mark.parametrize("form", MAKE)
def test_wanted_ranges_only(tmp_path: Path, form: str) -> None:
    url = str(tmp_path / "a.arrow")
    write(url, pa.Table.from_pylist(conversations(N)), form, 90)
    for unit_rows in (30, 200):
        _, units = scan(ARROW, url, unit_rows)
        for unit in units:
            wanted = [(unit.start + 1, unit.start + 2), (unit.start + 4, unit.start + 5), (unit.stop - 1, unit.stop)]
            got = [(a, b, [r.value["n"] for r in rows]) for a, b, rows in ARROW.read(unit, ["n"], wanted)]
            assert got == [(a, b, list(range(a, b))) for a, b in wanted]


def test_a_batch_longer_than_a_hint_can_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_ipc, "_SKIP_BITS", 5)
    monkeypatch.setattr(arrow_ipc, "_MAX_SKIP", 31)
    url = str(tmp_path / "a.arrow")
    write(url, pa.Table.from_pylist(conversations(N)), "stream", N)
    entry, units = scan(ARROW, url, 10)
    assert [u.stop for u in units] == [10, 20, 30, N]
    assert [r.value["n"] for r in read(ARROW, units, ["n"])] == list(range(entry.rows))


@pytest.mark.parametrize("form", MAKE)
@pytest.mark.parametrize("codec", [None, "zstd"])
def test_every_truncation_is_noticed(tmp_path: Path, form: str, codec: str | None) -> None:
    url, out = str(tmp_path / "a.arrow"), str(tmp_path / "out.arrow")
    write(url, pa.Table.from_pylist(conversations(60)), form, 20, codec)
    entry, units = scan(ARROW, url)
    raw = Path(url).read_bytes()
    ends = [m.end for m in _messages(url)]
    for cut in {0, 3, 7, 8, len(raw) - 1, *ends[:-1], *range(11, len(raw), len(raw) // 40)}:
        Path(url).write_bytes(raw[:cut])
        with pytest.raises(CorpusError, match=r"a\.arrow is cut off or broken, or no Arrow file"):
            scan(ARROW, url)
    Path(url).write_bytes(raw[: ends[1] + 20])
    with pytest.raises(CorpusError):
        read(ARROW, units, ["n"])
    with pytest.raises(CorpusError):
        ARROW.curate(entry, out, np.ones(60, bool))
    assert [p.name for p in tmp_path.iterdir()] == ["a.arrow"]


def _messages(url: str) -> list[arrow_messages.Message]:
    with storage.open_read(url) as f:
        return list(arrow_messages.walk(f, f.seek(0, 2)))


def test_random_bytes_never_crash(tmp_path: Path) -> None:
    url = str(tmp_path / "a.arrow")
    write(url, pa.Table.from_pylist(conversations(60)), "stream", 20)
    raw = Path(url).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(raw)
        for at in rng.integers(0, len(raw), 8):
            broken[at] = rng.integers(256)
        Path(url).write_bytes(broken)
        try:
            entry, _ = scan(ARROW, url)
        except CorpusError:
            continue
        assert entry.rows >= 0  # bytes of a text may change unnoticed: the format has no checksum


@pytest.mark.parametrize("form", MAKE)
def test_rows_and_codecs_are_those_that_pyarrow_sees(tmp_path: Path, form: str) -> None:
    url = str(tmp_path / "a.arrow")
    for codec in (None, "lz4", "zstd"):
        write(url, pa.Table.from_pylist(conversations(130)), form, 50, codec)
        batches = [m for m in _messages(url) if m.kind == "batch"]
        assert [m.rows for m in batches] == [50, 50, 30]
        assert {m.codec for m in batches} == {codec}


def test_streams_from_before_the_continuation_mark(tmp_path: Path) -> None:
    url = tmp_path / "a.arrow"
    options = pa.ipc.IpcWriteOptions(use_legacy_format=True)
    table = pa.Table.from_pylist(conversations(50))
    with pa.ipc.new_stream(str(url), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=20)
    assert struct.unpack("<I", url.read_bytes()[:4])[0] != 0xFFFFFFFF
    entry, units = scan(ARROW, str(url), 30)
    assert [r.value["n"] for r in read(ARROW, units, ["n"])] == list(range(entry.rows))


def test_file_that_changed_since(tmp_path: Path) -> None:
    url = str(tmp_path / "a.arrow")
    write(url, pa.Table.from_pylist(conversations(20)), "stream")
    entry, _ = scan(ARROW, url)
    for n, found in ((15, "15 rows"), (25, "more rows")):
        write(url, pa.Table.from_pylist(conversations(n)), "stream")
        with pytest.raises(CorpusError, match=rf"has {found}, but had 20 rows"):
            ARROW.curate(entry, str(tmp_path / "out"), np.ones(20, bool))


def test_empty(tmp_path: Path) -> None:
    url = str(tmp_path / "a.arrow")
    write(url, rich_table(0), "stream")
    entry, units = scan(ARROW, url)
    assert (entry.rows, units) == (0, [])
    assert ARROW.curate(entry, str(tmp_path / "out.arrow"), np.zeros(0, bool)) == 0
