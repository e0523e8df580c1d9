"""Pictures as inline SVG that takes its colours from the page.

In: arrays. Out: one <svg> element of our own making, without scripts, styles or foreign text. Colours are written as
CSS variables, so the same picture serves light, dark and print. Names and legends belong to the page, which
wraps and escapes them better than a picture does. Knows nothing of columns or labels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

# Colours that stand for CSS variables while matplotlib draws; they never reach the page.
STAND_IN = {"ink": "#010203", "muted": "#010204", "grid": "#010205"}
STAND_IN |= {f"c{i}": f"#0102{16 + i:02x}" for i in range(6)}
SERIES = tuple(f"c{i}" for i in range(6))
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.5)),  # type: ignore[assignment]
    (0, (6, 2, 1, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 3)),
)

_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": STAND_IN["ink"],
    "axes.edgecolor": STAND_IN["muted"],
    "axes.labelcolor": STAND_IN["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": STAND_IN["grid"],
    "grid.linewidth": 1.0,
    "xtick.color": STAND_IN["muted"],
    "ytick.color": STAND_IN["muted"],
    "xtick.labelcolor": STAND_IN["ink"],
    "ytick.labelcolor": STAND_IN["ink"],
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Series:
    """One line or histogram: values (or x and y), colour 0–5, dash pattern 0–5."""

    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"] | None
    colour: int


@dataclass(frozen=True)
class Band:
    """One line over `x` with the band between `low` and `high`; colour and dash pattern 0–5."""

    x: Sequence[int]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: int


def blank(width: int, height: int) -> Figure:
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def element(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an element for the page: ids prefixed by `name`, colours as variables, text in the page's font."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = buffer.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.S)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", body, flags=re.S)
    body = re.sub(r"font-family: [^;\"]*;?", "", body)
    body = re.sub(r'style="([^"]*)"', lambda m: _attributes(m[1]), body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    for variable, stand_in in STAND_IN.items():
        body = body.replace(stand_in, f"var(--{variable})")
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)
    if view is None:
        raise RuntimeError("matplotlib wrote an SVG without a viewBox")
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view[0]} '
        f'width="{float(view[1]):g}" height="{float(view[2]):g}" role="img" aria-label="{escape(alt)}">'
    )
    return Markup(re.sub(r"^<svg[^>]*>", lambda _: head, body).strip())


def _attributes(declarations: str) -> str:
    """A `style` attribute's declarations as attributes of their own: a page that trusts its own style sheet alone may
    refuse the first, and all that matplotlib writes exists as the second."""
    pairs = (d.split(":", 1) for d in declarations.split(";") if d.strip())
    return " ".join(f'{name.strip()}="{value.strip()}"' for name, value in pairs)


def rc(name: str) -> Any:  # matplotlib types its settings as a dict of several hundred literals
    return {**_RC, "svg.hashsalt": f"curate-{name}"}


def histogram_edges(values: Float[np.ndarray, " n"], bins: int = 60) -> Float[np.ndarray, " e"]:
    """Bin edges over the middle 99.8 % of `values`, stretched to the extremes when these are near.

    A single far outlier would otherwise press all rows into one bin; what lies beyond is counted in the last bins.
    """
    lowest, low, high, highest = np.percentile(values, [0, 0.1, 99.9, 100])
    room = 0.5 * (high - low)
    low, high = max(lowest, low - room), min(highest, high + room)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, min(bins, max(10, int(3 * len(values) ** (1 / 3)))) + 1)


def distribution(
    groups: Sequence[Series],
    cut: float | None,
    dropped_above: bool | None,
    share: bool,
    name: str,
    alt: str,
    width: int = 920,
    height: int = 300,
) -> Markup:
    """Histogram of each group's scores (`x`), the dropped side of `cut` shaded.

    share: heights as per cent of the group's own rows, so that a small group is seen; otherwise rows.
    """
    everything = np.concatenate([g.x for g in groups])
    with matplotlib.rc_context(rc(name)):
        edges = histogram_edges(everything, 60 if width > 500 else 32)
        figure = blank(width, height)
        ax = figure.add_subplot()
        for g in groups:
            heights = np.histogram(np.clip(g.x, edges[0], edges[-1]), edges)[0].astype(float)
            if share:
                heights *= 100 / max(1, len(g.x))
            colour = STAND_IN[SERIES[g.colour % 6]]
            ax.stairs(heights, edges, fill=True, color=colour, alpha=0.22)
            ax.stairs(heights, edges, color=colour, linewidth=2, linestyle=DASHES[g.colour % 6])
        ax.set_ylabel("% of the label's rows" if share else "rows")
        ax.set_xlabel("score (higher = more of the trait)")
        ax.xaxis.set_major_locator(MaxNLocator(9 if width > 500 else 5))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        ax.set_ylim(bottom=0)
        ax.grid(visible=False, axis="x")
        ax.set_xlim(edges[0], edges[-1])
        if cut is not None and edges[0] <= cut <= edges[-1]:
            _cut_line(ax, cut, dropped_above)
        return element(figure, name, alt)


def _cut_line(ax: Axes, cut: float, dropped_above: bool | None) -> None:
    ink = STAND_IN["ink"]
    ax.axvline(cut, color=ink, linewidth=1.5, linestyle=(0, (4, 3)))
    if dropped_above is None:
        return
    low, high = ax.get_xlim()
    ax.axvspan(cut, high if dropped_above else low, color=ink, alpha=0.07, linewidth=0)
    at = (cut - low) / (high - low)
    left, right = ("kept", "dropped") if dropped_above else ("dropped", "kept")
    above_axes: dict[str, Any] = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points", "va": "bottom"}
    if at > 0.12:
        ax.annotate(f"← {left}", (cut, 1.02), (-8, 0), ha="right", **above_axes)
    if at < 0.88:
        ax.annotate(f"{right} →", (cut, 1.02), (8, 0), ha="left", **above_axes)


def pr_curves(
    curves: Sequence[Series],
    base_rate: float,
    point: tuple[float, float] | None,
    name: str,
    alt: str,
    width: int = 460,
    height: int = 360,
) -> Markup:
    """Precision over recall as steps; the first curve is drawn boldly. point: (recall, precision) of the decision."""
    with matplotlib.rc_context(rc(name)):
        figure = blank(width, height)
        ax = figure.add_subplot()
        ax.axhline(base_rate, color=STAND_IN["muted"], linewidth=1.5, linestyle=(0, (2, 2)))
        for i, c in reversed(list(enumerate(curves))):
            assert c.y is not None
            style: dict[str, Any] = {"linewidth": 2.5 if i == 0 else 1.5, "linestyle": DASHES[i % 6]}
            ax.plot(c.x, c.y, drawstyle="steps-pre", color=STAND_IN[SERIES[c.colour % 6]], **style)
        if point is not None:
            ax.plot(*point, marker="o", markersize=9, color=STAND_IN["ink"], markerfacecolor="none", markeredgewidth=2)
        ax.set_xlim(-0.01, 1.01)
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("recall (share of labelled rows found)")
        ax.set_ylabel("precision (share that is right)")
        return element(figure, name, alt)


def layer_profile(
    profile: Sequence[tuple[int, float, float | None]],
    layer: int | None,
    name: str,
    alt: str,
    width: int = 460,
    height: int = 340,
) -> Markup:
    """Held-out AUC (where known) above the vector's norm, by layer; the layer in use is marked."""
    layers = np.array([p[0] for p in profile])
    norms = np.array([p[1] for p in profile], dtype=float)
    aucs = np.array([np.nan if p[2] is None else p[2] for p in profile], dtype=float)
    known = np.isfinite(aucs).any()
    with matplotlib.rc_context(rc(name)):
        figure = blank(width, height if known else round(0.65 * height))
        axes = figure.subplots(2 if known else 1, 1, sharex=True, squeeze=False)[:, 0]
        dots: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 2}
        if known:
            axes[0].axhline(0.5, color=STAND_IN["muted"], linewidth=1.5, linestyle=(0, (2, 2)))
            axes[0].plot(layers, aucs, color=STAND_IN["c1"], **dots)
            axes[0].set_ylabel("held-out AUC")
            axes[0].set_ylim(min(0.45, float(np.nanmin(aucs)) - 0.03), 1.03)
        axes[-1].plot(layers, norms, color=STAND_IN["c0"], **dots)
        axes[-1].set_ylabel("vector norm")
        axes[-1].set_ylim(bottom=0)
        axes[-1].set_xlabel("layer (0 = embeddings)")
        axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if layer is not None:
            for ax in axes:
                ax.axvline(layer, color=STAND_IN["ink"], linewidth=1.5, linestyle=(0, (4, 3)))
            axes[0].text(
                layer, 1.02, f"layer {layer}", transform=axes[0].get_xaxis_transform(), ha="center", va="bottom"
            )
        return element(figure, name, alt)


def stride_curves(
    lines: Sequence[Band], level: float, name: str, alt: str, width: int = 920, height: int = 360
) -> Markup:
    """Rank correlation over layer stride, one line a score; `level` is drawn across."""
    with matplotlib.rc_context(rc(name)):
        figure = blank(width, height)
        ax = figure.add_subplot()
        ax.axhline(level, color=STAND_IN["muted"], linewidth=1.5, linestyle=(0, (2, 2)))
        for line in lines:
            colour = STAND_IN[SERIES[line.colour]]
            ax.fill_between(line.x, line.low, line.high, color=colour, alpha=0.13, linewidth=0)
            style: dict[str, Any] = {"linewidth": 2, "marker": "o", "markersize": 4, "linestyle": DASHES[line.colour]}
            ax.plot(line.x, line.y, color=colour, **style)
        known = np.array([[*line.y, *line.low] for line in lines], dtype=float)
        lowest = float(np.nanmin(known)) if np.isfinite(known).any() else 0.0
        ax.set_ylim(min(lowest - 0.03, level - 0.05), 1.02)
        ax.set_xlabel("layer stride")
        ax.set_ylabel("rank correlation with stride 1")
        ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        return element(figure, name, alt)
