"""Scored rows of an audit or a baseline as columns: scores, sources, labels. And texts, of the few rows that are shown.

In: an output place of scores. Out: one number a row and column, one small number a row for its source. Texts are read
from the corpus again, of single rows and of a sample.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc

from connectors import registry
from curate.corpus.example import to_example
from curate.corpus.spread import Piece, spread
from curate.corpus.units import Manifest
from curate.errors import BadRow, ConfigError
from curate.evaluation.languages import languages
from curate.runtime.output import Output, read_parts
from curate.runtime.reader import ReaderSpec
from curate.runtime.select import score_columns
from curate.runtime.stream import map_tasks

OTHERS = "(others)"
MOST_SOURCES = 200
_EXCERPT = 600


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Rows with scores, part by part. `key`: index into `keys`, the files; `source`: index into `sources`."""

    columns: dict[str, np.ndarray]
    keys: tuple[str, ...]
    key: np.ndarray
    row: np.ndarray
    sources: tuple[str, ...]
    source: np.ndarray
    labels: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        return len(self.row)

    def of(self, column: str, source: str | None = None) -> np.ndarray:
        """A column, of one source or of all."""
        values = self.columns[column]
        if source is None:
            return values
        if source not in self.sources:
            return values[:0]
        return values[self.source == self.sources.index(source)]

    def count(self, source: str) -> int:
        """Rows of a source."""
        return int((self.source == self.sources.index(source)).sum()) if source in self.sources else 0


def source_of(key: str, by: str, day: str) -> str:
    """The source that a file counts to. A day in a folder's name is no source of its own: it becomes "*"."""
    if by == "none":
        return ""
    return re.sub(day, "*", (posixpath.dirname(key) or ".") if by == "folder" else key)


def load_rows(output: Output, columns: Sequence[str], by: str, day: str, labels: bool = True) -> ScoredRows:
    """All committed parts of `output`.

    Raises:
        StorageError: a broken part. ConfigError: the parts have no such column.
    """
    parts = sorted(output.parts().items())
    keys: dict[str, int] = {}
    sources: dict[str, int] = {}
    found: Counter[str] = Counter()
    pieces: dict[str, list[np.ndarray]] = {c: [] for c in (*columns, "\0key", "\0row", "\0source")}
    wanted = ["row", *columns, *(["label"] if labels else []), *(["group"] if by == "group" else [])]
    lacking = set(columns) - set(score_columns(dict(parts)))
    if parts and lacking:
        raise ConfigError(f"the scores at {output.url} have no column {min(lacking)!r}; they are of another recipe")
    for (part, _), table in zip(parts, read_parts([u for _, u in parts], wanted), strict=True):
        n = table.num_rows
        for c in columns:
            pieces[c].append(np.asarray(table[c].to_numpy(zero_copy_only=False), dtype=np.float64))
        pieces["\0key"].append(np.full(n, keys.setdefault(part.key, len(keys)), dtype=np.int32))
        pieces["\0row"].append(table["row"].to_numpy())
        if by == "group":
            groups = [g if g is not None else "(none)" for g in table["group"].to_pylist()]
            codes = np.array([sources.setdefault(g, len(sources)) for g in groups], dtype=np.int32)
        else:
            codes = np.full(n, sources.setdefault(source_of(part.key, by, day), len(sources)), dtype=np.int32)
        pieces["\0source"].append(codes)
        if labels:
            for value in pc.value_counts(table["label"]).to_pylist():
                if value["values"] is not None:
                    found[value["values"]] += value["counts"]
    joined = {c: np.concatenate(p) if p else np.empty(0) for c, p in pieces.items()}
    names, codes = _most(list(sources), joined["\0source"].astype(np.int32))
    own = {c: joined[c] for c in columns}
    return ScoredRows(own, tuple(keys), joined["\0key"].astype(np.int32), joined["\0row"], names, codes, found)


def _most(names: list[str], codes: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """The sources by name; beyond the largest MOST_SOURCES as one."""
    sizes = np.bincount(codes, minlength=len(names))
    largest = set(np.argsort(-sizes, kind="stable")[:MOST_SOURCES].tolist())
    kept = sorted(n for i, n in enumerate(names) if i in largest)
    shown = (*kept, OTHERS) if len(names) > MOST_SOURCES else tuple(kept)
    place = {n: i for i, n in enumerate(shown)}
    table = np.array([place.get(n, len(shown) - 1) for n in names], dtype=np.int32)
    return shown, table[codes] if len(codes) else codes


def quarantined_by_source(output: Output, by: str, day: str) -> tuple[Counter[str], Counter[str]]:
    """(quarantined rows of each source, of each reason). A quarantined row's group is not known."""
    sources: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for key, q in output.quarantined():
        sources["(none)" if by == "group" else source_of(key, by, day)] += 1
        reasons[q.reason] += 1
    return sources, reasons


@dataclass(frozen=True)
class WorstRow:
    """A row at the bad end of a score, with its text. `prompt` and `response` are cut."""

    id: str
    file: str
    row: int
    score: float
    source: str
    label: str | None
    prompt: str
    response: str


def worst_rows(
    rows: ScoredRows, column: str, n: int, highest: bool, manifest: Manifest, reader: ReaderSpec
) -> list[WorstRow]:
    """The `n` rows of the highest (lowest) score, read from the corpus again; one that is gone is left out."""
    values = rows.columns[column]
    order = np.argsort(np.where(np.isfinite(values), -values if highest else values, np.inf), kind="stable")
    chosen = [int(i) for i in order[:n] if np.isfinite(values[i])]
    places = {(rows.keys[rows.key[i]], int(rows.row[i])): i for i in chosen}
    texts = _texts(manifest, sorted(places), reader)
    out = []
    for place, i in places.items():
        if (found := texts.get(place)) is not None:
            head = (found.id, *place, float(values[i]), rows.sources[rows.source[i]])
            prompt = "\n".join(m.content for m in found.prompt)[-_EXCERPT:]
            out.append(WorstRow(*head, found.label, prompt, found.response[:_EXCERPT]))
    return out


def _texts(manifest: Manifest, places: Sequence[tuple[str, int]], reader: ReaderSpec) -> dict[tuple[str, int], Any]:
    pieces: list[Piece] = []
    for unit in manifest.units:
        mine = [(r, r + 1) for key, r in places if key == unit.key and unit.start <= r < unit.stop]
        if mine:
            pieces.append((unit, mine))
    return {(key, e.row): e for key, e in _read(pieces, reader)}


def _read(pieces: Sequence[Piece], reader: ReaderSpec) -> list[tuple[str, Any]]:
    connector = registry.connectors()[reader.format]
    out = []
    for unit, ranges in pieces:
        for _, _, rows in connector.read(unit, reader.columns.used(), ranges):
            for row in rows:
                try:
                    out.append((unit.key, to_example(row.value or {}, row.index, reader.columns)))
                except BadRow:
                    continue  # it is in quarantine
    return out


def language_counts(manifest: Manifest, rows: int, reader: ReaderSpec) -> Counter[str]:
    """Languages of the responses of about `rows` rows, spread over the new ones."""
    pieces = spread(manifest, rows)
    size = max(1, -(-len(pieces) // 16))  # a task loads the model once
    jobs = [(pieces[at : at + size], reader) for at in range(0, len(pieces), size)]
    return sum(map_tasks(_languages, jobs), Counter())


def _languages(job: tuple[list[Piece], ReaderSpec]) -> Counter[str]:
    return languages(e.response for _, e in _read(*job))
