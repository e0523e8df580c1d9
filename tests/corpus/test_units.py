from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.corpus.chunk import Chunk, Quarantined
from curate.corpus.coverage import Covered, Part, check_whole, parse_part, part_name
from curate.corpus.example import Example, Message
from curate.corpus.recipe import Recipe
from curate.corpus.render import Rendered
from curate.corpus.units import FileEntry, Manifest, Unit
from curate.errors import CorpusError, RecipeError

ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda t: (t[0], t[0] + t[1])), max_size=12)


@given(st.integers(0, 30), st.integers(1, 40), ranges)
def test_gaps_are_the_uncovered_rows(start, length, done):
    stop = start + length
    covered = {r for a, b in done for r in range(a, b)}
    found = [r for a, b in Covered(done).gaps(start, stop) for r in range(a, b)]
    assert found == [r for r in range(start, stop) if r not in covered]


def test_part_names_round_trip_and_sort_by_row():
    name = part_name("train/a-0.jsonl.gz", 0, 512, "parquet")
    assert parse_part(name) == Part("train/a-0.jsonl.gz", 0, 512)
    assert part_name("k", 999, 1000, "parquet") < part_name("k", 1000, 1001, "parquet")
    assert parse_part("train/.000000000000-000000000512.parquet.a1.tmp") is None
    assert parse_part("recipe.json") is None


def test_overlaps_and_holes_are_errors_that_name_the_rows():
    with pytest.raises(CorpusError, match=r"'a' overlap: rows 0-10 and 9-20"):
        check_whole([], [Part("a", 0, 10), Part("a", 9, 20)])
    with pytest.raises(CorpusError, match="rows 10-15 of 'a' have no part"):
        check_whole([Part("a", 0, 20)], [Part("a", 0, 10), Part("a", 15, 20)])
    check_whole([Part("a", 0, 20)], [Part("a", 0, 10), Part("a", 10, 20)])


def manifest() -> Manifest:
    files = tuple(FileEntry(k, f"/x/{k}", 10, "1", f"d{k}", n, ("messages",)) for k, n in (("a", 10), ("b", 5)))
    units = (Unit("a", "/x/a", 0, 4, 4), Unit("a", "/x/a", 4, 10, 3, 77), Unit("b", "/x/b", 0, 5, 5))
    return Manifest("jsonl", files, units)


def test_manifest_round_trip_and_head():
    m = manifest()
    assert Manifest.from_table(m.to_table()) == m
    assert m.rows == 15
    head = m.head(6)
    assert [(u.start, u.stop) for u in head.units] == [(0, 4), (4, 6)]
    assert [f.key for f in head.files] == ["a"]
    assert m.head(None) is m
    assert m.head(99) is m
    with pytest.raises(CorpusError, match="max_rows is 0"):
        m.head(0)
    assert m.units[1].ranges() == [(4, 7), (7, 10)]


def test_manifest_digest_follows_content_not_place_or_units():
    m = manifest()
    moved = Manifest(
        "jsonl",
        tuple(FileEntry(f.key, "s3://b/" + f.key, f.size, "9", f.digest, f.rows, f.columns) for f in m.files),
        (Unit("a", "", 0, 10, 10), m.units[2]),
    )
    assert moved.digest == m.digest
    changed = Manifest("jsonl", (m.files[0], FileEntry("b", "/x/b", 10, "1", "other", 5, ("messages",))), m.units)
    assert changed.digest != m.digest


def test_recipe_names_the_fields_that_differ():
    a = Recipe("scores", {"model": {"path": "x", "digest": "1"}, "seed": 0})
    b = Recipe("scores", {"model": {"path": "y", "digest": "1"}, "seed": 0})
    assert Recipe.from_json(a.to_json()) == a
    assert a.digest != b.digest
    assert a.differences(b) == {"model.path": ("x", "y")}
    with pytest.raises(RecipeError, match=r"(?s)s3://o/scores.*model\.path: there 'y', now 'x'.*sink\.url"):
        a.refuse_other(b, "s3://o/scores")
    a.refuse_other(Recipe.from_json(a.to_json()), "here")


def test_chunk_survives_the_wire_with_any_text():
    text = "a\u202eb \x00 <b> \U0001f600"
    e = Example("i", 3, (Message("user", text), Message("assistant", "ja")), None, "g")
    c = Chunk(
        "k",
        3,
        5,
        [e],
        [Rendered([1, 2, 3], 1, 2, 3)],
        [("own", Rendered([4, 5], 0, 1, 2))],
        [Quarantined(4, "why", None, text)],
    )
    assert Chunk.from_bytes(c.to_bytes()) == c
    empty = Chunk("k", 0, 1, [], [], [], [Quarantined(0, "why")])
    assert Chunk.from_bytes(empty.to_bytes()) == empty
