"""Stages of a status: how much of a product is there, told by its parts or markers, and at which rate it grows.

In: the place of a product, the rows that it is to cover. Out: a Stage. Rates and the time left come from the
modification times of the parts of the last ten minutes before the newest one: the clock is the store's, and a run that
was just resumed is not judged by the hours that it lay still. Knows no sinks and no jobs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from connectors import storage
from connectors.dated import Dated, dated_files
from curate.corpus.coverage import Part, parse_part
from curate.corpus.units import Manifest
from curate.runtime.output import load_manifest, read_quarantine

WINDOW_SECONDS = 600.0
QUARANTINE_FILES = 1000  # quarantine files that are read at most; of more, the newest, and the count is an estimate


@dataclass(frozen=True)
class Stage:
    """One stage. `total` None: nobody says. `told_by`: what the count is from. `reasons`: why rows are quarantined, the
    commonest first. `last`: the newest commit, seconds since 1970; `rate` a second; `left` seconds; `detail`: in words.
    """

    stage: str
    unit: str
    done: int
    total: int | None
    complete: bool
    told_by: Literal["parts", "markers", "driver", "files"]
    place: str | None = None
    quarantined: int = 0
    reasons: tuple[tuple[str, int], ...] = ()
    last: float | None = None
    rate: float | None = None
    left: float | None = None
    detail: str = ""


def scope(place: str, sink: str, rows: int) -> Manifest | None:
    """The first `rows` rows of the corpus that the parts at `place` are of, by the manifest beside it or the sink's."""
    for url in dict.fromkeys((place.rsplit("/", 1)[0], sink)):
        manifest = load_manifest(url)
        if manifest is not None and manifest.rows >= rows > 0:
            return manifest.head(rows)
    return None


def parts_stage(name: str, place: str, of: Manifest | None, total: int | None, unit: str = "rows") -> Stage:
    """A stage whose product is the parts at `place`. `of`: the rows they are to cover; where it is unknown, or another
    corpus's, all parts count."""
    files = {p: f for f in dated_files(storage.join(place, "parts")) if (p := parse_part(f.name)) is not None}
    stops: dict[str, int] = {}
    for u in of.units if of is not None else ():
        stops[u.key] = max(u.stop, stops.get(u.key, 0))
    if stops and not all(p.key in stops for p in files):
        stops = {}
    rows = {p: _inside(p, stops) for p in files}
    done = sum(rows.values())
    bad, reasons, detail = _quarantine(place, set(rows))
    rate, last = rate_of([(f.modified, rows[p]) for p, f in files.items() if rows[p]])
    if total is None and of is not None:
        total = of.rows
    complete = total is not None and done >= total
    left = (total - done) / rate if rate and total is not None and not complete else None
    done = done if total is None else min(done, total)
    return Stage(name, unit, done, total, complete, "parts", place, bad, reasons, last, rate, left, detail)


def _inside(part: Part, stops: Mapping[str, int]) -> int:
    """Rows of a part within the scope."""
    stop = min(part.stop, stops[part.key]) if stops else part.stop
    return max(0, stop - part.start)


def _quarantine(place: str, done: Collection[Part]) -> tuple[int, tuple[tuple[str, int], ...], str]:
    """Quarantined rows of the committed parts `done`: how many, for which reasons, and what there is to say of it."""
    listed = dated_files(storage.join(place, "quarantine"))
    files = [f for f in listed if (p := parse_part(f.name)) is not None and p in done]
    newest = sorted(files, key=lambda f: -(f.modified or 0.0))[:QUARANTINE_FILES]
    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(16) as pool:
        for rows in pool.map(lambda f: read_quarantine(f.url), newest):
            counts.update(q.reason for q in rows)
    bad, reasons = counts.total(), tuple(counts.most_common())
    if len(newest) == len(files):
        return bad, reasons, ""
    estimate = round(bad * len(files) / len(newest))
    return estimate, reasons, f"quarantine estimated from {len(newest):,} of {len(files):,} files"


def rate_of(commits: Sequence[tuple[float | None, int]]) -> tuple[float | None, float | None]:
    """(units a second, time of the newest) of commits, as (time, units): those within `WINDOW_SECONDS` of the newest,
    after the first of them, by the time since it. None where there are fewer than two, or no times."""
    known = sorted((t, n) for t, n in commits if t is not None)
    if not known:
        return None, None
    last = known[-1][0]
    window = [(t, n) for t, n in known if last - t <= WINDOW_SECONDS]
    took = last - window[0][0]
    return (sum(n for _, n in window[1:]) / took if took > 0 else None), last


def markers_stage(name: str, places: Mapping[str, str], marker: str, unit: str) -> Stage:
    """A stage of several folders, each of which gets the file `marker` last."""
    urls = list(dict.fromkeys(places.values()))
    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(urls, pool.map(dated_files, urls), strict=True))
    commits: list[tuple[float | None, int]] = []
    under_way: dict[str, str] = {}
    names = {url: key for key, url in places.items()}
    newest = None
    for url, files in found.items():
        at = {f.name: f for f in files}
        newest = max([newest or 0.0, *(f.modified for f in files if f.modified is not None)]) or None
        if marker in at:
            commits.append((at[marker].modified, 1))
        elif files:
            under_way[names[url]] = _how_far(at)
    rate, _ = rate_of(commits)
    done, total = len(commits), len(urls)
    left = (total - done) / rate if rate and done < total else None
    shown = ", ".join(f"{k} {v}".strip() for k, v in list(under_way.items())[:4])
    more = f", and {len(under_way) - 4} more" if len(under_way) > 4 else ""
    detail = f"under way: {shown}{more}" if under_way else ""
    return Stage(name, unit, done, total, done == total, "markers", None, 0, (), newest, rate, left, detail)


def _how_far(files: Mapping[str, Dated]) -> str:
    """Of a training, by its log; of a fit, by its files."""
    if "log.jsonl" in files:
        lines = [x for x in storage.read_text(files["log.jsonl"].url).split("\n") if x]
        if lines:
            line = json.loads(lines[-1])
            return f"{line['step']:,}/{line['of']:,} steps"
    kinds = Counter(n.split("/")[2] for n in files if n.startswith("work/") and n.count("/") >= 3)
    kinds.update(n.split("/")[0] for n in files if n.startswith(("layers/", "inputs/")))
    return "(" + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) + ")" if kinds else ""
