"""The layout of recurring audits: one folder an audit, what they share beside them, and what is kept.

<sink>/audits/recipe.json                what all audits of the place share: model, scorers, concepts, columns
<sink>/audits/lease.json                 who works here now
<sink>/audits/history.parquet            one row an audit, source and score column; made of the audits' statistics
<sink>/audits/known.parquet              the files that committed audits cover; a copy, made again when it is not whole
<sink>/audits/index.html                 the trend page
<sink>/audits/<number>/manifest.parquet  the units of this audit: what was new
<sink>/audits/<number>/scores/           their scores (an Output), until retention removes them
<sink>/audits/<number>/summary.json      what was found; statistics.parquet: this audit's rows of the history
<sink>/audits/<number>/committed.json    written last: with it the audit is done, without it it goes on
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from connectors import storage
from curate.corpus.units import FileEntry
from curate.errors import ConfigError, StorageError, near
from curate.runtime.output import Output, load_manifest, read_part

_FOLDER = re.compile(r"/(\d{6})/[^/]+$")
_FILES = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("size", pa.int64()),
        ("stamp", pa.string()),
        ("digest", pa.string()),
        ("rows", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Known:
    """What committed audits cover: rows by digest of the file's content; each file's newest state by its URL."""

    rows: Mapping[str, int]
    files: Mapping[str, FileEntry]

    @staticmethod
    def of(entries: Iterable[FileEntry]) -> Known:
        """In the order of the audits: later states replace earlier ones."""
        rows, files = {}, {}
        for e in entries:
            rows[e.digest] = e.rows
            files[e.url] = e
        return Known(rows, files)


@dataclass(frozen=True)
class Audit:
    """One audit. `label`: the day of a backfill, or when it began; `as_of`: its place in time, in the history."""

    number: int
    label: str
    as_of: str
    scope: str = "new"

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


@dataclass(frozen=True)
class Audits:
    """All audits of a place. Cheap to make: every question is answered from the store."""

    url: str

    def at(self, name: str) -> str:
        return storage.join(self.url, name)

    def folder(self, audit: Audit | str) -> str:
        return self.at(audit if isinstance(audit, str) else audit.name)

    def scores(self, audit: Audit | str) -> Output:
        return Output(storage.join(self.folder(audit), "scores"))

    def _names(self, file: str) -> list[str]:
        """The audits that have `file`. Not a listing of all that lies here: there are many parts."""
        found = storage.glob(f"{glob.escape(self.url)}/*/{file}")
        return sorted(m[1] for f in found if (m := _FOLDER.search(f.url)))

    def committed(self) -> list[dict[str, Any]]:
        """The markers of committed audits, by their place in time; each has number, label, as_of, status, kept."""
        urls = [storage.join(self.url, n, "committed.json") for n in self._names("committed.json")]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(_json, urls))
        return sorted(found, key=lambda c: (c["as_of"], c["number"]))

    def unfinished(self, scope: str) -> Audit | None:
        """An audit of the same scope that was begun and not committed."""
        done = set(self._names("committed.json"))
        for name in self._names("plan.json"):
            if name not in done:
                plan = _json(storage.join(self.url, name, "plan.json"))
                if plan["scope"] == scope:
                    return Audit(**plan)
        return None

    def next_number(self) -> int:
        names = [*self._names("plan.json"), *self._names("committed.json")]
        return 1 + max((int(n) for n in names), default=0)

    def begin(self, audit: Audit) -> None:
        storage.write_atomic(storage.join(self.folder(audit), "plan.json"), json.dumps(asdict(audit)))

    def known(self, committed: Sequence[Mapping[str, Any]]) -> Known:
        """What the committed audits cover, from the copy or, where that is of other audits, from their manifests."""
        url = self.at("known.parquet")
        names = sorted(f"{c['number']:06d}" for c in committed)
        if storage.exists(url):
            table = read_part(url)
            if json.loads((table.schema.metadata or {})[b"audits"]) == names:
                return Known.of(FileEntry(**r, columns=()) for r in table.to_pylist())
        manifests = [load_manifest(self.folder(n)) for n in names]
        lost = [n for n, m in zip(names, manifests, strict=True) if m is None]
        if lost:
            raise StorageError(
                f"{self.folder(lost[0])} has no manifest.parquet, so nobody can say what that audit covers; restore "
                f"it, or remove the folder to audit its files again"
            )
        known = Known.of(e for m in manifests if m is not None for e in m.files)
        self.save_known(known, names)
        return known

    def save_known(self, known: Known, names: Sequence[str]) -> None:
        """`names`: the committed audits whose files these are."""
        # Contents that no file has any more stay known: a file that comes back is not new.
        current = {f.digest for f in known.files.values()}
        gone = [FileEntry("", f"digest:{d}", 0, "", d, n, ()) for d, n in known.rows.items() if d not in current]
        rows = [{k: v for k, v in asdict(e).items() if k != "columns"} for e in (*gone, *known.files.values())]
        table = pa.Table.from_pylist(rows, schema=_FILES)
        write_table(self.at("known.parquet"), table.replace_schema_metadata({b"audits": json.dumps(sorted(names))}))

    def mend(self, committed: Sequence[Mapping[str, Any]]) -> pa.Table | None:
        """The history of the committed audits, in their order; written where it is missing or of other audits."""
        url = self.at("history.parquet")
        names = [f"{c['number']:06d}" for c in committed]
        table, there = None, set[str]()
        if storage.exists(url):
            table = read_part(url)
            stored = json.loads((table.schema.metadata or {}).get(b"audits", b"[]"))
            if stored == names:
                return table
            if set(stored) <= set(names):  # else an audit was removed by hand: from the audits' own tables
                there = set(stored)
        parts = [table] if table is not None and there else []
        parts += [read_part(storage.join(self.folder(n), "statistics.parquet")) for n in names if n not in there]
        if not parts:
            return None
        table = pa.concat_tables(parts, promote_options="permissive")
        table = table.sort_by([("as_of", "ascending"), ("audit", "ascending")])
        table = table.replace_schema_metadata({b"audits": json.dumps(names)})
        write_table(url, table)
        return table

    def notified(self) -> set[str]:
        """The audits of which a notice was delivered."""
        return set(self._names("notified.json"))

    def summary(self, name: str) -> dict[str, Any]:
        return _json(storage.join(self.url, name, "summary.json"))

    def find(self, baseline: str, committed: Sequence[Mapping[str, Any]], now: Audit) -> dict[str, Any] | None:
        """The committed audit that `baseline` names: the first that was committed, the previous one in time, or one by
        its number or label. None: there is none yet.

        Raises:
            ConfigError: no audit has that name.
        """
        if baseline == "first":
            return dict(min(committed, key=lambda c: c["number"])) if committed else None
        if baseline == "previous":
            before = [c for c in committed if (c["as_of"], c["number"]) < (now.as_of, now.number)]
            return dict(before[-1]) if before else None
        for c in committed:
            if baseline in (c["label"], f"{c['number']:06d}", str(c["number"])):
                return dict(c)
        names = [n for c in committed for n in (c["label"], f"{c['number']:06d}")]
        raise ConfigError(
            f"audit.baseline is {baseline!r}; no audit has that name{near(baseline, names)} (first, previous, a URL of "
            f"score parts)"
        )

    def retain(self, committed: Sequence[Mapping[str, Any]], keep: int, needed: Iterable[str]) -> int:
        """Remove the score parts of all but the newest `keep` audits and those `needed`; returns of how many.

        What the audits found stays: statistics, worst rows, summaries, manifests.
        """
        spare = {*needed, *(f"{c['number']:06d}" for c in committed[-keep:])}
        removed = 0
        for c in committed:
            name = f"{c['number']:06d}"
            if name in spare or not storage.exists(self.scores(name).recipe_url):
                continue
            for place in ("generations", "scores"):
                files = [f.url for f in storage.list_files(storage.join(self.folder(name), place))]
                # The recipe last: while it is there, there is something left to remove.
                for url in sorted(files, key=lambda u: u.endswith("/recipe.json")):
                    storage.remove(url)
            removed += 1
        return removed


@dataclass(frozen=True)
class Statistics:
    """An audit's rows of the history."""

    audit: Audit
    baseline: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> pa.Table:
        head = {"audit": self.audit.name, "label": self.audit.label, "as_of": self.audit.as_of}
        return pa.Table.from_pylist([{**head, "baseline": self.baseline, **r} for r in self.rows], schema=HISTORY)


_F = pa.float64()
HISTORY = pa.schema(
    [(n, pa.string()) for n in ("audit", "label", "as_of", "baseline", "source", "column")]
    + [(n, pa.int64()) for n in ("rows", "quarantined", "n", "baseline_n")]
    + [(n, _F) for n in ("mean", "std", "q05", "q25", "q50", "q75", "q95", "threshold", "share_above")]
    + [(n, _F) for n in ("baseline_share_above", "mean_shift", "psi", "psi_noise", "ks", "ks_p")]
)
"""Columns of history.parquet. `source` is "" for all new rows together."""


def remove_parts(output: Output, keys: Callable[[str], bool]) -> int:
    """Remove the parts, and quarantine, of the files whose key is wanted; returns how many parts."""
    removed = 0
    for place in ("parts", "quarantine"):
        root = storage.join(output.url, place)
        for f in storage.list_files(root):
            if keys(f.name.rsplit("/", 1)[0]):
                storage.remove(f.url)
                removed += place == "parts"
    return removed


def write_table(url: str, table: pa.Table) -> None:
    """As Parquet, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_atomic(url, sink.getvalue().to_pybytes())


def write_json(url: str, value: Any) -> None:
    storage.write_atomic(url, json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def _json(url: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read_text(url))
    except ValueError as e:
        raise StorageError(f"{url} is no JSON ({e}); remove the audit's folder and run again") from None
    return dict(found)
