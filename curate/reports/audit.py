"""The trend page of `curate audit`: how each score has gone from audit to audit, what the latest one found.

In: AuditPage. Out: the page as text. Knows no model and no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from curate.reports import audit_plots
from curate.reports.report import rendered
from curate.reports.words import column as column_words

SHOWN_AUDITS = 90  # in the pictures
LISTED_AUDITS = 30
LISTED_SOURCES = 40
_QUANTILES = ("q05", "q25", "q50", "q75", "q95")


@dataclass(frozen=True, eq=False)
class AuditPage:
    """audits: markers of the committed audits, in their order in time. history: rows of history.parquet. latest: the
    summary of the last one. facts: (what, value). limits: those of the rules on PSI."""

    title: str
    audits: Sequence[Mapping[str, Any]]
    history: Sequence[Mapping[str, Any]]
    latest: Mapping[str, Any]
    facts: tuple[tuple[str, str], ...]
    limits: tuple[float, ...] = ()


def build(page: AuditPage) -> str:
    """The whole page. The same data gives the same text."""
    return rendered("audit.html.j2", _context(page), styles=("page.css", "audit.css"))


def _context(page: AuditPage) -> dict[str, Any]:
    shown = list(page.audits[-SHOWN_AUDITS:])
    names = [f"{c['number']:06d}" for c in shown]
    total = {(r["audit"], r["column"]): r for r in page.history if r["source"] == ""}
    # The primary column first, then as they were scored.
    columns = list(dict.fromkeys([page.latest["column"], *(d["column"] for d in page.latest["drift"])]))
    trends = [_trend(i, c, shown, names, total, page) for i, c in enumerate(columns)]
    primary = page.latest["column"]
    sources = [d for d in page.latest["drift"] if d["source"] != "" and d["column"] == primary]
    sources.sort(key=lambda d: (-(d["psi"] if d["psi"] is not None else -1.0), d["source"]))
    first = next((d for d in page.latest["drift"] if d["source"] == "" and d["column"] == primary), None)
    listed = [
        {**c, "name": f"{c['number']:06d}", "total": total.get((f"{c['number']:06d}", primary))}
        for c in reversed(page.audits[-LISTED_AUDITS:])
    ]
    return {
        "page": page,
        "latest": page.latest,
        "now": first,
        "trends": trends,
        "sources": sources[:LISTED_SOURCES],
        "more_sources": max(0, len(sources) - LISTED_SOURCES),
        "listed": listed,
        "earlier": max(0, len(page.audits) - LISTED_AUDITS),
        "score": column_words(primary),
    }


def _trend(
    i: int,
    column: str,
    shown: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    total: Mapping[tuple[str, str], Mapping[str, Any]],
    page: AuditPage,
) -> dict[str, Any]:
    rows: list[Mapping[str, Any]] = [total.get((n, column), {}) for n in names]
    labels = moments([str(c["as_of"]) for c in shown])
    quantiles = {q: [r.get(q) for r in rows] for q in _QUANTILES}
    limits = [r.get("threshold") for r in rows]
    psi, noise = [r.get("psi") for r in rows], [r.get("psi_noise") for r in rows]
    fired = [column in c.get("fired", []) for c in shown]
    pictures: dict[str, dict[str, Markup]] = {"score": {}, "psi": {}}
    known = any(v is not None for v in psi)
    for size, width in (("wide", 920), ("narrow", 350)):
        alt = f"Quantiles of {column} in {len(rows)} audits"
        tall = 280 if size == "wide" else 240
        pictures["score"][size] = audit_plots.quantiles(labels, quantiles, limits, f"q{i}-{size}", alt, width, tall)
        if known:
            alt = f"PSI of {column} in {len(rows)} audits"
            low = 220 if size == "wide" else 200
            psi_of = (labels, psi, noise, fired, page.limits)
            pictures["psi"][size] = audit_plots.drift(*psi_of, f"d{i}-{size}", alt, width, low)
    return {"column": column, "words": column_words(column), "pictures": pictures, "known": known, "now": rows[-1]}


def moments(times: Sequence[str]) -> list[str]:
    """Times (2026-11-22T15:41:49Z) for an axis: their days, and where some share one, the hours of all."""
    days = [t[:10] for t in times]
    return days if len(set(days)) == len(days) else [f"{t[5:10]} {t[11:16]}" for t in times]
