"""Coverage: which rows are done, read from the names of the parts alone. Resume is arithmetic on row ranges.

A part is named `<key>/<start>-<stop>.<ext>`. There is no database and no state outside the output place.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from curate.errors import CorpusError

_NAME = re.compile(r"^(?P<key>.+)/(?P<start>\d{12})-(?P<stop>\d{12})\.[a-z0-9.]+$")
Range = tuple[int, int]


@dataclass(frozen=True, order=True)
class Part:
    """Rows [start, stop) of source file `key`, committed."""

    key: str
    start: int
    stop: int


def part_name(key: str, start: int, stop: int, extension: str) -> str:
    """Relative path of a part: sorts by row, says what it covers."""
    return f"{key}/{start:012d}-{stop:012d}.{extension}"


def unit_name(key: str, start: int, stop: int) -> str:
    """How a range of rows is called in logs."""
    return f"{key}:{start}-{stop}"


def parse_part(name: str) -> Part | None:
    """The part that a relative path names, or None for any other file (a temporary one, say)."""
    m = _NAME.match(name)
    return Part(m["key"], int(m["start"]), int(m["stop"])) if m else None


class Covered:
    """The rows of one file that ranges cover, which may touch or overlap: merged once, then asked by bisection."""

    def __init__(self, done: Iterable[Range]) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for a, b in sorted(done):
            if self._stops and a <= self._stops[-1]:
                self._stops[-1] = max(b, self._stops[-1])
            else:
                self._starts.append(a)
                self._stops.append(b)

    def gaps(self, start: int, stop: int) -> list[Range]:
        """The parts of [start, stop) that are not covered."""
        out, at = [], start
        for i in range(bisect_right(self._stops, start), len(self._stops)):
            if self._starts[i] >= stop:
                break
            if self._starts[i] > at:
                out.append((at, self._starts[i]))
            at = self._stops[i]
        if at < stop:
            out.append((at, stop))
        return out


def check_whole(wanted: Iterable[Part], parts: Iterable[Part]) -> None:
    """Final check: every wanted row is covered exactly once.

    Raises:
        CorpusError: two parts overlap, or rows are missing; names the file and the rows.
    """
    by_key: dict[str, list[Range]] = {}
    for p in parts:
        by_key.setdefault(p.key, []).append((p.start, p.stop))
    for key, ranges in by_key.items():
        ranges.sort()
        for (a, b), (c, d) in pairwise(ranges):
            if c < b:
                raise CorpusError(
                    f"parts of {key!r} overlap: rows {a}-{b} and {c}-{d}. Two runs with different unit sizes wrote "
                    f"here at the same time; remove one of the two parts and run again."
                )
    covered = {key: Covered(ranges) for key, ranges in by_key.items()}
    nothing = Covered([])
    for w in wanted:
        missing = covered.get(w.key, nothing).gaps(w.start, w.stop)
        if missing:
            raise CorpusError(f"rows {missing[0][0]}-{missing[0][1]} of {w.key!r} have no part; run the job again")
