"""What a report needs, gathered from an output place: scores, decision, texts of a few rows, quarantine, timings."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from connectors import registry, storage
from curate.concepts.concept import Concept
from curate.corpus.example import to_example
from curate.corpus.recipe import Recipe
from curate.corpus.units import Manifest
from curate.errors import BadRow
from curate.evaluation.ranking import Ranking, ranking
from curate.reports import report
from curate.reports.data import ConceptView, ExampleSets, ExampleView, ReportData
from curate.runtime.events import say
from curate.runtime.influence_views import InfluenceSources, coloured, influence_views
from curate.runtime.output import Output
from curate.runtime.reader import ReaderSpec
from curate.runtime.select import Scores, SelectSpec, label_counts
from curate.runtime.stage import StageResult, count_bad
from curate.runtime.token_shares import MEANING
from curate.selection.select import Decision


@dataclass(frozen=True)
class Place:
    """The layout of a sink."""

    url: str

    @property
    def curated(self) -> str:
        return storage.join(self.url, "curated")

    @property
    def ledger(self) -> str:
        return storage.join(self.url, "ledger")

    @property
    def report(self) -> str:
        return storage.join(self.url, "report.html")

    @property
    def summary(self) -> str:
        return storage.join(self.url, "summary.json")

    @property
    def timings(self) -> str:
        return storage.join(self.url, "timings.jsonl")

    def existing(self) -> dict[str, str]:
        """What is there, by name."""
        places = {"scores": storage.join(self.url, "scores"), "curated": self.curated, "ledger": self.ledger}
        places.update(report=self.report, summary=self.summary)
        return {name: url for name, url in places.items() if storage.exists(url)}

    def read_timings(self) -> list[dict[str, Any]]:
        """What every run of every stage cost, resumed ones included."""
        if not storage.exists(self.timings):
            return []
        return [json.loads(line) for line in storage.read_text(self.timings).splitlines() if line.strip()]

    def add_timing(self, stage: str, result: StageResult) -> None:
        """Add what a stage did just now."""
        now = {"stage": stage, "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **asdict(result)}
        lines = "".join(json.dumps(t) + "\n" for t in [*self.read_timings(), now])
        storage.write_atomic(self.timings, lines.encode())


@dataclass(frozen=True)
class ReportSpec:
    """Where and how to report."""

    place: Place
    title: str
    positive_label: str | None
    examples: int
    bootstrap: int
    reader: ReaderSpec
    generations: str | None
    influence: InfluenceSources | None = None


@dataclass(frozen=True)
class Summary:
    """The figures under the headline, also written as summary.json."""

    counts: Mapping[str, int]
    rule: str
    primary: str
    rankings: Mapping[str, Ranking | None]
    positive_label: str | None
    report: str


def _views(rows: Iterable[int], spec: ReportSpec, manifest: Manifest, scores: Scores, decision: Decision, column: str):
    """Texts of global `rows`, read from the source, as {global row: ExampleView}."""
    wanted: dict[str, list[int]] = {}
    for g in rows:
        key, (a, _) = next((k, s) for k, s in scores.spans.items() if s[0] <= g < s[1])
        wanted.setdefault(key, []).append(int(g) - a)
    connector = registry.connectors()[spec.reader.format]
    columns = spec.reader.columns
    found: dict[int, ExampleView] = {}
    for entry, units in manifest.per_file():
        here = sorted(set(wanted.get(entry.key, [])))
        base = scores.spans[entry.key][0] if here else 0
        for unit in units:
            ranges = [(r, r + 1) for r in here if unit.start <= r < unit.stop]
            for _, _, got in connector.read(unit, columns.used(), ranges) if ranges else []:
                for row in got:
                    try:
                        example = to_example(row.value or {}, row.index, columns)
                    except BadRow:
                        continue
                    g = base + row.index
                    found[g] = ExampleView(
                        example.id,
                        row.index,
                        entry.key,
                        example.label,
                        float(scores.columns[column][g]),
                        int(decision.rank[g]),
                        bool(decision.keep[g]),
                        tuple((m.role, m.content) for m in example.messages),
                    )
    return found


def _example_sets(spec: ReportSpec, manifest: Manifest, scores: Scores, decision: Decision, column: str) -> ExampleSets:
    values = scores.columns[column]
    order = np.lexsort((np.arange(len(values)), -np.nan_to_num(values, nan=-np.inf)))[: decision.n_scored]
    n = min(spec.examples, len(order))
    keep = decision.keep[order]
    edges = np.flatnonzero(keep[1:] != keep[:-1]) + 1
    at = int(edges[0]) if len(edges) else 0
    border = order[max(0, at - n // 2) : at + n - n // 2] if len(edges) else order[:0]
    sets = {"highest": order[:n], "lowest": order[-n:][::-1], "borderline": border}
    views = _views({int(g) for s in sets.values() for g in s}, spec, manifest, scores, decision, column)
    return ExampleSets(**{name: tuple(views[int(g)] for g in s if int(g) in views) for name, s in sets.items()})


def _quarantine(outputs: Sequence[tuple[str, Output]]) -> tuple[tuple[str, int, tuple[tuple[str, int, str], ...]], ...]:
    groups: dict[str, tuple[int, list[tuple[str, int, str]]]] = {}
    for stage, output in outputs:
        for key, q in output.quarantined():
            reason = q.reason if stage == "score" else f"{stage}: {q.reason}"
            n, shown = groups.get(reason, (0, []))
            if len(shown) < 5:
                shown.append((key, q.row, q.excerpt))
            groups[reason] = (n + 1, shown)
    return tuple((r, n, tuple(s)) for r, (n, s) in sorted(groups.items(), key=lambda kv: (-kv[1][0], kv[0])))


def _concepts(concepts: Sequence[Concept], columns: Sequence[str]) -> tuple[ConceptView, ...]:
    views = []
    for c in concepts:
        used = {int(p[1:]) for x in columns for p in x.split(".")[2:] if x.split(".")[1] == c.name}
        aucs = {p["layer"]: p.get("auc") for p in c.meta.get("profile", [])}
        rows = tuple((k, float(np.linalg.norm(c.vectors[k])), aucs.get(k)) for k in c.layers())
        views.append(ConceptView(c.name, used.pop() if len(used) == 1 else None, rows))
    return tuple(views)


def _warnings(manifest: Manifest, scores: Scores, generations: str | None) -> tuple[str, ...]:
    said = [f"Left out: {s}" for s in manifest.skipped]
    for name, values in scores.columns.items():
        missing = int(np.isnan(values).sum())
        if name.startswith("projection_difference") and missing:
            said.append(
                f"{name} covers {len(values) - missing:,} of {len(values):,} rows: "
                f"the others have no response of the model."
            )
    if generations and storage.exists(storage.join(generations, "artifact.json")):
        facts = json.loads(storage.read_text(storage.join(generations, "artifact.json")))
        if not facts["row_reproducible"]:
            said.append(
                "The model's own responses were made in a precision in which they depend on the batch; "
                "making them again can give other ones."
            )
    return tuple(said)


def write_report(
    spec: ReportSpec,
    recipe: Recipe | None,
    manifest: Manifest,
    scores: Scores,
    select: SelectSpec,
    decision: Decision,
    concepts: Sequence[Concept],
) -> Summary:
    """Write report.html and summary.json; returns the figures."""
    place, column = spec.place, select.column
    columns = tuple(dict.fromkeys([column, *scores.columns]))
    labels: np.ndarray | None = None
    if scores.labels is not None and scores.labels.null_count < len(scores.labels):
        words = np.array([*(x or "" for x in scores.labels.dictionary.to_pylist()), ""], dtype=object)
        labels = words[scores.labels.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False)]
    positive = spec.positive_label if labels is not None else None
    if positive is not None and labels is not None and positive not in set(labels.tolist()):
        say(
            f"report: no row has the label {positive!r} (source.positive_label); "
            f"there will be no precision-recall curve"
        )
        positive = None
    counts = {
        "rows": decision.n_rows,
        "scored": decision.n_scored,
        "kept": decision.n_kept,
        "dropped": decision.n_dropped,
        "quarantined": count_bad(select.scores, manifest),
    }
    if decision.n_unscored > counts["quarantined"]:
        counts["unscored"] = decision.n_unscored - counts["quarantined"]
    dropped = label_counts(scores.labels, ~decision.keep) if labels is not None and scores.labels is not None else {}
    outputs = [("score", select.scores)] + ([("generate", Output(spec.generations))] if spec.generations else [])
    timings = tuple((t["stage"], float(t["seconds"]), int(t["rows"]), int(t["tokens"])) for t in place.read_timings())
    examples = _example_sets(spec, manifest, scores, decision, column)
    if spec.influence is not None:
        examples = coloured(examples, column, spec.influence, recipe, spec.reader)
    data = ReportData(
        title=spec.title,
        recipe=json.loads(recipe.to_json()) if recipe else {},
        columns=columns,
        primary=column,
        scores={c: scores.columns[c] for c in columns},
        labels=labels,
        positive_label=positive,
        keep=decision.keep,
        rule=select.rule,
        cut=decision.cut,
        counts=counts,
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        examples=examples,
        concepts=_concepts(concepts, columns),
        quarantine=_quarantine(outputs),
        dropped_by_label=dropped,
        timings=timings,
        warnings=_warnings(manifest, scores, spec.generations),
        influence=influence_views(spec.influence, recipe) if spec.influence else (),
        token_meaning=MEANING,
    )
    report.write(place.report, data)
    found: dict[str, Ranking | None] = dict.fromkeys(columns)
    if positive is not None and labels is not None:
        hit, known = labels == positive, labels != ""
        for c in columns:
            found[c] = ranking(hit[known], scores.columns[c][known], spec.bootstrap)
    summary = Summary(counts, select.rule, column, found, positive, place.report)
    storage.write_atomic(place.summary, json.dumps(asdict(summary), indent=2).encode())
    return summary


def headline(summary: Summary) -> list[tuple[str, str]]:
    """The short table at the end of a run, as (name, value)."""
    c = summary.counts
    rows = [
        ("rows", f"{c['rows']:,}"),
        ("rule", f"{summary.rule} by {summary.primary}"),
        ("kept", f"{c['kept']:,}"),
        ("dropped", f"{c['dropped']:,}"),
        ("quarantined", f"{c['quarantined']:,}"),
        *([("no such score", f"{c['unscored']:,}")] if "unscored" in c else []),
    ]
    for name, r in summary.rankings.items():
        if r is not None:
            a = r.average_precision
            band = f" [{a.low:.3f}, {a.high:.3f}]" if a.low is not None and a.high is not None else ""
            text = (
                f"AUC-PR {a.value:.3f}{band}, ROC-AUC {r.roc_auc.value:.3f}, {r.rows} rows, base rate {r.base_rate:.3f}"
            )
            rows.append((name, text))
    return rows


def table(rows: Sequence[tuple[str, str]], place: Place) -> str:
    """`rows` and the places of the products as aligned text."""
    rows = [*rows, *((name, url) for name, url in place.existing().items())]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
