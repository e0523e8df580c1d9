"""Pictures of recurring audits: how a score's distribution and its drift go from audit to audit.

In: one number (or quantiles) an audit. Out: inline SVG as in `plots`. Knows nothing of rows and rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from curate.reports.plots import STAND_IN, blank, element, rc

Values = Sequence[float | None]


def _array(values: Values) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def _times(ax: Axes, labels: Sequence[str], wide: bool) -> None:
    """One place an audit, named where there is room; audits are not evenly spaced in time."""
    ax.set_xlim(-0.5, len(labels) - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(7 if wide else 3, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: labels[round(x)] if 0 <= round(x) < len(labels) else ""))


def quantiles(
    labels: Sequence[str],
    at: Mapping[str, Values],
    threshold: Values,
    name: str,
    alt: str,
    width: int = 920,
    height: int = 280,
) -> Markup:
    """Median, middle half (q25 to q75) and nine tenths (q05 to q95) of a score; the threshold dashed."""
    x = np.arange(len(labels))
    q = {k: _array(v) for k, v in at.items()}
    with matplotlib.rc_context(rc(name)):
        figure = blank(width, height)
        ax = figure.add_subplot()
        colour = STAND_IN["c0"]
        if len(labels) == 1:
            ax.vlines(x, q["q05"], q["q95"], color=colour, alpha=0.35, linewidth=6)
            ax.vlines(x, q["q25"], q["q75"], color=colour, alpha=0.6, linewidth=12)
        else:
            ax.fill_between(x, q["q05"], q["q95"], color=colour, alpha=0.13, linewidth=0)
            ax.fill_between(x, q["q25"], q["q75"], color=colour, alpha=0.22, linewidth=0)
        ax.plot(x, q["q50"], color=colour, linewidth=2, marker="o", markersize=4)
        ax.plot(x, _array(threshold), color=STAND_IN["ink"], linewidth=1.5, linestyle=(0, (4, 3)))
        ax.set_ylabel("score")
        ax.yaxis.set_major_locator(MaxNLocator(5))
        _times(ax, labels, width > 500)
        return element(figure, name, alt)


def drift(
    labels: Sequence[str],
    psi: Values,
    noise: Values,
    bad: Sequence[bool],
    limits: Sequence[float],
    name: str,
    alt: str,
    width: int = 920,
    height: int = 220,
) -> Markup:
    """PSI of each audit as a stem; grey: what samples of these sizes show without drift; dashed: the rules' limits.

    bad: audits in which a rule fired on this score.
    """
    x = np.arange(len(labels))
    y, n = _array(psi), _array(noise)
    with matplotlib.rc_context(rc(name)):
        figure = blank(width, height)
        ax = figure.add_subplot()
        known = ~np.isnan(n)
        ax.bar(x[known], n[known], width=0.7, color=STAND_IN["muted"], alpha=0.25, linewidth=0)
        for limit in limits:
            ax.axhline(limit, color=STAND_IN["ink"], linewidth=1.2, linestyle=(0, (4, 3)))
        fired = np.array(bad, dtype=bool)
        for which, colour, marker in ((~fired, "c0", "o"), (fired, "c1", "D")):
            here = which & ~np.isnan(y)
            ax.vlines(x[here], 0, y[here], color=STAND_IN[colour], linewidth=2.5)
            style: dict[str, Any] = {"linestyle": "none", "marker": marker, "markersize": 7}
            ax.plot(x[here], y[here], color=STAND_IN[colour], **style)
        top = np.nanmax([*y[~np.isnan(y)], *n[known], *limits, 0.05])
        ax.set_ylim(0, 1.08 * top)
        ax.set_ylabel("PSI")
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.grid(visible=False, axis="x")
        _times(ax, labels, width > 500)
        return element(figure, name, alt)
