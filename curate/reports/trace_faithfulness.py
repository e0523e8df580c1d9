"""Faithfulness on the page: curves, what they allow one to say, and the numbers behind them.

In: FaithfulnessTable. Out: plain values and pictures for trace.html.j2. Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curate.evaluation.masking import Contrast, FaithfulnessTable, Mode
from curate.evaluation.ranking import Estimate
from curate.reports.retrain_plots import Look
from curate.reports.text import fixed, percent
from curate.reports.trace_plots import Curve, Panel, masking_curves

# Measure -> (title, what it is, whether it is a share).
TITLES = {
    "delta_logit": ("Change of the correct logit", "logit of the right answer's first token, against no mask", False),
    "delta_nll": ("Change of the NLL", "−log p of the right answer's first token in nats, against no mask", False),
    "flip": ("Predictions that flip", "share of items whose prediction changes", True),
    "same": ("Same answer", "share of items whose prediction stays", True),
    "logit": ("Correct logit", "logit of the right answer's first token", False),
}
PANELS: dict[Mode, tuple[str, ...]] = {
    "necessity": ("delta_logit", "delta_nll", "flip"),
    "sufficiency": ("same", "logit"),
}
HEADS: dict[Mode, str] = {
    "necessity": "Necessity: without the first k latents",
    "sufficiency": "Sufficiency: with the first k latents alone",
}


def faithfulness(table: FaithfulnessTable | None) -> dict[str, Any] | None:
    """All that the page says of faithfulness; None where it was not measured."""
    if table is None or not table.maskings:
        return None
    looks = {method: Look.of(i) for i, method in enumerate(table.methods)}
    return {
        "table": table,
        "legend": [{"name": method, "look": look} for method, look in looks.items()],
        "modes": [_mode(table, mode, looks) for mode in PANELS],
        "unmasked": _unmasked(table),
        "contrasts": _contrasts(table.contrasts),
        "lead": _lead(table.contrasts),
        "rows": _rows(table),
        "heads": [(mode, TITLES[measure][0]) for mode, measures in PANELS.items() for measure in measures],
    }


def _mode(table: FaithfulnessTable, mode: Mode, looks: dict[str, Look]) -> dict[str, Any]:
    panels = [_panel(table, mode, measure, looks) for measure in PANELS[mode]]
    alt = f"{HEADS[mode]}; {', '.join(TITLES[m][0].lower() for m in PANELS[mode])} against k, by order of the latents"
    sizes = {"wide": (920, 300, len(panels)), "narrow": (350, 250, 1)}
    return {
        "mode": mode,
        "head": HEADS[mode],
        "pictures": {
            size: masking_curves(panels, f"{mode}-{size}", alt, width, height, across)
            for size, (width, height, across) in sizes.items()
        },
    }


def _panel(table: FaithfulnessTable, mode: Mode, measure: str, looks: dict[str, Look]) -> Panel:
    curves = []
    for i, method in enumerate(table.methods):
        found = [m for m in table.maskings if (m.method, m.mode) == (method, mode)]
        values: list[Estimate] = [getattr(m, measure) for m in found]
        known = all(v.low is not None and v.high is not None for v in values)
        curves.append(
            Curve(
                looks[method],
                tuple(m.k for m in found),
                tuple(v.value for v in values),
                tuple(v.low for v in values if v.low is not None) if known else (),
                tuple(v.high for v in values if v.high is not None) if known else (),
                strong=i == 0,
            )
        )
    level = {"logit": table.unmasked.spliced_logit.value, "same": 1.0}.get(measure, 0.0)
    title, _, share = TITLES[measure]
    return Panel(title, tuple(curves), level, share)


def shown(measure: str, estimate: Estimate) -> dict[str, str]:
    """{value, interval}: shares as per cent, others with two decimals."""
    write = percent if TITLES.get(measure, ("", "", measure in ("right", "agree")))[2] else fixed
    interval = "" if estimate.low is None else f"[{write(estimate.low)}, {write(estimate.high)}]"
    return {"value": write(estimate.value), "interval": interval}


def _unmasked(table: FaithfulnessTable) -> list[dict[str, Any]]:
    u = table.unmasked
    of = (("as it is", u.right, u.logit, u.nll), ("with the SAE", u.spliced_right, u.spliced_logit, u.spliced_nll))
    return [
        {"name": name, "right": shown("right", right), "logit": shown("logit", logit), "nll": shown("nll", nll)}
        for name, right, logit, nll in of
    ]


def verdict(contrast: Contrast) -> str:
    """ "better", "worse", "unclear" (the interval holds zero) or "single" (there is none)."""
    found = contrast.difference
    if found.low is None or found.high is None:
        return "single"
    if found.low <= 0 <= found.high:
        return "unclear"
    return "better" if (found.value > 0) == (contrast.better > 0) else "worse"


def _contrasts(contrasts: Sequence[Contrast]) -> list[dict[str, Any]]:
    """One row an order that is compared with, one cell a measure."""
    heads = [(mode, measure) for mode in PANELS for measure in PANELS[mode]]
    by = {(c.other, c.mode, c.measure): c for c in contrasts}
    out = []
    for other in dict.fromkeys(c.other for c in contrasts):
        cells = []
        for mode, measure in heads:
            found = by.get((other, mode, measure))
            cells.append(None if found is None else {**shown(measure, found.difference), "verdict": verdict(found)})
        out.append({"other": other, "cells": cells})
    return out


def _lead(contrasts: Sequence[Contrast]) -> dict[str, Any] | None:
    """By necessity's change of the logit and sufficiency's same answers: which orders the reference beats."""
    if not contrasts:
        return None
    out: dict[str, Any] = {"method": contrasts[0].method}
    for mode, measure in (("necessity", "delta_logit"), ("sufficiency", "same")):
        kinds: dict[str, list[str]] = {kind: [] for kind in ("better", "worse", "unclear", "single")}
        for c in contrasts:
            if (c.mode, c.measure) == (mode, measure):
                kinds[verdict(c)].append(c.other)
        out[mode] = kinds
    return out


def _rows(table: FaithfulnessTable) -> list[dict[str, Any]]:
    measures = ("delta_logit", "delta_nll", "flip", "same", "right", "logit")
    return [
        {"method": m.method, "mode": m.mode, "k": m.k, "cells": [shown(x, getattr(m, x)) for x in measures]}
        for m in table.maskings
    ]
