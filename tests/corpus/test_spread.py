"""Samples spread over a corpus, and their shards: oracle is a plain list of rows."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.corpus.spread import RUN, count, cut, draw, plan_digest, spread
from curate.corpus.units import FileEntry, Manifest, Unit
from curate.errors import ConfigError


def manifest(sizes: list[int]) -> Manifest:
    """One file a unit list: units of these sizes, two to a file."""
    units, files = [], []
    for i in range(0, len(sizes), 2):
        at = 0
        for n in sizes[i : i + 2]:
            units.append(Unit(f"f{i}", f"f{i}", at, at + n, n))
            at += n
        files.append(FileEntry(f"f{i}", f"f{i}", 1, "", f"d{i}", at, ("messages",)))
    return Manifest("jsonl", tuple(files), tuple(units))


def rows_of(pieces) -> list[tuple[str, int]]:
    return [(unit.key, row) for unit, ranges in pieces for a, b in ranges for row in range(a, b)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 300), st.integers(1, 30))
def test_a_sample_is_even_and_its_shards_hold_it_once(sizes, wanted, shard):
    corpus = manifest(sizes)
    pieces = spread(corpus, wanted)
    everything = [(u.key, row) for u in corpus.units for row in range(u.start, u.stop)]
    rows = rows_of(pieces)
    n = min(wanted, len(everything))
    assert count(pieces) == len(rows) == n
    assert rows == [r for r in everything if r in set(rows)]  # in order, none twice
    # Even: the k-th row of the sample lies where its share of the corpus ends, to within the length of a run.
    at = [everything.index(r) for r in rows]
    assert all(abs(at[k] - k * len(everything) / n) <= RUN * len(everything) / n for k in range(n))
    for unit, ranges in pieces:
        assert all(unit.start <= a < b <= unit.stop for a, b in ranges)
    shards = cut(pieces, shard)
    assert [r for s in shards for r in rows_of(s)] == rows
    assert [count(s) for s in shards[:-1]] == [shard] * (len(shards) - 1)
    assert plan_digest(shards) == plan_digest(cut(spread(corpus, wanted), shard))
    if len(shards) > 1:
        assert plan_digest(shards) != plan_digest(cut(pieces, n))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 300), st.integers(0, 5))
def test_rows_are_drawn_by_the_seed_each_by_itself(sizes, wanted, seed):
    corpus = manifest(sizes)
    pieces = draw(corpus, wanted, seed)
    everything = [(u.key, row) for u in corpus.units for row in range(u.start, u.stop)]
    rows = rows_of(pieces)
    assert count(pieces) == len(rows) == min(wanted, len(everything))
    assert rows == [r for r in everything if r in set(rows)]
    assert pieces == draw(corpus, wanted, seed)
    for unit, ranges in pieces:
        assert all(unit.start <= a < b <= unit.stop for a, b in ranges)
        assert all(b < c for (_, b), (c, _) in pairwise(ranges))  # neighbours are one range


def test_every_row_is_as_likely_to_be_drawn():
    corpus = manifest([3, 20, 7, 11])
    times = Counter(row for seed in range(400) for row in rows_of(draw(corpus, 10, seed)))
    expected = 400 * 10 / 41
    assert len(times) == 41
    assert all(abs(n - expected) < 5 * expected**0.5 for n in times.values())


@pytest.mark.parametrize("sample", [lambda m: spread(m, 0), lambda m: draw(m, 0, 1)])
def test_a_sample_of_nothing_is_refused(sample):
    with pytest.raises(ConfigError, match="a sample of 0 rows is asked for; it must be at least 1"):
        sample(manifest([3]))
