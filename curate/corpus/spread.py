"""Spread: a sample of rows, evenly over a corpus or drawn by a seed, and the shards that it is worked on in.

In: a manifest and how many rows. Out: ranges of rows within units; a function of these alone, so that a resumed run
cuts the same shards. Knows no storage and reads nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from curate.corpus.coverage import Range
from curate.corpus.units import Manifest, Unit
from curate.errors import ConfigError

RUN = 8  # neighbouring rows taken together: opening a file costs more than a few rows of it
Piece = tuple[Unit, list[Range]]


def spread(manifest: Manifest, rows: int) -> list[Piece]:
    """`rows` of the corpus (or all, if it has no more) as short runs at equal distances, in order.

    Raises:
        ConfigError: fewer than one row is asked for.
    """
    if rows < 1:
        raise ConfigError(f"a sample of {rows} rows is asked for; it must be at least 1")
    total = manifest.rows
    n = min(rows, total)
    runs = [(at * total // n, at * total // n + min(RUN, n - at)) for at in range(0, n, RUN)]
    pieces: list[Piece] = []
    offset, k = 0, 0
    for unit in manifest.units:
        end = offset + unit.rows
        ranges: list[Range] = []
        while k < len(runs) and runs[k][0] < end:
            a, b = max(runs[k][0], offset), min(runs[k][1], end)
            first, last = unit.start + a - offset, unit.start + b - offset
            if ranges and ranges[-1][1] == first:
                ranges[-1] = (ranges[-1][0], last)
            else:
                ranges.append((first, last))
            if runs[k][1] > end:
                break  # the rest of this run lies in the next unit
            k += 1
        if ranges:
            pieces.append((unit, ranges))
        offset = end
    return pieces


def draw(manifest: Manifest, rows: int, seed: int) -> list[Piece]:
    """`rows` of the corpus (or all, if it has no more), each drawn by itself, in order.

    Raises:
        ConfigError: fewer than one row is asked for.
    """
    if rows < 1:
        raise ConfigError(f"a sample of {rows} rows is asked for; it must be at least 1")
    total = manifest.rows
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(rows, total), replace=False, shuffle=False))
    pieces: list[Piece] = []
    offset = 0
    for unit in manifest.units:
        first, last = np.searchsorted(chosen, [offset, offset + unit.rows])
        at = chosen[first:last] - offset + unit.start
        if len(at):
            runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
            pieces.append((unit, [(int(run[0]), int(run[-1]) + 1) for run in runs]))
        offset += unit.rows
    return pieces


def cut(pieces: Sequence[Piece], rows: int) -> list[list[Piece]]:
    """Shards of `rows` rows, in order; the last one may be shorter."""
    shards: list[list[Piece]] = [[]]
    left = rows
    for unit, ranges in pieces:
        for a, b in ranges:
            while a < b:
                if left == 0:
                    shards.append([])
                    left = rows
                stop = min(b, a + left)
                if shards[-1] and shards[-1][-1][0] == unit:
                    shards[-1][-1][1].append((a, stop))
                else:
                    shards[-1].append((unit, [(a, stop)]))
                left -= stop - a
                a = stop
    return shards


def count(pieces: Sequence[Piece]) -> int:
    """Rows in `pieces`."""
    return sum(b - a for _, ranges in pieces for a, b in ranges)


def plan_digest(shards: Sequence[Sequence[Piece]]) -> str:
    """Names a way of cutting: sums of shards that were cut otherwise must not be added to these."""
    plain = [[[unit.key, ranges] for unit, ranges in shard] for shard in shards]
    return hashlib.blake2b(json.dumps(plain).encode(), digest_size=8).hexdigest()
