"""What of a grown file is new: the rows are compared with the lines that were written."""

from __future__ import annotations

import gzip
import json

import pytest

from connectors import appended, storage
from connectors.jsonl import Jsonl
from connectors.parquet import Parquet

ROWS = [json.dumps({"n": i, "text": "ö" * (i % 7)}, ensure_ascii=False) + "\n" for i in range(57)]


def scan(path, unit_rows=10):
    return Jsonl().scan(storage.info(str(path)), unit_rows)


def read(units) -> list[int]:
    return [r.value["n"] for u in units for _, _, rows in Jsonl().read(u, ["n"]) for r in rows]


@pytest.mark.parametrize("before", [1, 10, 23, 50, 56])
@pytest.mark.parametrize("head", ["", "\ufeff", "\n\n"])
def test_only_the_appended_rows_are_new(tmp_path, before, head):
    path = tmp_path / "a.jsonl"
    path.write_text(head + "".join(ROWS[:before]), encoding="utf-8")
    old, _ = scan(path)
    path.write_text(head + "".join(ROWS), encoding="utf-8")
    now, units = scan(path)
    new, grown = appended.new_units(Jsonl(), now, units, old)
    assert grown
    assert read(new) == list(range(before, 57))
    assert [(u.start, u.stop) for u in new][-1][1] == 57
    assert all(len(u.ranges()) == 1 for u in new)  # one part a unit, as ever


def test_a_second_growth_starts_where_the_first_ended(tmp_path):
    path, seen, old = tmp_path / "a.jsonl", [], None
    for n in (12, 31, 57):
        path.write_text("".join(ROWS[:n]))
        now, units = scan(path)
        new = appended.new_units(Jsonl(), now, units, old)[0] if old else units
        seen += read(new)
        old = now
    assert seen == list(range(57))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"n": 3,', '"n": 4,', 1),  # an old row was mended
        lambda text: text[:-1].replace("\n", " \n", 1) + "\n",
    ],
)
def test_a_file_that_was_changed_is_wholly_new(tmp_path, change):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(ROWS[:20]))
    old, _ = scan(path)
    path.write_text(change("".join(ROWS)))
    now, units = scan(path)
    assert appended.new_units(Jsonl(), now, units, old) == (units, False)


def test_a_last_row_without_line_end_may_have_gone_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(ROWS[:20]) + '{"n": 1}')
    old, _ = scan(path)
    path.write_text("".join(ROWS[:20]) + '{"n": 1} \n' + ROWS[20])
    now, units = scan(path)
    assert appended.new_units(Jsonl(), now, units, old) == (units, False)


def test_a_shorter_file_is_wholly_new(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(ROWS))
    old, _ = scan(path)
    path.write_text("".join(ROWS[:20]))
    now, units = scan(path)
    assert appended.new_units(Jsonl(), now, units, old) == (units, False)
    assert not appended.begins_with(now, old)


def test_compressed_streams_are_wholly_new(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    first = gzip.compress("".join(ROWS[:20]).encode(), mtime=0)
    path.write_bytes(first)
    old, _ = scan(path)
    assert appended.begins_with(old, old)
    path.write_bytes(first + gzip.compress("".join(ROWS[20:]).encode(), mtime=0))
    now, units = scan(path)
    assert now.rows == 57
    assert appended.new_units(Jsonl(), now, units, old) == (units, False)


def test_other_formats_do_not_grow(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(ROWS[:20]))
    old, _ = scan(path)
    path.write_text("".join(ROWS))
    now, units = scan(path)
    assert appended.new_units(Parquet(), now, units, old) == (units, False)
