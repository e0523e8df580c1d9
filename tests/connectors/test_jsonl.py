"""JSON lines: any bytes a person may bring, plain or compressed."""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import zstandard

from connectors import lines, storage
from connectors.base import Row
from connectors.jsonl import Jsonl
from connectors.lines import BOM
from curate.corpus.units import Unit
from curate.errors import CorpusError
from tests.connectors.rows import check_units, conversations, read, scan, some

JSONL = Jsonl()
KINDS = ("", ".gz", ".zst")


def pack(raw: bytes, kind: str) -> bytes:
    """Independent of the code under test: the plain library calls, of two members or frames."""
    half = len(raw) // 2
    if kind == ".gz":
        return gzip.compress(raw[:half]) + gzip.compress(raw[half:])
    if kind == ".zst":
        c = zstandard.ZstdCompressor()
        return c.compress(raw[:half]) + c.compress(raw[half:])
    return raw


def unpack(raw: bytes, kind: str) -> bytes:
    if kind == ".gz":
        return gzip.decompress(raw)
    if kind == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(raw)
    return raw


def text_of(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("unit_rows", "unit_bytes"), [(1000, None), (64, None), (7, None), (1000, 2000), (1000, 1)])
def test_round_trip(place: str, kind: str, unit_rows: int, unit_bytes: int | None) -> None:
    rows = conversations(150)
    url = storage.join(place, f"a.jsonl{kind}")
    storage.write_atomic(url, pack(text_of(rows), kind))
    entry, units = scan(JSONL, url, unit_rows, unit_bytes)
    assert entry.rows == 150
    assert entry.columns == ("id", "messages", "label", "n")
    check_units(entry, units, 150 if kind else unit_rows)
    if unit_bytes == 1 and not kind:
        assert len(units) == 150
    if kind:
        assert len(units) == 1
        assert units[0].step == min(unit_rows, 150)
    got = read(JSONL, units, ["messages", "n", "absent"])
    assert [r.value for r in got] == [{"messages": r["messages"], "n": r["n"]} for r in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_wanted_ranges_only(tmp_path: Path, kind: str) -> None:
    url = str(tmp_path / "a")
    storage.write_atomic(url, pack(text_of(conversations(100)), kind))
    _, units = scan(JSONL, url, 50)
    unit = units[-1]
    wanted = [(unit.start + 3, unit.start + 5), (unit.start + 5, unit.start + 6), (unit.stop - 1, unit.stop)]
    got = [(a, b, [r.value["n"] for r in rows]) for a, b, rows in JSONL.read(unit, ["n"], wanted)]
    assert got == [(a, b, list(range(a, b))) for a, b in wanted]
    assert list(JSONL.read(unit, ["n"], [])) == []
    with pytest.raises(ValueError, match="ascending"):
        list(JSONL.read(unit, ["n"], [wanted[1], wanted[0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_curate_is_byte_for_byte(place: str, kind: str) -> None:
    # Odd spacing, CRLF, escapes, big numbers, broken lines, blank lines and no line end at the end of the file.
    raw = [
        b'{"a" :  1e400, "\\u00e4":"\\ud83d"}\r\n',
        b"\n",
        b"{broken\n",
        b'{"n":12345678901234567890.10}\n',
        b" \t\r\n",
    ]
    raw += [b'{"c":"\xff"}\n', b'{"last": "\xc3\xbc"}']
    url, out = storage.join(place, f"in{kind}"), storage.join(place, f"out{kind}")
    storage.write_atomic(url, pack(b"".join(raw), kind))
    entry, _ = scan(JSONL, url)
    assert entry.rows == 5
    solid = [line for line in raw if line.strip()]
    for number in range(2**5):
        keep = np.array([bool(number >> i & 1) for i in range(5)])
        assert JSONL.curate(entry, out, keep) == keep.sum()
        written = storage.read_bytes(out)
        assert lines.detect(written) == {"": "none", ".gz": "gzip", ".zst": "zstd"}[kind]
        assert unpack(written, kind) == b"".join(x for x, k in zip(solid, keep, strict=True) if k)


@pytest.mark.parametrize("kind", KINDS)
def test_curated_bytes_do_not_depend_on_the_time(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "in")
    storage.write_atomic(url, pack(text_of(conversations(50)), kind))
    entry, _ = scan(JSONL, url)
    written = []
    for now in (1e9, 2e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        JSONL.curate(entry, str(tmp_path / f"out-{now}"), some(50))
        written.append((tmp_path / f"out-{now}").read_bytes())
    assert written[0] == written[1]


def test_the_command_line_tools_read_it(tmp_path: Path) -> None:
    url = str(tmp_path / "in.jsonl.gz")
    raw = text_of(conversations(50))
    storage.write_atomic(url, pack(raw, ".gz"))
    entry, _ = scan(JSONL, url)
    JSONL.curate(entry, str(tmp_path / "out.jsonl.gz"), np.ones(50, bool))
    assert (
        subprocess.run(["gzip", "-dc", str(tmp_path / "out.jsonl.gz")], capture_output=True, check=True).stdout == raw
    )
    if shutil.which("zstd"):
        storage.write_atomic(str(tmp_path / "in.zst"), pack(raw, ".zst"))
        entry, _ = scan(JSONL, str(tmp_path / "in.zst"))
        JSONL.curate(entry, str(tmp_path / "out.zst"), np.ones(50, bool))
        assert subprocess.run(["zstd", "-dc", str(tmp_path / "out.zst")], capture_output=True, check=True).stdout == raw


def test_crlf_bom_and_blank_lines(tmp_path: Path) -> None:
    url = str(tmp_path / "a.jsonl")
    raw = BOM + b'\r\n{"n": 0}\r\n\r\n   \n{"n": 1}\r\n\n\n{"n": 2}\n\n'
    storage.write_atomic(url, raw)
    for unit_rows in (1, 2, 9):
        entry, units = scan(JSONL, url, unit_rows)
        assert [r.value for r in read(JSONL, units, ["n"])] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert entry.columns == ("n",)
    JSONL.curate(entry, str(tmp_path / "out"), np.array([False, True, True]))
    assert (tmp_path / "out").read_bytes() == BOM + b'{"n": 1}\r\n{"n": 2}\n'


def test_bom_belongs_to_the_file_not_to_its_first_row(tmp_path: Path) -> None:
    url = str(tmp_path / "a.jsonl")
    storage.write_atomic(url, BOM + b'{"n": 0}\n{"n": 1}\n')
    entry, units = scan(JSONL, url, 1)
    assert [r.value for r in read(JSONL, units, ["n"])] == [{"n": 0}, {"n": 1}]
    for keep, left in (([1, 0], b'{"n": 0}\n'), ([0, 1], b'{"n": 1}\n')):
        JSONL.curate(entry, str(tmp_path / "out"), np.array(keep, bool))
        assert (tmp_path / "out").read_bytes() == BOM + left
    storage.write_atomic(url, b'\n\n\n{"n": 0}\n')  # three blank lines are no mark
    entry, _ = scan(JSONL, url)
    JSONL.curate(entry, str(tmp_path / "out"), np.array([True]))
    assert (tmp_path / "out").read_bytes() == b'{"n": 0}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "broken JSON: Expecting property name"),
        (b'{"a": "\x01"}', "broken JSON: Invalid control character"),
        (b'{"a": 1} {"b": 2}', "broken JSON: Extra data"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b"null", "a JSON NoneType, not an object"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 7"),
        (b"\x00\x00\x00", "broken JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "broken JSON: Exceeds the limit"),
    ],
)
def test_a_broken_line_is_a_row_with_an_error(tmp_path: Path, line: bytes, reason: str) -> None:
    url = str(tmp_path / "a.jsonl")
    storage.write_atomic(url, b'{"n": 0}\n' + line + b'\n{"n": 2}\n')
    entry, units = scan(JSONL, url)
    rows = read(JSONL, units, ["n"])
    assert entry.rows == 3
    assert [rows[0], rows[2]] == [Row(0, {"n": 0}), Row(2, {"n": 2})]
    assert rows[1].value is None
    assert reason in (rows[1].error or "")


def test_nan_and_lone_surrogates_are_values(tmp_path: Path) -> None:
    url = str(tmp_path / "a.jsonl")
    storage.write_atomic(url, b'{"a": NaN, "b": -Infinity, "c": "\\ud800", "d": "\\ud83d\\ude00"}\n')
    _, units = scan(JSONL, url)
    (row,) = read(JSONL, units, ["a", "b", "c", "d"])
    assert math.isnan(row.value["a"])
    assert row.value["b"] == -math.inf
    assert row.value["c"] == "\ud800"
    assert row.value["d"] == "😀"


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    url = str(tmp_path / "a.jsonl")
    text = "a\u2028b\u2029c\u0085d\x0be\x1cf"
    storage.write_atomic(url, json.dumps({"t": text}, ensure_ascii=False).encode() + b"\n")
    entry, units = scan(JSONL, url)
    assert entry.rows == 1
    assert read(JSONL, units, ["t"])[0].value == {"t": text}


@pytest.mark.parametrize("kind", KINDS)
def test_long_lines(tmp_path: Path, kind: str) -> None:
    url = str(tmp_path / "a.jsonl")
    long = b'{"n": 1, "text": "' + b"x" * 50_000_000 + b'"}\n'
    storage.write_atomic(url, pack(b'{"n": 0}\n' + long + b'{"n": 2}\n', kind))
    entry, units = scan(JSONL, url, 2)
    assert [r.value for r in read(JSONL, units, ["n"])] == [{"n": 0}, {"n": 1}, {"n": 2}]
    JSONL.curate(entry, str(tmp_path / "out"), np.array([False, True, False]))
    assert unpack((tmp_path / "out").read_bytes(), kind) == long


def test_a_line_past_all_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 1 << 20)
    url = str(tmp_path / "a.jsonl")
    storage.write_atomic(url, b'{"n": 0}\n' + b"\x00" * (3 << 20))
    with pytest.raises(
        CorpusError, match=r"a\.jsonl has a line longer than 1 MiB at byte 9; is it a file of JSON lines"
    ):
        scan(JSONL, url)


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_every_truncation_of_a_compressed_file_is_noticed(tmp_path: Path, kind: str) -> None:
    raw = text_of(conversations(300))
    whole = gzip.compress(raw) if kind == ".gz" else zstandard.compress(raw)
    url = str(tmp_path / f"a.jsonl{kind}")
    storage.write_atomic(url, whole)
    entry, (unit,) = scan(JSONL, url)
    for cut in {0, len(whole) - 1, *random.Random(0).sample(range(5, len(whole)), 40)}:
        storage.write_atomic(url, whole[:cut])
        with pytest.raises(CorpusError, match=rf"a\.jsonl{kind} is cut off"):
            scan(JSONL, url)
        with pytest.raises(CorpusError):
            read(JSONL, [unit], ["n"])
        with pytest.raises(CorpusError):
            JSONL.curate(entry, str(tmp_path / "out"), some(300))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_broken_compressed_bytes(tmp_path: Path, kind: str) -> None:
    whole = bytearray(pack(text_of(conversations(300)), kind))
    whole[len(whole) // 3 : len(whole) // 3 + 40] = b"\x00" * 40
    url = str(tmp_path / f"a.jsonl{kind}")
    storage.write_atomic(url, bytes(whole))
    with pytest.raises(CorpusError, match=rf"a\.jsonl{kind} is (broken|cut off)"):
        scan(JSONL, url)


def test_truncated_plain_file(tmp_path: Path) -> None:
    url = str(tmp_path / "a.jsonl")
    whole = text_of(conversations(30))
    storage.write_atomic(url, whole[:-20])
    with pytest.raises(
        CorpusError, match=r"a\.jsonl is cut off in the middle: row 29, its last, .* Copy the file again"
    ):
        scan(JSONL, url)
    storage.write_atomic(url, whole[:-1])  # only the line end is missing: nothing is lost
    assert scan(JSONL, url)[0].rows == 30
    storage.write_atomic(url, whole[:-20] + b"\n")  # a broken line, but the file has its end
    assert scan(JSONL, url)[0].rows == 30


def test_array_is_not_lines(tmp_path: Path) -> None:
    url = str(tmp_path / "a.jsonl")
    storage.write_atomic(url, '[{"a": 1},\n {"a": 2}]\n')
    with pytest.raises(CorpusError, match=r"one JSON array, not JSON lines.*jq"):
        scan(JSONL, url)


def test_empty_files(tmp_path: Path) -> None:
    for raw in (b"", b"\n\n", BOM):
        url = str(tmp_path / "a.jsonl")
        storage.write_atomic(url, raw)
        entry, units = scan(JSONL, url)
        assert (entry.rows, entry.columns, units) == (0, (), [])
        assert JSONL.curate(entry, str(tmp_path / "out"), np.zeros(0, bool)) == 0


def test_columns_are_those_of_the_first_hundred_good_rows(tmp_path: Path) -> None:
    url = str(tmp_path / "a.jsonl")
    rows = [{"a": 1}] * 50 + [{"b": 1}] * 50 + [{"late": 1}]
    storage.write_atomic(url, b"{broken\n" + text_of(rows))
    assert scan(JSONL, url)[0].columns == ("a", "b")


def test_file_that_changed_since(tmp_path: Path) -> None:
    url, out = str(tmp_path / "a.jsonl"), tmp_path / "out"
    storage.write_atomic(url, text_of(conversations(10)))
    entry, units = scan(JSONL, url)
    for n, found in ((9, "9 rows"), (11, "more rows")):
        storage.write_atomic(url, text_of(conversations(n)))
        with pytest.raises(CorpusError, match=rf"has {found}, but had 10 rows when the manifest was made"):
            JSONL.curate(entry, str(out), np.ones(10, bool))
        assert not out.exists()
    storage.write_atomic(url, text_of(conversations(5)))
    with pytest.raises(CorpusError, match="only 5 rows"):
        read(JSONL, units, ["n"])
    with pytest.raises(CorpusError, match=r"shape \(9,\)"):
        JSONL.curate(entry, str(out), np.ones(9, bool))


def test_digest_is_of_the_content(place: str, tmp_path: Path) -> None:
    raw = text_of(conversations(20))
    storage.write_atomic(storage.join(place, "a.jsonl"), raw)
    storage.write_atomic(str(tmp_path / "other.jsonl"), raw)
    storage.write_atomic(str(tmp_path / "changed.jsonl"), raw.replace(b"answer 3", b"answer 4"))
    here = scan(JSONL, storage.join(place, "a.jsonl"))[0].digest
    assert here == scan(JSONL, str(tmp_path / "other.jsonl"))[0].digest
    assert here != scan(JSONL, str(tmp_path / "changed.jsonl"))[0].digest


def test_a_shortened_unit_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    url = str(tmp_path / "a.jsonl.gz")
    storage.write_atomic(url, pack(text_of(conversations(100)), ".gz"))
    _, (unit,) = scan(JSONL, url, 30)
    head = Unit(unit.key, unit.url, 0, 40, unit.step, unit.hint)
    assert [(a, b) for a, b, _ in JSONL.read(head, ["n"])] == [(0, 30), (30, 40)]
