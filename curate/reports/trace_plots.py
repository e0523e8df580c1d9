"""Pictures of faithfulness: a measure against the number of latents that are masked, one line an order.

In: lines of plain numbers. Out: inline SVG as in `plots`. Every line has a colour, a dash and a marker of its own.
Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, MaxNLocator

from curate.reports.plots import DASHES, SERIES, STAND_IN, blank, element, rc
from curate.reports.retrain_plots import MARKERS, Look


@dataclass(frozen=True)
class Curve:
    """y over k with its interval; low and high are empty where there is none. strong: drawn boldly, on top."""

    look: Look
    k: tuple[int, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    strong: bool = False


@dataclass(frozen=True)
class Panel:
    """level: what holds without a mask. share: y is a share of 1, shown as per cent."""

    title: str
    curves: tuple[Curve, ...]
    level: float | None = None
    share: bool = False


def masking_curves(
    panels: Sequence[Panel], name: str, alt: str, width: int = 920, height: int = 300, across: int = 3
) -> Markup:
    """Panels side by side, each to its own scale."""
    down = -(-len(panels) // across)
    with matplotlib.rc_context(rc(name)):
        figure = blank(width, height * down)
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        for ax, panel in zip(axes, panels, strict=False):
            if panel.level is not None:
                ax.axhline(panel.level, color=STAND_IN["muted"], linewidth=1.5, linestyle=(0, (2, 2)))
            for curve in sorted(panel.curves, key=lambda c: c.strong):
                colour = STAND_IN[SERIES[curve.look.colour]]
                if curve.low:
                    alpha = 0.16 if curve.strong else 0.08
                    ax.fill_between(curve.k, curve.low, curve.high, color=colour, alpha=alpha, linewidth=0)
                ax.plot(
                    curve.k,
                    curve.y,
                    color=colour,
                    marker=MARKERS[curve.look.marker],
                    markersize=5.5 if curve.strong else 4,
                    linewidth=2.6 if curve.strong else 1.5,
                    linestyle=DASHES[curve.look.dash],
                )
            ax.set_title(panel.title, loc="left", fontsize=12, fontweight="bold")
            ax.set_xlabel("latents")
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(5))
            if panel.share:
                ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g}%"))
            ax.grid(visible=False, axis="x")
        return element(figure, name, alt)
