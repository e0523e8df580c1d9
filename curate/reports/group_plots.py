"""Pictures of groups that are taken one after the other: what they cover, and how many of the rows covered are bad.

In: curves of plain numbers. Out: inline SVG as in `plots`. Knows nothing of latents and rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator, PercentFormatter

from curate.reports.plots import DASHES, SERIES, STAND_IN, blank, element, rc

POINTS = 400  # of a curve, on the page


@dataclass(frozen=True, eq=False)
class Path:
    """A line over `x` with, where there are several draws, the band between `low` and `high`; colour and dash 0–5."""

    name: str
    x: Float[np.ndarray, " t"]
    y: Float[np.ndarray, " t"]
    colour: int
    low: Float[np.ndarray, " t"] | None = None
    high: Float[np.ndarray, " t"] | None = None


def thinned(n: int, points: int = POINTS) -> np.ndarray:
    """At most `points` of n indices, the first and the last among them; denser at the start, where curves turn."""
    if n <= points:
        return np.arange(n)
    return np.unique(
        np.concatenate([np.linspace(0, n - 1, points // 2), np.geomspace(1, n, points // 2) - 1]).astype(int)
    )


def curves(
    paths: Sequence[Path],
    across: float | None,
    at: float | None,
    labels: tuple[str, str],
    name: str,
    alt: str,
    width: int = 460,
    height: int = 340,
    shares: tuple[bool, bool] = (False, True),
) -> Markup:
    """The paths; `across` is drawn as a level, `at` as an upright line. `shares`: which axes run from 0 to 100 %."""
    with matplotlib.rc_context(rc(name)):
        figure = blank(width, height)
        ax = figure.add_subplot()
        if across is not None:
            ax.axhline(across, color=STAND_IN["muted"], linewidth=1.5, linestyle=(0, (2, 2)))
        if at is not None:
            ax.axvline(at, color=STAND_IN["ink"], linewidth=1.5, linestyle=(0, (4, 3)))
        for i, path in reversed(list(enumerate(paths))):
            colour = STAND_IN[SERIES[path.colour % 6]]
            if path.low is not None and path.high is not None:
                ax.fill_between(path.x, path.low, path.high, color=colour, alpha=0.15, linewidth=0)
            ax.plot(path.x, path.y, color=colour, linewidth=2.5 if i == 0 else 1.75, linestyle=DASHES[path.colour % 6])
        for axis, limit, share in ((ax.xaxis, ax.set_xlim, shares[0]), (ax.yaxis, ax.set_ylim, shares[1])):
            if share:
                limit(-0.01, 1.03)
                axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            else:
                axis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel(labels[0])
        ax.set_ylabel(labels[1])
        return element(figure, name, alt)
