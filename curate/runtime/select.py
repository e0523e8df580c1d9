"""The selection stage: score columns for a decision on every row; then each source file streams once more and what
stays is written.

No shuffle and nothing of the corpus on the driver but one number a row. Each source file gives one curated shard in its
own format and one ledger file; a file whose ledger is there is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from connectors import registry, storage
from curate.corpus.coverage import Part
from curate.corpus.recipe import Recipe
from curate.corpus.units import FileEntry, Manifest
from curate.errors import ConfigError, near
from curate.runtime.output import Output, claim, read_parts, read_recipe
from curate.runtime.progress import Progress
from curate.runtime.stage import PART_COLUMNS
from curate.runtime.stream import fetch, map_tasks, put
from curate.selection.ledger import ledger_table
from curate.selection.select import Decision


@dataclass(frozen=True)
class Scores:
    """Score columns by global row: file after file in manifest order. NaN = no score. Groups and labels: each text
    once, null where a row has none."""

    columns: dict[str, np.ndarray]
    spans: dict[str, tuple[int, int]]
    groups: pa.DictionaryArray | None = None
    labels: pa.DictionaryArray | None = None

    @property
    def rows(self) -> int:
        return max((b for _, b in self.spans.values()), default=0)


def file_spans(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Where the rows of each file lie in the global order."""
    spans, at = {}, 0
    for f, units in manifest.per_file():
        n = max((u.stop for u in units), default=0)
        spans[f.key] = (at, at + n)
        at += n
    return spans


def score_columns(parts: dict[Part, str]) -> list[str]:
    """Names of the score columns that the parts hold."""
    for table in read_parts([next(iter(parts.values()))]) if parts else []:
        return [c for c in table.column_names if c not in PART_COLUMNS]
    return []


def pick_column(columns: Sequence[str], wanted: str | None) -> str:
    """The column that decides: `wanted`, or the first.

    Raises:
        ConfigError: there is no such column; names near ones.
    """
    if wanted is None:
        return columns[0]
    if wanted not in columns:
        raise ConfigError(f"selector.column is {wanted!r}, which was not scored{near(wanted, columns)}")
    return wanted


def load_scores(
    output: Output, manifest: Manifest, columns: Sequence[str], groups: bool = False, labels: bool = False
) -> Scores:
    """Read `columns` (and groups, labels) of all parts, checked to cover every row of `manifest` exactly once."""
    parts = sorted(output.check_whole(manifest).items())
    spans = file_spans(manifest)
    n = max((b for _, b in spans.values()), default=0)
    arrays = {c: np.full(n, np.nan) for c in columns}
    words = {name: _Words(n) for name, on in (("group", groups), ("label", labels)) if on}
    wanted = ["row", *columns, *words]
    parts = [(p, u) for p, u in parts if p.key in spans]
    for (part, _), table in zip(parts, read_parts([u for _, u in parts], wanted), strict=True):
        a, b = spans[part.key]
        at = table["row"].to_numpy() + a
        inside = at < b
        for c in columns:
            arrays[c][at[inside]] = table[c].to_numpy(zero_copy_only=False)[inside]
        for name, texts in words.items():
            texts.put(at[inside], table[name].filter(pa.array(inside)))
    made = {name: texts.array() for name, texts in words.items()}
    return Scores(arrays, spans, made.get("group"), made.get("label"))


class _Words:
    """Texts by global row, few of them different, as four bytes a row and each text once."""

    def __init__(self, rows: int) -> None:
        self.codes = np.full(rows, -1, dtype=np.int32)
        self.known: dict[str, int] = {}

    def put(self, at: np.ndarray, texts: pa.ChunkedArray) -> None:
        """The texts of the rows `at`."""
        found = texts.combine_chunks().cast(pa.string()).dictionary_encode()
        codes = [self.known.setdefault(word, len(self.known)) for word in found.dictionary.to_pylist()]
        local = found.indices.fill_null(len(codes)).to_numpy(zero_copy_only=False)
        self.codes[at] = np.array([*codes, -1], dtype=np.int32)[local]

    def array(self) -> pa.DictionaryArray:
        """One text a row; null where none was put."""
        return pa.DictionaryArray.from_arrays(
            pa.array(self.codes, mask=self.codes < 0), pa.array(list(self.known), pa.string())
        )


@dataclass(frozen=True)
class SelectSpec:
    """Where scores come from and curated shards go to. `curated` holds shards alone, so that a trainer can take it.
    `rule`: in words, for the ledgers."""

    scores: Output
    format: str
    source_root: str
    curated: str
    ledger: str
    column: str
    rule: str


def _file_job(entry: FileEntry, spec: SelectSpec, ref: Any, span: tuple[int, int]) -> tuple[str, int, int]:
    """Write one file's shard and its ledger, which is last and so marks the file as done."""
    keep, scores, ranks, quantiles = (v[span[0] : span[1]] for v in fetch(ref))
    n = span[1] - span[0]
    ids: list[str | None] = [None] * n
    labels: list[str | None] = [None] * n
    urls = [u for _, u in sorted(spec.scores.parts(entry.key).items())]
    for table in read_parts(urls, ["id", "row", "label"]):
        for i, row, label in zip(*(table[c].to_pylist() for c in ("id", "row", "label")), strict=True):
            if row < n:
                ids[row], labels[row] = i, label
    reasons: list[str | None] = [None] * n
    for q in spec.scores.quarantine_of(entry.key):
        if q.row < n:
            reasons[q.row], ids[q.row] = q.reason, q.id
    mask = np.zeros(entry.rows, dtype=bool)
    mask[:n] = keep
    connector = registry.connectors()[spec.format]
    kept = connector.curate(entry, storage.join(spec.curated, entry.key), mask)
    table = ledger_table(
        ids,
        np.arange(n),
        scores,
        ranks,
        quantiles,
        keep,
        f"{spec.rule} by {spec.column}",
        reasons,
        labels if any(x is not None for x in labels) else None,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_atomic(_ledger_url(spec, entry.key), sink.getvalue().to_pybytes())
    return entry.key, n, kept


def _ledger_url(spec: SelectSpec, key: str) -> str:
    return storage.join(spec.ledger, f"{key}.parquet")


def select(
    decision: Decision,
    spec: SelectSpec,
    recipe: Recipe,
    manifest: Manifest,
    scores: Scores,
    progress: type[Progress] = Progress,
) -> None:
    """Write the curated shards and ledgers of a decision on every row, those that are not there.

    Raises:
        RecipeError: the place holds a selection by another rule or other scores.
    """
    _claim(spec, recipe)
    storage.check_writable(spec.curated)
    storage.remove_stale_temps(spec.curated)
    ref = put((decision.keep, scores.columns[spec.column], decision.rank, decision.quantile))
    todo = [f for f in manifest.files if f.rows and not storage.exists(_ledger_url(spec, f.key))]
    done = manifest.rows - sum(b - a for a, b in (scores.spans[f.key] for f in todo))
    bar = progress("select", manifest.rows, done)
    jobs = [(f, scores.spans[f.key]) for f in todo]
    for _, n, _ in map_tasks(partial(_run_job, spec=spec, ref=[ref]), jobs):
        bar.add(n)
    made = {f.key for f in manifest.files if f.rows}
    registry.connectors()[spec.format].finalize(spec.source_root, spec.curated, made)
    bar.close()


def _run_job(job: tuple[FileEntry, tuple[int, int]], spec: SelectSpec, ref: list[Any]) -> tuple[str, int, int]:
    return _file_job(job[0], spec, ref[0], job[1])


def _claim(spec: SelectSpec, recipe: Recipe) -> None:
    """As `claim`; but over more or fewer rows of the same scores, what was selected is selected anew: every rank may
    have moved."""
    url = storage.join(spec.ledger, "_recipe.json")
    stored = read_recipe(url, spec.ledger)
    if stored is not None and set(recipe.differences(stored)) == {"rows"}:
        for f in storage.list_files(spec.ledger):
            storage.remove(storage.join(spec.curated, f.name.removesuffix(".parquet")))
            storage.remove(f.url)
        storage.write_atomic(url, recipe.to_json())
    claim(url, recipe, spec.ledger)


def label_counts(labels: pa.DictionaryArray, mask: np.ndarray) -> dict[str, int]:
    """Rows of each label where `mask` is true."""
    counts = pc.value_counts(labels.filter(pa.array(mask)))
    return {str(c["values"]): int(c["counts"]) for c in counts.to_pylist() if c["values"] is not None}
