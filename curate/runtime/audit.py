"""One audit's end: new rows, scored, are compared with the baseline, the rules are asked, all is written and committed.

In: the scores of the new units and a baseline. Out: statistics, worst rows and a summary below the audit's folder, the
marker last; then what all audits share: history, known files, retention. Scores nothing and tells nobody.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from connectors import storage
from curate.errors import ConfigError, near
from curate.evaluation import languages as language_rules
from curate.evaluation.audit_rules import TOTAL, Finding, Slice, findings, undecided, worst_severity
from curate.evaluation.drift import QUANTILES, Drift, compare
from curate.runtime.audit_files import Audit, Audits, Known, Statistics, write_json, write_table
from curate.runtime.audit_plan import Plan
from curate.runtime.audit_rows import (
    ScoredRows,
    language_counts,
    load_rows,
    quarantined_by_source,
    worst_rows,
)
from curate.runtime.audit_settings import AuditSettings
from curate.runtime.events import say
from curate.runtime.reader import ReaderSpec
from curate.runtime.select import score_columns

SELF = "(itself)"
FAILED_RULE = 3
_QUANTILE_NAMES = tuple(f"q{round(100 * q):02d}" for q in QUANTILES)
MOST_LABELS = 1000
_REASONS = 10
_SHOWN_NAMES = 50


@dataclass(frozen=True)
class Baseline:
    """What new rows are compared with. `name` SELF: there was none; this audit is what later ones are compared with.

    labels, languages: those that are nothing new; None: not known, so nothing counts as new.
    """

    name: str
    rows: ScoredRows | None
    labels: frozenset[str] = frozenset()
    languages: frozenset[str] | None = None


@dataclass(frozen=True)
class Summary:
    """What an audit found, in short; the whole is summary.json. `status`: baseline, fine, warn or fail."""

    audit: str
    label: str
    as_of: str
    status: str
    exit_status: int
    rows: int
    scored: int
    quarantined: int
    reasons: dict[str, int]
    files: int
    same: int
    grown: int
    left_out: list[str]
    sources: int
    baseline: str
    baseline_rows: int
    column: str
    thresholds: dict[str, float | None]
    labels: dict[str, int]
    new_labels: list[str]
    languages: dict[str, int]
    new_languages: list[str]
    findings: list[dict[str, Any]]
    drift: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    seconds: float
    page: str = ""
    undecided: list[str] = field(default_factory=list)
    backfill: bool = False
    score_seconds: float = 0.0

    def line(self) -> dict[str, Any]:
        """For the last line of standard output: without texts and long lists."""
        out = {k: v for k, v in asdict(self).items() if k not in ("worst", "labels", "languages", "reasons", "drift")}
        total = [d for d in self.drift if d["source"] == TOTAL]
        return {**out, "drift": [{k: d[k] for k in ("column", "n", "psi", "ks", "share_above")} for d in total]}


@dataclass(frozen=True)
class Conclusion:
    """What an audit needs to be concluded. `primary`: the column of the worst rows, None: the first."""

    audits: Audits
    audit: Audit
    settings: AuditSettings
    reader: ReaderSpec
    plan: Plan
    began: float
    score_seconds: float = 0.0


def primary_column(columns: Sequence[str], wanted: str | None) -> str:
    """The column whose worst rows are shown.

    Raises:
        ConfigError: there is no such column.
    """
    if wanted is None:
        return columns[0]
    if wanted not in columns:
        raise ConfigError(f"audit.column is {wanted!r}, which was not scored{near(wanted, columns)}")
    return wanted


def slices(
    rows: ScoredRows,
    bad: Mapping[str, int],
    baseline: ScoredRows | None,
    thresholds: Mapping[str, float | None],
    bins: int,
    by: str,
) -> list[Slice]:
    """All new rows, then every source of them. A source is compared with the same source of the baseline where that
    has at least as many rows as PSI has bins, times ten; a new or small one with the whole baseline."""

    def one(source: str | None, quarantined: int) -> Slice:
        drift: dict[str, Drift] = {}
        for c in rows.columns:
            base = None
            if baseline is not None:
                own = baseline.of(c, source) if source is not None else baseline.columns[c]
                base = own if len(own) >= 10 * bins else baseline.columns[c]
            drift[c] = compare(rows.of(c, source), base, thresholds[c], bins)
        n = rows.rows if source is None else rows.count(source)
        return Slice(TOTAL if source is None else source, n + quarantined, quarantined, drift)

    out = [one(None, sum(bad.values()))]
    sources = sorted({*rows.sources, *bad})  # one may have bad rows alone
    if by == "none" or len(sources) < 2:
        return out
    return out + [one(s, bad.get(s, 0)) for s in sources]


def thresholds(columns: Sequence[str], primary: str, settings: AuditSettings, base: ScoredRows) -> dict[str, Any]:
    """Above which a score counts as high: as given, for the primary column; else a quantile of the baseline."""
    out: dict[str, float | None] = {}
    for c in columns:
        known = base.columns[c][np.isfinite(base.columns[c])]
        quantile = float(np.quantile(known, settings.threshold_quantile)) if len(known) else None
        out[c] = settings.threshold if c == primary and settings.threshold is not None else quantile
    return out


def conclude(c: Conclusion, baseline: Callable[[Sequence[str]], Baseline], still: Callable[[], None]) -> Summary:
    """Measure, ask the rules, write, commit. `still`: raises where this process may not commit any more.

    Raises:
        ConfigError: the primary column was not scored, or the baseline has other columns.
        LeaseError: from `still`.
    """
    s, folder = c.settings, c.audits.folder(c.audit)
    output = c.audits.scores(c.audit)
    parts = output.check_whole(c.plan.manifest)
    columns = score_columns(parts)
    primary = primary_column(columns, s.column)
    rows = load_rows(output, columns, s.by, s.day)
    bad, reasons = quarantined_by_source(output, s.by, s.day)
    base = baseline(columns)
    limits = thresholds(columns, primary, s, base.rows or rows)
    measured = slices(rows, bad, base.rows, limits, s.bins, s.by)
    spoken = language_counts(c.plan.manifest, s.languages, c.reader) if s.languages else Counter[str]()
    present = language_rules.present(spoken, s.new_share)
    first = base.rows is None
    labels = rows.labels
    if len(labels) > MOST_LABELS:
        say(f"WARNING: {len(labels):,} labels in one audit: that column is no label, and none of them is called new")
        labels = Counter[str]()
    new_labels = [] if first else sorted(set(labels) - base.labels)
    new_languages = [] if base.languages is None else sorted(present - base.languages)
    names = {"left_out": len(c.plan.left_out), "new_labels": len(new_labels), "new_languages": len(new_languages)}
    found = findings(s.rules, measured, names)
    worst = worst_rows(rows, primary, s.worst_rows, s.worst == "highest", c.plan.manifest, c.reader)
    status = worst_severity(found)
    summary = Summary(
        audit=c.audit.name,
        label=c.audit.label,
        as_of=c.audit.as_of,
        status="baseline" if first and status == "fine" else status,
        exit_status=FAILED_RULE if status == "fail" else 0,
        rows=c.plan.manifest.rows,
        scored=rows.rows,
        quarantined=sum(bad.values()),
        reasons=dict(reasons.most_common(_REASONS)),
        files=len({u.key for u in c.plan.manifest.units}),
        same=c.plan.same,
        grown=c.plan.grown,
        left_out=list(c.plan.left_out),
        sources=len(rows.sources),
        baseline=base.name,
        baseline_rows=base.rows.rows if base.rows else 0,
        column=primary,
        thresholds=limits,
        labels=dict(labels.most_common(_SHOWN_NAMES)),
        new_labels=new_labels[:_SHOWN_NAMES],
        languages=dict(spoken.most_common()),
        new_languages=new_languages,
        findings=[_told(f) for f in found],
        drift=[_flat(part, column, d) for part in measured for column, d in part.drift.items()],
        worst=[asdict(w) for w in worst],
        seconds=time.monotonic() - c.began,
        page=c.audits.at("index.html"),
        undecided=[] if first else undecided(s.rules, next(m for m in measured if m.source == TOTAL)),
        backfill=c.audit.scope != "new",
        score_seconds=c.score_seconds,
    )
    table = Statistics(c.audit, base.name, summary.drift).table()
    write_table(storage.join(folder, "statistics.parquet"), table)
    # Known names are those of all audits: the marker has them whole, the summary the commonest.
    heard = {"labels": sorted(labels), "languages": sorted(present)}
    write_json(storage.join(folder, "summary.json"), asdict(summary))
    still()
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts = {"status": summary.status, "committed": now, "rows": summary.rows, "notify": due(summary, s)}
    facts["fired"] = sorted({f.column for f in found if f.column and f.source == TOTAL})
    marker = {**asdict(c.audit), **facts, **heard}
    write_json(storage.join(folder, "committed.json"), marker)
    return summary


def due(summary: Summary, settings: AuditSettings) -> bool:
    """Is the webhook to be told? Not of a backfill: what was long ago wakes nobody."""
    hook = settings.webhook
    if summary.backfill or (hook.url is None and hook.url_env is None):
        return False
    return hook.told_of == "always" or summary.status == "fail" or (hook.told_of == "warn" and summary.status == "warn")


def _told(f: Finding) -> dict[str, Any]:
    return {**asdict(f), "text": f.text}


def _flat(part: Slice, column: str, d: Drift) -> dict[str, Any]:
    """A row of the history."""
    named = asdict(d)
    quantiles = dict(zip(_QUANTILE_NAMES, named.pop("quantiles"), strict=True))
    where = {"source": part.source, "column": column, "rows": part.rows, "quarantined": part.quarantined}
    return {**where, **named, **quantiles}


def settle(audits: Audits, known: Known, plan: Plan | None, keep: int, needed: Sequence[str]) -> None:
    """After a commit: history, known files and retention. What a killed run did not come to, the next one does."""
    committed = audits.committed()
    audits.mend(committed)
    if plan is not None:
        entries = (*known.files.values(), *plan.manifest.files)
        covered = {**known.rows, **{f.digest: f.rows for f in plan.manifest.files}}
        audits.save_known(Known(covered, Known.of(entries).files), [f"{c['number']:06d}" for c in committed])
    audits.retain(committed, keep, needed)


def remember(audits: Audits, known: Known, plan: Plan) -> None:
    """Nothing was new: so that renamed and touched files are not looked into at every tick."""
    if plan.manifest.files:
        entries = Known.of((*known.files.values(), *plan.manifest.files)).files
        audits.save_known(Known(known.rows, entries), [f"{c['number']:06d}" for c in audits.committed()])


def heard_before(committed: Sequence[Mapping[str, Any]]) -> tuple[frozenset[str], frozenset[str]]:
    """Labels and languages of the committed audits."""
    labels = {x for c in committed for x in c.get("labels", [])}
    spoken = {x for c in committed for x in c.get("languages", [])}
    return frozenset(labels), frozenset(spoken)


def empty(audits: Audits, plan: Plan | None) -> dict[str, Any]:
    """The last line where nothing is new."""
    left_out = list(plan.left_out) if plan is not None else []
    return {"status": "nothing new", "exit_status": 0, "rows": 0, "left_out": left_out, "page": audits.at("index.html")}
