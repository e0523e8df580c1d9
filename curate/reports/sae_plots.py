"""Pictures of an SAE sweep: what each layer's SAE costs and keeps, and how the trainings went.

In: numbers by layer. Out: SVG elements, see plots.py. Knows no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from curate.evaluation.sae_insertion import LayerSweep
from curate.reports.plots import SERIES, STAND_IN, blank, element, rc

INK, MUTED = STAND_IN["ink"], STAND_IN["muted"]
DROP, POOLED, TOKENS = (STAND_IN[SERIES[i]] for i in (1, 0, 2))


def layers(sweep: LayerSweep, drop_label: str, name: str, alt: str, width: int = 920, height: int = 480) -> Markup:
    """The drop with its interval above the explained variance, by layer; the middle half shaded, the chosen layer
    ringed."""
    at = [r.layer for r in sweep.layers]
    with matplotlib.rc_context(rc(name)):
        figure = blank(width, height)
        top, bottom = figure.subplots(2, 1, sharex=True)
        top.axhline(0.0, color=MUTED, linewidth=1.5, linestyle=(0, (2, 2)))
        _line(top, at, [r.drop.value for r in sweep.layers], DROP, "-")
        for r in sweep.layers:
            if r.drop.low is not None and r.drop.high is not None:
                top.plot([r.layer, r.layer], [r.drop.low, r.drop.high], color=DROP, linewidth=1.5, alpha=0.6)
        chosen = sweep.of(sweep.chosen)
        top.plot(
            [chosen.layer], [_value(chosen.drop.value)], marker="o", markersize=13, color=INK,
            markerfacecolor="none", markeredgewidth=2,
        )  # fmt: skip
        top.set_ylabel(drop_label)
        _line(bottom, at, [r.quality.explained_variance for r in sweep.layers], POOLED, "-")
        _line(bottom, at, [r.quality.explained_tokens for r in sweep.layers], TOKENS, (0, (5, 2)))
        lowest = min([0.0, *(_value(x) for r in sweep.layers for x in (r.quality.explained_tokens,))])
        bottom.set_ylim(max(lowest, -1.0) - 0.02, 1.03)
        bottom.set_ylabel("explained variance")
        bottom.set_xlabel("layer (0 = embeddings)")
        bottom.xaxis.set_major_locator(MaxNLocator(min(16, max(2, len(at))), integer=True))
        for ax in (top, bottom):
            ax.axvspan(sweep.middle[0] - 0.5, sweep.middle[1] + 0.5, color=INK, alpha=0.06, linewidth=0)
            ax.set_xlim(min([*at, sweep.middle[0]]) - 0.7, max([*at, sweep.middle[1]]) + 0.7)
        return element(figure, name, alt)


def curves(sweep: LayerSweep, name: str, alt: str, width: int = 920, height: int = 320) -> Markup:
    """Relative error over tokens seen, a line a layer; the chosen layer's is bold."""
    with matplotlib.rc_context(rc(name)):
        figure = blank(width, height)
        ax = figure.add_subplot()
        for r in sweep.layers:
            if not r.curve or r.layer == sweep.chosen:
                continue
            ax.plot(*zip(*r.curve, strict=True), color=MUTED, linewidth=1, alpha=0.7)
        found = sweep.of(sweep.chosen)
        if found.curve:
            ax.plot(*zip(*found.curve, strict=True), color=POOLED, linewidth=2.5)
        highest = [max(e for _, e in r.curve) for r in sweep.layers if r.curve]
        if highest:
            ax.set_ylim(0, min(1.5, max(highest)) * 1.05)
        ax.set_xlabel("tokens seen")
        ax.set_ylabel("relative squared error")
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.xaxis.set_major_locator(MaxNLocator(6 if width > 500 else 3))
        return element(figure, name, alt)


def _line(ax: Axes, x: Sequence[int], y: Sequence[float | None], colour: str, dash: Any) -> None:
    ax.plot(x, [_value(v) for v in y], color=colour, linewidth=2, marker="o", markersize=4, linestyle=dash)


def _value(value: float | None) -> float:
    return np.nan if value is None else value
