"""Segments of answers: what was put is there for others, what is broken is asked again."""

from __future__ import annotations

import pytest

from curate.errors import StorageError
from curate.evaluation.judge_cache import SegmentCache


def test_segments_are_shared(tmp_path):
    a, b = SegmentCache(str(tmp_path / "c")), SegmentCache(str(tmp_path / "c"))
    assert a.get(["x"]) == {}
    a.put({"x": {"value": 1.0}, "y": {"value": None}})
    assert b.get(["x", "z"]) == {"x": {"value": 1.0}}
    b.put({"z": {"value": 2.0, "reason": "é\n"}})
    b.put({})
    assert a.get(["z", "y"]) == {"z": {"value": 2.0, "reason": "é\n"}, "y": {"value": None}}
    assert len(list((tmp_path / "c").iterdir())) == 2
    a.put({"y": {"value": None}, "x": {"value": 1.0}})  # the same batch again: the same segment
    assert len(list((tmp_path / "c").iterdir())) == 2


@pytest.mark.parametrize("content", ["{", "[1]\n", '["k"]\n', "[1, 2]\n", '"text"\n'])
def test_broken_segments_are_absent(tmp_path, content, caplog):
    SegmentCache(str(tmp_path)).put({"x": {"value": 1.0}})
    (tmp_path / "broken.jsonl").write_text(content)
    assert SegmentCache(str(tmp_path)).get(["x"]) == {"x": {"value": 1.0}}
    assert "asking again" in caplog.text


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="file"):
        SegmentCache(str(tmp_path / "file" / "x")).put({"x": {}})
