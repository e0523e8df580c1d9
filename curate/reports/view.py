"""From ReportData to what the template prints: sections with their numbers, pictures and texts decided.

In: ReportData. Out: a dict of values for page.html.j2. Knows nothing of HTML beyond finished pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from curate.evaluation.ranking import SPEARMAN_ROWS, Ranking, precision_recall, ranking, spearman, top_rows
from curate.reports import plots
from curate.reports.data import COUNTS, ConceptView, ExampleView, InfluenceView, ReportData
from curate.reports.text import alike, fold, plain, visible
from curate.reports.tokens import coloured, scale
from curate.reports.words import CURVATURES, FISHERS, column, verdict

SHOWN_CHARACTERS = 700  # of a long text, before the fold
MAX_CHARACTERS = 6_000  # of one text, fold included
TEXT_BUDGET = 400_000  # characters of all example texts together: the page stays below 2 MB even when escaped
MAX_COLOURED = 12_000  # coloured tokens of all examples together: some 60 bytes each
MAX_TURNS = 8  # earlier turns of one conversation
MAX_LABELS = 20  # rows of the label table
MAX_HISTOGRAMS = 5  # labels with a histogram of their own
MAX_CURVES = 5
MAX_EXCERPTS = 5  # of one reason
EXCERPT = 400  # characters
MAX_REASONS = 50
MAX_CUTS = 200
LOW_ENERGY = 0.9  # share of ‖s‖² below which a low-rank test vector is pointed out


def context(data: ReportData) -> dict[str, Any]:
    """All that the template prints."""
    scores = {c: np.asarray(data.scores[c], dtype=np.float64) for c in data.columns}
    keep = np.asarray(data.keep, dtype=bool)
    labels = None if data.labels is None else _labels(data.labels)
    positive = _positive(labels, data.positive_label)
    rankings = _rankings(scores, positive)
    primary = column(data.primary)
    above = dropped_above(scores[data.primary], keep)
    return {
        "data": data,
        "primary": primary,
        "counts": [(k, int(data.counts[k])) for k in (*COUNTS, *(k for k in data.counts if k not in COUNTS))],
        "share_dropped": data.counts["dropped"] / max(1, data.counts["kept"] + data.counts["dropped"]),
        "found": rankings.get(data.primary),
        "verdict": verdict(rankings[data.primary]) if data.primary in rankings else None,
        "hits": _hits(positive, keep),
        "distribution": _distribution(data, scores[data.primary], labels, above),
        "cuts": _cuts(data.cut),
        "curve": _curve(data, scores, positive, rankings, above),
        "top": [] if positive is None else top_rows(positive[1], scores[data.primary][positive[0]]),
        "columns": _columns(data, scores, rankings),
        "labels": _label_table(data, labels, keep),
        "examples": _examples(data),
        "scale": scale(),
        "concepts": [_concept(c, i) for i, c in enumerate(data.concepts)],
        "agreement": _agreement(data, scores),
        "influence": [_influence(v) for v in data.influence],
        "quarantine": _quarantine(data),
        "timings": data.timings,
        "total_seconds": sum(t[1] for t in data.timings),
        "recipe": json.dumps(data.recipe, indent=2, ensure_ascii=False, default=str),
    }


def _labels(labels: np.ndarray) -> np.ndarray:
    """As a string array; "" where there is none."""
    array = np.asarray(labels)
    if array.dtype.kind == "U":
        return array
    return np.array(["" if v is None or v != v else str(v) for v in array.tolist()], dtype=object).astype(str)


def _positive(labels: np.ndarray | None, positive_label: str | None) -> tuple[np.ndarray, np.ndarray] | None:
    """(rows with a label, which of these are positive), or None where nothing can be measured."""
    if labels is None or positive_label is None:
        return None
    rows = np.flatnonzero(labels != "")
    positive = labels[rows] == positive_label
    return (rows, positive) if 0 < positive.sum() < len(rows) else None


def _rankings(scores: Mapping[str, np.ndarray], positive: tuple[np.ndarray, np.ndarray] | None) -> dict[str, Ranking]:
    if positive is None:
        return {}
    found = {name: ranking(positive[1], values[positive[0]]) for name, values in scores.items()}
    return {name: r for name, r in found.items() if r is not None}


def dropped_above(scores: np.ndarray, keep: np.ndarray) -> bool | None:
    """Whether the dropped rows are those of high score; None when nothing was decided or the sides do not differ."""
    finite = np.isfinite(scores)
    kept, dropped = scores[finite & keep], scores[finite & ~keep]
    if not len(kept) or not len(dropped):
        return None
    a, b = float(np.median(dropped)), float(np.median(kept))
    return None if a == b else a > b


def _hits(positive: tuple[np.ndarray, np.ndarray] | None, keep: np.ndarray) -> dict[str, float] | None:
    """What the decision did to the labelled rows."""
    if positive is None:
        return None
    rows, true = positive
    dropped = ~keep[rows]
    hit, total, gone = int((dropped & true).sum()), int(true.sum()), int(dropped.sum())
    left = len(rows) - gone
    return {
        "hit": hit,
        "others": gone - hit,
        "dropped": gone,
        "positives": total,
        "precision": hit / gone if gone else float("nan"),
        "recall": hit / total,
        "before": total / len(rows),
        "after": (total - hit) / left if left else float("nan"),
    }


def _distribution(
    data: ReportData, scores: np.ndarray, labels: np.ndarray | None, above: bool | None
) -> dict[str, Any] | None:
    finite = np.isfinite(scores)
    if not finite.any():
        return None
    groups: list[tuple[str, np.ndarray, int]] = []
    if labels is None:
        groups.append(("all rows", scores[finite], 0))
    else:
        names, sizes = np.unique(labels[finite], return_counts=True)
        order = [str(names[i]) for i in np.argsort(-sizes, kind="stable")]
        shown = order if len(order) <= MAX_HISTOGRAMS else order[: MAX_HISTOGRAMS - 1]
        if data.positive_label in order and data.positive_label not in shown:
            shown[-1] = str(data.positive_label)
        colours = iter([0, 2, 3, 4, 5])
        for name in shown:
            colour = 1 if name == data.positive_label else next(colours)
            groups.append((name or "no label", scores[finite & (labels == name)], colour))
        rest = [n for n in order if n not in shown]
        if rest:
            groups.append((f"{len(rest):,} other labels", scores[finite & np.isin(labels, rest)], 5))
    cut = float(data.cut) if data.cut is not None and not isinstance(data.cut, Mapping) else None
    alt = f"Histogram of {column(data.primary).title} for " + ", ".join(g[0] for g in groups)
    series = [plots.Series(values, None, colour) for _, values, colour in groups]
    pictures = {
        size: plots.distribution(
            series, cut, above, labels is not None, f"hist-{size}", plain(alt), width=width, height=height
        )
        for size, width, height in (("wide", 920, 300), ("narrow", 350, 260))
    }
    medians = alike([float(np.median(v)) for _, v, _ in groups])
    legend = [
        {"name": n, "colour": c, "dash": c % 6, "rows": len(v), "median": m}
        for (n, v, c), m in zip(groups, medians, strict=True)
    ]
    return {"pictures": pictures, "legend": legend, "cut": cut, "above": above, "unscored": int((~finite).sum())}


def _cuts(cut: float | Mapping[str, float] | None) -> dict[str, Any] | None:
    if not isinstance(cut, Mapping) or not cut:
        return None
    return {"shown": list(cut.items())[:MAX_CUTS], "more": max(0, len(cut) - MAX_CUTS)}


def _curve(
    data: ReportData,
    scores: Mapping[str, np.ndarray],
    positive: tuple[np.ndarray, np.ndarray] | None,
    rankings: Mapping[str, Ranking],
    above: bool | None,
) -> dict[str, Any] | None:
    """The primary column's curve with the best column of each other method; the decision's own point."""
    if positive is None or data.primary not in rankings:
        return None
    rows, true = positive
    best: dict[str, str] = {}
    for name in sorted(rankings, key=lambda n: -rankings[n].average_precision.value):
        best.setdefault(column(name).method, name)
    best.pop(column(data.primary).method, None)
    shown = [data.primary, *best.values()][:MAX_CURVES]
    series = [plots.Series(*precision_recall(true, scores[n][rows]), colour=i) for i, n in enumerate(shown)]
    # The primary curve has the colour of the positive label, so colours 0 and 1 change places.
    series = [plots.Series(s.x, s.y, {0: 1, 1: 0}.get(s.colour, s.colour)) for s in series]
    values, keep = scores[data.primary][rows], np.asarray(data.keep, dtype=bool)[rows]
    point = None
    if above is not None:
        high = np.isfinite(values) & (~keep if above else keep)
        if high.any():
            point = (float(true[high].sum() / true.sum()), float(true[high].mean()))
    found = rankings[data.primary]
    alt = f"Precision–recall curve; area {found.average_precision.value:.3f}, base rate {found.base_rate:.3f}"
    return {
        "pictures": {
            size: plots.pr_curves(series, found.base_rate, point, f"pr-{size}", alt, width, height)
            for size, width, height in (("wide", 460, 360), ("narrow", 350, 300))
        },
        "legend": [
            {"column": column(n), "colour": s.colour, "dash": i, "found": rankings[n]}
            for i, (n, s) in enumerate(zip(shown, series, strict=True))
        ],
        "point": point,
        "side": "dropped" if above else "kept",
        "base_rate": found.base_rate,
    }


def _columns(
    data: ReportData, scores: Mapping[str, np.ndarray], rankings: Mapping[str, Ranking]
) -> list[dict[str, Any]]:
    """Every column: spread and, where labels exist, how well it ranks; the best first."""
    out = []
    for name in data.columns:
        values = scores[name][np.isfinite(scores[name])]
        spread = np.percentile(values, [0, 50, 100]).tolist() if len(values) else [None] * 3
        out.append(
            {
                "column": column(name),
                "primary": name == data.primary,
                "rows": len(values),
                "spread": alike(spread),
                "found": rankings.get(name),
            }
        )
    return sorted(out, key=lambda c: -c["found"].average_precision.value if c["found"] else 1.0)


def _label_table(data: ReportData, labels: np.ndarray | None, keep: np.ndarray) -> dict[str, Any] | None:
    """Rows of each label, and how many of them were dropped."""
    rows: list[dict[str, Any]]
    if labels is None:
        if not data.dropped_by_label:
            return None
        rows = [{"name": str(k), "rows": None, "dropped": int(v)} for k, v in data.dropped_by_label.items()]
    else:
        names, index = np.unique(labels, return_inverse=True)
        totals = np.bincount(index, minlength=len(names))
        counted = np.bincount(index[~keep], minlength=len(names))
        rows = [
            {"name": str(n), "rows": int(t), "dropped": int(d)} for n, t, d in zip(names, totals, counted, strict=True)
        ]
    rows.sort(key=lambda r: -(r["rows"] or r["dropped"]))
    return {"rows": rows[:MAX_LABELS], "more": max(0, len(rows) - MAX_LABELS), "whole": labels is not None}


def _examples(data: ReportData) -> list[dict[str, Any]]:
    sets = data.examples
    texts = sum(
        min(len(e.messages), MAX_TURNS + 2) for group in (sets.highest, sets.borderline, sets.lowest) for e in group
    )
    limit = max(400, min(MAX_CHARACTERS, TEXT_BUDGET // max(1, texts)))
    with_tokens = sum(e.tokens is not None for group in (sets.highest, sets.borderline, sets.lowest) for e in group)
    limits = (limit, MAX_COLOURED // max(1, with_tokens))
    concept = column(data.primary).concept
    trait = f"“{concept}”" if concept else "the trait"
    notes = (
        (
            "highest",
            "Highest scores",
            f"The rows in which the score sees most of {trait}. Do they show it?",
            sets.highest,
        ),
        ("borderline", "Around the cut", "Rows just on either side of the decision.", sets.borderline),
        ("lowest", "Lowest scores", f"The rows in which the score sees least of {trait}.", sets.lowest),
    )
    return [
        {
            "id": key,
            "title": title,
            "note": note,
            "folds": key != "borderline",
            "shown": _shown(views, limits, data),
            "coloured": any(v.tokens is not None for v in views),
        }
        for key, title, note, views in notes
        if views
    ]


def _shown(views: Sequence[ExampleView], limits: tuple[int, int], data: ReportData) -> list[dict[str, Any]]:
    """The examples of one set; the first one across the cut from its predecessor is marked, if it is the only one."""
    crossings = [i for i in range(1, len(views)) if views[i].kept != views[i - 1].kept]
    return [{**_example(v, limits, data), "after_cut": crossings == [i]} for i, v in enumerate(views)]


def _example(view: ExampleView, limits: tuple[int, int], data: ReportData) -> dict[str, Any]:
    turns = [{"role": role, "text": _folded(text, limits[0])} for role, text in view.messages]
    if view.tokens is not None and turns:
        turns[-1]["text"] = coloured(view.tokens, SHOWN_CHARACTERS, *limits)
    earlier = turns[:-2]
    return {
        "view": view,
        "positive": view.label is not None and view.label == data.positive_label,
        "earlier": earlier[-MAX_TURNS:],
        "left_out": max(0, len(earlier) - MAX_TURNS),
        "turns": turns[-2:],
    }


def _folded(text: str, limit: int) -> dict[str, Any]:
    head, rest, left_out = fold(text, SHOWN_CHARACTERS, limit)
    return {"head": visible(head), "rest": visible(rest), "left_out": left_out, "whole": len(text), "shown": len(head)}


def _concept(view: ConceptView, index: int) -> dict[str, Any]:
    if not view.profile:
        return {"view": view, "pictures": None}
    alt = f"Layer profile over {len(view.profile)} layers"
    pictures = {
        size: plots.layer_profile(view.profile, view.layer, f"concept-{index}-{size}", alt, width, height)
        for size, width, height in (("wide", 460, 340), ("narrow", 350, 300))
    }
    at = {layer: (norm, auc) for layer, norm, auc in view.profile}
    return {"view": view, "pictures": pictures, "used": at.get(view.layer) if view.layer is not None else None}


def _influence(view: InfluenceView) -> dict[str, Any]:
    """The parts of the model by size, and what the derivation leaves to be said."""
    parts = []
    if view.tracked is not None and view.total:
        parts = [(what, n, n / view.total) for what, n in sorted(view.left_out.items(), key=lambda p: -p[1])]
    kept = [share for _, share in view.behaviours if share is not None]
    return {
        "view": view,
        "titles": [method.replace("_", " ") for method in view.methods],
        "share": view.tracked / view.total if view.tracked is not None and view.total else None,
        "left_out": parts,
        "curvature": CURVATURES.get(view.curvature, view.curvature),
        "fisher": FISHERS.get(view.fisher or "", view.fisher),
        "thin": bool(kept) and min(kept) < LOW_ENERGY,
    }


def _agreement(data: ReportData, scores: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    if len(data.columns) < 2:
        return None
    matrix = spearman([scores[c] for c in data.columns])
    rows = [{"column": column(c), "values": matrix[i].tolist()} for i, c in enumerate(data.columns)]
    return {"rows": rows, "sampled": SPEARMAN_ROWS if len(data.keep) > SPEARMAN_ROWS else None}


def _quarantine(data: ReportData) -> dict[str, Any]:
    shown = sorted(data.quarantine, key=lambda q: -q[1])
    reasons = [
        {
            "reason": reason,
            "rows": rows,
            "excerpts": [
                (source, row, text[:EXCERPT], max(0, len(text) - EXCERPT))
                for source, row, text in excerpts[:MAX_EXCERPTS]
            ],
        }
        for reason, rows, excerpts in shown[:MAX_REASONS]
    ]
    return {"reasons": reasons, "more": max(0, len(shown) - MAX_REASONS)}
