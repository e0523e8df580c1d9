"""Coverage: which rows are done, read from the names of the parts alone. Resume is arithmetic on row ranges.

A part is named `<key>/<start>-<stop>.<ext>`. There is no database and no state outside the output place.
"""

from __future__ import annotations

import re
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


def parse_part(name: str) -> Part | None:
    """The part that a relative path names, or None for any other file (a temporary one, say)."""
    m = _NAME.match(name)
    return Part(m["key"], int(m["start"]), int(m["stop"])) if m else None


def gaps(start: int, stop: int, done: Iterable[Range]) -> list[Range]:
    """The parts of [start, stop) that no range of `done` covers."""
    out, at = [], start
    for a, b in sorted(done):
        if b <= at or a >= stop:
            continue
        if a > at:
            out.append((at, a))
        at = max(at, b)
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
    for w in wanted:
        missing = gaps(w.start, w.stop, by_key.get(w.key, []))
        if missing:
            raise CorpusError(f"rows {missing[0][0]}-{missing[0][1]} of {w.key!r} have no part; run the job again")
