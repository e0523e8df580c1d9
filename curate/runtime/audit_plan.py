"""What is new in a growing corpus: the units whose content no committed audit has covered.

In: where the corpus lies, and the files that audits have covered. Out: a manifest of new units. New is content, not a
name or a date: a file that was renamed, copied or touched has nothing new, one that was rewritten is wholly new, and of
a plain JSON-lines file that was appended to only the appended rows are new. Reads no row's text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime

from connectors import appended, registry, storage
from connectors.base import Connector
from connectors.failures import told
from connectors.storage import FileInfo
from curate.corpus.units import FileEntry, Manifest, Unit
from curate.errors import CorpusError
from curate.runtime.audit_files import Known
from curate.runtime.manifest import SourceSpec, scan
from curate.runtime.stream import map_tasks


@dataclass(frozen=True)
class Listing:
    """The files that lie there now."""

    connector: Connector
    files: tuple[FileInfo, ...]


@dataclass(frozen=True)
class Plan:
    """`manifest`: the new units; its files are all that were looked into, those without new rows too.

    left_out: broken files (one that is still being written, say), each with its reason; they are looked at again by the
    next audit. same: files whose content was known already. grown: files of which only the appended rows are new.
    """

    manifest: Manifest
    left_out: tuple[str, ...]
    same: int
    grown: int


def listing(source: SourceSpec) -> Listing:
    """What lies there now.

    Raises:
        CorpusError: nothing is there, or of several formats.
    """
    connector, infos = registry.discover(source.url, source.format)
    return Listing(connector, tuple(infos))


def plan(source: SourceSpec, found: Listing, known: Known, progress: Callable[[int, int], None]) -> Plan:
    """Look into the files that are not known as they are (URL, size and stamp), and keep what is new of them."""
    unseen = [i for i in found.files if not _seen(i, known)]
    jobs = [(found.connector, i, source.unit_rows, known.files.get(i.url)) for i in unseen]
    files: list[FileEntry] = []
    units: list[Unit] = []
    left_out: list[str] = []
    here: set[str] = set()
    same = grown = 0
    for n, answer in enumerate(map_tasks(_look, jobs), 1):
        progress(n, len(jobs))
        if isinstance(answer, str):
            left_out.append(answer)
            continue
        entry, new, appended_to = answer
        files.append(entry)
        if entry.digest in known.rows or entry.digest in here or not entry.rows:
            same += 1
            continue
        here.add(entry.digest)
        grown += appended_to
        units += new
    return Plan(Manifest(found.connector.name, tuple(files), tuple(units)), tuple(left_out), same, grown)


def _seen(info: FileInfo, known: Known) -> bool:
    before = known.files.get(info.url)
    return before is not None and (before.size, before.stamp) == (info.size, info.stamp)


def _look(
    job: tuple[Connector, FileInfo, int, FileEntry | None],
) -> tuple[FileEntry, list[Unit], bool] | str:
    connector, info, unit_rows, before = job
    found = scan((connector, info, unit_rows))
    if isinstance(found, str) or before is None:
        return found if isinstance(found, str) else (*found, False)
    entry, units = found
    return (entry, *appended.new_units(connector, entry, units, before))


def kept_keys(before: Manifest, now: Manifest) -> set[str]:
    """Files of an unfinished audit whose parts are still right: unchanged, or appended to, since it was planned."""
    then = {f.key: f for f in before.files}
    asked = {u.key for u in now.units}
    return {
        f.key
        for f in now.files
        if f.key in asked
        and (old := then.get(f.key)) is not None
        and (old.digest == f.digest or (now.format == "jsonl" and appended.begins_with(f, old)))
    }


def day_of(info: FileInfo, pattern: str) -> date:
    """A file's day: the date in its name within the corpus (the last one), else the day it was last changed (UTC).

    Raises:
        CorpusError: neither is known.
    """
    for match in reversed(list(re.finditer(pattern, info.name))):
        try:
            return date(int(match["year"]), int(match["month"]), int(match["day"]))
        except ValueError:
            continue
    fs, path = storage.split(info.url)
    try:
        with told(info.url, "read"):
            changed: datetime = fs.modified(path)
    except NotImplementedError:
        raise CorpusError(
            f"{info.url} has no date in its name (audit.day), and its store does not tell when it was changed"
        ) from None
    return changed.astimezone(UTC).date()


def by_day(files: Sequence[FileInfo], pattern: str, first: date, last: date) -> dict[date, tuple[FileInfo, ...]]:
    """The files of each day from `first` to `last` that has any, in order."""
    days: dict[date, list[FileInfo]] = {}
    for f in files:
        day = day_of(f, pattern)
        if first <= day <= last:
            days.setdefault(day, []).append(f)
    return {day: tuple(days[day]) for day in sorted(days)}
